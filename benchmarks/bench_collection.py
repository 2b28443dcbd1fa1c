"""What collecting costs beside the forward pass, on the tiny VLM of the quickstart (`make quickstart` builds it)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

MODEL = Path(__file__).resolve().parents[1] / "build" / "tiny_vlm"
BATCHES, ROWS, TOKENS = 3, 16, 128


def forward(model: nn.Module, batches: list[dict[str, Any]]) -> None:
    with torch.no_grad():
        for batch in batches:
            model(**batch)


def float32_hooks(model: nn.Module, batches: list[dict[str, Any]]) -> None:
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
        forward(model, batches)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="no build/tiny_vlm: run make quickstart first")
def bench_collection(benchmark: BenchmarkFixture, compare: Any) -> None:
    from kore_fast.constraint import collect_covariance
    from kore_fast.modules.loading import load_model

    model = load_model(MODEL)
    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            "input_ids": torch.randint(1000, 40000, (ROWS, TOKENS), generator=generator),
            "attention_mask": torch.ones(ROWS, TOKENS, dtype=torch.long),
            "logits_to_keep": 1,
        }
        for _ in range(BATCHES)
    ]
    calls = {
        "ours": lambda: collect_covariance(model, batches, warn_few_tokens=False),
        "forward alone": lambda: forward(model, batches),
        "float32 hooks": lambda: float32_hooks(model, batches),
    }
    case = {"tokens": BATCHES * ROWS * TOKENS, "dtype": "float32", "model": "tiny_vlm"}
    rows = compare(calls, case, ours="ours", rounds=5)
    benchmark.extra_info["times the forward pass"] = 1 / rows["forward alone"]["ratio"]
    benchmark.pedantic(calls["forward alone"], rounds=1)
