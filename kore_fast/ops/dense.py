"""The dense float64 work of a null space: factors, solves, products; on a CPU by the kernels of csrc/."""

from __future__ import annotations

import torch

from kore_fast.ops.covariance import NONFINITE, covariance_update_, new_count
from kore_fast.ops.native import nullspace as native

# Columns a step: its update is a covariance of so many tokens, long enough for the kernel's full speed.
_BLOCK = 256


def factorize_(A: torch.Tensor) -> torch.Tensor | None:
    """The lower triangle of ``A`` (d, d) float64 → a factor for `solve`, in A's memory where that can be.

    On a CPU with native kernels, right-looking by blocks: the trailing update A − P Pᵀ, which is nearly all of the
    work, is a covariance update of −A, which the compiled kernel does one triangle of. Elsewhere the vendor's.

    Returns:
        L or −L (both give the same solutions), undefined above the diagonal; None where A is not positive definite.
    """
    if len(A) <= 2 * _BLOCK or not _compiled(A):
        L, failed = torch.linalg.cholesky_ex(A)
        return None if int(failed) != 0 else L
    N = A.neg_()
    count = new_count()
    for start in range(0, len(N), _BLOCK):
        end = min(start + _BLOCK, len(N))
        L, failed = torch.linalg.cholesky_ex(-N[start:end, start:end])
        if int(failed) != 0:
            return None
        N[start:end, start:end] = -L
        if end < len(N):
            panel = native.solve_triangular(L, N[end:, start:end].mT)
            N[end:, start:end] = panel.mT
            covariance_update_(N[end:, end:], count, panel)
    # The kernel leaves rows out that are not finite: then this is no factor.
    return None if float(count[NONFINITE]) else N


def solve(L: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """A⁻¹ V (d, b) from the factor of A (`factorize_`)."""
    if _compiled(L):
        return native.solve_triangular(L, native.solve_triangular(L, V), transposed=True)
    half = torch.linalg.solve_triangular(L, V, upper=False)
    return torch.linalg.solve_triangular(L.mT, half, upper=True)


def solve_lower(L: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """L⁻¹ V (d, b); of L (d, d) the lower triangle is read."""
    return native.solve_triangular(L, V) if _compiled(L) else torch.linalg.solve_triangular(L, V, upper=False)


def product(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """A B (n, m)."""
    return native.product(A, B) if _compiled(A) else A @ B


def subtract_product_(X: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> None:
    """X (n, m) −= A B, in place."""
    if _compiled(A):
        native.subtract_product_(X, A, B)
    else:
        X.addmm_(A, B, alpha=-1)


def _compiled(A: torch.Tensor) -> bool:
    return A.device.type == "cpu" and native.unavailable(A.device) is None
