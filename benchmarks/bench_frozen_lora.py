"""The frozen-A LoRA layer against the frozen linear layer alone and against LoRA as others run it: `make bench`.

The floor is the frozen layer's time × (1 + 2 r/d). A row's error is that of y, dx and dB against float64, as a multiple
of plain PyTorch's in the same dtype. `--rows=DIR` writes the rows, `python benchmarks/plot.py DIR` draws them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn
from torch.nn.functional import linear

from kore_fast.ops import frozen_lora

GPU = torch.cuda.is_available()
# Tokens, width, rank.
CASES = (
    [(8192, 4096, r) for r in (16, 64, 128, 235, 256, 512)] + [(t, 4096, 256) for t in (512, 2048, 16384)]
    if GPU
    else [(2048, 2048, 128), (2048, 576, 32), (2048, 576, 27), (512, 2048, 128)]
)
SLOW = [] if GPU else [(4096, 4096, 256), (4096, 4096, 235)]


def pair(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, dy: torch.Tensor) -> Callable[[], Any]:
    """Forward and backward."""

    def run() -> None:
        x.grad = None
        layer(x).backward(dy)

    return run


def variants(T: int, d: int, r: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], Any]]:
    from peft import LoraConfig, get_peft_model

    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    x, dy = randn(T, d).to(dtype).requires_grad_(), randn(T, d).to(dtype)
    W, A = (randn(d, d) / d**0.5).to(dtype), (randn(r, d) / d**0.5).to(dtype)

    def peft(*, train_a: bool, adapter: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
        base = nn.Sequential(nn.Linear(d, d, bias=False, device=device, dtype=dtype))
        config = LoraConfig(r=r, lora_alpha=r, target_modules=["0"])
        model = get_peft_model(base, config, autocast_adapter_dtype=adapter == torch.float32)
        layer = model.base_model.model[0]
        layer.lora_A["default"].weight.requires_grad_(train_a)
        return layer

    B = randn(d, r).to(dtype).requires_grad_()
    found = {
        "ours": pair(lambda x: frozen_lora(x, W, A, B), x, dy),
        "frozen linear alone": pair(lambda x: linear(x, W), x, dy),
        "plain products": pair(lambda x: frozen_lora(x, W, A, B, backend="reference"), x, dy),
        "PEFT LoRA": pair(peft(train_a=True, adapter=dtype), x, dy),
        "PEFT, A frozen": pair(peft(train_a=False, adapter=dtype), x, dy),
    }
    if dtype != torch.float32:
        found["PEFT's default, float32 adapter"] = pair(peft(train_a=True, adapter=torch.float32), x, dy)
    return found


@pytest.mark.parametrize(("T", "d", "r"), CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_layer(
    benchmark: BenchmarkFixture, compare: Any, device: torch.device, T: int, d: int, r: int, dtype: torch.dtype
) -> None:
    calls = variants(T, d, r, dtype, device)
    case = {"tokens": T, "d": d, "rank": r, "dtype": str(dtype).removeprefix("torch."), "what": "forward and backward"}
    rows = compare(calls, case, ours="ours", rounds=5 if d > 2048 else 9)
    floor = rows["frozen linear alone"]["ratio"] * (1 + 2 * r / d)
    benchmark.extra_info.update({name: round(row["ratio"], 3) for name, row in rows.items()})
    benchmark.extra_info["ours as a multiple of the floor"] = round(1 / floor, 3)
    benchmark.pedantic(calls["ours"], rounds=1)


MODEL = Path(__file__).resolve().parents[1] / "build" / "tiny_vlm"


@pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="no build/tiny_vlm: run make quickstart first")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_training_step(benchmark: BenchmarkFixture, compare: Any, device: torch.device, dtype: torch.dtype) -> None:
    """A step of the tiny VLM (forward, backward, AdamW) on text: our layers against PEFT's, of the same rank."""
    from peft import LoraConfig, get_peft_model

    from kore_fast.constraint.selection import select_linears, target_pattern
    from kore_fast.modules.adapter import freeze_lora_a
    from kore_fast.modules.loading import load_model
    from kore_fast.modules.lora import use_kore_layers

    rank, rows, length = 53, 4, 256
    ids = torch.randint(1000, 40000, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def step(ours: bool) -> Callable[[], None]:
        model = load_model(MODEL, dtype).to(device)
        names = [name for name, _ in model.named_modules()]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=target_pattern(select_linears(model, None), names))
        peft_model = get_peft_model(model, use_kore_layers(config) if ours else config)
        if ours:
            freeze_lora_a(peft_model)
        optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], weight_decay=0.0)

        def run() -> None:
            peft_model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    case = {"tokens": rows * length, "rank": rank, "dtype": str(dtype).removeprefix("torch."), "what": "training step"}
    calls = {"ours": step(True), "PEFT LoRA": step(False)}
    rows_of = compare(calls, case, ours="ours", rounds=7)
    benchmark.extra_info.update({name: row["ratio"] for name, row in rows_of.items()})
    benchmark.pedantic(calls["ours"], rounds=1)
