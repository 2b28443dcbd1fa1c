"""Covariance accumulation against the products that collectors use today: `make bench`, or pytest benchmarks.

Random data; variants take turns; each result is compared with float64 in the same run. A ratio is how many times ours
fits into the other's time. `--rows=DIR` writes the rows, `python benchmarks/plot.py DIR` draws them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.roofline import covariance_seconds
from benchmarks.roofline import device as peaks_of_device
from kore_fast.ops import backends, covariance_update_, finalize, new_count

GPU = torch.cuda.is_available()
WIDTHS = [4096, 11008, 18944] if GPU else [1536, 4096]
# Where the plain product might win.
SMALL = [(64, 16), (64, 512), (128, 128), (256, 32), (576, 64), (576, 512), (1536, 64)]


def addmm(C: torch.Tensor, x: torch.Tensor) -> None:
    """The plain product: torch's own in C's dtype, with sums in float32 where x is narrower."""
    if x.dtype == C.dtype:
        C.addmm_(x.T, x)
    elif x.is_cuda:
        torch.addmm(C, x.T, x, out_dtype=torch.float32, out=C)
    else:
        wide = x.float()
        C.addmm_(wide.T, wide)


def float32_hook(C: torch.Tensor, x: torch.Tensor) -> None:
    """What CorDA's hook and the released KORE code do for each layer: a float32 copy, a float32 product, a sum."""
    wide = x.float()
    C.add_(wide.T @ wide)


def ours(backend: str, device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], None]:
    count = new_count(device=device)
    return lambda C, x: covariance_update_(C, count, x, backend=backend)  # type: ignore[arg-type]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    """Values as TF32 products see them: ten bits of mantissa, rounded to nearest."""
    return ((x.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def error(C: torch.Tensor, exact: torch.Tensor) -> float:
    return float((C.double().tril() - exact).abs().max() / exact.abs().max())


def variants_of(x: torch.Tensor) -> dict[str, tuple[torch.Tensor, Callable[[torch.Tensor, torch.Tensor], None]]]:
    """Name → its accumulator and its call."""
    d = x.shape[-1]

    def zeros(dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(d, d, dtype=dtype, device=x.device)

    auto = ours("auto", x.device)
    found: dict[str, Any] = {"ours": (zeros(torch.float32), auto), "ours, float64 sums": (zeros(torch.float64), auto)}
    if x.is_cuda:
        for name, reason in backends.describe("covariance", x.device):
            if reason is None and name != "reference":
                found[name] = (zeros(torch.float32), ours(name, x.device))
    found["addmm"] = (zeros(torch.float32), addmm)
    found["float32 hook"] = (zeros(torch.float32), float32_hook)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16] if GPU else [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("d", "tokens"), [(d, 8192) for d in WIDTHS] + SMALL)
def bench_covariance(
    benchmark: BenchmarkFixture, compare: Any, device: torch.device, dtype: torch.dtype, d: int, tokens: int
) -> None:
    x = torch.randn(tokens, d, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    wide = x.double()
    exact = (wide.T @ wide).tril()
    variants = variants_of(x)
    extra = {}
    for name, (C, call) in variants.items():
        call(C, x)
        extra[name] = {"error": error(C, exact)}
        C.zero_()
    assert extra["ours"]["error"] <= 2 * max(extra["addmm"]["error"], 1e-7)
    assert extra["ours, float64 sums"]["error"] <= 2 * max(extra["addmm"]["error"], 1e-7)
    case = {"d": d, "tokens": tokens, "dtype": name_of(dtype)}
    calls = {name: (lambda C=C, call=call: call(C, x)) for name, (C, call) in variants.items()}
    small = tokens * d * d < 1 << 30
    peaks = peaks_of_device()
    least = None if peaks is None else covariance_seconds(peaks, tokens, d)
    rows = compare(calls, case, ours="ours", rounds=301 if small else 7, least_seconds=least, extra=extra)
    if least is not None:
        benchmark.extra_info["roofline"] = rows["ours"]["roofline"]
    benchmark.extra_info.update({f"ratio to {name}": row["ratio"] for name, row in rows.items() if name != "ours"})
    benchmark.extra_info.update(case)
    benchmark.pedantic(calls["ours"], rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_accuracy(benchmark: BenchmarkFixture, record: Any, device: torch.device, dtype: torch.dtype) -> None:
    """What the null space lives on: 200,000 tokens, three massive directions, a tail from 1e-6 down to 1e-8 of them.

    Figures are leaks of the bottom quarter of the directions, as multiples of the float64 oracle's.
    """
    d, rank, tokens, batch = 256, 64, 200_000, 8192
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.cat([torch.logspace(-8, -6, d - 3), torch.tensor([0.3, 0.6, 1.0])]).double()
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    sums = {name: torch.zeros(d, d, dtype=torch.float64, device=device) for name in ("oracle", "ours")}
    sums |= {name: torch.zeros(d, d, device=device) for name in ("ours, float32 sums", "addmm", "addmm, TF32")}
    count = new_count(device=device)
    for start in range(0, tokens, batch):
        n = min(batch, tokens - start)
        x = torch.randn(n, d, generator=generator, dtype=torch.float64) * spectrum.sqrt() @ basis.T
        x = x.to(device, dtype)
        sums["oracle"].addmm_(x.double().T, x.double())
        covariance_update_(sums["ours"], count, x)
        covariance_update_(sums["ours, float32 sums"], count, x)
        addmm(sums["addmm"], x)
        addmm(sums["addmm, TF32"], to_tf32(x))

    def leak(C: torch.Tensor) -> float:
        U = torch.linalg.eigh(C.double())[1][:, :rank]
        return float((U * (sums["oracle"] @ U)).sum())

    best = leak(sums["oracle"])
    found = {name: leak(finalize(C) if name.startswith("ours") else C) / best for name, C in sums.items()}
    for name, ratio in found.items():
        record({"variant": name, "d": d, "rank": rank, "tokens": tokens, "dtype": name_of(dtype), "leak_ratio": ratio})
    benchmark.extra_info.update(found)
    assert found["ours"] <= 1.02
    benchmark.pedantic(lambda: covariance_update_(sums["ours"], count, x), rounds=3)
