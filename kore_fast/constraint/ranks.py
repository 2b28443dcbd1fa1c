"""Choosing the rank: one for all layers (the paper's), by the energy of the tail, or from a budget of parameters."""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from kore_fast.constraint.spectrum import Spectrum
from kore_fast.errors import ConstraintError


@dataclass(frozen=True)
class FixedRank:
    """The same rank in every layer."""

    rank: int

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConstraintError(f"rank={self.rank}: want at least 1")

    @property
    def lowest(self) -> int:
        """The least rank of a layer."""
        return self.rank


@dataclass(frozen=True)
class EnergyRank:
    """In each layer the largest rank whose bottom space carries at most ``fraction`` of tr C.

    Within ``lowest`` and ``highest``, also where the tail carries more than ``fraction`` at ``lowest``.
    """

    fraction: float
    lowest: int = 1
    highest: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ConstraintError(f"energy={self.fraction}: a share of the trace, want it between 0 and 1 (1e-4, say)")
        _check_bounds(self.lowest, self.highest)


@dataclass(frozen=True)
class BudgetRank:
    """The ranks that spend so many trained parameters with the least leaked energy, summed over layers.

    B is (d_out, r), so that a layer's next rank costs d_out; what it leaks is the next eigenvalue's share of tr C. What
    is left of the budget is less than the next rank would cost, unless every layer is at its highest.
    """

    parameters: int
    lowest: int = 1
    highest: int | None = None

    def __post_init__(self) -> None:
        if self.parameters < 1:
            raise ConstraintError(f"parameters={self.parameters}: want at least 1")
        _check_bounds(self.lowest, self.highest)


RankChoice: TypeAlias = FixedRank | EnergyRank | BudgetRank


def choose_ranks(
    choice: RankChoice, spectra: Sequence[Spectrum], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, int]:
    """The rank of every layer, in the order of ``shapes``.

    Args:
        spectra: of the inputs that the layers read; a `FixedRank` needs none.
        shapes: layer → (d_out, d_in), the shape of its weight.

    Raises:
        ConstraintError: a rank larger than a layer's width, a budget below the lowest ranks, a layer without a spectrum
            or with one of another width; names the layer.
    """
    lowest = choice.lowest
    for layer, (d_out, d_in) in shapes.items():
        if lowest > min(d_out, d_in):
            raise ConstraintError(
                f"{layer}: rank {lowest} is larger than its width (d_out {d_out}, d_in {d_in}); choose at most "
                f"{min(map(min, shapes.values()))}"
            )
    if isinstance(choice, FixedRank):
        return dict.fromkeys(shapes, choice.rank)
    of = {layer: spectrum for spectrum in spectra for layer in spectrum.layers}
    for layer, (_, d_in) in shapes.items():
        if layer not in of:
            raise ConstraintError(f"{layer}: no spectrum of its input; compute spectra for the layers to be adapted")
        if of[layer].d != d_in:
            raise ConstraintError(f"{layer}: its input is {d_in} wide, its spectrum {of[layer].d}")
    highest = {layer: min(choice.highest or min(shape), *shape) for layer, shape in shapes.items()}
    if isinstance(choice, BudgetRank):
        return _spend(choice, of, shapes, highest)
    return {
        layer: min(max(_largest_within(of[layer], choice.fraction), choice.lowest), highest[layer]) for layer in shapes
    }


def _largest_within(spectrum: Spectrum, fraction: float) -> int:
    # tails[0] is 0, so that the number of entries within is the rank and one.
    return int(torch.searchsorted(spectrum.tails, fraction, right=True)) - 1


def _spend(
    choice: BudgetRank,
    of: Mapping[str, Spectrum],
    shapes: Mapping[str, tuple[int, int]],
    highest: Mapping[str, int],
) -> dict[str, int]:
    """Take ranks one at a time, the one with the least energy per parameter first, until the next does not fit.

    No choice that spends as much leaks less. A layer's eigenvalues ascend and its cost stays, so that for some t every
    rank taken leaks at most t a parameter and every rank left at least t; another choice gives up some of the first for
    some of the second, of no less cost in all.
    """
    ranks = dict.fromkeys(shapes, choice.lowest)
    left = choice.parameters - sum(choice.lowest * d_out for d_out, _ in shapes.values())
    if left < 0:
        raise ConstraintError(
            f"parameters={choice.parameters:,}: rank {choice.lowest} in each of {len(shapes)} layers takes "
            f"{choice.parameters - left:,} already; raise the budget or choose fewer layers"
        )

    prices = {layer: of[layer].shares[: highest[layer]] / d_out for layer, (d_out, _) in shapes.items()}
    # Equal prices (the exact zeros of a singular C) go round: the layer with the lowest rank is next.
    order = list(shapes)
    queue = [(float(prices[n][ranks[n]]), ranks[n], place) for place, n in enumerate(order) if ranks[n] < highest[n]]
    heapq.heapify(queue)
    while queue:
        _, _, place = heapq.heappop(queue)
        layer = order[place]
        if shapes[layer][0] > left:
            break
        left -= shapes[layer][0]
        ranks[layer] += 1
        if ranks[layer] < highest[layer]:
            heapq.heappush(queue, (float(prices[layer][ranks[layer]]), ranks[layer], place))
    return ranks


def parse_rank_choice(value: Any) -> RankChoice:
    """A choice from a configuration: ``64``, ``{"energy": 1e-4}`` or ``{"parameters": 8000000}``, the latter two with
    ``lowest`` and ``highest`` if wanted.

    Raises:
        ConstraintError: anything else; says what was expected.
    """
    if isinstance(value, FixedRank | EnergyRank | BudgetRank):
        return value
    if not isinstance(value, Mapping):
        return FixedRank(_whole("rank", value))
    kinds = [key for key in ("energy", "parameters") if key in value]
    for key in value:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(_KEYS)}"
            raise ConstraintError(f"rank: unknown key {key!r}; {hint}")
    if len(kinds) != 1:
        raise ConstraintError(f"rank: want a number, or one of energy and parameters; found {dict(value)!r:.80}")
    bounds = {key: _whole(key, value[key]) for key in ("lowest", "highest") if value.get(key) is not None}
    if kinds == ["energy"]:
        return EnergyRank(_number("energy", value["energy"]), **bounds)
    return BudgetRank(_whole("parameters", value["parameters"]), **bounds)


_KEYS = ("energy", "parameters", "lowest", "highest")


def _number(key: str, value: Any) -> float:
    # YAML 1.1 reads 1e-4 as a string.
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with suppress(ValueError):
            return float(value)
    raise ConstraintError(f"{key}={value!r}: want a number")


def _whole(key: str, value: Any) -> int:
    number = _number(key, value)
    if not number.is_integer():
        raise ConstraintError(f"{key}={value!r}: want a whole number")
    return int(number)


def _check_bounds(lowest: int, highest: int | None) -> None:
    if lowest < 1:
        raise ConstraintError(f"lowest={lowest}: want at least 1")
    if highest is not None and highest < lowest:
        raise ConstraintError(f"highest={highest}: below lowest={lowest}")
