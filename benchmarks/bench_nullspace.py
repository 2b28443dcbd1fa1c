"""The bottom-r space of a covariance against the paper's route, a full SVD: `make bench`, or pytest benchmarks.

A power-law spectrum with three massive directions, as activations have it. A row carries its leak beside its time: a
fast wrong answer is no answer.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from kore_fast.ops import nullspace

RANK = 53


def ours(C: torch.Tensor) -> torch.Tensor:
    return nullspace(C, RANK).basis


def svd_float32(C: torch.Tensor) -> torch.Tensor:
    """The released KORE code's: singular vectors of C in float32."""
    return torch.linalg.svd(C.float())[0][:, -RANK:].double()


def eigh_float32(C: torch.Tensor) -> torch.Tensor:
    return torch.linalg.eigh(C.float())[1][:, :RANK].double()


def covariance(d: int) -> tuple[torch.Tensor, float]:
    """C (d, d) float64 and the least energy that a space of RANK directions can carry."""
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    spectrum = torch.logspace(-2, -8, d, dtype=torch.float64)
    spectrum[:3] = torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64)
    return (Q * spectrum) @ Q.T, float(spectrum[-RANK:].sum())


@pytest.mark.parametrize("d", [576, 1536])
@pytest.mark.parametrize("provider", [ours, svd_float32, eigh_float32], ids=lambda provider: provider.__name__)
def bench_nullspace(benchmark: BenchmarkFixture, provider: Callable[[torch.Tensor], torch.Tensor], d: int) -> None:
    C, least = covariance(d)
    basis = provider(C)
    ratio = float((basis * (C @ basis)).sum()) / least
    if provider is ours:
        assert ratio < 1 + 1e-6
    benchmark.extra_info.update(
        d=d, rank=RANK, leak_over_optimum=ratio, torch=torch.__version__, threads=torch.get_num_threads()
    )
    benchmark.pedantic(provider, (C,), rounds=3, iterations=1)
