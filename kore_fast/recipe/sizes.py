"""What a method trains, holds in memory and writes, counted from shapes: exact but for a rank by spectrum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kore_fast.constraint.ranks import FixedRank, parse_rank_choice
from kore_fast.recipe.schema import Method

_FLOAT = 4
# Two moments in float32 for each trained parameter.
_MOMENTS = 8


@dataclass(frozen=True)
class Layer:
    """A linear layer that a method changes."""

    d_out: int
    d_in: int
    bias: int = 0
    """Its length, 0 without one."""

    @property
    def weight(self) -> int:
        return self.d_out * self.d_in


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, and bytes."""

    trained: int
    """Parameters of the layers' adapters, or of the layers."""
    how: str
    """What ``trained`` is, in words."""
    projector: int
    """Parameters trained in full beside them."""
    passed: int
    """Parameters that each token goes through beside the base's."""
    base_bytes: int
    """The base's weights in memory, of full fine-tuning those that are trained in float32."""
    adapter_bytes: int
    """What is held beside the base: factors, frozen ones too, and a copy of the projector."""
    kept_bytes: int
    """What EWC and LwF hold: the Fisher, the weights that changes are told from, a second base."""
    start_bytes: int
    """The file that stage ``init`` writes, 0 where a method has none."""
    saved_bytes: int
    """The file that stage ``train`` writes."""
    checkpoint_bytes: int
    """One checkpoint while it trains."""
    fisher_bytes: int
    """EWC's, on disk while it trains."""

    @property
    def all_trained(self) -> int:
        """With the projector."""
        return self.trained + self.projector

    @property
    def gradient_bytes(self) -> int:
        return _FLOAT * self.all_trained

    @property
    def moment_bytes(self) -> int:
        return _MOMENTS * self.all_trained


def sizes_of(method: Method, layers: Mapping[str, Layer], *, parameters: int, projector: int, itemsize: int) -> Sizes:
    """Of a method on these layers of a model.

    Args:
        parameters: of the whole model.
        projector: its projector's, where the method trains it; else 0.
        itemsize: bytes of a weight of the base.
    """
    weights = sum(layer.weight for layer in layers.values())
    base = itemsize * parameters
    if method.kind == "full":
        trained = weights + sum(layer.bias for layer in layers.values())
        whole = trained + projector
        base = saved = itemsize * (parameters - whole) + _FLOAT * whole
        passed = start = adapter = 0
        how = "every weight of the layers"
        checkpoint = saved
    elif method.kind == "osf":
        trained, frozen, keeps = _osf(method, layers)
        adapter = _FLOAT * (trained + frozen)
        saved = checkpoint = _FLOAT * trained
        # The small directions as they are, less those that they were.
        passed, start = 2 * trained, 0
        how = f"the singular directions but the largest {keeps}"
    else:
        trained, factors, how = _low_rank(method, layers)
        adapter = checkpoint = _FLOAT * (factors + projector)
        # Untrained the projector is a copy of the base's; of a residual the change has twice the rank.
        start = _FLOAT * factors + itemsize * projector
        saved = _FLOAT * (factors * (2 if _is_residual(method) and not method.frozen_a else 1) + projector)
        passed = factors
    fisher = _FLOAT * weights if method.ewc is not None else 0
    held = fisher
    if method.ewc is not None and (method.kind == "full" or _is_residual(method)):
        held += _FLOAT * weights
    if method.lwf is not None and not method.way.shows_base:
        held += itemsize * parameters
    return Sizes(
        trained=trained,
        how=how,
        projector=projector,
        passed=passed,
        base_bytes=base,
        adapter_bytes=adapter,
        kept_bytes=held,
        start_bytes=start,
        saved_bytes=saved,
        checkpoint_bytes=checkpoint + _MOMENTS * (trained + projector),
        fisher_bytes=fisher,
    )


def _is_residual(method: Method) -> bool:
    return method.kind in ("pissa", "corda", "lora_null")


def _osf(method: Method, layers: Mapping[str, Layer]) -> tuple[int, int, str]:
    """(trained, frozen beside them, the directions that stay in words), as PEFT splits each weight.

    Trained are U, S and V of the small directions; frozen are those as they started, and of the longer side the large
    ones, which gradients are kept orthogonal to.
    """
    trained = frozen = 0
    keeps = method.effective_rank
    for layer in layers.values():
        narrow, wide = sorted((layer.d_out, layer.d_in))
        large = (
            narrow // 2 if keeps is None else int(narrow * keeps) if isinstance(keeps, float) else min(narrow, keeps)
        )
        small = (narrow - large) * (narrow + wide + 1)
        trained += small
        frozen += small + (large * wide if narrow < wide else 0)
    return (
        trained,
        frozen,
        "half" if keeps is None else f"{100 * keeps:g} %" if isinstance(keeps, float) else str(keeps),
    )


def _low_rank(method: Method, layers: Mapping[str, Layer]) -> tuple[int, int, str]:
    """(trained, A and B together, what is trained in words)."""
    assert method.rank is not None, "the schema asks for one"
    d_out = sum(layer.d_out for layer in layers.values())
    d_in = sum(layer.d_in for layer in layers.values())
    choice = parse_rank_choice(method.rank)
    if not isinstance(choice, FixedRank):
        # Ranks that follow from a spectrum are KORE's: B is trained, and A at least of the lowest rank.
        wanted = getattr(choice, "parameters", None)
        how = "at least: a rank by spectrum" if wanted is None else "at most: a budget"
        trained = choice.lowest * d_out if wanted is None else int(wanted)
        return trained, trained + choice.lowest * d_in, how
    rank = choice.rank
    if method.kind == "mica":
        return rank * d_in, rank * (d_out + d_in), f"A at rank {rank}, B frozen"
    if method.frozen_a:
        return rank * d_out, rank * (d_out + d_in), f"B at rank {rank}, A frozen"
    return rank * (d_out + d_in), rank * (d_out + d_in), f"A and B at rank {rank}"
