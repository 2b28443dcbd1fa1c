"""DDP, FSDP2 and DeepSpeed on two gloo ranks under torchrun: saved, loaded, resumed, A is the same and in every file.

This file is also what the ranks run. accelerate and Trainer take FSDP for accelerators only; the ranks let them take it
for CPUs too, and all that follows is theirs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerControl, TrainerState

import kore_fast as kf
from kore_fast.errors import ConstraintError
from kore_fast.modules.adapter import adapter_state, model_lora_a_hash, state_key
from kore_fast.modules.sharding import is_sharded, plain_name, whole
from python_tests.constraint.stack import PYTHONPATH
from python_tests.training import small


def run_scenarios(names: list[str], adapter: Path, out: Path) -> None:
    """What the ranks do; every rank leaves its results in ``out``."""
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for name in names:
        found[name] = SCENARIOS[name](adapter, out / name)
        forget_accelerate()
        dist.barrier()
    (out / f"found.{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # threads of gloo that outlive their peers can abort while the interpreter ends


def forget_accelerate(fsdp_config: dict[str, Any] | None = None) -> None:
    """A process has one state of accelerate; the next Trainer needs another.

    Older ones leave FSDP's version and the form of its state to accelerate's environment.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    if fsdp_config is not None:
        os.environ["FSDP_VERSION"] = str(fsdp_config["version"])
        os.environ["FSDP_STATE_DICT_TYPE"] = fsdp_config["state_dict_type"]


def allow_fsdp_on_cpus() -> None:
    from accelerate import state
    from accelerate.utils import DistributedType

    real = state.AcceleratorState.__init__

    def allowing(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        real(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if hasattr(self, "fsdp_plugin"):
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                self.fsdp_plugin.set_mixed_precision(self._mixed_precision)

    state.AcceleratorState.__init__ = allowing


def allow_resuming_on_cpus() -> None:
    """Older versions of Trainer ask torch to load an optimizer onto "cpu:0", a name that torch does not know."""
    torch.serialization.register_package(
        0, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
    )


def facts(model: nn.Module, losses: dict[int, float]) -> dict[str, Any]:
    """Of a model that the ranks hold together."""
    return {
        "sharded": is_sharded(model),
        "frozen": small.frozen(model),
        "hash": model_lora_a_hash(model),
        "losses": {str(step): loss for step, loss in losses.items()},
    }


def leave(model: nn.Module, path: Path) -> None:
    """The adapter's parameters in a file, gathered here and not by what is tested."""
    state = {name: whole(p).detach().cpu().clone() for name, p in model.named_parameters() if ".lora_" in name}
    if dist.get_rank() == 0:
        save_file(state, path)


def trained_and_resumed(adapter: Path, out: Path, *, from_checkpoint: bool = False, **options: Any) -> dict[str, Any]:
    """Four steps; then again from the second, by a model that is new: the adapter's or, if wanted, the checkpoint's."""
    found: dict[str, Any] = {}
    checkpoint = out / "whole" / "checkpoint-2"
    for name, resumed in {"whole": None, "resumed": str(checkpoint)}.items():
        forget_accelerate(options.get("fsdp_config"))
        model = small.start(checkpoint if resumed and from_checkpoint else adapter)
        trainer = small.trainer(model, out / name, [kf.KoreCallback()], **options)
        trainer.train(resume_from_checkpoint=resumed)
        found[name] = facts(trainer.model, small.losses(trainer))
        leave(trainer.model, out / f"{name}.safetensors")
        trainer.save_model(str(out / name / "final"))
        kf.save_kore_adapter(trainer.model_wrapped, out / name / "ours")
    return found


def ddp(adapter: Path, out: Path) -> dict[str, Any]:
    return trained_and_resumed(adapter, out)


def fsdp(adapter: Path, out: Path) -> dict[str, Any]:
    return trained_and_resumed(adapter, out, **fsdp_options())


def fsdp_in_shards(adapter: Path, out: Path) -> dict[str, Any]:
    return trained_and_resumed(adapter, out, **fsdp_options(state_dict_type="SHARDED_STATE_DICT"))


def fsdp_recomputing(adapter: Path, out: Path) -> dict[str, Any]:
    """accelerate's sharded state has no layer that is recomputed: a model that is not the checkpoint's is refused."""
    options = fsdp_options(state_dict_type="SHARDED_STATE_DICT", activation_checkpointing=True)
    found = trained_and_resumed(adapter, out, from_checkpoint=True, **options)
    forget_accelerate(options["fsdp_config"])
    trainer = small.trainer(small.start(adapter), out / "whole", [], **options)
    trainer.train(resume_from_checkpoint=str(out / "whole" / "checkpoint-4"))
    state = TrainerState(global_step=4)
    asked = message(
        lambda: kf.KoreCallback().on_train_begin(trainer.args, state, TrainerControl(), model=trainer.model)
    )
    return {**found, "asked": asked}


def zero2(adapter: Path, out: Path) -> dict[str, Any]:
    return trained_and_resumed(adapter, out, deepspeed=zero_config(2))


def zero3(adapter: Path, out: Path) -> dict[str, Any]:
    found = trained_and_resumed(adapter, out, deepspeed=zero_config(3))
    forget_accelerate()
    trainer = small.trainer(
        small.start(adapter), out.parent / "zero3-trap", [kf.KoreCallback()], deepspeed=zero_config(3)
    )
    trainer.train()
    # What Trainer asks for when it saves an adapter.
    saver = trainer.deepspeed._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    return {**found, "saver": sorted(saver or [])}


def zero_config(stage: int) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
    }


def fsdp_options(state_dict_type: str = "FULL_STATE_DICT", **config: Any) -> dict[str, Any]:
    """In words that every Trainer since 4.56 understands."""
    config |= {"version": 2, "state_dict_type": state_dict_type}
    config |= {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    return {"fsdp": "full_shard auto_wrap", "fsdp_config": config}


def loop(adapter: Path, out: Path) -> dict[str, Any]:
    """torch's FSDP2 in a loop of one's own, and what its savers leave out."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = small.start(adapter)
    for layer in model.get_submodule("base_model.model.model.layers").children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    losses = {}
    for step in range(2):
        row = small.samples()[2 * step + dist.get_rank()]["input_ids"][None]
        loss = model(input_ids=row, labels=row).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[step] = float(loss)
    found = facts(model, losses)
    leave(model, out.with_suffix(".safetensors"))
    kf.save_kore_adapter(model, out / "ours")
    model.save_pretrained(str(out / "own"))
    dist.barrier()

    # What accelerate asks for when it saves an adapter (save_fsdp_model with adapter_only).
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    left = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        PeftModel.save_pretrained(model, str(out / "trap"), state_dict=left)
        found["refused"] = message(lambda: model.save_pretrained(str(out / "refused"), state_dict=left))
    found["state"] = sorted(adapter_state(model))
    A = next(iter(small.parts(model, "A").values()))
    with torch.no_grad():
        A.mul_(1.01)
    found["changed"] = message(lambda: kf.save_kore_adapter(model, out / "changed"))
    return found


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except ConstraintError as error:
        return str(error)
    return "no error"


SCENARIOS = {
    scenario.__name__: scenario for scenario in (ddp, fsdp, loop, fsdp_in_shards, fsdp_recomputing, zero2, zero3)
}
# Of each group all run together.
GROUPS = {
    "quick": ["ddp", "fsdp", "loop"],
    "shards": ["fsdp_in_shards", "fsdp_recomputing"],
    "zero": ["zero2", "zero3"],
}
SLOW = [*GROUPS["shards"], *GROUPS["zero"]]
SLOW_TOO = [pytest.param(name, marks=pytest.mark.slow) for name in SLOW]
TRAINERS = pytest.mark.parametrize("name", ["ddp", "fsdp", *SLOW_TOO])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.make_adapter(tmp_path_factory.mktemp("start") / "adapter")


@pytest.fixture(scope="module")
def ranks_of(tmp_path_factory: pytest.TempPathFactory, adapter: Path) -> Callable[[str], Path]:
    """Where two ranks left what they found of a scenario; it runs with others when it is first asked for."""

    @cache
    def run(group: str) -> Path:
        if group == "zero":
            pytest.importorskip("deepspeed")
        out = tmp_path_factory.mktemp("ranks")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
        given = [__file__, str(adapter), str(out), *GROUPS[group]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH, "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(
            [*launcher, "--rdzv-endpoint=localhost:0", *given],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-6000:]
        return out

    return lambda name: run(next(group for group, names in GROUPS.items() if name in names))


def found(ranks: Path, name: str, rank: int = 0) -> dict[str, Any]:
    return json.loads((ranks / f"found.{rank}.json").read_text())[name]


@TRAINERS
def test_a_is_the_same_and_frozen_on_every_rank(ranks_of: Callable[[str], Path], adapter: Path, name: str) -> None:
    ranks = ranks_of(name)
    wanted = json.loads((adapter / "kore.json").read_text())["lora_a_sha256"]
    for rank in range(2):
        for run in (found(ranks, name, rank)[run] for run in ("whole", "resumed")):
            assert run["hash"] == wanted
            assert run["frozen"]
            assert run["sharded"] == (name not in ("ddp", "zero2"))


@TRAINERS
def test_resumed_is_uninterrupted(ranks_of: Callable[[str], Path], name: str) -> None:
    ranks = ranks_of(name)
    whole_run, resumed = (found(ranks, name)[run]["losses"] for run in ("whole", "resumed"))
    assert list(whole_run) == ["1", "2", "3", "4"]
    assert {step: resumed[step] for step in ("3", "4")} == {step: whole_run[step] for step in ("3", "4")}
    one, other = (small.read(ranks / name / run / "ours", "B") for run in ("whole", "resumed"))
    assert small.same(one, other)
    assert all(B.any() for B in one.values())


@TRAINERS
def test_no_file_lacks_a(ranks_of: Callable[[str], Path], adapter: Path, name: str) -> None:
    ranks = ranks_of(name)
    A = small.read(adapter, "A")
    folders = [path.parent for path in (ranks / name).rglob("adapter_model.safetensors")]
    places = {str(folder.relative_to(ranks / name)) for folder in folders}
    expected = {f"whole/checkpoint-{n}" for n in (2, 4)} | {"resumed/checkpoint-4"}
    expected |= {f"{run}/ours" for run in ("whole", "resumed")}
    # Trainer's save_model writes no adapter where the state stays in shards.
    expected |= set() if name in GROUPS["shards"] else {f"{run}/final" for run in ("whole", "resumed")}
    assert places == expected
    for folder in folders:
        assert small.same(small.read(folder, "A"), A)
        assert len(small.read(folder, "B")) == len(A)
        assert (folder / "kore.json").read_bytes() == (adapter / "kore.json").read_bytes()


@pytest.mark.parametrize("name", ["ddp", "fsdp", "loop", *SLOW_TOO])
def test_saved_is_what_the_ranks_hold(ranks_of: Callable[[str], Path], name: str) -> None:
    ranks, place = ranks_of(name), name if name == "loop" else f"{name}/whole"
    folder = ranks / place / "ours"
    state = {plain_name(key): held for key, held in load_file(ranks / f"{place}.safetensors").items()}
    for part in "AB":
        stored = small.read(folder, part)
        assert small.same(stored, {name: state[state_key(name, part)] for name in stored})
    model = small.start(folder)
    assert torch.equal(small.by_plain_peft(folder), small.logits(model))


@pytest.mark.parametrize("name", ["fsdp"])
def test_sharded_learns_what_ddp_learns(ranks_of: Callable[[str], Path], name: str) -> None:
    ranks = ranks_of(name)
    one, other = (small.read(ranks / n / "whole" / "ours", "B") for n in ("ddp", name))
    for layer, B in one.items():
        assert torch.allclose(other[layer], B, atol=1e-4)


def test_a_loop_of_one_s_own(ranks_of: Callable[[str], Path], adapter: Path) -> None:
    ranks = ranks_of("loop")
    for rank in range(2):
        run = found(ranks, "loop", rank)
        assert run["frozen"]
        assert run["sharded"]
        assert "lora_A has changed" in run["changed"]
    assert not (ranks / "loop" / "changed").exists()
    for folder in ("ours", "own"):
        assert small.same(small.read(ranks / "loop" / folder, "A"), small.read(adapter, "A"))
    assert len(found(ranks, "loop")["state"]) == 28
    assert not found(ranks, "loop", 1)["state"]


def test_the_trap_savers_leave_a_out(ranks_of: Callable[[str], Path], adapter: Path) -> None:
    """What is written today without kore_fast: B alone, and plain PEFT loads it with a warning and a random A."""
    ranks = ranks_of("loop")
    trap = ranks / "loop" / "trap"
    assert not small.read(trap, "A")
    assert len(small.read(trap, "B")) == 14
    with pytest.warns(UserWarning, match="missing adapter keys"):
        model = PeftModel.from_pretrained(small.base(), str(trap))
    assert not small.same(small.parts(model, "A"), small.read(adapter, "A"))
    assert "lacks a whole base_model.model.model.layers.0" in found(ranks, "loop")["refused"]
    assert not (ranks / "loop" / "refused").exists()


@pytest.mark.slow
def test_what_a_sharded_state_left_out_is_noticed_when_resuming(ranks_of: Callable[[str], Path]) -> None:
    ranks = ranks_of("fsdp_recomputing")
    assert "lora_B is not the one in" in found(ranks, "fsdp_recomputing")["asked"]


@pytest.mark.slow
def test_the_trap_zero3_leaves_a_out(ranks_of: Callable[[str], Path]) -> None:
    saver = found(ranks_of("zero3"), "zero3")["saver"]
    assert len(saver) == 14
    assert all(".lora_B." in name for name in saver)


if __name__ == "__main__":
    torch.set_num_threads(1)
    allow_fsdp_on_cpus()
    allow_resuming_on_cpus()
    run_scenarios(sys.argv[3:], Path(sys.argv[1]), Path(sys.argv[2]))
