"""What collecting costs beside the forward pass, on the tiny VLM of the quickstart (`make quickstart` builds it)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

MODEL = Path(__file__).resolve().parents[1] / "build" / "tiny_vlm"
BATCHES, ROWS, TOKENS, ROUNDS = 3, 16, 128, 3
Batch = dict[str, Any]


def float32_hooks(model: nn.Module, batches: Iterable[Batch]) -> None:
    """A hook on every linear layer with a float32 product and a sum, as CorDA's and the released KORE code's."""
    from kore_fast.constraint.selection import select_linears

    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = inputs[0].detach().float().reshape(-1, inputs[0].shape[-1])
            product = x.T @ x
            sums[name] = sums[name] + product if name in sums else product

        return add

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in select_linears(model, None)]
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()


def beside_forward(run: Callable[[Iterable[Batch]], Any], bare: nn.Module, batches: list[Batch]) -> tuple[float, float]:
    """Seconds of a collection and of the bare forward passes over the same batches.

    Before each batch of the collection the bare model runs it: a machine that is now faster, now slower, is so for
    both. Two calls with a pause between them differ by a quarter on a shared machine, more than what is measured here.
    """
    forward = 0.0

    def interleaved() -> Iterator[Batch]:
        nonlocal forward
        for batch in batches:
            start = time.perf_counter()
            with torch.no_grad():
                bare(**batch)
            forward += time.perf_counter() - start
            yield batch

    start = time.perf_counter()
    run(interleaved())
    return time.perf_counter() - start - forward, forward


@pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="no build/tiny_vlm: run make quickstart first")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_collection(benchmark: BenchmarkFixture, record: Callable[[Batch], None], dtype: torch.dtype) -> None:
    from kore_fast.constraint import collect_covariance
    from kore_fast.modules.loading import load_model

    model, bare = load_model(MODEL, dtype), load_model(MODEL, dtype)
    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            "input_ids": torch.randint(1000, 40000, (ROWS, TOKENS), generator=generator),
            "attention_mask": torch.ones(ROWS, TOKENS, dtype=torch.long),
            "logits_to_keep": 1,
        }
        for _ in range(BATCHES)
    ]
    variants: dict[str, Callable[[Iterable[Batch]], Any]] = {
        "ours": lambda given: collect_covariance(model, given, warn_few_tokens=False),
        "float32 hooks": lambda given: float32_hooks(model, given),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for run in variants.values():
        run(batches[:1])
    for _ in range(ROUNDS):
        for name, run in variants.items():
            taken[name].append(beside_forward(run, bare, batches))
    ours = float(np.median([seconds for seconds, _ in taken["ours"]]))
    samples = {name: [seconds for seconds, _ in pairs] for name, pairs in taken.items()}
    samples["forward alone"] = [forward for pairs in taken.values() for _, forward in pairs]
    for name, seconds in samples.items():
        p20, median, p80 = np.quantile(seconds, [0.2, 0.5, 0.8])
        row = {
            "variant": name,
            "model": "tiny_vlm",
            "tokens": BATCHES * ROWS * TOKENS,
            "dtype": str(dtype).removeprefix("torch."),
            "median_ms": round(1e3 * float(median), 1),
            "p20_ms": round(1e3 * float(p20), 1),
            "p80_ms": round(1e3 * float(p80), 1),
            "ratio": round(float(median) / ours, 3),
        }
        if name in taken:
            times = [seconds / forward for seconds, forward in taken[name]]
            row["times_forward"] = round(float(np.median(times)), 3)
            benchmark.extra_info[f"{name}, times the forward pass"] = row["times_forward"]
        record(row)
    benchmark.pedantic(lambda: bare(**batches[0]), rounds=1)
