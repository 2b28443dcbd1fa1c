"""Adapters as files: read with every fault named, held against a model, padded without another function."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from kore_fast.constraint import KoreConfig, collect_covariance, get_kore_model, select_linears
from kore_fast.errors import ConstraintError, DataError
from kore_fast.modules.adapter import load_kore_model, lora_layers
from kore_fast.modules.adapter_files import check_fits, misfits, pad_adapter, read_adapter, vllm_rank
from kore_fast.modules.loading import load_model

IDS = torch.arange(4, 84).reshape(4, 20)
FIRST = "model.language_model.layers.0.self_attn.q_proj"


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight.normal_(std=0.5)


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.fixture
def kore_adapter(tiny_model_folder: Path, tmp_path: Path) -> Path:
    base = load_model(tiny_model_folder)
    store = collect_covariance(base, [{"input_ids": IDS}])
    model = get_kore_model(base, KoreConfig(rank=5), store)
    train(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def test_read(kore_adapter: Path, tiny_model: nn.Module) -> None:
    adapter = read_adapter(kore_adapter)
    names = select_linears(tiny_model)
    assert set(adapter.A) == set(adapter.B) == set(names)
    assert set(adapter.ranks.values()) == {5}
    assert set(adapter.scalings().values()) == {1.0}
    assert not adapter.others
    assert adapter.kore is not None
    assert misfits(adapter, tiny_model) == []


@pytest.mark.parametrize("which", ["lora_A", "lora_B"])
def test_a_missing_half_is_named(kore_adapter: Path, which: str) -> None:
    rewrite(kore_adapter, lambda t: {k: v for k, v in t.items() if not (which in k and "layers.1" in k)})
    with pytest.raises(ConstraintError, match=rf"{which} is missing in 7 of 14 layers.*FSDP2"):
        read_adapter(kore_adapter)


def test_files_that_are_not_an_adapter(kore_adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read_adapter(tmp_path / "nothing")
    weights = kore_adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match="not a whole safetensors file"):
        read_adapter(kore_adapter)
    weights.rename(kore_adapter / "adapter_model.bin")
    with pytest.raises(DataError, match="is a pickle"):
        read_adapter(kore_adapter)
    config = kore_adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "IA3"}))
    with pytest.raises(ConstraintError, match="not the configuration of a LoRA adapter"):
        read_adapter(kore_adapter)
    config.unlink()
    with pytest.raises(DataError, match="no such file"):
        read_adapter(kore_adapter)


def test_another_prefix_is_told_with_the_model_s(kore_adapter: Path, tiny_model: nn.Module) -> None:
    rewrite(
        kore_adapter,
        lambda t: {k.replace("model.language_model.layers", "language_model.model.layers"): v for k, v in t.items()},
    )
    with pytest.raises(ConstraintError, match="14 of 14 layers are not in this model") as raised:
        check_fits(read_adapter(kore_adapter), tiny_model)
    # base_model.model.model.language_model → base_model.model.language_model.model
    assert "prefix is 'model.language_model.' where the adapter has 'language_model.model.'" in str(raised.value)


def test_shapes_ranks_and_strangers(kore_adapter: Path, tiny_model: nn.Module) -> None:
    key = f"base_model.model.{FIRST}.lora_"
    whole = load_file(kore_adapter / "adapter_model.safetensors")

    def found(**changed: torch.Tensor) -> str:
        rewrite(kore_adapter, lambda _: {**whole, **{name.replace("__", "."): t for name, t in changed.items()}})
        return " | ".join(misfits(read_adapter(kore_adapter), tiny_model))

    assert found() == ""
    assert f"{FIRST}: the adapter is for a weight of shape (32, 31)" in found(**{f"{key}A.weight": torch.ones(5, 31)})
    assert f"{FIRST}: lora_A has rank 4, lora_B 5" in found(**{f"{key}A.weight": torch.ones(4, 32)})
    both = {f"{key}A.weight": torch.ones(4, 32), f"{key}B.weight": torch.ones(32, 4)}
    assert "its rank is 4, but adapter_config.json says 5" in found(**both)
    assert "none of that name" in found(**{"base_model.model.model.projector.weight": torch.ones(2)})
    norm = "base_model.model.model.language_model.norm.weight"
    assert "shape (31,) in the adapter, (32,)" in found(**{norm: torch.ones(31)})
    assert found(**{norm: torch.ones(32)}) == ""
    config = kore_adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "modules_to_save": ["multi_modal_projector"]}))
    assert "multi_modal_projector: named in modules_to_save" in found()


def test_ranks_that_vllm_takes() -> None:
    assert [vllm_rank(r) for r in (1, 2, 16, 17, 235, 256, 274, 512, 513)] == [1, 8, 16, 32, 256, 256, 320, 512, None]


def test_padded_kore_adapter_computes_the_same_and_verifies(
    kore_adapter: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    ours = logits(PeftModel.from_pretrained(load_model(tiny_model_folder), str(kore_adapter)))
    assert pad_adapter(kore_adapter, tmp_path / "padded") == 8
    found = load_kore_model(load_model(tiny_model_folder), tmp_path / "padded")
    assert {layer.r["default"] for layer in lora_layers(found).values()} == {8}
    assert {layer.scaling["default"] for layer in lora_layers(found).values()} == {1.0}
    assert float((logits(found) - ours).abs().max()) <= 1e-5 * float(ours.abs().max())
    before = json.loads((kore_adapter / "kore.json").read_text())
    assert found.kore["padded_from"] == {"ranks": [5], "lora_a_sha256": before["lora_a_sha256"]}
    assert found.kore["lora_a_sha256"] != before["lora_a_sha256"]
    assert pad_adapter(tmp_path / "padded", tmp_path / "again") == 8
    assert pad_adapter(kore_adapter, tmp_path / "wide", 32) == 32


@pytest.mark.parametrize("rslora", [False, True])
def test_padding_keeps_mixed_ranks_and_scalings(
    tiny_model: nn.Module, tiny_model_folder: Path, tmp_path: Path, rslora: bool
) -> None:
    names = select_linears(tiny_model)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=names,
        use_rslora=rslora,
        rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 9},
        alpha_pattern={"q_proj": 8},
    )
    model = get_peft_model(tiny_model, config)
    train(model)
    ours, scalings = logits(model), {name: layer.scaling["default"] for name, layer in lora_layers(model).items()}
    model.save_pretrained(str(tmp_path / "adapter"))
    adapter = read_adapter(tmp_path / "adapter")
    assert adapter.scalings() == pytest.approx(scalings, rel=1e-12)
    assert misfits(adapter, load_model(tiny_model_folder)) == []
    assert pad_adapter(tmp_path / "adapter", tmp_path / "padded") == 16
    found = PeftModel.from_pretrained(load_model(tiny_model_folder), str(tmp_path / "padded"))
    assert {name: layer.scaling["default"] for name, layer in lora_layers(found).items()} == pytest.approx(scalings)
    assert {layer.r["default"] for layer in lora_layers(found).values()} == {16}
    assert float((logits(found) - ours).abs().max()) <= 1e-5 * float(ours.abs().max())
    written = json.loads((tmp_path / "padded" / "adapter_config.json").read_text())
    assert written["rank_pattern"] == {}
    if not rslora:
        assert written["lora_alpha"] == 24  # 6/4 · 16
    else:
        assert math.isclose(written["lora_alpha"], 12.0)


def test_padding_refuses(kore_adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConstraintError, match="rank is 5, which does not fit into 4"):
        pad_adapter(kore_adapter, tmp_path / "out", 4)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="is there already and not empty"):
        pad_adapter(kore_adapter, tmp_path / "full")
    # A changed A must not get a new hash by being padded.
    rewrite(kore_adapter, lambda t: {k: v * 2 if "lora_A" in k else v for k, v in t.items()})
    with pytest.raises(ConstraintError, match="lora_A has changed"):
        pad_adapter(kore_adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "full"]
