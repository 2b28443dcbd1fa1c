"""Products and triangular solves in float64 on a CPU by `csrc/nullspace`: packed panels and register tiles."""

from __future__ import annotations

import torch

from kore_fast.ops.native.library import unavailable as unavailable


def solve_triangular(L: torch.Tensor, V: torch.Tensor, *, transposed: bool = False) -> torch.Tensor:
    """L⁻¹ V (d, b), or L⁻ᵀ V, row-major; of L (d, d) the lower triangle is read."""
    solution: torch.Tensor = torch.ops.kore_fast.solve_triangular_native(L, V, transposed)
    return solution


def product(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """A B (n, m), row-major."""
    result: torch.Tensor = torch.ops.kore_fast.product_native(A, B)
    return result


def subtract_product_(X: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> None:
    """X (n, m) −= A B, in place."""
    torch.ops.kore_fast.subtract_product_native_(X, A, B)
