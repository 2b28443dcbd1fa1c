"""Covariance accumulation against the full product that collectors use: `make bench`, or pytest benchmarks.

Random data, float64 sums, one triangle against the whole; the result is checked in the same run.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from kore_fast.ops import covariance_update_, finalize, new_count

TOKENS = 2048


def triangle(C: torch.Tensor, x: torch.Tensor) -> None:
    covariance_update_(C, new_count(), x)


def full_float64(C: torch.Tensor, x: torch.Tensor) -> None:
    x64 = x.double()
    C.addmm_(x64.T, x64)


def full_float32(C: torch.Tensor, x: torch.Tensor) -> None:
    """What the released KORE code, CorDA and GPTQ do; loses what lies below about 1e-7 of ‖C‖."""
    x32 = x.float()
    C.add_(x32.T @ x32)


@pytest.mark.parametrize("d", [576, 1536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("provider", [triangle, full_float64, full_float32], ids=lambda provider: provider.__name__)
def bench_covariance(
    benchmark: BenchmarkFixture,
    provider: Callable[[torch.Tensor, torch.Tensor], None],
    dtype: torch.dtype,
    d: int,
) -> None:
    x = torch.randn(TOKENS, d, generator=torch.Generator().manual_seed(0)).to(dtype)
    C = torch.zeros(d, d, dtype=torch.float64)
    provider(C, x)
    result = finalize(C.clone())
    oracle = x.double().T @ x.double()
    error = float((result - oracle).abs().max() / oracle.abs().max())
    assert error < (1e-5 if provider is full_float32 else 1e-13)
    benchmark.extra_info.update(
        d=d, tokens=TOKENS, error=error, torch=torch.__version__, threads=torch.get_num_threads()
    )
    benchmark(provider, C, x)
