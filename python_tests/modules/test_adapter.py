"""Law 2: A never changes, whatever PEFT, a file or a user does; and what is saved is an ordinary adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from kore_fast.constraint import KoreConfig, collect_covariance, get_kore_model, select_linears
from kore_fast.errors import ConstraintError
from kore_fast.modules.adapter import (
    KorePeftModel,
    attach_lora,
    is_kore_adapter,
    load_kore_model,
    lora_a_hash,
    lora_layers,
    model_lora_a_hash,
    refuse_dropout,
    refuse_weight_decay,
)
from kore_fast.modules.loading import load_model

IDS = torch.arange(4, 84).reshape(4, 20)


@pytest.fixture
def kore_model(tiny_model: nn.Module) -> KorePeftModel:
    store = collect_covariance(tiny_model, [{"input_ids": IDS}])
    return get_kore_model(tiny_model, KoreConfig(rank=4), store)


def a_frozen(model: nn.Module) -> bool:
    layers = lora_layers(model).values()
    return all(
        not layer.lora_A["default"].weight.requires_grad and layer.lora_B["default"].weight.requires_grad
        for layer in layers
    )


def test_a_stays_frozen_through_peft_s_switches(kore_model: KorePeftModel) -> None:
    assert a_frozen(kore_model)
    kore_model.set_adapter("default")
    assert a_frozen(kore_model)
    kore_model.base_model.disable_adapter_layers()
    kore_model.base_model.enable_adapter_layers()
    assert a_frozen(kore_model)
    with kore_model.disable_adapter():
        pass
    assert a_frozen(kore_model)


def test_disabled_adapter_is_the_base(kore_model: KorePeftModel, tiny_model_folder: Path) -> None:
    with torch.no_grad():
        for layer in lora_layers(kore_model).values():
            layer.lora_B["default"].weight.fill_(0.1)
        with kore_model.disable_adapter():
            off = kore_model(input_ids=IDS).logits
        on = kore_model(input_ids=IDS).logits
        base = load_model(tiny_model_folder)(input_ids=IDS).logits
    assert torch.equal(off, base)
    assert float((on - base).abs().max()) > 1e-4


def test_saved_and_loaded_to_the_bit(kore_model: KorePeftModel, tiny_model_folder: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        for layer in lora_layers(kore_model).values():
            layer.lora_B["default"].weight.normal_()
        ours = kore_model(input_ids=IDS).logits
    kore_model.save_pretrained(str(tmp_path))
    assert is_kore_adapter(tmp_path)
    for trainable in (False, True):
        found = load_kore_model(load_model(tiny_model_folder), tmp_path, is_trainable=trainable)
        assert isinstance(found, KorePeftModel)
        with torch.no_grad():
            assert torch.equal(found(input_ids=IDS).logits, ours)
        assert found.kore == kore_model.kore
        layers = lora_layers(found).values()
        assert not any(layer.lora_A["default"].weight.requires_grad for layer in layers)
        assert all(layer.lora_B["default"].weight.requires_grad == trainable for layer in layers)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert len(keys) == 2 * 14
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)


def test_changed_a_is_refused_when_saving(kore_model: KorePeftModel, tmp_path: Path) -> None:
    layer = next(iter(lora_layers(kore_model).values()))
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] += 1e-4
    with pytest.raises(ConstraintError, match="lora_A has changed"):
        kore_model.save_pretrained(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter").exists()


def test_changed_a_is_refused_when_loading(kore_model: KorePeftModel, tiny_model_folder: Path, tmp_path: Path) -> None:
    kore_model.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "lora_A" in key)
    tensors[key] = torch.roll(tensors[key], 1, 0)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ConstraintError, match="lora_A has changed"):
        load_kore_model(load_model(tiny_model_folder), tmp_path)


def test_missing_a_is_refused_when_loading(kore_model: KorePeftModel, tiny_model_folder: Path, tmp_path: Path) -> None:
    """What distributed savers do: they leave the frozen A out, and PEFT fills it with chance."""
    kore_model.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "lora_A" not in k}, path, metadata={"format": "pt"})
    with (
        pytest.warns(UserWarning, match="missing adapter keys"),
        pytest.raises(ConstraintError, match="lora_A has changed"),
    ):
        load_kore_model(load_model(tiny_model_folder), tmp_path)


def test_metadata_without_a_hash_is_refused(kore_model: KorePeftModel, tiny_model_folder: Path, tmp_path: Path) -> None:
    kore_model.save_pretrained(str(tmp_path))
    for content in ("[]", "{}"):
        (tmp_path / "kore.json").write_text(content)
        with pytest.raises(ConstraintError, match="no hash of A"):
            load_kore_model(load_model(tiny_model_folder), tmp_path)


def test_dropout_in_an_edited_config_is_refused(
    kore_model: KorePeftModel, tiny_model_folder: Path, tmp_path: Path
) -> None:
    kore_model.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_dropout": 0.05}))
    with pytest.raises(ConstraintError, match=r"lora_dropout=0\.05"):
        load_kore_model(load_model(tiny_model_folder), tmp_path)


def test_trained_a_is_let_through(tiny_model: nn.Module, tiny_model_folder: Path, tmp_path: Path) -> None:
    store = collect_covariance(tiny_model, [{"input_ids": IDS}])
    model = get_kore_model(tiny_model, KoreConfig(rank=4, train_a=True), store)
    layer = next(iter(lora_layers(model).values()))
    assert layer.lora_A["default"].weight.requires_grad
    with torch.no_grad():
        layer.lora_A["default"].weight.add_(1)
    model.save_pretrained(str(tmp_path))
    found = load_kore_model(load_model(tiny_model_folder), tmp_path, is_trainable=True)
    assert next(iter(lora_layers(found).values())).lora_A["default"].weight.requires_grad


def test_plain_lora_is_not_taken_for_kore(tiny_model: nn.Module, tmp_path: Path) -> None:
    plain = get_peft_model(tiny_model, LoraConfig(r=2, target_modules=["q_proj"]))
    plain.save_pretrained(str(tmp_path))
    assert not is_kore_adapter(tmp_path)
    with pytest.raises(ConstraintError, match=r"no kore\.json"):
        load_kore_model(tiny_model, tmp_path)


def test_attach_wants_factors_of_exactly_the_layers(tiny_model: nn.Module) -> None:
    wanted = select_linears(tiny_model, r".*language_model.*q_proj")
    config = LoraConfig(r=2, lora_alpha=2, target_modules=wanted)
    with pytest.raises(ConstraintError, match=r"layers\.1\.self_attn\.q_proj"):
        attach_lora(tiny_model, config, {wanted[0]: torch.ones(2, 32)})


def test_attach_copies_a_and_zeroes_b(tiny_model: nn.Module) -> None:
    wanted = select_linears(tiny_model, r".*language_model.*q_proj")
    A = {name: torch.randn(2, 32, dtype=torch.float64) for name in wanted}
    model = attach_lora(tiny_model.bfloat16(), LoraConfig(r=2, lora_alpha=2, target_modules=wanted), A)
    assert isinstance(model, PeftModel)
    for name, layer in lora_layers(model).items():
        assert layer.lora_A["default"].weight.dtype == torch.float32
        assert torch.equal(layer.lora_A["default"].weight, A[name].float())
        assert not layer.lora_B["default"].weight.any()


def test_hash_sees_names_shapes_and_every_bit() -> None:
    A: list[tuple[str, Any]] = [("a", torch.ones(2, 3)), ("b", torch.zeros(2, 3))]
    wanted = lora_a_hash(A)
    assert lora_a_hash(reversed(A)) == wanted
    assert lora_a_hash((n, t.double()) for n, t in A) == wanted
    changed = torch.ones(2, 3)
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(2.0))
    others = [
        [("a", changed), A[1]],
        [("a", A[1][1]), ("b", A[0][1])],
        [("a", torch.ones(3, 2)), A[1]],
        A[:1],
    ]
    assert wanted not in {lora_a_hash(other) for other in others}


def test_hash_of_a_model_is_that_of_its_file(kore_model: KorePeftModel, tmp_path: Path) -> None:
    kore_model.save_pretrained(str(tmp_path))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    found = lora_a_hash(
        (key.removeprefix(prefix).removesuffix(suffix), value) for key, value in stored.items() if suffix in key
    )
    assert found == model_lora_a_hash(kore_model) == kore_model.kore["lora_a_sha256"]


def test_refusals() -> None:
    refuse_dropout(0.0)
    refuse_weight_decay(0.0)
    with pytest.raises(ConstraintError, match=r"weight_decay=0\.1: KORE needs 0"):
        refuse_weight_decay(0.1)
    with pytest.raises(ConstraintError, match=r"lora_dropout=0\.1: KORE needs 0"):
        refuse_dropout(0.1)
