"""The complement of a small space: where nearly all directions are wanted, the few that are left out are found instead.

They are the top k of C, the low end of −C, which block Krylov iteration finds by products alone. The proof is the low
end's too (see `kore_fast.ops.certificate`): tr C less the most that k directions carry is the least the others leak.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kore_fast.ops.dense import product

# Random vectors that stand for all in a check of orthogonality.
_PROBES = 8


class Complement(NamedTuple):
    """All directions of C but those of a space."""

    basis: torch.Tensor
    """Û (d, d − k) orthonormal, the smallest quotient first."""
    quotients: torch.Tensor
    """(d − k,) ûᵀCû, ascending."""
    leak: torch.Tensor
    """tr(ÛᵀCÛ), as tr C − tr(UᵀCU)."""
    orthogonality: torch.Tensor
    """‖[U Û]ᵀ[U Û] − I‖ in Frobenius' norm, estimated from random vectors: the largest entry is no larger."""


def complement(C: torch.Tensor, U: torch.Tensor) -> Complement:
    """The directions orthogonal to ``U`` (d, k), orthonormal columns, k ≤ d, by one block reflection.

    With B = U P, P orthogonal such that the upper k × k part of B is −H, H ⪰ 0 (its polar decomposition), and
    W = B − [I 0]ᵀ, the reflection I − W (I + H)⁻¹ Wᵀ takes the first k coordinates to B, so the others to what is
    orthogonal to U. The condition number of I + H is at most 2 (Schreiber and Parlett 1988). That is half to a third of
    the time of the complete Householder QR, and gives the quotients without a product of C and Û.
    """
    d, k = U.shape
    left, cosines, right = torch.linalg.svd(U[:k])
    turn = -right.mT @ left.mT
    W, CU = U @ turn, product(C, U)
    W.diagonal().sub_(1)
    CW = CU @ turn - C[:, :k]
    scaled = W[k:] @ (left / (1 + cosines) @ left.mT)
    # Column j is e_j − W g_j, g_j the row of `scaled`.
    quotients = C.diagonal()[k:] + (scaled * (scaled @ (W.mT @ CW) - 2 * CW[k:])).sum(1)
    quotients, order = quotients.sort()
    basis = product(W, scaled[order].mT).neg_()
    basis[k + order, torch.arange(d - k, device=C.device)] += 1
    return Complement(basis, quotients, C.diagonal().sum() - (U * CU).sum(), _orthogonality(U, basis))


def _orthogonality(U: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The products of all columns with each other would take as long as everything else."""
    generator = torch.Generator(U.device).manual_seed(0)
    X = torch.randn(len(U), _PROBES, generator=generator, dtype=U.dtype, device=U.device)
    k = U.shape[1]
    Y = U @ X[:k] + basis @ X[k:]
    return torch.linalg.vector_norm(torch.cat([U.mT @ Y, basis.mT @ Y]) - X) / _PROBES**0.5
