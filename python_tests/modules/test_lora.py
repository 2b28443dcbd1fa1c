"""PEFT's layer with our forward pass: PEFT's results in every state, ours where that is allowed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn

from kore_fast.modules import lora as module
from kore_fast.modules.adapter import freeze_lora_a
from kore_fast.modules.lora import KoreLoraLinear, use_kore_layers


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.act, self.two = nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.act(self.one(x)))


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers the operation ran."""
    calls: list[int] = []
    real = module.frozen_lora

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "frozen_lora", counted)
    return calls


def pair(**options: Any) -> tuple[PeftModel, PeftModel]:
    """The same adapters, in our layers and in PEFT's; A frozen, B random."""
    torch.manual_seed(0)
    net = Net()
    config = LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": ["one", "two"], **options})
    ours = get_peft_model(copy.deepcopy(net), use_kore_layers(copy.deepcopy(config)))
    theirs = get_peft_model(net, config)
    for model in (ours, theirs):
        freeze(model)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours.base_model.model.one, KoreLoraLinear)
    assert not isinstance(theirs.base_model.model.one, KoreLoraLinear)
    return ours, theirs


def freeze(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)


def same(ours: nn.Module, theirs: nn.Module, run: Callable[[nn.Module], torch.Tensor] | None = None) -> None:
    """Results and gradients."""
    x = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(1))
    found = []
    for model in (ours, theirs):
        model.zero_grad()
        given = x.clone().requires_grad_()
        y = run(model) if run else model(given)
        grads: dict[str, torch.Tensor] = {}
        if y.requires_grad:
            y.float().square().sum().backward()
            grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((y, given.grad, grads))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_as_peft_computes(fused: list[int]) -> None:
    ours, theirs = pair()
    same(ours, theirs)
    assert len(fused) == 2


def test_as_the_base_computes_while_b_is_zero(fused: list[int]) -> None:
    ours, _ = pair()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    x = torch.randn(7, 16)
    y = ours(x)
    assert len(fused) == 2
    with ours.disable_adapter():
        assert torch.equal(ours(x), y)


@pytest.mark.parametrize(
    "options", [{"lora_dropout": 0.5}, {"lora_bias": True}, {"use_dora": True}], ids=lambda o: next(iter(o))
)
def test_what_is_out_of_the_ordinary_is_peft_s(options: dict[str, Any], fused: list[int]) -> None:
    ours, theirs = pair(**options)
    for model in (ours, theirs):
        model.eval()
    same(ours, theirs)
    assert not fused


def test_trained_a_is_peft_s(fused: list[int]) -> None:
    ours, theirs = pair()
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(True)
    same(ours, theirs)
    assert not fused


def test_rslora_and_other_scalings() -> None:
    same(*pair(use_rslora=True))
    same(*pair(lora_alpha=7))


def test_several_adapters_and_their_states(fused: list[int]) -> None:
    ours, theirs = pair()
    for model in (ours, theirs):
        config = LoraConfig(r=2, target_modules=["one", "two"], init_lora_weights=False)
        torch.manual_seed(3)
        model.add_adapter("other", use_kore_layers(config) if model is ours else config)
    ours.load_state_dict(theirs.state_dict())
    for name in ("other", "default"):
        for model in (ours, theirs):
            model.set_adapter(name)
            freeze(model)
        fused.clear()
        same(ours, theirs)
        assert len(fused) == 2
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "other"])
        freeze(model)
    fused.clear()
    same(ours, theirs)
    assert not fused


def test_what_is_frozen_stays_so_until_it_is_deleted() -> None:
    ours, _ = pair()
    layer = ours.base_model.model.one
    freeze_lora_a(ours)
    for switch in (
        lambda: layer.set_adapter(["default"]),
        lambda: layer.set_requires_grad("default", True),
        lambda: (layer.enable_adapters(False), layer.enable_adapters(True)),
    ):
        switch()
        assert not layer.lora_A["default"].weight.requires_grad
        assert layer.lora_B["default"].weight.requires_grad
    ours.add_adapter("other", use_kore_layers(LoraConfig(r=2, target_modules=["one", "two"])))
    ours.set_adapter("other")
    assert layer.lora_A["other"].weight.requires_grad
    ours.delete_adapter("default")
    ours.add_adapter("default", use_kore_layers(LoraConfig(r=2, target_modules=["one", "two"])))
    ours.set_adapter("default")
    assert layer.lora_A["default"].weight.requires_grad


def test_disabled(fused: list[int]) -> None:
    ours, theirs = pair()
    with ours.disable_adapter(), theirs.disable_adapter():
        same(ours, theirs)
    assert not fused


def test_merged_and_unmerged(fused: list[int]) -> None:
    ours, theirs = pair()
    x = torch.randn(7, 16)
    apart = ours(x)
    for model in (ours, theirs):
        model.merge_adapter()
    fused.clear()
    same(ours, theirs)
    assert not fused
    torch.testing.assert_close(ours(x), apart)
    for model in (ours, theirs):
        model.unmerge_adapter()
    same(ours, theirs)
    assert len(fused) == 2
    plain = ours.merge_and_unload()
    assert type(plain.one) is nn.Linear
    torch.testing.assert_close(plain(x), apart)


def test_mixed_batches(fused: list[int]) -> None:
    ours, theirs = pair()
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    for model in (ours, theirs):
        model.eval()
    same(ours, theirs, lambda model: model(x, adapter_names=["default", "__base__", "default"]))
    assert not fused


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_with_float32_adapters(dtype: torch.dtype, fused: list[int]) -> None:
    torch.manual_seed(0)
    net = Net().to(dtype)
    config = LoraConfig(r=4, target_modules=["one", "two"], init_lora_weights=False)
    torch.manual_seed(1)
    ours = get_peft_model(copy.deepcopy(net), use_kore_layers(copy.deepcopy(config)))
    torch.manual_seed(1)
    theirs = get_peft_model(net, config)
    freeze(ours)
    freeze(theirs)
    assert ours.base_model.model.one.lora_B["default"].weight.dtype == torch.float32
    x = torch.randn(9, 16).to(dtype)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0.03, atol=0.03)
    assert len(fused) == 2
    ours(x).float().sum().backward()
    assert ours.base_model.model.one.lora_B["default"].weight.grad.dtype == torch.float32


def test_under_autocast(fused: list[int]) -> None:
    ours, theirs = pair()
    x = torch.randn(9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        one, two = ours(x), theirs(x)
    assert one.dtype == two.dtype == torch.bfloat16
    torch.testing.assert_close(one, two, rtol=0.03, atol=0.03)
    assert len(fused) == 2


def test_hooks_on_the_base_are_called(fused: list[int]) -> None:
    ours, _ = pair()
    seen: list[int] = []
    ours.base_model.model.one.get_base_layer().register_forward_hook(lambda *_: seen.append(1))
    ours(torch.randn(2, 16))
    assert seen == [1]
    assert len(fused) == 1


def test_what_follows_may_change_the_output_in_place(fused: list[int]) -> None:
    ours, theirs = pair()
    for model in (ours, theirs):
        model.base_model.model.act = nn.ReLU(inplace=True)
    same(ours, theirs)
    assert len(fused) == 2


def test_another_method_s_layer_below_is_called(fused: list[int]) -> None:
    outputs = []
    for prepare in (use_kore_layers, lambda config: config):
        torch.manual_seed(0)
        model = get_peft_model(Net(), LoHaConfig(r=2, target_modules=["one"], init_weights=False), mixed=True)
        config = prepare(LoraConfig(r=2, target_modules=["one"], init_lora_weights=False))
        model.add_adapter("other", config)
        model.set_adapter(["default", "other"])
        freeze(model)
        outputs.append(model(torch.ones(3, 16)))
    torch.testing.assert_close(*outputs)
    assert not fused


def test_a_parameter_as_target_is_peft_s() -> None:
    config = LoraConfig(r=2, target_modules=[], target_parameters=["one.weight"])
    model = get_peft_model(Net(), use_kore_layers(config))
    assert type(model.base_model.model.one) is peft.tuners.lora.layer.ParamWrapper


def test_the_saved_adapter_is_plain(tmp_path: Path) -> None:
    ours, _ = pair()
    ours.save_pretrained(str(tmp_path))
    assert "custom" not in (tmp_path / "adapter_config.json").read_text(encoding="utf-8")
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), str(tmp_path))
    assert type(loaded.base_model.model.one) is peft.tuners.lora.Linear
    x = torch.randn(4, 16)
    torch.testing.assert_close(loaded(x), ours(x))


def test_other_classes_of_linear_layers_are_peft_s() -> None:
    class Quantised(nn.Linear):
        pass

    net = nn.Sequential(Quantised(8, 8), nn.Linear(8, 8))
    model = get_peft_model(net, use_kore_layers(LoraConfig(r=2, target_modules=["0", "1"])))
    assert type(model.base_model.model[0]) is peft.tuners.lora.Linear
    assert type(model.base_model.model[1]) is KoreLoraLinear
