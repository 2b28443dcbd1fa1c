"""The Triton kernels of `kore_fast.ops.triton.covariance`; that module says how they fit together."""

# The types of a kernel's parameters are made at its launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

# What the rows kernel writes for each row.
DROPPED = tl.constexpr(0)
KEPT = tl.constexpr(1)
BROKEN = tl.constexpr(2)


@triton.jit
def row_offset(row, stride_outer, stride_inner, inner, FLAT: tl.constexpr):
    """Elements from the first row to ``row``, where rows are (outer, inner) with a stride each; flat has inner only."""
    if FLAT:
        return row.to(tl.int64) * stride_inner
    return (row // inner).to(tl.int64) * stride_outer + (row % inner).to(tl.int64) * stride_inner


@triton.jit(do_not_specialize=["rows", "inner"])
def rows_kernel(
    state_ptr,
    x_ptr,
    mask_ptr,
    scale_ptr,
    rows,
    d,
    inner,
    x_group,
    x_outer,
    x_inner,
    x_column,
    FLAT: tl.constexpr,
    MASKED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Per row: dropped (masked or of weight 0), kept, or broken (wanted, but not finite or of negative weight)."""
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    place = group * rows + row
    wanted = inside
    if MASKED:
        wanted = wanted & (tl.load(mask_ptr + place, mask=inside, other=0) != 0)
    sound = inside
    if WEIGHTED:
        scale = tl.load(scale_ptr + place, mask=inside, other=0.0)
        wanted = wanted & (scale != 0)
        sound = (scale > 0) & (scale < float("inf"))
    start = x_ptr + group * x_group + row_offset(row, x_outer, x_inner, inner, FLAT)
    broken = tl.zeros([ROWS, COLUMNS], tl.int32)
    for first in range(0, d, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        value = tl.load(
            start[:, None] + column.to(tl.int64)[None, :] * x_column,
            mask=wanted[:, None] & (column < d)[None, :],
            other=0.0,
        )
        if value.dtype != tl.float64:
            value = value.to(tl.float32)
        broken = tl.where(tl.abs(value) < float("inf"), broken, 1)  # a NaN compares false too
    sound = sound & (tl.max(broken, axis=1) == 0)
    state = tl.where(wanted, tl.where(sound, KEPT, BROKEN), DROPPED)
    tl.store(state_ptr + place, state.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["rows", "count_group", "count_entry"])
def order_kernel(
    kept_ptr,
    count_ptr,
    order_ptr,
    weight_ptr,
    state_ptr,
    scale_ptr,
    rows,
    count_group,
    count_entry,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Number the kept rows in their order: order[n] is the row that is n-th, weight[n] its weight.

    The program of the last rows sees them all: it leaves how many are kept and adds to the count.
    """
    group = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * ROWS
    before = 0
    total = tl.zeros([ROWS], tl.float64)
    broken = 0
    for start in range(0, first, ROWS):
        place = group * rows + start + tl.arange(0, ROWS)
        state = tl.load(state_ptr + place)
        before += tl.sum((state == KEPT).to(tl.int32), axis=0)
        broken += tl.sum((state == BROKEN).to(tl.int32), axis=0)
        if WEIGHTED:
            total += tl.where(state == KEPT, tl.load(scale_ptr + place), 0.0)
    row = first + tl.arange(0, ROWS)
    inside = row < rows
    state = tl.load(state_ptr + group * rows + row, mask=inside, other=DROPPED)
    kept = state == KEPT
    place = group * rows + before + tl.cumsum(kept.to(tl.int32), axis=0) - 1
    tl.store(order_ptr + place, row, mask=kept)
    if WEIGHTED:
        scale = tl.load(scale_ptr + group * rows + row, mask=inside, other=0.0)
        tl.store(weight_ptr + place, scale.to(weight_ptr.dtype.element_ty), mask=kept)
        total += tl.where(kept, scale, 0.0)
    if first + ROWS >= rows:
        before += tl.sum(kept.to(tl.int32), axis=0)
        broken += tl.sum((state == BROKEN).to(tl.int32), axis=0)
        tl.store(kept_ptr + group, before)
        entry = count_ptr + group * count_group
        tl.store(entry, tl.load(entry) + before.to(tl.float64))
        weight = before.to(tl.float64)
        if WEIGHTED:
            weight = tl.sum(total, axis=0)
        tl.store(entry + count_entry, tl.load(entry + count_entry) + weight)
        tl.store(entry + 2 * count_entry, tl.load(entry + 2 * count_entry) + broken.to(tl.float64))


@triton.jit
def triangle_root(index):
    """The row i of the ``index``-th entry of a lower triangle read row by row: i(i+1)/2 ≤ index < (i+1)(i+2)/2."""
    i = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # float32 knows 8·index + 1 to 24 bits only: far below one step of i, so a step either way makes it exact.
    i = tl.where(i * (i + 1) // 2 > index, i - 1, i)
    return tl.where((i + 1) * (i + 2) // 2 <= index, i + 1, i)


@triton.jit
def triangle_tile(index, tiles, BAND: tl.constexpr):
    """Tile (i, j), j ≤ i, of a lower triangle of ``tiles`` rows of tiles, by its number.

    Bands of BAND rows, each read column by column up to its own small triangle, which ends it: neighbours in number
    share rows and columns of x while those are in the cache.
    """
    first = triangle_root(index) // BAND * BAND
    rest = index - first * (first + 1) // 2
    height = tl.minimum(BAND, tiles - first)
    corner = rest - height * first
    row = triangle_root(tl.maximum(corner, 0))
    square = corner < 0
    i = tl.where(square, rest % height, row)
    j = tl.where(square, rest // height, first + corner - row * (row + 1) // 2)
    return first + i, j


@triton.jit
def add_part(row_ptr, part, row_inside, column, d, C_column):
    """C[rows, column] += part, where ``row_ptr`` (rows, 1) points to the rows' first elements."""
    ptr = row_ptr + column.to(tl.int64)[None, :] * C_column
    inside = row_inside[:, None] & (column < d)[None, :]
    old = tl.load(ptr, mask=inside, other=0.0)
    if old.dtype == tl.float64:
        tl.store(ptr, old + part.to(tl.float64), mask=inside)
    else:
        # Float64 products into a float32 C are added before they are rounded.
        tl.store(ptr, (old.to(part.dtype) + part).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["start", "rows", "tiles", "inner"])
def update_kernel(
    C_ptr,
    x_ptr,
    order_ptr,
    weight_ptr,
    kept_ptr,
    start,
    rows,
    d,
    tiles,
    inner,
    C_group,
    C_row,
    C_column,
    x_group,
    x_outer,
    x_inner,
    x_column,
    FLAT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    # What the products are made in: x's own type, or float32 for weighted float16.
    PRODUCT: tl.constexpr,
    # Into how many values of that type w·x is split.
    TERMS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
    SPAN: tl.constexpr,
    BAND: tl.constexpr,
):
    """One tile of C's lower triangle: C[i, j] += Σ w x_i x_jᵀ over the kept rows."""
    tl.static_assert(CHUNK % DEPTH == 0)
    tl.static_assert(SPAN % CHUNK == 0)
    i, j = triangle_tile(tl.program_id(0), tiles, BAND)
    group = tl.program_id(1).to(tl.int64)
    kept = tl.load(kept_ptr + group)
    order_ptr += group * rows
    if WEIGHTED:
        weight_ptr += group * rows
    x_ptr += group * x_group
    left = i * TILE + tl.arange(0, TILE)
    right = j * TILE + tl.arange(0, TILE)
    left_inside = left < d
    right_inside = right < d
    left_ptr = x_ptr + left.to(tl.int64) * x_column
    right_ptr = x_ptr + right.to(tl.int64) * x_column
    stop = tl.minimum(start + SPAN, kept)
    total = tl.zeros([TILE, TILE], ACCUMULATOR)
    partial = tl.zeros([TILE, TILE], ACCUMULATOR)
    for first in range(start, stop, DEPTH):
        number = first + tl.arange(0, DEPTH)
        live = number < stop
        row = tl.load(order_ptr + number, mask=live, other=0)
        offset = row_offset(row, x_outer, x_inner, inner, FLAT)
        # Loaded as (column, row): a transpose after the load would keep it from being copied asynchronously.
        a = tl.load(left_ptr[:, None] + offset[None, :], mask=left_inside[:, None] & live[None, :], other=0.0)
        b = tl.load(right_ptr[None, :] + offset[:, None], mask=live[:, None] & right_inside[None, :], other=0.0)
        b = b.to(PRODUCT)
        if WEIGHTED:
            weight = tl.load(weight_ptr + number, mask=live, other=0.0)
            y = a.to(ACCUMULATOR) * weight[None, :]
            for _ in tl.static_range(TERMS):
                part = y.to(PRODUCT)
                partial = tl.dot(part, b, partial, input_precision="ieee", out_dtype=ACCUMULATOR)
                y -= part.to(ACCUMULATOR)
        else:
            partial = tl.dot(a.to(PRODUCT), b, partial, input_precision="ieee", out_dtype=ACCUMULATOR)
        if (first - start) % CHUNK == CHUNK - DEPTH:
            total += partial
            partial = tl.zeros([TILE, TILE], ACCUMULATOR)
    total += partial
    if start < stop:
        # In halves: a whole tile of float64 beside the sums would not fit the registers.
        half: tl.constexpr = TILE // 2
        low, high = tl.split(tl.permute(tl.reshape(total, [TILE, 2, half]), [0, 2, 1]))
        first_column = j * TILE + tl.arange(0, half)
        row_ptr = C_ptr + group * C_group + left.to(tl.int64)[:, None] * C_row
        add_part(row_ptr, low, left_inside, first_column, d, C_column)
        add_part(row_ptr, high, left_inside, first_column + half, d, C_column)
