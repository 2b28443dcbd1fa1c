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


def update_if_ready() -> torch._ops.OpOverload:
    """On a CPU: the update, without Python's checks, of arguments that C++ finds right as they are; False for others.

    One dispatch, and no Python: for few rows of few columns the rest would take longer than the sums.
    """
    operation: torch._ops.OpOverload = torch.ops.kore_fast.covariance_update_if_ready_.default
    return operation
