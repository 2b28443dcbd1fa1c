"""`verify_adapter`: all well on a good adapter, and each check fails when its fault is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from kore_fast.constraint import CovarianceStore, KoreConfig, get_kore_model
from kore_fast.constraint.verification import Check, find_store, verify_adapter
from kore_fast.errors import KoreError
from kore_fast.modules.adapter import lora_layers
from kore_fast.modules.adapter_files import pad_adapter
from kore_fast.modules.loading import load_model, load_processor

NAMES = ["files", "layers", "function", "A", "base", "leak", "rank"]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def adapter(tiny_model: nn.Module, store: CovarianceStore, tmp_path: Path) -> Path:
    model = get_kore_model(tiny_model, KoreConfig(rank=5), store)
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight.normal_(std=0.1)
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def by_name(checks: list[Check]) -> dict[str, Check]:
    assert [check.name for check in checks] == NAMES
    return {check.name: check for check in checks}


def statuses(checks: list[Check]) -> dict[str, str]:
    return {name: check.status for name, check in by_name(checks).items()}


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def edit(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_good_adapter(adapter: Path, tiny_model_folder: Path, store: CovarianceStore) -> None:
    checks = by_name(verify_adapter(adapter, tiny_model_folder, store))
    assert {check.status for check in checks.values()} == {"ok"}
    assert "on a text" in checks["function"].detail
    assert "on a picture" in checks["function"].detail
    assert "--max-lora-rank 8;" in checks["rank"].detail


def test_without_a_store(adapter: Path, tiny_model_folder: Path) -> None:
    checks = by_name(verify_adapter(adapter, tiny_model_folder))
    assert checks["leak"].status == "skipped"
    assert "--covariance" in checks["leak"].detail
    assert checks["base"].status == "ok"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(adapter: Path, tiny_model_folder: Path, store: CovarianceStore, dtype: torch.dtype) -> None:
    found = verify_adapter(adapter, tiny_model_folder, store, dtype=dtype)
    assert {c.status for c in found if c.name != "base"} == {"ok"}


def drop_a(tensors: Tensors) -> Tensors:
    return {key: value for key, value in tensors.items() if "lora_A" not in key}


def rename(tensors: Tensors) -> Tensors:
    return {k.replace("model.language_model.layers", "language_model.model.layers"): v for k, v in tensors.items()}


def spoil_first(which: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    def apply(tensors: Tensors) -> Tensors:
        key = next(key for key in sorted(tensors) if which in key)
        return {**tensors, key: change(tensors[key])}

    return apply


@pytest.mark.parametrize(
    ("change", "failed", "named"),
    [
        (drop_a, {"files": "FAILED"}, "lora_A is missing in 14 of 14 layers"),
        (rename, {"layers": "FAILED", "function": "skipped"}, "where the adapter has 'language_model.model.'"),
        (spoil_first("lora_B", lambda B: B[:-1]), {"layers": "FAILED", "function": "skipped"}, "the model's is"),
        (spoil_first("lora_B", lambda B: B * float("nan")), {"files": "FAILED", "function": "FAILED"}, "NaN"),
        (lambda t: {k: v * (0 if "lora_B" in k else 1) for k, v in t.items()}, {"function": "FAILED"}, "not trained"),
        (lambda t: {k: v * (1e-30 if "lora_B" in k else 1) for k, v in t.items()}, {"function": "FAILED"}, "no effect"),
        (spoil_first("lora_A", lambda A: A.flip(1)), {"A": "FAILED", "leak": "FAILED"}, "lora_A has changed"),
        (spoil_first("lora_A", lambda A: A.flip(0)), {"A": "FAILED"}, "lora_A has changed"),
        (
            lambda t: {k: v for k, v in t.items() if "layers.0.self_attn.q_proj" not in k},
            {"function": "FAILED", "A": "FAILED"},
            "target_modules matches 1 layer(s)",
        ),
    ],
    ids=["no A", "prefix", "shape", "NaN", "B zero", "no effect", "A", "A's rows", "layer"],
)
def test_faults_in_the_weights(
    adapter: Path,
    tiny_model_folder: Path,
    store: CovarianceStore,
    change: Callable[[Tensors], Tensors],
    failed: dict[str, str],
    named: str,
) -> None:
    rewrite(adapter, change)
    checks = by_name(verify_adapter(adapter, tiny_model_folder, store))
    first = next(iter(failed))
    assert named in checks[first].detail
    if first == "files" and len(failed) == 1:
        assert all(check.status == "skipped" for name, check in checks.items() if name != "files")
    elif first == "layers":
        # Under other names there is neither A's hash nor a leak.
        assert all(checks[name].status == status for name, status in failed.items())
    else:
        wrong = {name: check.status for name, check in checks.items() if check.status != "ok"}
        assert wrong == failed


def test_files_that_are_gone(adapter: Path, tiny_model_folder: Path) -> None:
    (adapter / "adapter_config.json").unlink()
    assert statuses(verify_adapter(adapter, tiny_model_folder)) == {
        name: "FAILED" if name == "files" else "skipped" for name in NAMES
    }


def test_no_model(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(KoreError, match="cannot load a model"):
        verify_adapter(adapter, tmp_path / "nothing")


def test_another_base(adapter: Path, tiny_model_folder: Path, store: CovarianceStore, tmp_path: Path) -> None:
    other = load_model(tiny_model_folder)
    with torch.no_grad():
        other.get_submodule("model.language_model.layers.0.mlp.up_proj").weight.neg_()
    other.save_pretrained(tmp_path / "other")
    load_processor(tiny_model_folder).save_pretrained(tmp_path / "other")
    wrong = {n: s for n, s in statuses(verify_adapter(adapter, tmp_path / "other", store)).items() if s != "ok"}
    assert wrong == {"base": "FAILED"}


def test_changed_leak_and_another_store(adapter: Path, tiny_model_folder: Path, store: CovarianceStore) -> None:
    kore = json.loads((adapter / "kore.json").read_text())
    kore["leaks"][3]["leak"] *= 1.01
    kore["leaks"][3]["leak"] += 1e-5
    (adapter / "kore.json").write_text(json.dumps(kore))
    checks = by_name(verify_adapter(adapter, tiny_model_folder, store))
    assert checks["leak"].status == "FAILED"
    assert checks["leak"].detail.startswith(kore["leaks"][3]["layer"])
    edit(adapter, "kore.json", covariance="0" * 64)
    checks = by_name(verify_adapter(adapter, tiny_model_folder, store))
    assert checks["leak"].status == "skipped"
    assert "another store" in checks["leak"].detail


def test_plain_lora_and_trained_a(
    tiny_model: nn.Module, tiny_model_folder: Path, store: CovarianceStore, tmp_path: Path
) -> None:
    plain = get_peft_model(tiny_model, LoraConfig(r=600, target_modules=["up_proj"], init_lora_weights=False))
    plain.save_pretrained(str(tmp_path / "plain"))
    checks = by_name(verify_adapter(tmp_path / "plain", tiny_model_folder, store))
    assert (checks["A"].status, checks["base"].status) == ("skipped", "skipped")
    assert checks["leak"].status == "ok"
    assert (checks["rank"].status, checks["files"].status) == ("FAILED", "ok")
    assert "vLLM takes 512 at most" in checks["rank"].detail
    model = get_kore_model(load_model(tiny_model_folder), KoreConfig(rank=4, train_a=True), store)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_A["default"].weight.add_(0.1)
            layer.lora_B["default"].weight.add_(0.1)
    model.save_pretrained(str(tmp_path / "trained"))
    found = statuses(verify_adapter(tmp_path / "trained", tiny_model_folder, store))
    assert (found["A"], found["leak"], found["function"]) == ("skipped", "skipped", "ok")


def test_ranks_for_vllm(tiny_model: nn.Module, tiny_model_folder: Path, tmp_path: Path) -> None:
    def rank(name: str, **config: Any) -> Check:
        base = load_model(tiny_model_folder)
        targets = ["up_proj", "q_proj"]
        get_peft_model(base, LoraConfig(target_modules=targets, init_lora_weights=False, **config)).save_pretrained(
            str(tmp_path / name)
        )
        return by_name(verify_adapter(tmp_path / name, tiny_model_folder))["rank"]

    plain = rank("plain", r=16, lora_alpha=16)
    assert (plain.status, plain.detail) == ("ok", "16: serve with vLLM's --max-lora-rank 16")
    mixed = rank("mixed", r=4, lora_alpha=4, rank_pattern={"q_proj": 20}, alpha_pattern={"q_proj": 20})
    assert mixed.status == "ok"
    assert "4…20 by layer (rank_pattern): serve with vLLM's --max-lora-rank 32" in mixed.detail
    odd = rank("odd", r=4, lora_alpha=4, rank_pattern={"q_proj": 20})
    assert odd.status == "FAILED"
    assert "scaling 0.2 where lora_alpha and r give 1" in odd.detail
    projector = rank("projector", r=4, modules_to_save=["multi_modal_projector"])
    assert projector.status == "skipped"
    assert "kore-fast merge" in projector.detail


def test_padded_still_verifies(adapter: Path, tiny_model_folder: Path, store: CovarianceStore, tmp_path: Path) -> None:
    pad_adapter(adapter, tmp_path / "padded")
    checks = by_name(verify_adapter(tmp_path / "padded", tiny_model_folder, store))
    assert {check.status for check in checks.values()} == {"ok"}
    assert "padded" in checks["A"].detail
    assert checks["rank"].detail == "8: serve with vLLM's --max-lora-rank 8"


def test_the_run_s_store_is_found(finished: Path, adapter: Path) -> None:
    trained = finished / "run" / "train" / "kore" / "adapter"
    assert find_store(trained) == (finished / "run" / "covariance").resolve()
    assert find_store(adapter) is None
