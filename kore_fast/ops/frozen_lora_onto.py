"""`ops.frozen_lora` where the base's product is somebody else's, as a quantised layer's is: its adapter's part alone.

    y + s·(x Aᵀ) Bᵀ        dz = s·dy B        dx = dz A        dB = s·dyᵀ z

A never changes, so that backward needs z = x Aᵀ, of r values a token, and nothing of x or y.
"""

from __future__ import annotations

from typing import Any

import torch


def frozen_lora_onto(
    y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, *, scaling: float = 1.0
) -> torch.Tensor:
    """y + scaling·(x Aᵀ) Bᵀ, with gradients for y, x and B. Where B is 0 that is y, bit for bit.

    For backward it saves z = x Aᵀ, (…, r), beside A and B as they are: no cast of them is kept.

    Args:
        y: (…, d_out), the base's product, in any floating dtype; the result has it too.
        x: (…, d_in). The adapter's products are made in its dtype, under autocast in autocast's.
        A: (r, d_in) in any floating dtype, frozen.
        B: (d_out, r) in any floating dtype; its gradient has it too.
        scaling: s.

    Raises:
        ValueError: shapes that do not fit, or an A that wants a gradient.
    """
    if A.dim() != 2 or x.shape[-1:] != A.shape[1:]:
        raise ValueError(f"frozen_lora_onto: A {tuple(A.shape)} does not fit x {tuple(x.shape)}: want (r, d_in)")
    if (*x.shape[:-1], *B.shape) != (*y.shape, len(A)):
        raise ValueError(
            f"frozen_lora_onto: B {tuple(B.shape)} does not fit y {tuple(y.shape)}, x {tuple(x.shape)} and A "
            f"{tuple(A.shape)}: want (d_out, r)"
        )
    if A.requires_grad:
        raise ValueError(
            "frozen_lora_onto: A requires a gradient, and gets none here: freeze it (A.requires_grad_(False)), or use "
            "an ordinary LoRA layer"
        )
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    found: torch.Tensor = _Onto.apply(y, x, A, B, scaling)
    return found


class _Onto(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            z = x.reshape(-1, x.shape[-1]) @ A.to(x.dtype).mT
            ctx.save_for_backward(z, A, B)
            ctx.scaling = scaling
            rows = y.reshape(-1, y.shape[-1])
            if y.dtype == z.dtype:
                rows = torch.addmm(rows, z, B.mT.to(z.dtype), alpha=scaling)
            else:
                rows = rows + _product(z, B.mT.to(z.dtype), scaling).to(y.dtype)
            return rows.view(y.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, A, B = ctx.saved_tensors
        wants_y, wants_x, _, wants_B, _ = ctx.needs_input_grad
        dx = dB = None
        with torch.autocast(dy.device.type, enabled=False):
            rows = dy.reshape(-1, dy.shape[-1]).to(z.dtype)
            if wants_x:
                dz = _product(rows, B.to(z.dtype), ctx.scaling)
                dx = (dz @ A.to(z.dtype)).view(*dy.shape[:-1], A.shape[1])
            if wants_B:
                dB = _product(rows.mT, z, ctx.scaling).to(B.dtype)
        return dy if wants_y else None, dx, None, dB, None


def _product(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling·left·right, rounded once."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scaling)
