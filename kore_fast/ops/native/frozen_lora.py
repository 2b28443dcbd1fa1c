"""The frozen-A LoRA layer by `csrc/frozen_lora`: the adapter's products continue the sums of the base's."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kore_fast.ops.native import library
from kore_fast.ops.reference import frozen_lora as reference


def unavailable(device: torch.device) -> str | None:
    """Why it can't run on a device; None if it can."""
    if device.type != "cpu":
        return "the compiled kernels of this operation are for CPUs yet; use the reference"
    return library.unavailable(device)


def forward(
    x: torch.Tensor,
    W: Sequence[torch.Tensor],
    A: Sequence[torch.Tensor],
    B: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    scaling: Sequence[float],
    kept: torch.Tensor | None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    if not _takes(x):
        return reference.forward(x, W, A, B, bias, scaling, kept)
    thinned = x if kept is None else x * kept
    ys, zs = [], []
    for W_i, A_i, B_i, bias_i, s in zip(W, A, B, bias, scaling, strict=True):
        bias_i = None if bias_i is None else bias_i.contiguous()
        y, z = torch.ops.kore_fast.frozen_lora_forward_native(x, thinned, W_i, A_i, B_i.to(x.dtype), bias_i, s)
        ys.append(y)
        zs.append(z)
    return ys, zs


def backward(
    dy: Sequence[torch.Tensor],
    z: Sequence[torch.Tensor],
    W: Sequence[torch.Tensor],
    A: Sequence[torch.Tensor],
    B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    kept: torch.Tensor | None,
    wants_dx: bool,
    wants_dB: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    if not _takes(dy[0]) or kept is not None:
        return reference.backward(dy, z, W, A, B, scaling, kept, wants_dx, wants_dB)
    dx: torch.Tensor | None = None
    dB = []
    for dy_i, z_i, W_i, A_i, B_i, s in zip(dy, z, W, A, B, scaling, strict=True):
        if wants_dx:
            part, _ = torch.ops.kore_fast.frozen_lora_backward_x_native(dy_i, W_i, A_i, B_i.to(dy_i.dtype), s)
            dx = part if dx is None else dx.add_(part)
        if wants_dB:
            dB.append(torch.ops.kore_fast.frozen_lora_backward_b_native(dy_i, z_i, B_i, s))
    return dx, dB


def _takes(x: torch.Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
