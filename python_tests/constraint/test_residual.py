"""The residual form: trains to the same weights as the zero-delta form, and turns back into it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from kore_fast.constraint import (
    CovarianceStore,
    KoreConfig,
    collect_covariance,
    get_kore_model,
    select_linears,
    to_residual,
    to_zero_delta,
)
from kore_fast.errors import ConstraintError
from kore_fast.modules.adapter import lora_layers

RANK = 8


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def train(model: nn.Module, batch: dict[str, torch.Tensor], steps: int = 200) -> None:
    """AdamW without weight decay on B, towards fixed targets."""
    torch.manual_seed(3)
    labels = torch.randint(0, 250, batch["input_ids"].shape)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(**batch).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def merged(model: nn.Module) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {
            name: layer.get_base_layer().weight + layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            for name, layer in lora_layers(model).items()
        }


def test_both_forms_train_to_the_same_weights(tiny_model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    text = {name: batch[name][:2] for name in ("input_ids", "attention_mask")}
    text["input_ids"] = torch.where(text["input_ids"] == 3, 9, text["input_ids"])
    tiny_model.double()
    made = collect_covariance(tiny_model, [text])
    start = {name: tiny_model.get_submodule(name).weight.clone() for name in select_linears(tiny_model)}
    zero = get_kore_model(copy.deepcopy(tiny_model), KoreConfig(rank=RANK), made)
    residual = get_kore_model(copy.deepcopy(tiny_model), KoreConfig(rank=RANK, form="residual"), made)
    for name, weight in merged(residual).items():
        assert torch.allclose(weight, start[name], rtol=0, atol=1e-12 * float(start[name].abs().max()))
        assert float((lora_layers(residual)[name].get_base_layer().weight - start[name]).abs().max()) > 1e-4
    for model in (zero, residual):
        train(model, text)
    trained, others = merged(zero), [merged(residual), merged(to_zero_delta(residual))]
    for name, weight in trained.items():
        assert float((weight - start[name]).norm()) > 1e-3 * float(start[name].norm())
        for other in others:
            assert float((weight - other[name]).norm()) <= 1e-10 * float(weight.norm())
    # Even the change alone, which is a small part of the weight.
    for name, layer in lora_layers(zero).items():
        B, other_B = layer.lora_B["default"].weight, lora_layers(residual)[name].lora_B["default"].weight
        assert float((B - other_B).detach().norm()) <= 1e-8 * float(B.detach().norm())


def test_residual_there_and_back(
    tiny_model: nn.Module, store: CovarianceStore, batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    before = logits(tiny_model, batch)
    weights = {n: p.clone() for n, p in tiny_model.state_dict().items()}
    model = get_kore_model(tiny_model, KoreConfig(rank=RANK, form="residual"), store)
    assert torch.allclose(logits(model, batch), before, atol=1e-5)
    with pytest.raises(ConstraintError, match="to_zero_delta"):
        model.save_pretrained(str(tmp_path / "early"))
    assert not (tmp_path / "early").exists()
    assert to_residual(model) is model
    to_zero_delta(model)
    assert model.kore_residual is None
    for layer in lora_layers(model).values():
        assert not layer.lora_B["default"].weight.any()
    for name, layer in lora_layers(model).items():
        assert torch.allclose(layer.get_base_layer().weight, weights[f"{name}.weight"], atol=1e-6)
    to_zero_delta(model)
    model.save_pretrained(str(tmp_path / "late"))
    assert (tmp_path / "late" / "adapter_model.safetensors").is_file()


def test_what_cannot_be_changed_is_refused(tiny_model: nn.Module, store: CovarianceStore, tmp_path: Path) -> None:
    with pytest.raises(ConstraintError, match="residual form cannot be saved"):
        get_kore_model(tiny_model, KoreConfig(rank=RANK, form="residual"), store, save_to=tmp_path)
    name = select_linears(tiny_model)[3]
    packed = nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)
    tiny_model.get_submodule(name).weight = packed
    with pytest.raises(ConstraintError, match=rf"{name}: form='residual' changes the base's weight"):
        get_kore_model(tiny_model, KoreConfig(rank=RANK, form="residual"), store)
