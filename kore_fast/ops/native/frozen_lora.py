"""The frozen-A LoRA layer by `csrc/frozen_lora`: the adapter's products continue the sums of the base's.

On a CPU all products are compiled ones. On CUDA, in bfloat16 and float16, those of
the size of the base's are: y = x Wᵀ + s·z Bᵀ + bias and dx = dy W + dz A, each rounded and written once. So y is not
the vendor's bit for bit where B is 0. z, dz and dB are vendor products there; a float32 B gets dB's float32 sums, not
sums that were rounded to bfloat16. `csrc/frozen_lora/cuda.cu` says why dz and dB do not share a read of dy.

The reference takes the other dtypes, and on CUDA calls with dropout. On a GPU: not yet run, speed not measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from kore_fast.ops.native.library import unavailable as unavailable
from kore_fast.ops.reference import frozen_lora as reference

__all__ = ["backward", "forward", "unavailable"]

# Elements of 16 bytes, which the GPU's kernels read at a time.
CHUNK = 8


def forward(
    x: torch.Tensor,
    W: Sequence[torch.Tensor],
    A: Sequence[torch.Tensor],
    B: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    scaling: Sequence[float],
    kept: torch.Tensor | None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """y (T, d_out) and z (T, r) of each layer that reads x (T, d_in)."""
    if not _takes(x, A, kept):
        return reference.forward(x, W, A, B, bias, scaling, kept)
    if x.is_cuda:
        return _forward_cuda(x, W, A, B, bias, scaling)
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
    """dx (T, d_in) of all layers and dB (d_out, r) of each, in B's dtype."""
    if not _takes(dy[0], A, kept) or kept is not None:
        return reference.backward(dy, z, W, A, B, scaling, kept, wants_dx, wants_dB)
    if dy[0].is_cuda:
        return _backward_cuda(dy, z, W, A, B, scaling, wants_dx, wants_dB)
    dx: torch.Tensor | None = None
    dB = []
    for dy_i, z_i, W_i, A_i, B_i, s in zip(dy, z, W, A, B, scaling, strict=True):
        if wants_dx:
            part, _ = torch.ops.kore_fast.frozen_lora_backward_x_native(dy_i, W_i, A_i, B_i.to(dy_i.dtype), s)
            dx = part if dx is None else dx.add_(part)
        if wants_dB:
            dB.append(torch.ops.kore_fast.frozen_lora_backward_b_native(dy_i, z_i, B_i, s))
    return dx, dB


def _forward_cuda(
    x: torch.Tensor,
    W: Sequence[torch.Tensor],
    A: Sequence[torch.Tensor],
    B: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    scaling: Sequence[float],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    ys, zs = [], []
    for W_i, A_i, B_i, bias_i, s in zip(W, A, B, bias, scaling, strict=True):
        z = x @ A_i.mT
        y = x.new_empty(len(x), len(W_i))
        product_(y, x, W_i.mT, z, B_i.mT.to(x.dtype), s, None if bias_i is None else bias_i.contiguous())
        ys.append(y)
        zs.append(z)
    return ys, zs


def _backward_cuda(
    dy: Sequence[torch.Tensor],
    z: Sequence[torch.Tensor],
    W: Sequence[torch.Tensor],
    A: Sequence[torch.Tensor],
    B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    wants_dx: bool,
    wants_dB: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    dx = dy[0].new_empty(len(dy[0]), W[0].shape[1]) if wants_dx else None
    dB = []
    for i, (dy_i, z_i, W_i, A_i, B_i, s) in enumerate(zip(dy, z, W, A, B, scaling, strict=True)):
        nothing = dy_i.new_empty(())
        if dx is not None:
            dz = torch.addmm(nothing, dy_i, B_i.to(dy_i.dtype), beta=0, alpha=s)
            product_(dx, dy_i, W_i, dz, A_i, 1.0, None, add=i > 0)
        if wants_dB and B_i.dtype == dy_i.dtype:
            dB.append(torch.addmm(nothing, dy_i.mT, z_i, beta=0, alpha=s))
        elif wants_dB:
            dB.append(torch.mm(dy_i.mT, z_i, out_dtype=torch.float32).mul_(s).to(B_i.dtype))
    return dx, dB


def product_(
    C: torch.Tensor,
    P: torch.Tensor,
    Q: torch.Tensor,
    R: torch.Tensor,
    S: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    add: bool = False,
) -> None:
    """On CUDA: C (M, N) = P (M, K1) Q (K1, N) + scale · R (M, K2) S (K2, N) [+ bias (N,)] [+ C], rounded once.

    Lays P, R and S out as the kernel reads them: by rows, S as Q. Of the large factors that is no copy as a rule.
    """
    P, Q = _by_rows(P), Q if 1 in Q.stride() else Q.contiguous()
    more = -R.shape[1] % CHUNK
    if more and _on_16_bytes(P) and (_on_16_bytes(Q) or _on_16_bytes(Q.mT)):
        # Ranks as they come (235): two small copies, where the large product would lose its fast way to memory.
        R, S = pad(R, (0, more)), pad(S, (0, 0, 0, more))
    S = S.contiguous() if Q.stride(1) == 1 else S.mT.contiguous().mT
    torch.ops.kore_fast.frozen_lora_product_native_(C, P, Q, _by_rows(R), S, bias, scale, add)


def _by_rows(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _on_16_bytes(matrix: torch.Tensor) -> bool:
    """Whether each row starts there."""
    return matrix.stride(1) == 1 and matrix.data_ptr() % 16 == 0 and matrix.stride(0) % CHUNK == 0


def _takes(x: torch.Tensor, A: Sequence[torch.Tensor], kept: torch.Tensor | None) -> bool:
    if x.is_cuda:
        return kept is None and x.dtype in (torch.bfloat16, torch.float16) and all(part.numel() for part in (x, *A))
    return x.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
