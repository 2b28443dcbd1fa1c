"""The Triton covariance kernels' arithmetic, on a CPU in Triton's interpreter; `test_covariance.py` runs this file.

The interpreter must be asked for before Triton is imported, so this has a process of its own. Its ``tl.dot`` multiplies
the bits of bfloat16, so those products are shown with float16 here and compiled there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from kore_fast.ops.reference import covariance as reference
from kore_fast.ops.triton import covariance as backend
from kore_fast.ops.triton import covariance_kernels as kernels
from kore_fast.ops.triton.covariance import Config, Products, unavailable


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that little data crosses all their edges: spans of 32 rows, chunks of 16, tiles of 16."""
    exact = backend.products

    def products(dtype: torch.dtype, weighted: bool) -> Products:
        how = exact(dtype, weighted)
        return Products(how.product, how.terms, how.accumulator, chunk=16, span=32)

    monkeypatch.setattr(backend, "products", products)
    monkeypatch.setattr(backend, "candidates", lambda *_: (Config(16, 8, 4, 2),))
    monkeypatch.setattr(backend, "LOOK", (4, 16))
    monkeypatch.setattr(backend, "NUMBER", 16)
    monkeypatch.setattr(backend, "BAND", 2)


def update(
    x: torch.Tensor, mask: torch.Tensor | None = None, scale: torch.Tensor | None = None, dtype: Any = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """The lower triangle of C and the count; above the diagonal C starts as poison."""
    groups = () if x.dim() < 4 else x.shape[:1]
    d = x.shape[-1]
    C = torch.full((*groups, d, d), float("nan"), dtype=dtype).triu(1)
    count = torch.zeros(*groups, 3, dtype=torch.float64)
    backend.covariance_update_(C, count, x, mask, scale)
    return C.tril(), count


def check(x: torch.Tensor, mask: torch.Tensor | None = None, scale: torch.Tensor | None = None) -> None:
    """Equal counts, and an error at most twice that of one float32 product; float64's roundings for float64."""
    C, count = update(x, mask, scale)
    groups = C.shape[:-2]
    exact, wanted = torch.zeros_like(C), torch.zeros_like(count)
    weights = None if scale is None else scale.double()
    reference.covariance_update_(exact, wanted, x, None if mask is None else mask != 0, weights)
    torch.testing.assert_close(count, wanted, rtol=1e-14, atol=0)
    keep = torch.isfinite(x).all(-1)
    for given in (mask, scale):
        keep = keep if given is None else keep & (given > 0) & (given < float("inf"))
    rows = torch.where(keep[..., None], x, 0).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    left = rows if scale is None else rows * torch.where(keep, scale, 0).to(rows.dtype)[..., None]
    d = x.shape[-1]
    same = left.reshape(*groups, -1, d).mT @ rows.reshape(*groups, -1, d)
    largest = float(exact.abs().max())
    # The oracle rounds too where rows are float64; a product of few terms may be exact in float32.
    allowed = (1e-13 if rows.dtype == torch.float64 else 2e-7) * largest
    allowed += 2 * float((same.double().tril() - exact.tril()).abs().max())
    assert float((C - exact.tril()).abs().max()) <= allowed


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(sum(shape))
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("count", "d"), [(1, 1), (7, 5), (16, 16), (33, 17), (67, 35)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_ragged_sizes_in_every_dtype(dtype: torch.dtype, count: int, d: int, weighted: bool) -> None:
    x = rows(count, d, dtype=dtype)
    check(x, scale=torch.rand(count, dtype=torch.float64) + 0.1 if weighted else None)


def test_bfloat16_is_widened_here() -> None:
    check(rows(40, 20, dtype=torch.bfloat16))


def test_masks_weights_and_broken_rows() -> None:
    x = rows(3, 30, 20)
    mask = torch.rand(3, 30) > 0.3
    scale = torch.rand(3, 30, dtype=torch.float64)
    x[0, 3, 1], x[1, 5, 0], x[2, 7, 19], x[2, 8, 2] = float("nan"), float("inf"), float("-inf"), 1e30
    mask[0, 3], mask[1, 5], mask[2, 7], mask[2, 8] = True, False, True, False
    check(x, mask)
    check(x, mask.long() * 5)
    scale[0, 0], scale[0, 1], scale[0, 2], scale[0, 4] = 0.0, -1.0, float("nan"), float("inf")
    x[1, 6, 0], scale[1, 6] = float("nan"), 0.0
    check(x, mask, scale)
    _, count = update(x, mask, scale)
    assert int(count[2]) >= 2


def test_all_rows_dropped_leave_the_sums_alone() -> None:
    C, count = update(torch.full((40, 9), float("nan")), torch.zeros(40, dtype=torch.bool))
    assert not C.any()
    assert not count.any()
    C, count = update(torch.full((40, 9), float("nan")))
    assert not C.any()
    assert count.tolist() == [0, 0, 40]


def test_rows_of_zeros_count_as_tokens() -> None:
    x = rows(40, 9)
    x[5:25] = 0
    check(x)
    assert update(x)[1].tolist() == [40, 40, 0]


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 1:],
        lambda x: x[:, ::2],
        lambda x: x.transpose(0, 1),
        lambda x: x[..., 3:20],
        lambda x: x[:, :, ::2],
        lambda x: x[:1].expand(4, -1, -1),
        lambda x: x.transpose(1, 2)[:, :20],
        lambda x: x[0],
        lambda x: x[:, :1],
        lambda x: x.flatten(0, 1).T,
    ],
    ids=["cut", "rows", "turned", "columns", "odd", "expanded", "columns far apart", "plain", "one", "transposed"],
)
def test_strides_without_a_copy(view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = view(rows(5, 12, 24, dtype=torch.float16))
    seen = backend._Rows(x[None])
    assert seen.x.data_ptr() == x.data_ptr()
    check(x)


def test_strides_that_no_two_dimensions_describe() -> None:
    x = rows(2, 3, 4, 5, 9)[:, :, :, ::2].transpose(1, 2)  # group, three dimensions of rows
    check(x, torch.rand(x.shape[:-1]) > 0.3)


def test_groups_are_apart() -> None:
    x = rows(3, 5, 9, 20)
    x[1, 2, 3, 4] = float("nan")
    check(x, torch.rand(3, 5, 9) > 0.4, torch.rand(3, 5, 9, dtype=torch.float64))
    check(x.transpose(0, 1), scale=torch.rand(5, 3, 9, dtype=torch.float64))


def test_a_second_call_adds() -> None:
    x = rows(50, 18)
    C, count = torch.zeros(18, 18, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for piece in x.split([20, 0, 30]):
        backend.covariance_update_(C, count, piece, None, None)
    whole, _ = update(x)
    torch.testing.assert_close(C.tril(), whole, rtol=0, atol=1e-5)
    assert count.tolist() == [50, 50, 0]


def test_padding_changes_no_bit() -> None:
    """Kept rows are gathered first: where the others stand does not move a sum."""
    x = rows(50, 18)
    keep = torch.rand(90).argsort()[:50].sort().values
    padded, mask = torch.full((90, 18), float("nan")), torch.zeros(90, dtype=torch.bool)
    padded[keep], mask[keep] = x, True
    assert torch.equal(update(padded, mask)[0], update(x)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_a_float32_accumulator(dtype: torch.dtype) -> None:
    x = rows(100, 24, dtype=dtype)
    C, _ = update(x, dtype=torch.float32)
    exact = (x.double().T @ x.double()).tril()
    assert C.dtype == torch.float32
    assert float((C - exact).abs().max()) <= 2e-7 * float(exact.abs().max())


def test_accumulator_and_count_in_the_middle_of_something_else() -> None:
    big, counts = torch.zeros(2, 30, 40, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.float64)
    x = rows(2, 2, 25, 20)
    backend.covariance_update_(big[:, 5:25, 3:23], counts[:, 1:4], x, None, None)
    for group in range(2):
        flat = x[group].reshape(-1, 20).double()
        torch.testing.assert_close(big[group, 5:25, 3:23].tril(), (flat.T @ flat).tril(), rtol=1e-6, atol=1e-5)
        assert counts[group].tolist() == [0, 50, 50, 0, 0]
    big[:, 5:25, 3:23] = 0
    assert not big.any()


def test_the_split_of_weighted_rows_keeps_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three parts of float16 stand in for three of bfloat16; with one part the same data fail."""
    x = rows(96, 24).half()
    w = torch.rand(96, dtype=torch.float64) + 0.5
    exact = torch.einsum("ti,t,tj->ij", x.double(), w, x.double()).tril()
    errors = []
    for terms in (1, 2, 3):
        monkeypatch.setattr(backend, "products", lambda *_, terms=terms: Products("float16", terms, chunk=16, span=32))
        errors.append(float((update(x, scale=w)[0] - exact).abs().max() / exact.abs().max()))
    assert errors[0] > 1e-5
    assert errors[2] < 3e-7


def test_a_tail_of_1e_9_survives_where_one_float32_sum_loses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shipped chunk and span; three massive directions and a tail: the bottom-r space of C leaks as the oracle's."""
    monkeypatch.undo()
    monkeypatch.setattr(backend, "candidates", lambda *_: (Config(64, 64, 4, 2),))
    torch.manual_seed(0)
    d, count, r = 64, 4096, 16
    deviations = torch.cat([torch.full((3,), 1.0), torch.logspace(-1, -4.5, d - 3)]).double()
    turn = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    x = (torch.randn(count, d, dtype=torch.float64) * deviations @ turn.T).float()
    exact = x.double().T @ x.double()

    def leak(C: torch.Tensor) -> float:
        bottom = torch.linalg.eigh((C.tril() + C.tril(-1).T).double()).eigenvectors[:, :r]
        return float(((bottom.T @ exact) * bottom.T).sum())

    best = leak(exact)
    assert leak(update(x)[0]) <= 1.02 * best
    single = torch.zeros(d, d)
    for block in x.split(64):
        single += block.T @ block
    assert leak(single) > 1.03 * best


def test_tuning_takes_the_fastest_that_fits_and_leaves_the_sums_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(1, 40, 24)
    C, count = torch.zeros(1, 24, 24, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    rivals = (Config(32, 8, 4, 2), Config(16, 8, 4, 2), Config(16, 16, 4, 2))
    times = iter([None, 2.0, 1.0])

    def do_bench(run: Any, **_: Any) -> float:
        run()
        time = next(times)
        if time is None:
            raise OutOfResources(200, 100, "shared memory")
        return time

    def choose(*given: Any) -> Config:
        return backend._fastest(rivals, rivals[0], torch.float64, *given[1:], 20)

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(backend, "_choose", lambda *given: chosen.append(choose(*given)) or chosen[0])
    chosen: list[Config] = []
    backend.covariance_update_(C, count, x, None, None)
    assert chosen == [rivals[2]]
    torch.testing.assert_close(C[0].tril(), (x[0].double().T @ x[0].double()).tril(), rtol=1e-6, atol=1e-5)


@triton.jit
def tiles_kernel(i_ptr, j_ptr, tiles, BAND: tl.constexpr):  # type: ignore[no-untyped-def]
    number = tl.program_id(0)
    i, j = kernels.triangle_tile(number, tiles, BAND)
    tl.store(i_ptr + number, i)
    tl.store(j_ptr + number, j)


@triton.jit
def roots_kernel(root_ptr, index_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.arange(0, N)
    tl.store(root_ptr + place, kernels.triangle_root(tl.load(index_ptr + place)))


@pytest.mark.parametrize("band", [3, 8])
@pytest.mark.parametrize("tiles", [1, 2, 7, 8, 9, 19])
def test_every_tile_once(tiles: int, band: int) -> None:
    total = tiles * (tiles + 1) // 2
    i, j = torch.full((2, total), -1, dtype=torch.int32)
    tiles_kernel[(total,)](i, j, tiles, BAND=band)
    found = set(zip(i.tolist(), j.tolist(), strict=True))
    assert found == {(a, b) for a in range(tiles) for b in range(a + 1)}


def test_roots_of_large_numbers() -> None:
    """Either side of each step, for triangles of up to 40,000 tiles a side: 1.3 million columns in small tiles."""
    rows_of = np.unique(np.concatenate([np.arange(1, 400), np.geomspace(400, 40_000, 600).astype(np.int64)]))
    first = rows_of * (rows_of + 1) // 2
    index = np.concatenate([first - 1, first, first + rows_of])
    expected = np.concatenate([rows_of - 1, rows_of, rows_of])
    size = 4096
    given = torch.zeros(size, dtype=torch.int32)
    given[: len(index)] = torch.from_numpy(index.astype(np.int32))
    found = torch.empty(size, dtype=torch.int32)
    roots_kernel[(1,)](found, given, N=size)
    assert found[: len(index)].tolist() == expected.tolist()


def test_the_interpreter_is_what_runs_here() -> None:
    assert unavailable(torch.device("cpu")) is None
