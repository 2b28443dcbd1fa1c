"""The covariance update on every CPU backend against a float64 oracle: masks, weights, strides, dtypes, groups."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from kore_fast.errors import BackendError
from kore_fast.ops import covariance_update_, finalize, new_count
from kore_fast.ops.covariance import NONFINITE, TOKENS, WEIGHT
from kore_fast.ops.native.covariance import update_if_ready
from kore_fast.ops.native.library import unavailable
from kore_fast.ops.reference import covariance as reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NO_NATIVE = unavailable(torch.device("cpu"))
needs_native = pytest.mark.skipif(NO_NATIVE is not None, reason=str(NO_NATIVE))


@pytest.fixture(params=["reference", pytest.param("native", marks=needs_native)])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def oracle(x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Xᵀ diag(w) X over the rows of x (…, d), in float64."""
    rows = x.reshape(-1, x.shape[-1]).double()
    w = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights.reshape(-1).double()
    return torch.einsum("ti,t,tj->ij", rows, w, rows)


def update(x: torch.Tensor, dtype: torch.dtype = torch.float64, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """C and count of one call; what stands above C's diagonal is poison."""
    d = x.shape[-1]
    C, count = torch.full((d, d), float("nan"), dtype=dtype).triu(1), new_count()
    covariance_update_(C, count, x, **given)
    return finalize(C), count


def assert_close(C: torch.Tensor, x: torch.Tensor, backend: str, weights: torch.Tensor | None = None) -> None:
    """At most twice the error of the same product in float32; float64 where that is the precision of the sums."""
    exact = oracle(x, weights)
    allowed = 1e-12 * float(exact.abs().max())
    if backend != "reference" and x.dtype != torch.float64:
        rows = x.reshape(-1, x.shape[-1]).float()
        left = rows if weights is None else rows * weights.reshape(-1, 1).float()
        # A sum of few terms may come out exact in float32: a rounding of the largest entry is always allowed.
        allowed = 2 * float(((left.T @ rows).double() - exact).abs().max()) + 2e-7 * float(exact.abs().max())
    assert float((C.double() - exact).abs().max()) <= allowed


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "d"), [(51, 12), (1, 49), (300, 96), (131, 145), (1100, 200)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_oracle(dtype: torch.dtype, rows: int, d: int, weighted: bool, backend: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, d).to(dtype)
    w = torch.rand(rows) + 0.1 if weighted else None
    C, count = update(x, scale=w, backend=backend)
    assert_close(C, x, backend, w)
    assert count[TOKENS] == rows
    assert count[NONFINITE] == 0


@needs_native
@pytest.mark.parametrize("limit", ["generic", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set(limit: str) -> None:
    """In a process each: the set is chosen once. A machine without one runs the next lower, which must be right too."""
    code = """
import torch
from kore_fast.ops import covariance_update_, finalize, new_count
torch.manual_seed(0)
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for rows, d in ((1, 5), (259, 50), (700, 130)):
        for w in (None, torch.rand(rows)):
            x = torch.randn(rows, d).to(dtype)
            x[rows // 2, d // 2] = float("inf") if rows > 1 else 1
            keep = torch.isfinite(x).all(-1)
            C, count = torch.zeros(d, d, dtype=torch.float64), new_count()
            covariance_update_(C, count, x, scale=w, backend="native")
            kept = x[keep].double()
            exact = (kept * (1 if w is None else w[keep, None].double())).T @ kept
            error = float((finalize(C) - exact).abs().max() / exact.abs().max())
            assert error < (1e-13 if dtype == torch.float64 else 1e-6), (dtype, rows, d, error)
            assert int(count[0]) == int(keep.sum()) and int(count[2]) == int((~keep).sum())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "KORE_FAST_CPU": limit}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@needs_native
def test_the_result_does_not_depend_on_threads() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(999, 200).bfloat16(), torch.rand(999)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(update(x, scale=w, backend="native")[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_small_directions_survive_large_ones(backend: str) -> None:
    """An activation 10⁴ times the others must not round away what the null space is made of."""
    torch.manual_seed(0)
    x = torch.randn(400, 8)
    x[:, 0] *= 1e4
    x[:, 1] *= 1e-4
    C, _ = update(x, backend=backend)
    exact = oracle(x)
    assert torch.allclose(torch.linalg.eigvalsh(C)[0], torch.linalg.eigvalsh(exact)[0], rtol=1e-6)
    assert abs(float(C[1, 1] / exact[1, 1]) - 1) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_leak_of_the_smallest_directions(dtype: torch.dtype, backend: str) -> None:
    """200,000 tokens, three massive directions, a tail down to 1e-8 of them: a float32 product fails, ours does not."""
    d, rank, tokens = 128, 32, 200_000
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.cat([torch.logspace(-8, -6, d - 3), torch.tensor([0.3, 0.6, 1.0])]).double()
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    C, count, exact, plain = zeros(d, d), zeros(3), zeros(d, d), torch.zeros(d, d)
    for _ in range(tokens // 8000):
        x = (torch.randn(8000, d, generator=generator).double() * spectrum.sqrt() @ basis.T).to(dtype)
        covariance_update_(C, count, x, backend=backend)  # type: ignore[arg-type]
        exact.addmm_(x.double().T, x.double())
        plain.addmm_(x.float().T, x.float())

    def leak(sums: torch.Tensor) -> float:
        U = torch.linalg.eigh(sums.double())[1][:, :rank]
        return float((U * (exact @ U)).sum())

    assert leak(finalize(C)) <= 1.02 * leak(exact)
    assert leak(plain) > 1.02 * leak(exact)


def test_mask_and_weights(backend: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 9, 7)
    mask = torch.rand(4, 9) > 0.4
    w = torch.rand(4, 9)
    w[0] = 0
    C, count = update(x, mask=mask.long(), scale=w, backend=backend)
    assert_close(C, x, backend, w * mask)
    kept = mask & (w != 0)
    assert count[TOKENS] == int(kept.sum())
    assert float(count[WEIGHT]) == pytest.approx(float((w * mask).double().sum()), rel=1e-12)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x.transpose(0, 1),
        lambda x: x[..., 3:9],
        lambda x: x[:, :, ::2],
        lambda x: x[:1].expand(5, -1, -1),
        lambda x: x[0].T,
    ],
    ids=["rows", "transposed", "columns", "every other column", "expanded", "column-major"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_inputs(view: Any, dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    x = view(torch.randn(5, 8, 12).to(dtype))
    before = x.clone()
    C, count = update(x, backend=backend)
    assert_close(C, x, backend)
    assert int(count[TOKENS]) == x.numel() // x.shape[-1]
    assert torch.equal(x, before)


@pytest.mark.parametrize("groups", [(2,), (2, 3)])
def test_batched_groups_are_apart(groups: tuple[int, ...], backend: str) -> None:
    torch.manual_seed(0)
    x, mask, w = torch.randn(*groups, 4, 6, 5), torch.rand(*groups, 4, 6) > 0.5, torch.rand(*groups, 4, 6)
    C, count = torch.zeros(*groups, 5, 5, dtype=torch.float64), new_count(*groups)
    covariance_update_(C, count, x, mask, w, backend=backend)
    finalize(C)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in groups)).reshape(-1, len(groups)).tolist():
        assert_close(C[tuple(at)], x[tuple(at)], backend, w[tuple(at)] * mask[tuple(at)])
        assert int(count[(*at, TOKENS)]) == int(mask[tuple(at)].sum())


def test_broken_rows_are_dropped_and_counted_but_not_where_they_are_masked(backend: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(10, 4)
    x[2, 1], x[5, 0], x[7, 3] = float("nan"), float("inf"), float("-inf")
    mask = torch.ones(10, dtype=torch.bool)
    mask[7] = False
    C, count = update(x, mask=mask, backend=backend)
    good = [i for i in range(10) if i not in (2, 5, 7)]
    assert_close(C, x[good], backend)
    assert count.tolist() == [7, 7, 2]
    _, weighted = update(x, scale=mask * 2.0, backend=backend)
    assert weighted.tolist() == [7, 14, 2]


def test_broken_weights_drop_their_rows(backend: str) -> None:
    x = torch.randn(5, 3)
    w = torch.tensor([1.0, -1.0, float("nan"), float("inf"), 0.0])
    C, count = update(x, scale=w, backend=backend)
    assert_close(C, x[:1], backend)
    assert count.tolist() == [1, 1, 3]


@pytest.mark.parametrize("sizes", [[1] * 20, [20], [7, 13], [19, 1]])
def test_batch_sizes_and_order_do_not_matter(sizes: list[int], backend: str) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(20, 6).bfloat16(), torch.rand(20)
    for reverse in (False, True):
        C, count = torch.zeros(6, 6, dtype=torch.float64), new_count()
        pieces = list(zip(x.split(sizes), w.split(sizes), strict=True))
        for rows, weights in reversed(pieces) if reverse else pieces:
            covariance_update_(C, count, rows, scale=weights, backend=backend)
        assert_close(finalize(C), x, backend, w)
        assert int(count[TOKENS]) == 20


def test_blocks_of_rows_and_panels_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "ROWS", 7)
    monkeypatch.setattr(reference, "PANEL", 5)
    torch.manual_seed(0)
    x, mask = torch.randn(40, 13), torch.rand(40) > 0.3
    C, count = update(x, mask=mask, backend="reference")
    assert_close(C, x, "reference", mask)
    assert int(count[TOKENS]) == int(mask.sum())


def test_more_rows_than_fit_one_packed_chunk(backend: str) -> None:
    """The native kernel packs 32 MiB at a time: of 600 columns in float64, 6,800 rows."""
    torch.manual_seed(0)
    x = torch.randn(7300, 600, dtype=torch.float64)
    C, _ = update(x, backend=backend)
    assert_close(C, x, backend)


def test_adds_to_what_is_there_and_keeps_no_gradient(backend: str) -> None:
    x = torch.randn(5, 3, requires_grad=True)
    C, count = torch.zeros(3, 3, dtype=torch.float64), new_count()
    covariance_update_(C, count, x, backend=backend)
    covariance_update_(C, count, x, backend=backend)
    assert_close(finalize(C) / 2, x.detach(), backend)
    assert int(count[TOKENS]) == 10
    assert not C.requires_grad


def test_float32_accumulator_is_as_good_as_float32(backend: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 16)
    C, _ = update(x, dtype=torch.float32, backend=backend)
    same_dtype = (x.T @ x).double() - oracle(x)
    assert float((C.double() - oracle(x)).abs().max()) <= 2 * float(same_dtype.abs().max()) + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_part_of_a_larger_matrix(dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 20).to(dtype)
    whole, count = torch.zeros(50, 50, dtype=torch.float64), new_count()
    covariance_update_(whole[10:30, 10:30], count, x, backend=backend)
    assert_close(finalize(whole[10:30, 10:30]), x, backend)
    whole[10:30, 10:30] = 0
    assert not whole.any()


def test_finalize_mirrors_whatever_stood_above_the_diagonal() -> None:
    C = torch.full((2, 4, 4), float("nan"), dtype=torch.float64)
    lower = torch.tril(torch.randn(2, 4, 4, dtype=torch.float64))
    index = torch.tril_indices(4, 4)
    C[:, index[0], index[1]] = lower[:, index[0], index[1]]
    out = finalize(C)
    assert out is C
    assert torch.equal(C, C.mT)
    assert torch.equal(torch.tril(C), lower)


def test_rows_that_do_not_count_change_nothing(backend: str) -> None:
    C, count = update(torch.randn(4, 3), mask=torch.zeros(4, dtype=torch.bool), backend=backend)
    assert not C.any()
    assert int(count[NONFINITE]) == 0


def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("C", "count", "x", "given", "named"),
    [
        (zeros(4, 4), zeros(3), zeros(5, 3), {}, "x (5, 3)"),
        (zeros(4, 5), zeros(3), zeros(6, 5), {}, "C (4, 5)"),
        (zeros(2, 4, 4), zeros(2, 3), zeros(3, 6, 4), {}, "x (3, 6, 4)"),
        (zeros(4, 4), zeros(3), zeros(4), {}, "x (4,)"),
        (zeros(3, 3), zeros(3), zeros(6, 4), {}, "C (3, 3)"),
        (zeros(4, 4), zeros(3), zeros(2, 0, 4), {}, "no rows"),
        (zeros(4, 4), zeros(2), zeros(6, 4), {}, "count has shape (2,)"),
        (zeros(4, 4), zeros(6)[::2], zeros(6, 4), {}, "count has strides"),
        (zeros(2, 4, 4), zeros(3), zeros(2, 6, 4), {}, "count has shape (3,)"),
        (zeros(4, 4), zeros(3), zeros(2, 6, 4), {"mask": torch.ones(12, dtype=torch.bool)}, "mask has shape (12,)"),
        (zeros(4, 4), zeros(3), zeros(6, 4), {"scale": torch.ones(6, 4)}, "scale has shape (6, 4)"),
        (zeros(4, 4), zeros(3), zeros(6, 4), {"mask": torch.ones(6)}, "mask is torch.float32"),
        (zeros(4, 4, dtype=torch.bfloat16), zeros(3), zeros(6, 4), {}, "C is torch.bfloat16"),
        (zeros(4, 4), zeros(3, dtype=torch.float32), zeros(6, 4), {}, "count is torch.float32"),
        (zeros(4, 4), zeros(3), zeros(6, 4, dtype=torch.int64), {}, "x is torch.int64"),
        (zeros(4, 4), zeros(3), torch.zeros(6, 4, device="meta"), {}, "x on meta"),
        (zeros(4, 4), zeros(3), zeros(6, 4), {"mask": torch.ones(6, device="meta") > 0}, "mask is on meta"),
        (zeros(4, 4).T, zeros(3), zeros(6, 4), {}, "row-major"),
        (zeros(1, 4).expand(4, 4), zeros(3), zeros(6, 4), {}, "overlap"),
        (zeros(4, 4).expand(2, 4, 4), zeros(2, 3), zeros(2, 6, 4), {}, "overlap"),
        (zeros(2, 4, 4), zeros(3).expand(2, 3), zeros(2, 6, 4), {}, "count has strides"),
        (zeros(8).as_strided((4, 4), (1, 1)), zeros(3), zeros(6, 4), {}, "overlap"),
    ],
)
def test_what_does_not_fit(C: Any, count: Any, x: Any, given: dict[str, torch.Tensor], named: str) -> None:
    with pytest.raises(ValueError) as caught:
        covariance_update_(C, count, x + 1, **given)
    assert named in str(caught.value)
    assert not C.any()
    assert not count.any()


def test_backends_asked_for_by_name() -> None:
    C, count, x = zeros(4, 4), zeros(3), torch.ones(6, 4)
    with pytest.raises(BackendError, match="choose auto, reference, native, triton"):
        covariance_update_(C, count, x, backend="magic")  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="'triton' can't run on cpu"):
        covariance_update_(C, count, x, backend="triton")
    assert not C.any()


@pytest.mark.parametrize("given", [{}, {"mask": torch.rand(9) > 0.5, "scale": torch.rand(9)}], ids=["plain", "all"])
def test_the_dispatchers_operation(given: dict[str, torch.Tensor], backend: str) -> None:
    C, count, x = zeros(5, 5), zeros(3), torch.randn(9, 5)
    arguments = (C, count, x, given.get("mask"), given.get("scale"))
    torch.library.opcheck(torch.ops.kore_fast.covariance_update_.default, arguments, {"backend": backend})


@needs_native
def test_the_native_operation() -> None:
    for mask, scale in ((None, None), (torch.rand(9) > 0.5, torch.rand(9, dtype=torch.float64))):
        arguments = (zeros(5, 5), zeros(3), torch.randn(9, 5), mask, scale)
        torch.library.opcheck(torch.ops.kore_fast.covariance_update_native_.default, arguments)
    with pytest.raises(RuntimeError, match="call that one"):
        torch.ops.kore_fast.covariance_update_native_(zeros(5, 5), zeros(3), torch.randn(9, 5), torch.ones(9), None)


@needs_native
def test_the_short_way_takes_what_needs_no_preparation_and_nothing_else() -> None:
    take = update_if_ready()
    x, mask, scale = torch.randn(2, 9, 5), torch.rand(2, 9) > 0.5, torch.rand(2, 9, dtype=torch.float64)
    fits = (zeros(5, 5), zeros(3), x, mask, scale)
    assert take(*fits)
    for place, given in [
        (0, zeros(2, 2, 5, 5)),
        (0, zeros(5, 5, dtype=torch.bfloat16)),
        (0, zeros(5, 5).T),
        (0, zeros(5, 8).T[:5]),
        (0, zeros(1, 5).expand(5, 5)),
        (0, zeros(6, 6)),
        (1, zeros(2)),
        (1, zeros(6)[::2]),
        (1, zeros(3, dtype=torch.float32)),
        (2, x[..., :4]),
        (2, x.int()),
        (2, x[:, :0]),
        (3, mask.int()),
        (3, mask[:, :8]),
        (3, mask.T.contiguous().T),
        (4, scale.float()),
        (4, scale[0]),
    ]:
        arguments = [*fits[:place], given, *fits[place + 1 :]]
        before = arguments[0].clone(), arguments[1].clone()
        assert not take(*arguments), (place, given.shape, given.stride())
        assert torch.equal(arguments[0], before[0])
        assert torch.equal(arguments[1], before[1])


@needs_native
def test_groups_whose_rows_interleave(backend: str) -> None:
    x = torch.randn(2, 9, 5, dtype=torch.float64)
    C, count = zeros(5, 2, 5).transpose(0, 1), zeros(2, 3)
    if backend == "native":
        assert update_if_ready()(C, count, x, None, None)
        assert not update_if_ready()(zeros(9, 5).as_strided((2, 5, 5), (5, 5, 1)), count, x, None, None)
    C.zero_()
    covariance_update_(C, count, x, backend=backend)  # type: ignore[arg-type]
    for group in range(2):
        assert torch.allclose(C[group].tril(), oracle(x[group]).tril())


def test_fake_tensors() -> None:
    with torch._subclasses.FakeTensorMode():
        covariance_update_(zeros(4, 4), zeros(3), torch.randn(7, 4))
        with pytest.raises(ValueError, match="count has shape"):
            covariance_update_(zeros(4, 4), zeros(2), torch.randn(7, 4))


def test_inside_a_compiled_graph() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(C: torch.Tensor, count: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        covariance_update_(C, count, x)
        return C * 2

    C, count, x = zeros(4, 4), zeros(3), torch.randn(7, 4, dtype=torch.float64)
    assert torch.allclose(step(C, count, x).tril(), 2 * oracle(x).tril())
    assert int(count[TOKENS]) == 7
