"""Triton backend of `kore_fast.ops.covariance`, for NVIDIA (sm_80 and up) and AMD (gfx942) GPUs.

Schedule. Three kernels, none of which waits for the host:

1. Each row is read once and called kept, dropped (masked, weight 0) or broken (not finite). Then the kept rows are
   numbered in their order, and counted in float64 without atomics.
2. One program a tile of C's lower triangle, diagonal tiles once; its (i, j) in closed form from its number. It gathers
   the kept rows only, so a NaN in a dropped row never meets a product and padding costs no arithmetic. What is over
   the edge, of d and of the kept rows, is read as zero. For few tiles the tiles are smaller; tokens are never split
   between programs.

Accumulation, at most CHUNK tokens into a first sum, at most SPAN tokens' first sums into a second, that into C:

====================  =====================================  =======  ==========  =====
x                     products                               CHUNK    SPAN        sums
====================  =====================================  =======  ==========  =====
bfloat16, float16     exact, on tensor cores                 256      8192        fp32
bfloat16 with scale   w·x in float32, split in 3 bfloat16s   256      8192        fp32
float32               float32 ("ieee": never TF32)           64       1024        fp32
float16 with scale    w·x in float32, then as float32        64       1024        fp32
float64               float64 tensor cores (Triton ≥ 3.5)    256      8192        fp64
====================  =====================================  =======  ==========  =====

Tensor cores truncate where they add. In a first sum they do so CHUNK/16 times, which scales each row of a chunk by one
factor 1 − δ, δ below 2e-6 (arithmetic): that moves nothing into a null space. All else rounds to nearest. An entry's
error is at most 6e-6 of Σ w|x_i x_j|: (CHUNK/16 + SPAN/CHUNK + 2)·2⁻²³ on tensor cores, (CHUNK + SPAN/CHUNK + 2)·2⁻²⁴
for float32. It is 1e-7 of it and less where roundings fall at random. Weights are rounded to float32 (2⁻²⁴) unless x is
float64. Three bfloat16s hold a float32 to its last bit, so the split adds no error; it costs three products, and
weighted float16 rows a product off the tensor cores. Products over 3e38, as of x over 1e19, overflow float32: the
reference takes those. Under Triton 3.4, which has no float64 products, the reference takes float64 rows.

The same call on a device gives the same bits. Candidates for one shape differ in tile and prefetching, not in the
order of additions, so the choice should not show in a bit either (a test for GPUs compares them). The fastest is found
at the first call of a shape, on a scratch copy of a part of the work (this waits for the GPU, once);
KORE_FAST_AUTOTUNE=0 takes the first choice by rule, and so does a graph's capture.

Compiles for sm_80, sm_90, sm_100 and gfx942 without spills. Not yet run on a GPU; speed on a GPU: not measured.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch

from kore_fast.ops.reference import covariance as reference
from kore_fast.ops.triton import device_kind, triton_version, unavailable

__all__ = ["covariance_update_", "unavailable"]

# Rows that one program looks at for broken ones, and columns at a time; rows that one program numbers; tiles in a band.
LOOK = (8, 256)
NUMBER = 2048
BAND = 8
# Tuning works on that much of C and of the rows.
TUNED_WIDTH, TUNED_ROWS = 4096, 8192


@dataclass(frozen=True)
class Products:
    """How rows of one dtype are multiplied and added; see the table above. dtypes are Triton's names."""

    product: str
    terms: int = 1
    accumulator: str = "float32"
    chunk: int = 256
    span: int = 8192


@dataclass(frozen=True)
class Config:
    """Tile of C, rows at a time, warps of a program, and Triton's number of stages."""

    tile: int
    depth: int
    warps: int
    stages: int


def products(dtype: torch.dtype, weighted: bool) -> Products:
    """How rows of ``dtype`` are multiplied."""
    if dtype == torch.float64:
        return Products("float64", accumulator="float64")
    if dtype == torch.bfloat16:
        return Products("bfloat16", terms=3 if weighted else 1)
    # Weighted float16 values may leave float16's range, and the parts of a split do.
    if dtype == torch.float16 and not weighted:
        return Products("float16")
    return Products("float32", chunk=64, span=1024)


def candidates(how: Products, architecture: str, aligned: bool = True) -> tuple[Config, ...]:
    """The settings shipped for such products, largest tile first; the last is for few tiles and never tuned against.

    Of NVIDIA's stages, the rows' numbers take every second: 5 are two tiles ahead, 7 three. Rows that are not aligned
    are read value by value, with an address each: no large tile has the registers.

    Args:
        architecture: "sm_80" (every NVIDIA GPU whose tensor cores read registers), "sm_90" (shared memory) or "gfx942".
    """
    found: tuple[Config, ...]
    if how.product == "float64":
        found = (Config(64, 16, 4, 3), Config(32, 16, 4, 3))
    elif how.product == "float32":
        found = (Config(128, 16, 8, 3), Config(64, 16, 4, 3), Config(32, 16, 4, 3))
    elif how.terms > 1:
        # One depth: the parts of a split are added in the order of the blocks of rows.
        found = (Config(128, 32, 8, 5), Config(64, 32, 4, 5), Config(32, 32, 4, 5))
    else:
        depth = 32 if architecture == "sm_80" else 64  # operands take registers there
        found = (Config(128, depth, 8, 5), Config(128, depth, 8, 7), Config(64, 64, 4, 5), Config(32, 64, 4, 5))
    if architecture == "gfx942":  # 64 KB of shared memory
        found = tuple(dict.fromkeys(Config(one.tile, one.depth, one.warps, 2) for one in found))
    if aligned:
        return found
    largest = 32 if how.product in ("float32", "float64") else 64
    return tuple(Config(one.tile, min(one.depth, 32), one.warps, one.stages) for one in found if one.tile <= largest)


def covariance_update_(
    C: torch.Tensor, count: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None, scale: torch.Tensor | None
) -> None:
    """See `kore_fast.ops.covariance.covariance_update_`, which has checked the arguments; one group dimension at most.

    Any strides of x: rows are addressed where they are when two dimensions (batch, token) describe them, else copied.

    Raises:
        triton.OutOfResources: a GPU with less shared memory than 64 KB a program.
    """
    if not x.numel():
        return
    if x.dtype == torch.float64 and triton_version() < (3, 5):
        reference.covariance_update_(C, count, x, mask, scale)
        return
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        x = x.float()  # the interpreter multiplies bfloat16's bits
    if C.dim() == 2:
        C, count, x = C[None], count[None], x[None]
    groups = x.shape[0]
    view = _Rows(x.detach())
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask != 0
        mask = mask.reshape(groups, -1).contiguous().view(torch.uint8)
    if scale is not None:
        scale = scale.detach().reshape(groups, -1).to(torch.float64).contiguous()
    if x.device.type == "cpu":
        _run(C, count, view, mask, scale)
    else:
        with torch.cuda.device(x.device):
            _run(C, count, view, mask, scale)


class _Rows:
    """x (group, …, d) as rows of at most two dimensions (outer, inner), each with a stride."""

    def __init__(self, x: torch.Tensor) -> None:
        levels: list[tuple[int, int]] = []
        for size, stride in zip(x.shape[1:-1], x.stride()[1:-1], strict=True):
            if size == 1:
                continue
            if levels and levels[-1][1] == size * stride:
                levels[-1] = (levels[-1][0] * size, stride)
            else:
                levels.append((size, stride))
        if len(levels) > 2:
            x = x.reshape(x.shape[0], -1, x.shape[-1])
            levels = [(x.shape[1], x.stride(1))]
        self.x = x
        self.groups, self.d = x.shape[0], x.shape[-1]
        self.count = math.prod(size for size, _ in levels)
        self.inner, inner_stride = levels[-1] if levels else (1, 0)
        outer_stride = levels[0][1] if len(levels) == 2 else 0
        self.flat = len(levels) < 2
        self.strides = (x.stride(0) if self.groups > 1 else 0, outer_stride, inner_stride, x.stride(-1))
        # What Triton knows of a multiple of 16, and reads 16 bytes at a time by.
        steps = (self.d, x.data_ptr(), *self.strides[:3])
        self.aligned = self.strides[3] == 1 and all(step % 16 == 0 for step in steps)


def _run(
    C: torch.Tensor, count: torch.Tensor, rows: _Rows, mask: torch.Tensor | None, scale: torch.Tensor | None
) -> None:
    from kore_fast.ops.triton import covariance_kernels as kernels

    device, shape = rows.x.device, (rows.groups, rows.count)
    state = torch.empty(shape, dtype=torch.uint8, device=device)
    kernels.rows_kernel[(-(-rows.count // LOOK[0]), rows.groups)](
        state,
        rows.x,
        mask,
        scale,
        rows.count,
        rows.d,
        rows.inner,
        *rows.strides,
        FLAT=rows.flat,
        MASKED=mask is not None,
        WEIGHTED=scale is not None,
        ROWS=LOOK[0],
        COLUMNS=LOOK[1],
        enable_fp_fusion=True,
    )
    # enable_fp_fusion is said because Triton 3.10 changes its default, and sums of float32 products lose by it.
    kept = torch.empty(rows.groups, dtype=torch.int32, device=device)
    order = torch.empty(shape, dtype=torch.int32, device=device)
    weights = None
    if scale is not None:
        kind = torch.float64 if rows.x.dtype == torch.float64 else torch.float32
        weights = torch.empty(shape, dtype=kind, device=device)
    kernels.order_kernel[(-(-rows.count // NUMBER), rows.groups)](
        kept,
        count,
        order,
        weights,
        state,
        scale,
        rows.count,
        count.stride(0),
        count.stride(1),
        WEIGHTED=scale is not None,
        ROWS=NUMBER,
        num_warps=8,
        enable_fp_fusion=True,
    )
    how = products(rows.x.dtype, scale is not None)
    _multiply(C, rows, order, weights, kept, how, _choose(C, rows, order, weights, kept, how))


def _multiply(
    C: torch.Tensor,
    rows: _Rows,
    order: torch.Tensor,
    weights: torch.Tensor | None,
    kept: torch.Tensor,
    how: Products,
    config: Config,
    width: int | None = None,
    most: int | None = None,
) -> None:
    """The third kernel, once a span; for tuning, on the first columns and with at most that many rows kept."""
    import triton.language as tl

    from kore_fast.ops.triton import covariance_kernels as kernels

    width = width or rows.d
    tiles = -(-width // config.tile)
    for start in range(0, min(rows.count, most or rows.count), how.span):
        kernels.update_kernel[(tiles * (tiles + 1) // 2, C.shape[0])](
            C,
            rows.x,
            order,
            weights,
            kept,
            start,
            rows.count,
            width,
            tiles,
            rows.inner,
            *C.stride(),
            *rows.strides,
            FLAT=rows.flat,
            WEIGHTED=weights is not None,
            PRODUCT=getattr(tl, how.product),
            TERMS=how.terms,
            ACCUMULATOR=getattr(tl, how.accumulator),
            TILE=config.tile,
            DEPTH=config.depth,
            CHUNK=how.chunk,
            SPAN=how.span,
            BAND=BAND,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
        )


_tuned: dict[tuple[Any, ...], Config] = {}


def by_rule(options: tuple[Config, ...], d: int, groups: int, processors: int) -> Config:
    """The largest tile that gives each processor a program; the smallest where none does."""
    for option in options:
        tiles = -(-d // option.tile)
        if groups * tiles * (tiles + 1) // 2 >= processors:
            return option
    return options[-1]


def _choose(
    C: torch.Tensor,
    rows: _Rows,
    order: torch.Tensor,
    weights: torch.Tensor | None,
    kept: torch.Tensor,
    how: Products,
) -> Config:
    """A configuration by rule, or the fastest of those that are as large, as tried once for shapes like this one."""
    device = rows.x.device
    architecture, processors = device_kind(device)
    options = candidates(how, architecture, rows.aligned)
    first = by_rule(options, rows.d, rows.groups, processors)
    rivals = options[:-1]
    if (
        first not in rivals
        or len(rivals) < 2
        or rows.d < 1024
        or rows.count < 1024
        or device.type == "cpu"
        or os.environ.get("KORE_FAST_AUTOTUNE") == "0"
        or torch.cuda.is_current_stream_capturing()
    ):
        return first
    width, bucket = min(rows.d, TUNED_WIDTH), min(rows.count, TUNED_ROWS).bit_length()
    key = (device, how, rows.x.dtype, C.dtype, weights is None, width, bucket, rows.groups, rows.aligned)
    if key not in _tuned:
        _tuned[key] = _fastest(rivals, first, C.dtype, rows, order, weights, kept, how, width)
    return _tuned[key]


def _fastest(
    rivals: tuple[Config, ...],
    first: Config,
    dtype: torch.dtype,
    rows: _Rows,
    order: torch.Tensor,
    weights: torch.Tensor | None,
    kept: torch.Tensor,
    how: Products,
    width: int,
) -> Config:
    """Time the rivals on a scratch C of the first group: at most TUNED_WIDTH columns and TUNED_ROWS rows."""
    import triton
    from triton.runtime.errors import OutOfResources

    scratch = torch.zeros(1, width, width, dtype=dtype, device=rows.x.device)
    few = kept[:1].clamp(max=TUNED_ROWS)
    times: dict[Config, float] = {}
    for rival in rivals:
        try:
            times[rival] = triton.testing.do_bench(
                lambda rival=rival: _multiply(scratch, rows, order, weights, few, how, rival, width, TUNED_ROWS),
                warmup=5,
                rep=20,
            )
        except OutOfResources:
            continue
    return min(times, key=lambda rival: times[rival]) if times else first
