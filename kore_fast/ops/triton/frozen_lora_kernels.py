"""The Triton kernels of `kore_fast.ops.triton.frozen_lora`; that module says how they fit together."""

# The types of a kernel's parameters are made at its launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grouped_tile(index, rows, columns, GROUP: tl.constexpr):
    """Tile (i, j) by its number: GROUP rows of tiles at a time, column by column.

    Neighbours in number share rows of the left and columns of the right factor while those are in the cache.
    """
    first = index // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    rest = index % (GROUP * columns)
    return first + rest % height, rest // height


@triton.jit
def add_product(
    total,
    left_ptr,
    right_ptr,
    row,
    column,
    M,
    N,
    K,
    left_row,
    left_column,
    right_row,
    right_column,
    DEPTH: tl.constexpr,
):
    """total + left·right for these rows and columns; both factors in left's type. What is over an edge is zero."""
    inner = tl.arange(0, DEPTH)
    left_ptrs = left_ptr + row.to(tl.int64)[:, None] * left_row + inner.to(tl.int64)[None, :] * left_column
    right_ptrs = right_ptr + inner.to(tl.int64)[:, None] * right_row + column.to(tl.int64)[None, :] * right_column
    row_inside = (row < M)[:, None]
    column_inside = (column < N)[None, :]
    # A stride below 2³¹ times DEPTH may be above it.
    left_step = tl.full((), DEPTH, tl.int64) * left_column
    right_step = tl.full((), DEPTH, tl.int64) * right_row
    for first in range(0, K, DEPTH):
        inside = inner < K - first
        left = tl.load(left_ptrs, mask=row_inside & inside[None, :], other=0.0)
        right = tl.load(right_ptrs, mask=inside[:, None] & column_inside, other=0.0)
        total = tl.dot(left, right.to(left.dtype), total, input_precision="ieee")
        left_ptrs += left_step
        right_ptrs += right_step
    return total


@triton.jit(do_not_specialize=["M"])
def product_kernel(
    C_ptr,
    P_ptr,
    Q_ptr,
    R_ptr,
    S_ptr,
    bias_ptr,
    scale,
    M,
    N,
    K1,
    K2,
    C_row,
    P_row,
    P_column,
    Q_row,
    Q_column,
    R_row,
    R_column,
    S_row,
    S_column,
    # Adds to what is in C.
    ADD: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    DEPTH: tl.constexpr,
    SHALLOW: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of C (M, N) = P (M, K1)·Q (K1, N) + scale·R (M, K2)·S (K2, N) [+ bias (N,)] [+ C], rounded once."""
    i, j = grouped_tile(tl.program_id(0), tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N), GROUP)
    row = i * TILE_M + tl.arange(0, TILE_M)
    column = j * TILE_N + tl.arange(0, TILE_N)
    total = tl.zeros([TILE_M, TILE_N], tl.float32)
    # The small product first: there the scale is one multiplication of the sum, and neither factor is rounded by it.
    total = add_product(total, R_ptr, S_ptr, row, column, M, N, K2, R_row, R_column, S_row, S_column, SHALLOW)
    total *= scale
    if ADD:
        C_ptrs = C_ptr + row.to(tl.int64)[:, None] * C_row + column[None, :]
        inside = (row < M)[:, None] & (column < N)[None, :]
        total += tl.load(C_ptrs, mask=inside, other=0.0).to(tl.float32)
    total = add_product(total, P_ptr, Q_ptr, row, column, M, N, K1, P_row, P_column, Q_row, Q_column, DEPTH)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    C_ptrs = C_ptr + row.to(tl.int64)[:, None] * C_row + column[None, :]
    inside = (row < M)[:, None] & (column < N)[None, :]
    tl.store(C_ptrs, total.to(C_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def sums_kernel(
    dz_ptr,
    dB_ptr,
    dy_ptr,
    z_ptr,
    B_ptr,
    M,
    N,
    K,
    span,
    dy_row,
    dy_column,
    z_row,
    z_column,
    B_row,
    B_column,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    """From one read of dy (M, N): what ``span`` of its columns add to dz = dy·B, and what TOKENS rows add to dyᵀ·z.

    Leaves sums in float32, dz_ptr (spans, M, K) and dB_ptr (blocks of rows, N, K), for a second step to add: in an
    order that is always the same.
    """
    block, part = tl.program_id(0), tl.program_id(1)
    row = block * TOKENS + tl.arange(0, TOKENS)
    row_inside = row < M
    rank = tl.arange(0, RANK)
    rank_inside = rank < K
    z_ptrs = z_ptr + row.to(tl.int64)[:, None] * z_row + rank.to(tl.int64)[None, :] * z_column
    z = tl.load(z_ptrs, mask=row_inside[:, None] & rank_inside[None, :], other=0.0)
    dy_rows = dy_ptr + row.to(tl.int64)[:, None] * dy_row
    dz = tl.zeros([TOKENS, RANK], tl.float32)
    for first in range(part * span, tl.minimum((part + 1) * span, N), COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        column_inside = column < N
        wide = column.to(tl.int64)
        dy = tl.load(dy_rows + wide[None, :] * dy_column, mask=row_inside[:, None] & column_inside[None, :], other=0.0)
        there = column_inside[:, None] & rank_inside[None, :]
        B = tl.load(B_ptr + wide[:, None] * B_row + rank.to(tl.int64)[None, :] * B_column, mask=there, other=0.0)
        dz = tl.dot(dy, B.to(dy.dtype), dz, input_precision="ieee")
        dB = tl.dot(tl.trans(dy), z, input_precision="ieee")
        tl.store(dB_ptr + (block.to(tl.int64) * N + wide)[:, None] * K + rank[None, :], dB, mask=there)
    dz_ptrs = dz_ptr + (part.to(tl.int64) * M + row)[:, None] * K + rank[None, :]
    tl.store(dz_ptrs, dz, mask=row_inside[:, None] & rank_inside[None, :])
