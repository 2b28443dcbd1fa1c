"""The bottom-r space of a covariance against full decompositions and other iterations: `make bench`.

Spectra as activations have them, and worse ones. A row carries its leak, as a multiple of the least possible, beside
its time: more than 1.02 is no answer, however fast. `--rows=DIR` writes the rows, `python benchmarks/plot.py DIR` draws
them.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from kore_fast.ops import nullspace
from kore_fast.ops.dense import product
from kore_fast.ops.factors import thin_factors

GPU = torch.cuda.is_available()
QUICKSTART = Path(__file__).resolve().parents[1] / "runs" / "quickstart" / "covariance"
SPECTRA: dict[str, Callable[[int], torch.Tensor]] = {
    "power law": lambda d: torch.arange(1, d + 1) ** -1.5,
    "flat power law": lambda d: torch.arange(1, d + 1) ** -0.8,
    "massive directions": lambda d: torch.cat([torch.tensor([1.0, 0.3, 0.1]), torch.logspace(-2, -8, d - 3)]),
    "clustered tail": lambda d: torch.cat([torch.logspace(0, -3, d // 2), torch.full((d - d // 2,), 1e-4)]),
    "rank-deficient": lambda d: torch.cat([torch.logspace(0, -6, d // 2), torch.zeros(d - d // 2)]),
}


def covariance(spectrum: str, d: int, rank: int, device: torch.device) -> tuple[torch.Tensor, float]:
    """C (d, d) float64 and the least energy that ``rank`` directions can carry."""
    values = SPECTRA[spectrum](d).double().to(device)
    generator = torch.Generator(device).manual_seed(0)
    Q = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64, device=device))[0]
    C = (Q * values) @ Q.T
    return (C + C.T) / 2, float(values.sort().values[:rank].sum())


def reflected(values: torch.Tensor) -> torch.Tensor:
    """C (d, d) with these eigenvalues, turned by three reflections: a random basis of a wide C takes minutes."""
    C = torch.diag(values)
    generator = torch.Generator(values.device).manual_seed(0)
    for _ in range(3):  # C ← H C H with H = I − 2 v vᵀ, in place
        v = torch.randn(len(values), generator=generator, dtype=C.dtype, device=C.device)
        v /= v.norm()
        Cv = C @ v
        w = Cv - (v @ Cv) * v
        C.addr_(v, w, alpha=-2).addr_(w, v, alpha=-2)
    return C


def truncated(C: torch.Tensor, rank: int) -> torch.Tensor:
    return nullspace(C, rank, method="truncated").basis


def complement(C: torch.Tensor, rank: int) -> torch.Tensor:
    return nullspace(C, rank, method="complement").basis


def eigh_float64(C: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.linalg.eigh(C)[1][:, :rank]


def eigh_float32(C: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.linalg.eigh(C.float())[1][:, :rank]


def svd_float32(C: torch.Tensor, rank: int) -> torch.Tensor:
    """The released KORE code's first step: singular vectors of C in float32."""
    return torch.linalg.svd(C.float())[0][:, -rank:]


def paper(C: torch.Tensor, rank: int, weight: torch.Tensor) -> torch.Tensor:
    """Both steps for a layer: an SVD of C, then one of W·P, as large as W (d_out, d)."""
    basis = svd_float32(C, rank)
    torch.linalg.svd((weight @ basis) @ basis.T)
    return basis


def svd_lowrank(C: torch.Tensor, rank: int) -> torch.Tensor:
    """Randomised SVD of the inverse, whose largest directions are C's smallest."""
    scale = float(C.diagonal().mean())
    inverse = torch.linalg.inv(C + 1e-12 * scale * torch.eye(len(C), dtype=C.dtype, device=C.device))
    return torch.svd_lowrank(inverse, q=rank + rank // 2, niter=4)[0][:, :rank]


def lobpcg(C: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.lobpcg(C, k=rank, largest=False, niter=30)[1]


def measured(
    compare: Any, benchmark: BenchmarkFixture, C: torch.Tensor, rank: int, least: float, case: dict[str, Any],
    variants: Mapping[str, Callable[[torch.Tensor, int], torch.Tensor]], rounds: int,
) -> None:  # fmt: skip
    trace = float(C.diagonal().sum())
    extra = {}
    for name, provider in variants.items():
        basis = torch.linalg.qr(provider(C, rank).double())[0]
        leak = float((basis * (C @ basis)).sum())
        # Of a true null space the least is nothing: then what counts is the share of the whole.
        ratio = leak / least if least > 1e-12 * trace else 1 + max(leak, 0) / trace
        extra[name] = {"leak_ratio": round(ratio, 5), "failed": not ratio <= 1.02}
    assert extra["ours"]["leak_ratio"] <= 1.02
    calls = {name: (lambda provider=provider: provider(C, rank)) for name, provider in variants.items()}
    rows = compare(calls, case, ours="ours", rounds=rounds, warm=True, extra=extra)
    benchmark.extra_info.update({f"{name}: ratio, leak": (r["ratio"], r["leak_ratio"]) for name, r in rows.items()})
    benchmark.pedantic(calls["ours"], rounds=1)


@pytest.mark.parametrize("spectrum", SPECTRA)
def bench_spectra(benchmark: BenchmarkFixture, compare: Any, device: torch.device, spectrum: str) -> None:
    d, rank = (4096, 235) if GPU else (1536, 88)
    C, least = covariance(spectrum, d, rank, device)
    variants = {"ours": truncated, "eigh float64": eigh_float64, "eigh float32": eigh_float32}
    variants |= {"svd_lowrank of the inverse": svd_lowrank, "lobpcg": lobpcg}
    measured(compare, benchmark, C, rank, least, {"spectrum": spectrum, "d": d, "rank": rank}, variants, rounds=3)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("left_out", [64, 192])
def bench_complement(
    benchmark: BenchmarkFixture, compare: Any, device: torch.device, spectrum: str, left_out: int
) -> None:
    """Nearly all directions: the few that are left out are found."""
    d = 4096 if GPU else 1536
    rank = d - left_out
    C, least = covariance(spectrum, d, rank, device)
    variants = {"ours": complement, "eigh float64": eigh_float64, "eigh float32": eigh_float32}
    measured(compare, benchmark, C, rank, least, {"spectrum": spectrum, "d": d, "rank": rank}, variants, rounds=3)


@pytest.mark.parametrize("spectrum", ["flat power law", "massive directions"])
def bench_llava(benchmark: BenchmarkFixture, compare: Any, device: torch.device, spectrum: str) -> None:
    """Width and rank of LLaVA-v1.5-7B."""
    d, rank = 4096, 235
    C, least = covariance(spectrum, d, rank, device)
    variants = {"ours": truncated, "eigh float64": eigh_float64, "eigh float32": eigh_float32}
    measured(compare, benchmark, C, rank, least, {"spectrum": spectrum, "d": d, "rank": rank}, variants, rounds=3)


@pytest.mark.parametrize("layers", [1, 3])
def bench_factors(benchmark: BenchmarkFixture, compare: Any, device: torch.device, layers: int) -> None:
    """From C to the factors of the layers that read it: o_proj of LLaVA-v1.5-7B alone, or q, k and v together.

    The paper's route takes both its decompositions for every layer, whatever they share.
    """
    d, rank, spectrum = 4096, 235, "massive directions"
    C, least = covariance(spectrum, d, rank, device)
    generator = torch.Generator(device).manual_seed(0)
    weights = [torch.randn(d, d, generator=generator, device=device) for _ in range(layers)]

    def ours(C: torch.Tensor, rank: int) -> torch.Tensor:
        basis = truncated(C, rank)
        thin_factors([product(weight.double(), basis) for weight in weights], basis, b0=False)
        return basis

    def theirs(C: torch.Tensor, rank: int) -> torch.Tensor:
        *_, basis = [paper(C, rank, weight) for weight in weights]
        return basis

    variants = {"ours": ours, "the paper's": theirs}
    case = {"spectrum": f"{spectrum}, factors of {layers}", "d": d, "rank": rank}
    measured(compare, benchmark, C, rank, least, case, variants, rounds=2)


@pytest.mark.slow
def bench_wide(benchmark: BenchmarkFixture, record: Any, device: torch.device) -> None:
    """The widest input of LLaVA-v1.5-7B, once each: a full decomposition takes minutes on a CPU. Memory is C's d²."""
    d, rank = 11008, 235
    values = SPECTRA["massive directions"](d).double().to(device)
    C = reflected(values)
    least = float(values.sort().values[:rank].sum())
    before, taken = peak_bytes(), {}
    for name, provider in {"ours": truncated, "eigh float64": eigh_float64}.items():
        start = time.perf_counter()
        basis = provider(C, rank)
        leak = float((basis * (C @ basis)).sum())  # also waits for a GPU
        taken[name] = time.perf_counter() - start
        more = {"peak_over_c": round((peak_bytes() - before) / (8 * d * d), 2)} if name == "ours" else {}
        row = {"variant": name, "spectrum": "massive directions", "d": d, "rank": rank}
        row |= {"median_ms": 1e3 * taken[name], "ratio": taken[name] / taken["ours"], "rounds": 1}
        record({**row, "leak_ratio": leak / least, "failed": not leak <= 1.02 * least, **more})
        benchmark.extra_info[name] = {**more, "s": taken[name], "leak": leak / least}
        assert leak <= 1.02 * least
    benchmark.pedantic(lambda: None, rounds=1)


def peak_bytes() -> int:
    """The most memory so far: of the GPU, or of this process."""
    if GPU:
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.skipif(not QUICKSTART.exists(), reason="no runs/quickstart/covariance: run make quickstart first")
@pytest.mark.parametrize("layer", [2, 28])
@pytest.mark.parametrize("module", ["self_attn.q_proj", "mlp.down_proj"])
def bench_tiny_vlm(benchmark: BenchmarkFixture, compare: Any, device: torch.device, module: str, layer: int) -> None:
    """Covariances of the quickstart's model."""
    from kore_fast.constraint import CovarianceStore

    store = CovarianceStore.load(QUICKSTART)
    name = next(name for name in store.layers if name.endswith(f"layers.{layer}.{module}"))
    C = store.covariance(name).to(device)
    d = C.shape[-1]
    rank = 53 if d > 1000 else 27
    least = float(torch.linalg.eigvalsh(C)[:rank].sum())
    variants = {"ours": truncated, "eigh float64": eigh_float64, "eigh float32": eigh_float32}
    case = {"spectrum": f"tiny VLM, layer {layer}, {module}", "d": d, "rank": rank}
    measured(compare, benchmark, C, rank, least, case, variants, rounds=3)
