"""Reference of `kore_fast.ops.frozen_lora`: vendor products, the adapter's added to the base's in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def forward(
    x: torch.Tensor,
    W: Sequence[torch.Tensor],
    A: Sequence[torch.Tensor],
    B: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    scaling: Sequence[float],
    kept: torch.Tensor | None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    thinned = x if kept is None else x * kept
    ys, zs = [], []
    for W_i, A_i, B_i, bias_i, s in zip(W, A, B, bias, scaling, strict=True):
        z = thinned @ A_i.mT
        y = torch.nn.functional.linear(x, W_i, bias_i)
        ys.append(y.addmm_(z, B_i.mT.to(z.dtype), alpha=s))
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
    dx: torch.Tensor | None = None
    dB = []
    for dy_i, z_i, W_i, A_i, B_i, s in zip(dy, z, W, A, B, scaling, strict=True):
        if wants_dx:
            dx = dy_i @ W_i if dx is None else dx.addmm_(dy_i, W_i)
            dz = torch.addmm(dy_i.new_empty(()), dy_i, B_i.to(dy_i.dtype), beta=0, alpha=s)
            dx = dx.addmm_(dz, A_i) if kept is None else dx.add_(dz @ A_i * kept)
        if wants_dB:
            dB.append(torch.addmm(dy_i.new_empty(()), dy_i.mT, z_i, beta=0, alpha=s).to(B_i.dtype))
    return dx, dB
