"""What the frozen-A layer is compared with must be right too: the rival's gradients, and the meters of memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.bench_frozen_lora import Block, Shape, block_passes, error, layer_passes
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.rivals import swap_in

CPU = torch.device("cpu")
SMALL = Shape(d=32, mlp=48, heads=4, kv_heads=2, rank=5, rows=2, length=7)


def random_block() -> Block:
    """In float64, PEFT's adapters of rank 5 and scaling 0.6 on all seven layers, nothing of them zero."""
    torch.manual_seed(0)
    block = Block(SMALL).double().requires_grad_(False)
    names = [name.rpartition(".")[2] for name, part in block.named_modules() if isinstance(part, nn.Linear)]
    get_peft_model(block, LoraConfig(r=5, lora_alpha=3, target_modules=names), autocast_adapter_dtype=False)
    for name, parameter in block.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return block


def test_the_rivals_block_has_pefts_output_and_gradients() -> None:
    theirs = random_block()
    rival = copy.deepcopy(theirs)
    trained = {name: part for name, part in theirs.named_parameters() if part.requires_grad}
    rivals = {name: part for name, part in rival.named_parameters() if part.requires_grad}
    swap_in(rival.layer)
    x, dy = torch.randn(2, 2, 7, 32, dtype=torch.float64)
    found: list[list[torch.Tensor]] = []
    for block, parameters in ((theirs, trained), (rival, rivals)):
        given = x.clone().requires_grad_()
        y = block(given)
        found.append([y, *torch.autograd.grad(y, [given, *parameters.values()], dy)])
    assert len(trained) == 14
    for name, one, two in zip(["y", "x", *trained], *found, strict=True):
        assert two.detach().any(), name
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_the_rival_has_no_bias() -> None:
    block = random_block()
    block.layer.self_attn.q_proj.get_base_layer().bias = nn.Parameter(torch.ones(32, dtype=torch.float64))
    swap_in(block.layer)
    with pytest.raises(ValueError, match="bias"):
        block(torch.zeros(1, 3, 32, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_variants_of_a_layer_compute_the_same(dtype: torch.dtype) -> None:
    passes, exact, _ = layer_passes(40, 24, 5, dtype, CPU, compiling=False)
    truth = exact.everything()
    for name, one in passes.items():
        found = one.everything()
        assert found["y"].dtype == dtype
        if one.trained:
            assert max(error(found, truth).values()) < 4 * torch.finfo(dtype).eps, name
    dAs = [passes[name].everything()["A"] for name in ("PEFT LoRA", "Unsloth-style")]
    torch.testing.assert_close(*dAs)


def test_variants_of_a_block_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.bench_frozen_lora.compiled", lambda *_: "not compiled here")
    passes, few, exact, share, why = block_passes(SMALL, torch.float32, CPU)
    assert why == "not compiled here"
    linears = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    assert share == pytest.approx(5 * sum(a + b for a, b in linears) / sum(a * b for a, b in linears))
    truth = exact.everything()
    for name, one in few.items():
        if one.trained:
            assert max(error(one.everything(), truth).values()) < 1e-5, name
    assert passes["ours"].trained.keys() == passes["PEFT, A frozen"].trained.keys()
    # One memory holds the base's weights for all of them.
    assert len({id(one.call.layer.input_layernorm.weight) for one in passes.values()}) == 1


def test_an_error_of_a_known_size() -> None:
    exact = {name: torch.ones(4, dtype=torch.float64) for name in ("y", "x", "B of q", "B of k")}
    found = {**exact, "x": exact["x"] * 1.5, "B of k": exact["B of k"] * 3}
    assert error(found, exact) == pytest.approx({"y": 0, "x": 0.5, "B": 2**0.5})


def test_what_is_saved_is_counted_once_and_without_weights() -> None:
    x, W = torch.randn(10, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    assert saved_bytes(lambda: (x @ W.T, x.T @ x), [W]) == 10 * 8 * 4
    assert saved_bytes(lambda: (x @ W.T, x.T @ x), [W, x]) == 0
    assert saved_bytes(lambda: x.exp().sum(), [x]) == 10 * 8 * 4  # its result
    assert saved_bytes(lambda: x[2:4].square(), [W]) == 10 * 8 * 4  # a view keeps the whole


def test_variants_save_what_their_formulas_say() -> None:
    T, d, r = 64, 48, 8
    passes, _, _ = layer_passes(T, d, r, torch.float32, CPU, compiling=False)

    x, z = 4 * T * d, 4 * T * r
    expected = {"ours": z, "frozen linear alone": 0, "PEFT LoRA": x + z, "PEFT, A frozen": z, "Unsloth-style": x}
    assert {name: saved_bytes(passes[name].forward, passes[name].weights()) for name in expected} == expected


def test_the_peak_is_that_of_what_lives_together() -> None:
    def call() -> Any:
        one = torch.empty(1000, 1000)
        two = torch.empty(500, 1000)
        del one
        return two, torch.empty(250, 1000)

    assert peak_bytes(call, CPU).allocated == 4 * 1_500_000


def test_memory_of_other_allocators_is_resident() -> None:
    import numpy as np

    peak = peak_bytes(lambda: np.ones(16_000_000, np.float32), CPU)
    assert peak.allocated == 0
    if peak.resident is not None:
        assert 64_000_000 <= peak.resident + (2 << 20) <= 80_000_000
