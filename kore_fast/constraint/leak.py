"""Leak: how much of the old inputs an adapter's A still reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kore_fast.constraint.store import CovarianceStore
from kore_fast.ops import NullSpace
from kore_fast.ops.factors import leak


@dataclass(frozen=True)
class LayerLeak:
    """A row of the leak report."""

    layer: str
    d_in: int
    d_out: int
    rank: int
    tokens: int
    leak: float
    """tr(A C Aᵀ)·d_in / (‖A‖_F²·tr C): 1 for a random direction, 0 in a true null space."""
    tail_energy: float | None
    """Share of tr C in the bottom-r space; None for an A that was not made from it."""
    lambda_min: float | None
    lambda_max: float | None
    shares: str
    """The distinct input that the layer reads."""


def layer_leak(
    layer: str,
    A: torch.Tensor,
    C: torch.Tensor,
    d_out: int,
    store: CovarianceStore,
    space: NullSpace | None = None,
) -> LayerLeak:
    """The leak report's row of one layer; ``space`` is the null space that A was made from, if it was."""
    return LayerLeak(
        layer=layer,
        d_in=A.shape[1],
        d_out=d_out,
        rank=A.shape[0],
        tokens=store.tokens(layer),
        leak=leak(A, C),
        tail_energy=None if space is None else float(space.energy),
        lambda_min=None if space is None else float(space.eigenvalues[0]),
        lambda_max=None if space is None else float(space.largest),
        shares=store.group_of(layer),
    )


def leak_report(
    factors: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    store: CovarianceStore,
    source_weights: Mapping[str, float] | None = None,
) -> list[LayerLeak]:
    """The leak of any adapter: A (r, d_in) and W0 (d_out, d_in) by layer name."""
    rows: dict[str, LayerLeak] = {}
    for group, members in store.groups.items():
        chosen = [name for name in members if name in factors]
        if chosen:
            C = store.covariance(group, source_weights)
            rows |= {name: layer_leak(name, factors[name].cpu(), C, weights[name].shape[0], store) for name in chosen}
    return [rows[name] for name in factors if name in rows]
