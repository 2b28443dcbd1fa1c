"""The covariance update on a GPU, on every backend that runs there, against a float64 oracle on the same GPU."""

from __future__ import annotations

import pytest
import torch

from kore_fast.ops import covariance_update_, finalize, new_count
from kore_fast.ops.backends import describe
from kore_fast.ops.covariance import NONFINITE, TOKENS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GPU = torch.device("cuda")


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend; one that can't run here fails, because on a GPU machine all of them should."""
    reasons = dict(describe("covariance", GPU))
    assert reasons[request.param] is None, reasons[request.param]
    return str(request.param)


def oracle(x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1]).double()
    left = rows if weights is None else rows * weights.reshape(-1, 1).double()
    return left.T @ rows


def assert_close(C: torch.Tensor, exact: torch.Tensor, terms: int) -> None:
    """Within float32's rounding of sums of ``terms`` products, from the spread of the errors that addmm shows."""
    scale = max(float(exact.abs().max()), 1.0)
    assert float((C.double() - exact).abs().max()) <= 4e-7 * scale * max(1.0, (terms / 256) ** 0.5)


@pytest.mark.parametrize("sums", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "d"), [(1, 8), (77, 40), (512, 256), (1000, 1111), (8192, 1536), (300, 4096)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_equals_the_oracle(
    dtype: torch.dtype, rows: int, d: int, weighted: bool, sums: torch.dtype, backend: str
) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, d, device=GPU).to(dtype)
    w = torch.rand(rows, device=GPU) + 0.1 if weighted else None
    C, count = torch.zeros(d, d, dtype=sums, device=GPU), new_count(device=GPU)
    covariance_update_(C, count, x, scale=w, backend=backend)
    assert_close(finalize(C), oracle(x, w), rows)
    assert int(count[TOKENS]) == rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_inputs_are_summed_in_float64(dtype: torch.dtype) -> None:
    x = torch.randn(700, 130, device=GPU, dtype=dtype)
    C, count = torch.zeros(130, 130, dtype=torch.float64, device=GPU), new_count(device=GPU)
    covariance_update_(C, count, x)
    assert torch.allclose(finalize(C), oracle(x), rtol=1e-12, atol=1e-10)


def test_masks_groups_and_broken_rows(backend: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 90, 200, device=GPU).bfloat16()
    mask = torch.rand(3, 4, 90, device=GPU) > 0.4
    x[0, 1, 2, 3], x[2, 3, 4, 5] = float("nan"), float("inf")
    mask[0, 1, 2], mask[2, 3, 4] = True, False
    C, count = torch.zeros(3, 200, 200, device=GPU), new_count(3, device=GPU)
    for _ in range(2):
        covariance_update_(C, count, x, mask, backend=backend)
    finalize(C)
    keep = mask & torch.isfinite(x).all(-1)
    for g in range(3):
        assert_close(C[g] / 2, oracle(x[g][keep[g]]), int(keep[g].sum()))
        assert int(count[g, TOKENS]) == 2 * int(keep[g].sum())
    assert count[:, NONFINITE].tolist() == [2, 0, 0]


def test_strides_that_a_layer_sees(backend: str) -> None:
    whole = torch.randn(6, 50, 192, device=GPU).bfloat16()
    for x in (whole[:, 1:], whole.transpose(0, 1), whole[..., 7:100], whole[:, :, ::2], whole[0].T):
        d = x.shape[-1]
        C, count = torch.zeros(d, d, device=GPU), new_count(device=GPU)
        covariance_update_(C, count, x, backend=backend)
        assert_close(finalize(C), oracle(x), x.numel() // d)


def test_the_widest_layer(backend: str) -> None:
    """18,944 is Qwen2.5-VL-7B's: byte offsets in C pass 2³⁰."""
    d, last = 18944, 500
    x = torch.randn(64, d, device=GPU).bfloat16()
    C, count = torch.zeros(d, d, device=GPU), new_count(device=GPU)
    covariance_update_(C, count, x, backend=backend)
    wide = x.double()
    exact = wide[:, -last:].T @ wide
    assert_close(C[-last:, :-last], exact[:, :-last], 64)
    assert_close(C[-last:, -last:].tril(), exact[:, -last:].tril(), 64)


def test_two_runs_are_equal_to_the_bit(backend: str) -> None:
    x = torch.randn(5000, 700, device=GPU).bfloat16()
    found = []
    for _ in range(2):
        C, count = torch.zeros(700, 700, device=GPU), new_count(device=GPU)
        covariance_update_(C, count, x, backend=backend)
        found.append(C.tril())
    assert torch.equal(*found)


def test_nothing_waits_for_the_gpu(backend: str) -> None:
    x = torch.randn(900, 300, device=GPU).bfloat16()
    C, count = torch.zeros(300, 300, device=GPU), new_count(device=GPU)
    mask, w = torch.rand(900, device=GPU) > 0.5, torch.rand(900, device=GPU)
    covariance_update_(C, count, x, mask, w, backend=backend)  # compiles, tunes
    torch.cuda.set_sync_debug_mode("error")
    try:
        covariance_update_(C, count, x, mask, w, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
