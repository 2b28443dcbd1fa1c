"""The covariance update against a float64 oracle: masks, weights, strides, dtypes, groups, broken rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kore_fast.ops import covariance_update_, finalize, new_count
from kore_fast.ops.covariance import NONFINITE, TOKENS, WEIGHT
from kore_fast.ops.reference import covariance as reference


def oracle(x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Xᵀ diag(w) X over the rows of x (…, d), in float64."""
    rows = x.reshape(-1, x.shape[-1]).double()
    w = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights.reshape(-1).double()
    return torch.einsum("ti,t,tj->ij", rows, w, rows)


def update(x: torch.Tensor, dtype: torch.dtype = torch.float64, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    C, count = torch.zeros(x.shape[-1], x.shape[-1], dtype=dtype), new_count()
    covariance_update_(C, count, x, **given)
    return finalize(C), count


def assert_relative(found: torch.Tensor, wanted: torch.Tensor, bound: float = 1e-12) -> None:
    assert float((found.double() - wanted).abs().max()) <= bound * float(wanted.abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_oracle_in_every_dtype_of_x(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 17, 12).to(dtype)
    C, count = update(x)
    assert_relative(C, oracle(x))
    assert count.tolist() == [51, 51, 0]


def test_small_directions_survive_large_ones() -> None:
    """An activation 10⁴ times the others must not round away what the null space is made of."""
    torch.manual_seed(0)
    x = torch.randn(400, 8)
    x[:, 0] *= 1e4
    x[:, 1] *= 1e-4
    C, _ = update(x)
    exact = oracle(x)
    assert torch.allclose(torch.linalg.eigvalsh(C)[0], torch.linalg.eigvalsh(exact)[0], rtol=1e-6)
    assert abs(float(C[1, 1] / exact[1, 1]) - 1) < 1e-12


def test_mask_and_weights() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 9, 7)
    mask = torch.rand(4, 9) > 0.4
    w = torch.rand(4, 9)
    w[0] = 0
    C, count = update(x, mask=mask.long(), scale=w)
    assert_relative(C, oracle(x, w * mask))
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
    ],
    ids=["rows", "transposed", "columns", "every other column", "expanded"],
)
def test_strided_inputs(view: Any) -> None:
    torch.manual_seed(0)
    x = view(torch.randn(5, 8, 12))
    before = x.clone()
    C, count = update(x)
    assert_relative(C, oracle(x))
    assert int(count[TOKENS]) == x.numel() // x.shape[-1]
    assert torch.equal(x, before)


def test_batched_groups_are_apart() -> None:
    torch.manual_seed(0)
    x, mask, w = torch.randn(2, 3, 4, 6, 5), torch.rand(2, 3, 4, 6) > 0.5, torch.rand(2, 3, 4, 6)
    C, count = torch.zeros(2, 3, 5, 5, dtype=torch.float64), new_count(2, 3)
    covariance_update_(C, count, x, mask, w)
    finalize(C)
    for i in range(2):
        for j in range(3):
            assert_relative(C[i, j], oracle(x[i, j], w[i, j] * mask[i, j]))
            assert int(count[i, j, TOKENS]) == int(mask[i, j].sum())


def test_broken_rows_are_dropped_and_counted_but_not_where_they_are_masked() -> None:
    torch.manual_seed(0)
    x = torch.randn(10, 4)
    x[2, 1], x[5, 0], x[7, 3] = float("nan"), float("inf"), float("-inf")
    mask = torch.ones(10)
    mask[7] = 0
    C, count = update(x, mask=mask)
    good = [i for i in range(10) if i not in (2, 5, 7)]
    assert_relative(C, oracle(x[good]))
    assert count.tolist() == [7, 7, 2]
    _, weighted = update(x, scale=mask * 2)
    assert weighted.tolist() == [7, 14, 2]


@pytest.mark.parametrize("sizes", [[1] * 20, [20], [7, 13], [19, 1]])
def test_batch_sizes_and_order_do_not_matter(sizes: list[int]) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(20, 6).bfloat16(), torch.rand(20)
    for reverse in (False, True):
        C, count = torch.zeros(6, 6, dtype=torch.float64), new_count()
        pieces = list(zip(x.split(sizes), w.split(sizes), strict=True))
        for rows, weights in reversed(pieces) if reverse else pieces:
            covariance_update_(C, count, rows, scale=weights)
        assert_relative(finalize(C), oracle(x, w))
        assert int(count[TOKENS]) == 20


def test_blocks_of_rows_and_panels_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "ROWS", 7)
    monkeypatch.setattr(reference, "PANEL", 5)
    torch.manual_seed(0)
    x, mask = torch.randn(40, 13), torch.rand(40) > 0.3
    C, count = update(x, mask=mask)
    assert_relative(C, oracle(x, mask))
    assert int(count[TOKENS]) == int(mask.sum())


def test_adds_to_what_is_there_and_keeps_no_gradient() -> None:
    x = torch.randn(5, 3, requires_grad=True)
    C, count = torch.zeros(3, 3, dtype=torch.float64), new_count()
    covariance_update_(C, count, x)
    covariance_update_(C, count, x)
    assert_relative(finalize(C), 2 * oracle(x.detach()))
    assert int(count[TOKENS]) == 10
    assert not C.requires_grad


def test_float32_accumulator_is_as_good_as_float32() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 16)
    C, _ = update(x, dtype=torch.float32)
    same_dtype = (x.T @ x).double() - oracle(x)
    assert float((C.double() - oracle(x)).abs().max()) <= 2 * float(same_dtype.abs().max()) + 1e-5


def test_finalize_mirrors_whatever_stood_above_the_diagonal() -> None:
    C = torch.full((2, 4, 4), float("nan"), dtype=torch.float64)
    lower = torch.tril(torch.randn(2, 4, 4, dtype=torch.float64))
    index = torch.tril_indices(4, 4)
    C[:, index[0], index[1]] = lower[:, index[0], index[1]]
    out = finalize(C)
    assert out is C
    assert torch.equal(C, C.mT)
    assert torch.equal(torch.tril(C), lower)


def test_no_rows_change_nothing() -> None:
    C, count = update(torch.randn(0, 3))
    assert not C.any()
    assert not count.any()
    C, count = update(torch.randn(4, 3), mask=torch.zeros(4))
    assert not C.any()
    assert int(count[NONFINITE]) == 0


@pytest.mark.parametrize(
    ("C", "count", "x", "given", "named"),
    [
        ((4, 4), (3,), (5, 3), {}, "x (5, 3)"),
        ((4, 5), (3,), (6, 5), {}, "C (4, 5)"),
        ((2, 4, 4), (2, 3), (3, 6, 4), {}, "x (3, 6, 4)"),
        ((4, 4), (3,), (4,), {}, "x (4,)"),
        ((4, 4), (2,), (6, 4), {}, "count"),
        ((2, 4, 4), (3,), (2, 6, 4), {}, "count"),
        ((4, 4), (3,), (2, 6, 4), {"mask": torch.ones(12)}, "mask"),
        ((4, 4), (3,), (6, 4), {"scale": torch.ones(6, 4)}, "scale"),
    ],
)
def test_shapes_that_do_not_fit(C: Any, count: Any, x: Any, given: dict[str, torch.Tensor], named: str) -> None:
    accumulator = torch.zeros(C, dtype=torch.float64)
    with pytest.raises(ValueError) as caught:
        covariance_update_(accumulator, torch.zeros(count, dtype=torch.float64), torch.ones(x), **given)
    assert named in str(caught.value)
    assert not accumulator.any()
