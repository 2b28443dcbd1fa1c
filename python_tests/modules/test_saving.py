"""Saving from a wrapped model: whole files or none, never without A."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kore_fast as kf
from kore_fast.errors import ConstraintError, DataError
from kore_fast.modules.adapter import adapter_state, complete_state, lora_layers
from kore_fast.modules.saving import kore_model_of
from kore_fast.modules.sharding import plain_name
from python_tests.constraint.killing import Killed, Killer
from python_tests.training import small


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.make_adapter(tmp_path_factory.mktemp("start") / "adapter")


class Wrapper(nn.Module):
    """As DDP and DeepSpeed's engine hold a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_the_same_files_as_save_pretrained(adapter: Path, tmp_path: Path) -> None:
    model = small.start(adapter)
    kf.save_kore_adapter(Wrapper(torch.compile(model)), tmp_path / "saved")
    names = sorted(path.name for path in adapter.iterdir())
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == names
    for name in set(names) - {"README.md"}:
        assert (tmp_path / "saved" / name).read_bytes() == (adapter / name).read_bytes()


def test_found_inside_what_wraps_it(adapter: Path) -> None:
    model = small.start(adapter)
    assert kore_model_of(Wrapper(Wrapper(model))) is model
    for other in (small.base(), Wrapper(small.base())):
        with pytest.raises(ConstraintError, match="without a KORE adapter"):
            kore_model_of(other)
    flattened = type("FullyShardedDataParallel", (Wrapper,), {})
    with pytest.raises(ConstraintError, match="fsdp_version=2"):
        kore_model_of(flattened(model))


def test_a_changed_a_is_not_saved(adapter: Path, tmp_path: Path) -> None:
    model = small.start(adapter)
    with torch.no_grad():
        next(iter(small.parts(model, "A").values()))[0, 0] += 1
    with pytest.raises(ConstraintError, match="lora_A has changed"):
        kf.save_kore_adapter(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_kill_leaves_each_file_whole(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old and new files differ in B only: whichever are there, they load."""
    model = small.start(adapter)
    kf.save_kore_adapter(model, tmp_path)
    old = small.read(tmp_path, "B")
    with torch.no_grad():
        for B in small.parts(model, "B").values():
            B.add_(1)
    killer = Killer(monkeypatch)
    kept_old = []
    for killer_left in range(4):
        killer.left = killer_left
        with pytest.raises(Killed):
            kf.save_kore_adapter(model, tmp_path)
        found = small.read(tmp_path, "B")
        assert small.same(found, old) or small.same(found, small.parts(model, "B"))
        kept_old.append(small.same(found, old))
        assert small.same(small.parts(small.start(tmp_path), "A"), small.parts(model, "A"))
    # Kills before B was replaced, and after: else the loop above has tried one side only.
    assert set(kept_old) == {True, False}


def test_a_folder_that_cannot_be_written(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: could not be written"):
        kf.save_kore_adapter(small.start(adapter), tmp_path / "file")


def test_a_state_without_a_is_refused_or_completed(adapter: Path, tmp_path: Path) -> None:
    """What ZeRO-3's saver hands to rank 0, which cannot gather A alone."""
    model = small.start(adapter)
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ConstraintError, match=r"layers\.0\..*lacks a whole .*lora_A.*KoreCallback\(\)"):
        model.save_pretrained(str(tmp_path / "refused"), state_dict=state)
    assert not (tmp_path / "refused").exists()
    model.kore_lora_a = small.copied(small.parts(model, "A"))
    model.save_pretrained(str(tmp_path / "whole"), state_dict=state)
    assert small.same(small.read(tmp_path / "whole", "A"), small.read(adapter, "A"))
    name = next(iter(model.kore_lora_a))
    model.kore_lora_a[name] = model.kore_lora_a[name] + 1
    with pytest.raises(ConstraintError, match="lora_A has changed"):
        complete_state(model, state)
    with pytest.raises(ConstraintError, match=r"lacks a whole .*lora_B"):
        complete_state(model, {})


def test_state_has_what_is_trained_beside_the_adapter() -> None:
    model = small.base()
    store = kf.collect_covariance(model, [{"input_ids": small.IDS}], warn_few_tokens=False)
    model = kf.get_kore_model(model, kf.KoreConfig(rank=4, modules_to_save=["norm"]), store)
    wanted = {name for name, p in model.named_parameters() if p.requires_grad or ".lora_A." in name}
    assert set(adapter_state(model)) == wanted
    assert any("modules_to_save" in name for name in wanted)


def test_names_are_those_of_the_unwrapped_model(adapter: Path, tmp_path: Path) -> None:
    """Activation checkpointing puts itself into names; A's hash is over names."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = small.start(adapter)
    names = list(lora_layers(model))
    layers: Any = model.get_submodule("base_model.model.model.layers")
    layers[0] = checkpoint_wrapper(layers[0])
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_modules())
    assert list(lora_layers(model)) == names
    kf.save_kore_adapter(model, tmp_path)
    assert small.same(small.read(tmp_path, "A"), small.read(adapter, "A"))
    assert plain_name("a._orig_mod.b._checkpoint_wrapped_module.c") == "a.b.c"


def test_file_is_synced_before_it_takes_its_name(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real = os.replace
    monkeypatch.setattr(os, "fsync", lambda _: events.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda *given: (events.append("replace"), real(*given))[0])
    kf.save_kore_adapter(small.start(adapter), tmp_path)
    assert events[:2] == ["fsync", "replace"]
    assert events.count("fsync") >= events.count("replace")
