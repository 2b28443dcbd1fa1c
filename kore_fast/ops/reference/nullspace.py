"""Reference of `kore_fast.ops.nullspace`: a full float64 eigendecomposition."""

from __future__ import annotations

import torch


def nullspace(C: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    eigenvalues, eigenvectors = torch.linalg.eigh(C.to(torch.float64))
    return eigenvectors[..., :rank].contiguous(), eigenvalues[..., :rank].contiguous(), eigenvalues[..., -1]
