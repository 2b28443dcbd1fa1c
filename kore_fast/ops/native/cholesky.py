"""Triangular solves by `csrc/nullspace`: packed panels and register tiles, as for covariances."""

from __future__ import annotations

import torch

from kore_fast.ops.native.library import unavailable as unavailable


def solve_triangular(L: torch.Tensor, V: torch.Tensor, *, transposed: bool = False) -> torch.Tensor:
    """L⁻¹ V (d, b), or L⁻ᵀ V, row-major; of L (d, d) the lower triangle is read. Float64 on a CPU, any strides."""
    solution: torch.Tensor = torch.ops.kore_fast.solve_triangular_native(L, V, transposed)
    return solution
