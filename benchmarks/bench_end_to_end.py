"""A whole initialisation, from calibration batches to factors, against the paper's route: `make bench`.

The model is random, of LLaVA-v1.5-7B's shape on a GPU and of the tiny VLM's decoder on a CPU. The paper's route (a
float32 hook and two full SVDs for each linear layer) is run on the layers of one decoder block; its time for the whole
model is that times the number of blocks, and says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from benchmarks.bench_nullspace import SPECTRA, paper, reflected

GPU = torch.cuda.is_available()
LLAVA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
TINY = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
SHAPE, RANK, BATCHES, ROWS, TOKENS = (LLAVA, 235, 32, 8, 650) if GPU else (TINY, 53, 4, 12, 128)


def decoder(device: torch.device) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPE, num_key_value_heads=SHAPE["num_attention_heads"], vocab_size=32000)
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(config).to(torch.bfloat16 if GPU else torch.float32)
    return model.eval().requires_grad_(False)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    if GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    found = work()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start, found


def bench_initialization(
    benchmark: BenchmarkFixture, record: Callable[[dict[str, Any]], None], device: torch.device
) -> None:
    from kore_fast.constraint import KoreConfig, collect_covariance, kore_factors

    model = decoder(device)
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"input_ids": torch.randint(0, 32000, (ROWS, TOKENS), generator=generator), "logits_to_keep": 1}
        for _ in range(BATCHES)
    ]

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**{key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()})

    alone, _ = seconds(forward)
    # All sums of LLaVA-7B take 44 GB.
    collecting, store = seconds(lambda: collect_covariance(model, batches, warn_few_tokens=False))
    solving, (factors, leaks) = seconds(lambda: kore_factors(model, KoreConfig(rank=RANK), store))

    block = [name for name in factors if ".layers.0." in name]
    covariances = {name: store.covariance(name).float().to(device) for name in block}
    weights = {name: model.get_parameter(f"{name}.weight").float() for name in block}
    theirs, _ = seconds(lambda: [paper(covariances[name], RANK, weights[name]) for name in block])
    blocks = SHAPE["num_hidden_layers"]
    case = {"tokens": BATCHES * ROWS * TOKENS, "rank": RANK, **SHAPE}
    worst = max(leak.leak for leak in leaks)
    for variant, taken, more in [
        ("forward alone", alone, {}),
        ("ours, collection", collecting, {}),
        ("ours, null spaces and factors", solving, {"worst_leak": worst}),
        ("ours", collecting + solving, {}),
        ("the paper's factorisations", blocks * theirs, {"measured": f"one block of {blocks}, times {blocks}"}),
    ]:
        ratio = round(taken / (collecting + solving), 3)
        record({"variant": variant, **case, "median_ms": round(1e3 * taken, 1), "ratio": ratio, **more})
        benchmark.extra_info[variant] = f"{taken:.1f} s"
    assert len(factors) == 7 * blocks
    assert worst < 1
    benchmark.pedantic(forward, rounds=1)


@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize(
    ("model", "problems"),
    [("LLaVA-v1.5-7B", {4096: 96, 11008: 32}), ("Qwen2.5-VL-7B", {3584: 84, 18944: 28})],
)
def bench_all_problems(
    benchmark: BenchmarkFixture, record: Callable[[dict[str, Any]], None], device: torch.device, model: str,
    problems: dict[int, int],
) -> None:  # fmt: skip
    """Every null space of a model, one after the other, on covariances with massive directions."""
    from kore_fast.ops import nullspace

    rank = 235 if model.startswith("LLaVA") else 274
    total = 0.0
    for d, times in problems.items():
        values = SPECTRA["massive directions"](d).double().to(device)
        C = reflected(values)
        nullspace(C, rank)
        for _ in range(3):
            taken, space = seconds(partial(nullspace, C, rank))
        least = float(values.sort().values[:rank].sum())
        assert float(space.leak) <= 1.02 * least
        total += taken * times
        record(
            {"variant": "ours", "model": model, "d": d, "rank": rank, "problems": times, "median_ms": 1e3 * taken,
             "ratio": 1.0, "leak_ratio": float(space.leak) / least, "method": space.method}
        )  # fmt: skip
    record({"variant": "ours, all", "model": model, "rank": rank, "median_ms": 1e3 * total, "ratio": 1.0})
    benchmark.extra_info["all problems, s"] = total
    benchmark.pedantic(lambda: None, rounds=1)
