"""Truncated null-space extraction: the r directions that old inputs use least (KORE, arXiv 2510.19316, step 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kore_fast.ops.reference import nullspace as reference


@dataclass(frozen=True)
class NullSpace:
    """The bottom-r space of a covariance, with what certifies it.

    Only the span is canonical: eigenvectors of close eigenvalues turn freely, so compare leaks, never vectors.
    """

    basis: torch.Tensor
    """Û (*batch, d, r), orthonormal columns, smallest eigenvalue first."""
    eigenvalues: torch.Tensor
    """(*batch, r) Ritz values ûᵀCû, ascending."""
    largest: torch.Tensor
    """(*batch,) the largest eigenvalue of C."""
    energy: torch.Tensor
    """(*batch,) tr(ÛᵀCÛ) / tr(C): the share of the old inputs' energy that the space still carries."""
    orthogonality: torch.Tensor
    """(*batch,) max |ÛᵀÛ − I|."""
    method: str
    """The path that computed it."""


def nullspace(C: torch.Tensor, rank: int, *, method: str = "auto") -> NullSpace:
    """Span of the ``rank`` eigenvectors of ``C`` with the smallest eigenvalues.

    Args:
        C: (*batch, d, d) symmetric positive semi-definite.
        rank: r, 1 ≤ r ≤ d.
        method: ``"auto"`` or ``"reference"`` (float64 ``eigh``).

    Raises:
        ValueError: C not square or not finite, a rank outside 1…d, an unknown method.
    """
    d = C.shape[-1]
    if C.dim() < 2 or C.shape[-2] != d:
        raise ValueError(f"nullspace: C has shape {tuple(C.shape)}, want (*batch, d, d)")
    if not 1 <= rank <= d:
        raise ValueError(f"nullspace: rank {rank} is outside 1…{d}, the width of C")
    if method not in ("auto", "reference"):
        raise ValueError(f"nullspace: unknown method {method!r}; choose 'auto' or 'reference'")
    if not bool(torch.isfinite(C).all()):
        raise ValueError("nullspace: C holds NaN or infinite values")
    basis, eigenvalues, largest = reference.nullspace(C, rank)
    C64 = C.to(torch.float64)
    carried = (basis * (C64 @ basis)).sum(dim=(-2, -1))
    trace = C64.diagonal(dim1=-2, dim2=-1).sum(-1)
    identity = torch.eye(rank, dtype=basis.dtype, device=basis.device)
    return NullSpace(
        basis=basis,
        eigenvalues=eigenvalues,
        largest=largest,
        energy=torch.where(trace > 0, carried / trace, torch.zeros_like(trace)),
        orthogonality=(basis.mT @ basis - identity).abs().amax(dim=(-2, -1)),
        method="reference",
    )
