"""Triton backend of `kore_fast.ops.frozen_lora`, for NVIDIA (sm_80 and up) and AMD (gfx942) GPUs.

y and dx come of one kernel, C = P·Q + s·R·S (+ bias) (+ C): the adapter's product and the base's share one float32 sum,
which is rounded and written once. So y is not the vendor's bit for bit where B is 0, and ``"auto"`` does not take it.

    y = x Wᵀ + s·z Bᵀ + bias        dx = dy W + dz A, the next layer's added to it

z = x Aᵀ is the vendor's product. dz = s·dy B and dB = s·dyᵀ z are the vendor's too, each with a read of dy, or of one
read by a kernel that leaves sums of blocks of tokens (dB) and of spans of columns (dz) for a second step to add, in the
same order each time. Those sums are written and read in float32, r/32 of the read they save for dB alone (arithmetic),
so that larger ranks lose by them: `one_read` takes the kernel for r ≤ 16 where they are fewer bytes.

float32 is multiplied as "ieee": never TF32. The reference takes float64, and calls with dropout, as a whole.

Compiles for sm_80, sm_90, sm_100 and gfx942 without spills. Not yet run on a GPU; speed on a GPU: not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from kore_fast.ops.reference import frozen_lora as reference
from kore_fast.ops.triton import device_kind, unavailable

__all__ = ["backward", "forward", "unavailable"]

# Rows of tiles whose programs stand together.
GROUP = 8
# Largest r of the kernel of one read: twice that leaves the registers.
MOST_RANK = 16


@dataclass(frozen=True)
class Config:
    """Tile of C, columns of P and of R at a time, warps of a program, and Triton's number of stages."""

    rows: int
    columns: int
    depth: int
    shallow: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Sums:
    """Rows and columns of dy at a time, and warps of a program."""

    tokens: int
    columns: int
    warps: int
    stages: int = 2


# How the kernel of one read goes over dy.
SUMS = Sums(128, 64, 4)


def candidates(dtype: torch.dtype, architecture: str, aligned: bool = True, add: bool = False) -> tuple[Config, ...]:
    """The settings shipped for a dtype, largest tile first; the last is for few tiles.

    Args:
        architecture: as of `kore_fast.ops.triton.device_kind`.
        aligned: whether each factor can be read 16 bytes at a time. Else each value has an address of its own, and no
            large tile has the registers.
        add: whether C's old values are added, which takes registers too.
    """
    stages = 2 if architecture == "gfx942" else 3  # 64 KB of shared memory
    if dtype == torch.float32:
        if not aligned:
            return (Config(64, 32, 16, 16, 4, stages),)
        small = Config(64, 64, 16, 16, 4, stages)
        return (small,) if add else (Config(128, 128, 16, 16, 8, stages), small)
    small = Config(64, 64, 32, 32, 4, stages)
    if not aligned:
        return (small,)
    medium = Config(128, 128, 64, 32, 8, stages)
    large = architecture == "sm_90" and not add
    return (Config(128, 256, 64, 32, 8, stages), medium, small) if large else (medium, small)


def by_rule(options: tuple[Config, ...], rows: int, columns: int, processors: int) -> Config:
    """The largest tile that gives each processor a program; the smallest where none does."""
    for option in options:
        if -(-rows // option.rows) * -(-columns // option.columns) >= processors:
            return option
    return options[-1]


def one_read(dy: torch.Tensor, r: int, processors: int) -> int | None:
    """How many columns of dy (T, d_out) a program of the kernel of one read takes; None where two reads cost less.

    The sums must be fewer bytes than a read of dy. float32, without tensor cores, is not bound by what it reads.
    """
    if dy.dtype == torch.float32 or not dy.numel() or not 0 < r <= MOST_RANK or not _rows_aligned(dy):
        return None
    config = SUMS
    tokens, d_out = dy.shape
    blocks = -(-tokens // config.tokens)
    spans = min(-(-processors // blocks), -(-d_out // config.columns))
    span = -(-d_out // (spans * config.columns)) * config.columns
    sums = 2 * 4 * r * (blocks * d_out + -(-d_out // span) * tokens)
    return span if sums < tokens * d_out * dy.element_size() else None


def forward(
    x: torch.Tensor,
    W: Sequence[torch.Tensor],
    A: Sequence[torch.Tensor],
    B: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    scaling: Sequence[float],
    kept: torch.Tensor | None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """y (T, d_out) and z (T, r) of each layer that reads x (T, d_in); with dropout the reference's."""
    if kept is not None or not _takes(x):
        return reference.forward(x, W, A, B, bias, scaling, kept)
    ys, zs = [], []
    for W_i, A_i, B_i, bias_i, s in zip(W, A, B, bias, scaling, strict=True):
        z = x @ A_i.mT
        y = x.new_empty(len(x), len(W_i))
        _product(y, x, W_i.mT, z, B_i.mT, s, bias_i)
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
    """dx (T, d_in) of all layers and dB (d_out, r) of each, in B's dtype; with dropout the reference's."""
    if kept is not None or not _takes(dy[0]):
        return reference.backward(dy, z, W, A, B, scaling, kept, wants_dx, wants_dB)
    dx = dy[0].new_empty(len(dy[0]), W[0].shape[1]) if wants_dx else None
    dB = []
    for i, (dy_i, z_i, W_i, A_i, B_i, s) in enumerate(zip(dy, z, W, A, B, scaling, strict=True)):
        dz, dB_i = _small_products(dy_i, z_i, B_i, s, wants_dx, wants_dB)
        if dx is not None:
            assert dz is not None
            _product(dx, dy_i, W_i, dz, A_i, 1.0, None, add=i > 0)
        if dB_i is not None:
            dB.append(dB_i)
    return dx, dB


def _takes(x: torch.Tensor) -> bool:
    # Of bfloat16 the interpreter multiplies the bits.
    return x.dtype in (torch.float32, torch.float16) or (x.dtype == torch.bfloat16 and x.device.type != "cpu")


def _rows_aligned(x: torch.Tensor) -> bool:
    """Whether Triton knows that rows can be read 16 bytes at a time: by multiples of 16."""
    return x.stride(1) == 1 and all(step % 16 == 0 for step in (x.data_ptr(), x.stride(0), x.shape[1]))


def _aligned(left: torch.Tensor, right: torch.Tensor) -> bool:
    """The same of the factors of a product; right's columns do as well as its rows."""
    return _rows_aligned(left) and (_rows_aligned(right) or _rows_aligned(right.mT))


def _product(
    C: torch.Tensor,
    P: torch.Tensor,
    Q: torch.Tensor,
    R: torch.Tensor,
    S: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
    add: bool = False,
) -> None:
    """C (M, N) = P (M, K1) Q (K1, N) + scale · R (M, K2) S (K2, N) [+ bias (N,)] [+ C]; C is contiguous."""
    if not C.numel():
        return
    from kore_fast.ops.triton import frozen_lora_kernels as kernels

    if S.dtype not in (P.dtype, torch.float32):
        S = S.to(P.dtype)
    architecture, processors = device_kind(C.device)
    aligned = _aligned(P, Q)
    if aligned and not _aligned(R, S):
        # Ranks as they come (235): two small copies, where the large product would lose its large tile.
        more = -R.shape[1] % 16
        R, S = pad(R, (0, more)).contiguous(), pad(S, (0, 0, 0, more)).contiguous()
        aligned = _aligned(R, S)
    options = candidates(P.dtype, architecture, aligned, add)
    M, N = C.shape
    config = by_rule(options, M, N, processors)
    with torch.cuda.device_of(C):
        kernels.product_kernel[(-(-M // config.rows) * -(-N // config.columns),)](
            C,
            P,
            Q,
            R,
            S,
            None if bias is None else bias.contiguous(),
            scale,
            M,
            N,
            P.shape[1],
            R.shape[1],
            C.stride(0),
            *P.stride(),
            *Q.stride(),
            *R.stride(),
            *S.stride(),
            ADD=add,
            TILE_M=config.rows,
            TILE_N=config.columns,
            DEPTH=config.depth,
            SHALLOW=config.shallow,
            GROUP=GROUP,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,  # as in the covariance's kernels
        )


def _small_products(
    dy: torch.Tensor, z: torch.Tensor, B: torch.Tensor, s: float, wants_dz: bool, wants_dB: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dz = s·dy B (T, r) in dy's dtype and dB = s·dyᵀ z (d_out, r) in B's, those that are wanted."""
    if wants_dz and wants_dB:
        span = one_read(dy, B.shape[1], device_kind(dy.device)[1])
        if span is not None:
            dz, dB = _sums(dy, z, B, span)
            return dz.mul_(s).to(dy.dtype), dB.mul_(s).to(B.dtype)
    nothing = dy.new_empty(())
    return (
        torch.addmm(nothing, dy, B.to(dy.dtype), beta=0, alpha=s) if wants_dz else None,
        torch.addmm(nothing, dy.mT, z, beta=0, alpha=s).to(B.dtype) if wants_dB else None,
    )


def _sums(dy: torch.Tensor, z: torch.Tensor, B: torch.Tensor, span: int) -> tuple[torch.Tensor, torch.Tensor]:
    """dy B and dyᵀ z in float32, by the kernel that reads dy once."""
    from kore_fast.ops.triton import frozen_lora_kernels as kernels

    if B.dtype not in (dy.dtype, torch.float32):
        B = B.to(dy.dtype)
    (tokens, d_out), r = dy.shape, B.shape[1]
    config = SUMS
    blocks, spans = -(-tokens // config.tokens), -(-d_out // span)
    dz = dy.new_empty(spans, tokens, r, dtype=torch.float32)
    dB = dy.new_empty(blocks, d_out, r, dtype=torch.float32)
    with torch.cuda.device_of(dy):
        kernels.sums_kernel[(blocks, spans)](
            dz,
            dB,
            dy,
            z,
            B,
            tokens,
            d_out,
            r,
            span,
            *dy.stride(),
            *z.stride(),
            *B.stride(),
            TOKENS=config.tokens,
            COLUMNS=config.columns,
            RANK=max(16, 1 << (r - 1).bit_length()),
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,  # as in the covariance's kernels
        )
    return dz.sum(0), dB.sum(0)
