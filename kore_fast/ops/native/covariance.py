"""The covariance update by `csrc/covariance`: packed panels and register tiles, sums promoted to float64."""

from __future__ import annotations

import torch

from kore_fast.ops.native.library import unavailable as unavailable


def covariance_update_(
    C: torch.Tensor,
    count: torch.Tensor,
    x: torch.Tensor,
    mask: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> None:
    torch.ops.kore_fast.covariance_update_native_(C, count, x, mask, scale)
