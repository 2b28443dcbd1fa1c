"""Merged models: the adapter's function to the dtype's rounding, an ordinary folder, and refusals."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from kore_fast.constraint import KoreConfig, collect_covariance, get_kore_model
from kore_fast.errors import ConstraintError, DataError, KoreError
from kore_fast.modules import merging
from kore_fast.modules.adapter import lora_layers
from kore_fast.modules.loading import load_model
from kore_fast.modules.merging import merge_adapter

IDS = torch.arange(4, 84).reshape(4, 20)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@pytest.fixture
def adapter(tiny_model_folder: Path, tmp_path: Path) -> Path:
    base = load_model(tiny_model_folder)
    store = collect_covariance(base, [{"input_ids": IDS}])
    model = get_kore_model(base, KoreConfig(rank=5, modules_to_save=["multi_modal_projector"]), store)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or ("multi_modal_projector" in name and "modules_to_save" in name):
                parameter.add_(torch.randn_like(parameter), alpha=0.5)
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_merged_is_base_with_adapter(
    adapter: Path, tiny_model_folder: Path, tmp_path: Path, dtype: torch.dtype, bound: float
) -> None:
    done = merge_adapter(adapter, tiny_model_folder, tmp_path / "merged", dtype=dtype)
    assert (done.layers, done.dtype) == (14, str(dtype).removeprefix("torch."))
    assert done.difference <= done.allowed <= bound
    # Without kore_fast and PEFT:
    found = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    assert next(found.parameters()).dtype == dtype
    wanted = logits(PeftModel.from_pretrained(load_model(tiny_model_folder), str(adapter)))
    base = logits(load_model(tiny_model_folder))
    assert float((logits(found) - wanted).norm()) <= bound * float(wanted.norm())
    assert float((base - wanted).norm()) > 2 * bound * float(wanted.norm())
    assert AutoProcessor.from_pretrained(tmp_path / "merged").image_processor is not None
    projector = found.get_submodule("model.multi_modal_projector.linear_1").weight
    before = load_model(tiny_model_folder).get_submodule("model.multi_modal_projector.linear_1").weight
    assert float((projector.float() - before).detach().abs().max()) > 0.01
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "merged" / name).read_bytes() == (tiny_model_folder / name).read_bytes()
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")]


def test_rank_stabilised_lora(tiny_model_folder: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["up_proj"], init_lora_weights=False)
    get_peft_model(load_model(tiny_model_folder), config).save_pretrained(str(tmp_path / "adapter"))
    assert merge_adapter(tmp_path / "adapter", tiny_model_folder, tmp_path / "merged").layers == 2


def test_output_that_is_not_empty(adapter: Path, tiny_model_folder: Path) -> None:
    before = sorted(path.name for path in adapter.iterdir())
    with pytest.raises(DataError, match="is there already and not empty"):
        merge_adapter(adapter, tiny_model_folder, adapter)
    assert sorted(path.name for path in adapter.iterdir()) == before


def test_what_does_not_fit(adapter: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    whole = load_file(path)
    first = next(key for key in whole if "lora_A" in key)
    renamed = {k.replace("model.language_model.layers", "language_model.model.layers"): v for k, v in whole.items()}
    # The hash speaks first for a KORE adapter.
    save_file({**whole, first: whole[first] * 2}, path, metadata={"format": "pt"})
    with pytest.raises(ConstraintError, match="lora_A has changed"):
        merge_adapter(adapter, tiny_model_folder, tmp_path / "merged")
    (adapter / "kore.json").unlink()
    save_file(renamed, path, metadata={"format": "pt"})
    with pytest.raises(ConstraintError, match=r"where the adapter has 'language_model\.model\.'"):
        merge_adapter(adapter, tiny_model_folder, tmp_path / "merged")
    with pytest.raises(KoreError, match="cannot load a model"):
        merge_adapter(adapter, tmp_path / "nothing", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_quantised_base(adapter: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model_folder, base)
    config = json.loads((base / "config.json").read_text())
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))
    with pytest.raises(ConstraintError, match="its weights are quantised"):
        merge_adapter(adapter, base, tmp_path / "merged")


def test_a_wrong_merge_is_seen(
    adapter: Path, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import Linear

    honest = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: honest(self, name) * 1.001)
    with pytest.raises(ConstraintError, match=r"q_proj: the merged weight is off W0 \+ B·A"):
        merge_adapter(adapter, tiny_model_folder, tmp_path / "merged")
    monkeypatch.undo()
    monkeypatch.setattr(merging, "_merge_layer", lambda name, layer: layer.merge())
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: honest(self, name) * 1.01)
    with pytest.raises(ConstraintError, match="merged, the logits differ by"):
        merge_adapter(adapter, tiny_model_folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_overflow_in_float16(tiny_model_folder: Path, tmp_path: Path) -> None:
    model = get_peft_model(load_model(tiny_model_folder), LoraConfig(r=2, lora_alpha=2, target_modules=["up_proj"]))
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_A["default"].weight.fill_(300.0)
            layer.lora_B["default"].weight.fill_(300.0)
    model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ConstraintError, match="float16 overflows"):
        merge_adapter(tmp_path / "adapter", tiny_model_folder, tmp_path / "merged", dtype=torch.float16)


def test_full_disk_leaves_nothing(
    adapter: Path, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(DataError, match=r"merged: could not be written \(No space left on device\)"):
        merge_adapter(adapter, tiny_model_folder, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
