"""An earlier adapter beside the weights: what it computes, that methods fold it where they must, and that a store made
with it is another model's."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from kore_fast.constraint.fingerprint import model_fingerprint
from kore_fast.constraint.selection import select_linears
from kore_fast.errors import ConstraintError
from kore_fast.modules.earlier import earlier_factors, put_beside, put_into, whole_weight
from kore_fast.training.methods import METHODS
from kore_fast.training.methods.interface import StartOptions

IDS = torch.arange(4, 84).reshape(4, 20)
PROJECTOR = "model.multi_modal_projector.linear_1"


@pytest.fixture
def adapter(tiny_model: nn.Module, tmp_path: Path) -> Path:
    """A LoRA with a scaling of 2 and a projector trained beside it, as small as an update is: 0.3 % of each weight."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=r".*language_model.*_proj", modules_to_save=["multi_modal_projector"]
    )
    adapted = get_peft_model(copy.deepcopy(tiny_model), config)
    with torch.no_grad():
        for name, module in adapted.named_modules():
            if hasattr(module, "lora_B"):
                B = module.lora_B["default"].weight.normal_()
                size = (2 * B @ module.lora_A["default"].weight).norm() / module.get_base_layer().weight.norm()
                B.mul_(0.003 / size)
            elif name.endswith("modules_to_save.default.linear_1"):
                module.weight.add_(0.1)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_it_computes_what_the_adapter_on_its_base_does(tiny_model: nn.Module, adapter: Path) -> None:
    names = [name for name, _ in tiny_model.named_modules()]
    weights = {name: tiny_model.get_submodule(name).weight.clone() for name in select_linears(tiny_model)}
    wanted = logits(PeftModel.from_pretrained(copy.deepcopy(tiny_model), str(adapter)))
    model = put_beside(tiny_model, adapter)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-6)
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in weights.items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    loaded = PeftModel.from_pretrained(copy.deepcopy(tiny_model), str(adapter)).merge_and_unload()
    assert torch.equal(model.get_submodule(PROJECTOR).weight, loaded.get_submodule(PROJECTOR).weight)
    torch.testing.assert_close(logits(put_into(model)), wanted, rtol=1e-5, atol=1e-6)
    assert not [name for name, _ in model.named_parameters() if "earlier" in name]


def test_bfloat16_weights_would_lose_of_it_what_it_keeps(tiny_model: nn.Module, adapter: Path) -> None:
    model = put_beside(tiny_model.to(torch.bfloat16), adapter)
    for name in select_linears(model):
        layer = model.get_submodule(name)
        factors = earlier_factors(layer)
        assert factors is not None
        delta, W = factors[1] @ factors[0], layer.weight.float()
        kept, rounded = whole_weight(layer) - W, whole_weight(layer).bfloat16().float() - W
        assert float((kept - delta).norm()) < 1e-3 * float(delta.norm())
        assert float((rounded - delta).norm()) > 0.2 * float(delta.norm())
    assert logits(model).dtype == torch.bfloat16  # without autocast too


def test_with_it_the_model_is_another_for_a_store(tiny_model: nn.Module, adapter: Path) -> None:
    layers = select_linears(tiny_model)
    alone = model_fingerprint(tiny_model, layers)
    beside = model_fingerprint(put_beside(tiny_model, adapter), layers)
    assert beside != alone
    # As without it, one whatever the dtype.
    assert model_fingerprint(copy.deepcopy(tiny_model).to(torch.bfloat16), layers) == beside


def test_full_fine_tuning_trains_and_saves_whole_weights(tiny_model: nn.Module, adapter: Path) -> None:
    wanted = logits(PeftModel.from_pretrained(copy.deepcopy(tiny_model), str(adapter)))
    layers = select_linears(tiny_model)
    half = copy.deepcopy(tiny_model).to(torch.bfloat16)
    model = METHODS["full"].open(put_beside(tiny_model, adapter), StartOptions(layers=layers), None)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-6)
    assert not [name for name in model.state_dict() if "earlier" in name]
    opened = METHODS["full"].open(put_beside(half, adapter), StartOptions(layers=layers), None)
    for name in layers:
        assert opened.get_submodule(name).weight.dtype == torch.float32


def test_an_adapter_of_another_form_or_model_is_refused(tiny_model: nn.Module, tmp_path: Path) -> None:
    config = LoraConfig(r=2, use_dora=True, target_modules=r".*language_model.*q_proj")
    get_peft_model(copy.deepcopy(tiny_model), config).save_pretrained(str(tmp_path / "dora"))
    with pytest.raises(ConstraintError, match="more than A and B"):
        put_beside(tiny_model, tmp_path / "dora")
    other = nn.ModuleDict({"a": nn.Linear(4, 4)})
    get_peft_model(other, LoraConfig(r=2, target_modules=["a"])).save_pretrained(str(tmp_path / "other"))
    with pytest.raises(ConstraintError, match="not in this model, first a"):
        put_beside(tiny_model, tmp_path / "other")
