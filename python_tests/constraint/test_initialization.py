"""Initialisation: the base's logits to the bit, A in the null space, both forms alike, clear refusals."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kore_fast.constraint import (
    CovarianceStore,
    KoreConfig,
    collect_covariance,
    get_kore_model,
    kore_factors,
    select_linears,
)
from kore_fast.constraint import factors as factors_module
from kore_fast.errors import ConstraintError, StoreError
from kore_fast.modules.adapter import load_kore_model, lora_layers, model_lora_a_hash

RANK = 8


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        return model(**{**batch, "pixel_values": batch["pixel_values"].to(dtype)}).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logits_are_the_base_s_bit_for_bit(
    tiny_model: nn.Module, batch: dict[str, torch.Tensor], store: CovarianceStore, dtype: torch.dtype
) -> None:
    tiny_model.to(dtype)
    before = logits(tiny_model, batch)
    model = get_kore_model(tiny_model, KoreConfig(rank=RANK), store)
    assert torch.equal(logits(model, batch), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_B" in name for name in trained)
    assert len(trained) == len(lora_layers(model)) == 14


def test_leaks_report_the_space(tiny_model: nn.Module, store: CovarianceStore) -> None:
    model = get_kore_model(tiny_model, KoreConfig(rank=RANK), store)
    leaks = {row["layer"]: row for row in model.kore["leaks"]}
    assert list(leaks) == list(lora_layers(model))
    for name, layer in lora_layers(model).items():
        A = layer.lora_A["default"].weight.detach().double()
        C = store.covariance(name)
        values = torch.linalg.eigvalsh(C)
        tail = float(values[:RANK].sum() / values.sum())
        found = leaks[name]
        assert found["tail_energy"] == pytest.approx(tail, rel=1e-6, abs=1e-15)
        wanted = float((A @ C * A).sum() * C.shape[0] / (A.square().sum() * C.trace()))
        assert found["leak"] == pytest.approx(wanted, rel=1e-3, abs=1e-12)
        # No direction of the space carries more than its λ_r.
        assert found["leak"] <= float(values[RANK - 1]) * C.shape[0] / float(values.sum()) * (1 + 1e-9)
        assert found["leak"] < 0.2
        assert found["tokens"] == store.tokens(name)


def test_rank_above_a_width_is_refused_before_any_solve(
    tiny_model: nn.Module, store: CovarianceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factors_module, "nullspace", lambda *_, **__: pytest.fail("solved"))
    with pytest.raises(ConstraintError, match=r"layers\.0\.self_attn\.k_proj: rank 17 .*d_out 16.*at most 16"):
        get_kore_model(tiny_model, KoreConfig(rank=17), store)
    with pytest.raises(ConstraintError, match="rank=0"):
        KoreConfig(rank=0)
    assert not lora_layers(tiny_model)


@pytest.mark.parametrize("choice", [{"energy": 1e-3, "lowest": 2}, {"parameters": 6000}])
def test_ranks_by_spectrum(
    tiny_model: nn.Module,
    batch: dict[str, torch.Tensor],
    store: CovarianceStore,
    tmp_path: Path,
    choice: dict[str, float],
) -> None:
    before = logits(tiny_model, batch)
    model = get_kore_model(copy.deepcopy(tiny_model), KoreConfig(rank=choice), store)
    assert torch.equal(logits(model, batch), before)
    ranks = {name: len(layer.lora_A["default"].weight) for name, layer in lora_layers(model).items()}
    assert len(set(ranks.values())) > 1
    for name, layer in lora_layers(model).items():
        assert layer.scaling["default"] == 1
        values = torch.linalg.eigvalsh(store.covariance(name)).clamp(min=0)
        tail = float(values[: ranks[name]].sum() / values.sum())
        if "energy" in choice:
            widest = min(layer.get_base_layer().weight.shape)
            assert tail <= 1e-3 or ranks[name] == 2
            assert ranks[name] == widest or float(values[: ranks[name] + 1].sum() / values.sum()) > 1e-3
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if "parameters" in choice:
        largest = max(layer.get_base_layer().weight.shape[0] for layer in lora_layers(model).values())
        assert 6000 - largest < trained <= 6000
    assert model.kore["rank"] == choice
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight.normal_()
    model.save_pretrained(str(tmp_path))
    again = load_kore_model(copy.deepcopy(tiny_model), tmp_path)
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert not torch.equal(logits(again, batch), before)


def test_ranks_by_spectrum_are_chosen_before_kore_factors(tiny_model: nn.Module, store: CovarianceStore) -> None:
    with pytest.raises(ConstraintError, match="layer_ranks"):
        kore_factors(tiny_model, KoreConfig(rank={"energy": 1e-3}), store)
    with pytest.raises(ConstraintError, match="unknown key 'energie'; did you mean 'energy'"):
        KoreConfig(rank={"energie": 1e-3})


def test_store_of_another_model_is_refused(tiny_model: nn.Module, store: CovarianceStore) -> None:
    other = copy.deepcopy(tiny_model)
    with torch.no_grad():
        other.get_submodule(select_linears(other)[-1]).weight.neg_()
    with pytest.raises(StoreError, match="made for another model"):
        get_kore_model(other, KoreConfig(rank=RANK), store)
    with torch.device("meta"):
        wider = type(tiny_model)(copy.deepcopy(tiny_model.config))
    wider.get_submodule(select_linears(wider)[0]).weight = nn.Parameter(torch.zeros(32, 40))
    with pytest.raises(StoreError, match=r"q_proj: its input is 40 wide, the store's covariance 32"):
        kore_factors(wider, KoreConfig(rank=RANK), store)


def test_store_of_other_layers_is_refused(tiny_model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    partial = collect_covariance(tiny_model, [batch], target_modules=r".*language_model.*self_attn\..*_proj")
    with pytest.raises(StoreError, match=r"layers\.0\.mlp\.gate_proj: the covariance store has no such layer"):
        get_kore_model(tiny_model, KoreConfig(rank=RANK), partial)
    attention = r".*language_model.*self_attn\..*_proj"
    assert len(lora_layers(get_kore_model(tiny_model, KoreConfig(rank=RANK, target_modules=attention), partial))) == 8


def test_store_over_more_layers_than_asked_for(tiny_model: nn.Module, store: CovarianceStore) -> None:
    config = KoreConfig(rank=RANK, target_modules=["k_proj", "up_proj"])
    with pytest.raises(StoreError, match="vision_tower"):
        get_kore_model(tiny_model, config, store)
    config = KoreConfig(rank=RANK, target_modules=r".*language_model.*\.(k|up)_proj")
    found = get_kore_model(tiny_model, config, store)
    assert {name.rpartition(".")[2] for name in lora_layers(found)} == {"k_proj", "up_proj"}


def test_dropout_is_refused(tiny_model: nn.Module, store: CovarianceStore) -> None:
    with pytest.raises(ConstraintError, match=r"lora_dropout=0\.1: KORE needs 0"):
        get_kore_model(tiny_model, KoreConfig(rank=RANK, lora_dropout=0.1), store)
    with pytest.raises(ConstraintError, match="form='paper'"):
        KoreConfig(form="paper")  # type: ignore[arg-type]


def test_adapter_config_is_an_ordinary_lora(tiny_model: nn.Module, store: CovarianceStore, tmp_path: Path) -> None:
    import re

    names = [name for name, _ in tiny_model.named_modules()]
    wanted = select_linears(tiny_model)
    get_kore_model(tiny_model, KoreConfig(rank=RANK), store).save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["lora_dropout"]) == ("LORA", RANK, RANK, 0)
    assert config["init_lora_weights"] is True
    assert not config.get("use_rslora")
    assert not config.get("rank_pattern")
    assert [n for n in names if re.fullmatch(config["target_modules"], n)] == wanted
    kore = json.loads((tmp_path / "kore.json").read_text())
    assert kore["rank"] == RANK
    assert kore["covariance"] == store.fingerprint()
    assert kore["model"] == store.model
    assert len(kore["leaks"]) == len(wanted)


def test_projector_is_trained_and_saved_whole(
    tiny_model: nn.Module, store: CovarianceStore, batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    before = logits(tiny_model, batch)
    model = get_kore_model(tiny_model, KoreConfig(rank=RANK, modules_to_save=["multi_modal_projector"]), store)
    assert torch.equal(logits(model, batch), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("multi_modal_projector" in name for name in trained)
    assert all("multi_modal_projector" in name or "lora_B" in name for name in trained)
    model.save_pretrained(str(tmp_path))
    assert any("multi_modal_projector" in key for key in load_file(tmp_path / "adapter_model.safetensors"))


LOAD = """
import sys, importlib.abc

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "kore_fast":
            raise ModuleNotFoundError("blocked: " + name)

sys.meta_path.insert(0, Absent())
try:
    import kore_fast
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("kore_fast is importable")
import torch
from peft import PeftModel
from transformers import LlavaForConditionalGeneration
torch.set_num_threads(1)
base, adapter, batch, out = sys.argv[1:]
model = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base), adapter).eval()
with torch.no_grad():
    torch.save(model(**torch.load(batch)).logits, out)
assert not any(name.startswith("kore_fast") for name in sys.modules)
"""


def test_plain_peft_loads_it_where_kore_fast_is_not_importable(
    tiny_model: nn.Module,
    tiny_model_folder: Path,
    store: CovarianceStore,
    batch: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    before = logits(tiny_model, batch)
    model = get_kore_model(tiny_model, KoreConfig(rank=RANK), store)
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight.normal_(std=0.5)
    ours = logits(model, batch)
    assert float((ours - before).abs().max()) > 1e-3
    model.save_pretrained(str(tmp_path / "adapter"))
    torch.save(batch, tmp_path / "batch.pt")
    subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            LOAD,
            str(tiny_model_folder),
            str(tmp_path / "adapter"),
            str(tmp_path / "batch.pt"),
            str(tmp_path / "logits.pt"),
        ],
        check=True,
        cwd=tmp_path,
    )
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), ours, atol=1e-5)


def test_initialisation_does_not_depend_on_chance(
    tiny_model: nn.Module, store: CovarianceStore, batch: dict[str, torch.Tensor]
) -> None:
    hashes = set()
    for seed in range(2):
        torch.manual_seed(seed)
        hashes.add(model_lora_a_hash(get_kore_model(copy.deepcopy(tiny_model), KoreConfig(rank=RANK), store)))
    assert len(hashes) == 1
