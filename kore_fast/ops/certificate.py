"""A proof of how far a space's leak is from the least possible, by one Cholesky factorisation.

The least leak is a semidefinite program, min tr(C X) over 0 ⪯ X ⪯ I, tr X = r (Ky Fan 1949). Its dual bounds it from
below: for every number γ and every Z ⪰ 0 with C − γ I + Z ⪰ 0, no space of r directions leaks less than r γ − tr Z.
With Z = Û diag(w) Ûᵀ, w_i = max(γ − θ_i, 0) + δ_i, the bound is Σ min(θ_i, γ) − Σ δ_i: near the leak Σ θ_i as soon as
γ may be near the largest θ. Whether the matrix is positive semi-definite, a Cholesky factorisation decides.

Nothing here needs C ⪰ 0: for −C the same bounds what k directions carry at most, so what all others leak at least.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kore_fast.ops.covariance import covariance_update_, new_count
from kore_fast.ops.dense import factorize_

EPS = torch.finfo(torch.float64).eps


def slack(C: torch.Tensor, gamma: float = 0.0) -> float:
    """By how much a successful Cholesky factorisation of C − γ I + Z (d, d) may miss an eigenvalue below zero.

    Its backward error is at most (d + 1) u times the trace (Higham, Accuracy and Stability of Numerical Algorithms,
    theorem 10.3), which is about tr C at most where C is a covariance, and −d γ where it is the negative of one.
    """
    d = C.shape[-1]
    return (d + 1) * EPS * max(float(C.diagonal().abs().sum()), -d * gamma)


@dataclass(frozen=True)
class Dual:
    """A candidate (γ, Z) for a space, at most ``tolerance`` of its leak below that leak."""

    gamma: float
    weights: torch.Tensor
    """w (r,): Z = Û diag(w) Ûᵀ."""
    uncovered: torch.Tensor
    """δ (r,): the part of w that makes up for residuals."""


def candidate(values: torch.Tensor, residuals: torch.Tensor, room: float) -> Dual:
    """Spends half of ``room`` on γ and half on the residuals, most where they are largest.

    Args:
        values: θ (r,) = û_iᵀ C û_i, ascending.
        residuals: (r,) ‖C û_i − θ_i û_i‖.
        room: how far below Σ θ_i the bound may be, above 0.
    """
    gamma = _level(values, room / 2)
    uncovered = residuals + EPS * values.abs().max()
    uncovered = uncovered * (room / 2 / uncovered.sum())
    return Dual(gamma, uncovered + (gamma - values).clamp(min=0), uncovered)


def room_below(leak: float, tolerance: float, rank: int, rounding: float) -> float:
    """How far a bound may lie below ``leak`` for a leak of at most (1 + tolerance) times the least; may be negative."""
    return leak * tolerance / (1 + tolerance) - 2 * rank * rounding


def prove(C: torch.Tensor, basis: torch.Tensor, dual: Dual, memory: torch.Tensor | None = None) -> float | None:
    """The bound of a candidate, by a factorisation; None where that fails: no proof, and none to the contrary.

    Args:
        C: (d, d) float64, a covariance or the negative of one; its lower triangle is read.
        basis: Û (d, r).
        memory: (d, d) to work in.
    """
    F = C.clone() if memory is None else memory.copy_(C)
    F.diagonal().sub_(dual.gamma)
    covariance_update_(F, new_count(device=F.device), basis.mT, scale=dual.weights)
    if factorize_(F) is None:
        return None
    rank = basis.shape[-1]
    return rank * (dual.gamma - slack(C, dual.gamma)) - float((dual.weights * basis.square().sum(0)).sum())


def _level(values: torch.Tensor, room: float) -> float:
    """The γ with Σ max(θ_i − γ, 0) = ``room``: where filling up from the top of the ascending θ ends."""
    above = values.flip(0)
    counts = torch.arange(1, len(values) + 1, dtype=values.dtype, device=values.device)
    levels = (above.cumsum(0) - room) / counts  # γ, were the k largest above it
    below = torch.cat([above[1:], above.new_full((1,), -torch.inf)])
    return float(levels[(levels >= below).nonzero()[0]])
