"""Choosing ranks: each way against a calculation of its own, and every wrong wish named."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import yaml

from kore_fast.constraint.ranks import BudgetRank, EnergyRank, FixedRank, choose_ranks, parse_rank_choice
from kore_fast.constraint.spectrum import Spectrum
from kore_fast.errors import ConstraintError

SHAPES = {"q": (4, 4), "k": (2, 4), "up": (5, 4), "down": (3, 6)}


def of(group: str, layers: tuple[str, ...], values: list[float]) -> Spectrum:
    return Spectrum(group, layers, len(values), 99, torch.tensor(sorted(values), dtype=torch.float64))


def random_spectra(seed: int) -> list[Spectrum]:
    draw = torch.Generator().manual_seed(seed)

    def values(d: int) -> list[float]:
        return torch.rand(d, generator=draw, dtype=torch.float64).pow(4).mul(10.0**seed).tolist()

    return [of("q", ("q", "k"), values(4)), of("up", ("up",), values(4)), of("down", ("down",), values(6))]


def leaked(spectra: list[Spectrum], ranks: dict[str, int]) -> float:
    """By hand, without the properties of `Spectrum`."""
    total = 0.0
    for s in spectra:
        values = s.eigenvalues.tolist()
        total += sum(sum(values[: ranks[layer]]) / sum(values) for layer in s.layers if layer in ranks)
    return total


def cost(ranks: dict[str, int]) -> int:
    return sum(rank * SHAPES[layer][0] for layer, rank in ranks.items())


def test_fixed_needs_no_spectra() -> None:
    assert choose_ranks(FixedRank(2), [], SHAPES) == dict.fromkeys(SHAPES, 2)
    with pytest.raises(ConstraintError, match=r"k: rank 3 is larger than its width \(d_out 2, d_in 4\).* at most 2"):
        choose_ranks(FixedRank(3), [], SHAPES)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fraction", [1e-6, 1e-3, 0.1, 0.5, 0.99])
def test_energy_takes_the_largest_rank_within(seed: int, fraction: float) -> None:
    spectra = random_spectra(seed)
    ranks = choose_ranks(EnergyRank(fraction), spectra, SHAPES)
    assert list(ranks) == list(SHAPES)
    for layer, rank in ranks.items():
        alone = [s for s in spectra if layer in s.layers]
        within = [r for r in range(1, min(SHAPES[layer]) + 1) if leaked(alone, {layer: r}) <= fraction]
        assert rank == max(within, default=1)


def test_energy_stays_within_its_bounds() -> None:
    spectra = random_spectra(1)
    ranks = choose_ranks(EnergyRank(0.999, highest=3), spectra, SHAPES)
    assert ranks == {"q": 3, "k": 2, "up": 3, "down": 3}
    assert choose_ranks(EnergyRank(1e-9, lowest=2), spectra, SHAPES) == dict.fromkeys(SHAPES, 2)
    with pytest.raises(ConstraintError, match="k: rank 3 is larger"):
        choose_ranks(EnergyRank(1e-9, lowest=3), spectra, SHAPES)


def test_energy_counts_an_exact_share_as_within() -> None:
    spectra = [of("x", ("x",), [1.0, 1.0, 2.0, 4.0])]
    shapes = {"x": (4, 4)}
    assert choose_ranks(EnergyRank(0.25), spectra, shapes) == {"x": 2}
    assert choose_ranks(EnergyRank(0.2499), spectra, shapes) == {"x": 1}
    assert choose_ranks(EnergyRank(0.5), spectra, shapes) == {"x": 3}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("lowest", "highest"), [(1, None), (2, 3)])
def test_no_other_ranks_spend_as_much_and_leak_less(seed: int, lowest: int, highest: int | None) -> None:
    spectra = random_spectra(seed)
    each = [range(lowest, min(highest or 9, *shape) + 1) for shape in SHAPES.values()]
    every = [dict(zip(SHAPES, ranks, strict=True)) for ranks in itertools.product(*each)]
    most = max(map(cost, every))
    for parameters in range(min(map(cost, every)), most + 3):
        found = choose_ranks(BudgetRank(parameters, lowest, highest), spectra, SHAPES)
        assert found in every
        assert cost(found) <= parameters
        # Within the row that the costliest layer would take next, or everything.
        assert cost(found) == most or parameters - cost(found) < 5
        best = min(leaked(spectra, ranks) for ranks in every if cost(found) <= cost(ranks) <= parameters)
        assert leaked(spectra, found) <= best + 1e-12


def test_budget_prefers_the_layer_with_more_room() -> None:
    spectra = [of("a", ("a",), [1e-9] * 6 + [1.0] * 2), of("b", ("b",), [0.5] * 8)]
    ranks = choose_ranks(BudgetRank(7 * 8), spectra, {"a": (8, 8), "b": (8, 8)})
    assert ranks == {"a": 6, "b": 1}


def test_budget_does_not_see_the_scale_of_a_covariance() -> None:
    spectra, shapes = random_spectra(2), SHAPES
    scaled = [Spectrum(s.group, s.layers, s.d, s.tokens, s.eigenvalues * 2.0**n) for n, s in enumerate(spectra)]
    assert choose_ranks(BudgetRank(30), spectra, shapes) == choose_ranks(BudgetRank(30), scaled, shapes)


def test_zeros_are_spread_evenly_whatever_their_rounding() -> None:
    # Fewer tokens than width: half of each spectrum is rounding.
    noise = [-3e-17, -1e-17, 1e-18, 2e-17]
    spectra = [of("a", ("a",), [*noise, 1.0, 2.0]), of("b", ("b",), [0.0] * 4 + [1.0, 2.0])]
    assert choose_ranks(BudgetRank(36), spectra, {"a": (6, 6), "b": (6, 6)}) == {"a": 3, "b": 3}


def test_a_budget_below_the_lowest_ranks_says_what_they_take() -> None:
    with pytest.raises(ConstraintError, match=r"parameters=13: rank 1 in each of 4 layers takes 14 already"):
        choose_ranks(BudgetRank(13), random_spectra(0), SHAPES)
    assert choose_ranks(BudgetRank(14), random_spectra(0), SHAPES) == dict.fromkeys(SHAPES, 1)


@pytest.mark.parametrize("choice", [EnergyRank(0.1), BudgetRank(100)])
def test_spectra_must_fit_the_layers(choice: Any) -> None:
    spectra = random_spectra(0)
    with pytest.raises(ConstraintError, match="down: no spectrum"):
        choose_ranks(choice, spectra[:2], SHAPES)
    with pytest.raises(ConstraintError, match="down: its input is 7 wide, its spectrum 6"):
        choose_ranks(choice, spectra, {**SHAPES, "down": (3, 7)})


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("64", FixedRank(64)),
        ("{energy: 1e-4}", EnergyRank(1e-4)),
        ("{energy: 0.01, lowest: 8, highest: 512}", EnergyRank(0.01, 8, 512)),
        ("{parameters: 8000000}", BudgetRank(8_000_000)),
        ("{parameters: 8e6, lowest: 4}", BudgetRank(8_000_000, 4)),
        ("{energy: 0.5, highest: null}", EnergyRank(0.5)),
    ],
)
def test_choices_of_a_configuration(text: str, wanted: Any) -> None:
    found = parse_rank_choice(yaml.safe_load(text))
    assert found == wanted
    assert parse_rank_choice(found) is found


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "rank=0: want at least 1"),
        (2.5, "rank=2.5: want a whole number"),
        (float("inf"), "want a whole number"),
        (True, "rank=True: want a number"),
        (None, "rank=None: want a number"),
        ("large", "rank='large': want a number"),
        ({"energy": 0}, "energy=0.0: .* between 0 and 1"),
        ({"energy": 1}, "between 0 and 1"),
        ({"energy": float("nan")}, "between 0 and 1"),
        ({"parameters": 0}, "parameters=0: want at least 1"),
        ({"parameters": 10, "lowest": 0}, "lowest=0"),
        ({"energy": 0.1, "lowest": 5, "highest": 4}, "highest=4: below lowest=5"),
        ({"energy": 0.1, "parameters": 10}, "one of energy and parameters"),
        ({"lowest": 3}, "one of energy and parameters"),
        ({}, "one of energy and parameters"),
        ({"enrgy": 0.1}, "unknown key 'enrgy'; did you mean 'energy'"),
        ({"energy": [0.1]}, r"energy=\[0\.1\]: want a number"),
    ],
)
def test_wrong_wishes_are_named(value: Any, message: str) -> None:
    with pytest.raises(ConstraintError, match=message):
        parse_rank_choice(value)
