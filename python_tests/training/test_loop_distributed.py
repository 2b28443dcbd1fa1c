"""The loop on two gloo processes, through a recipe's train stage: DDP, FSDP2 and ZeRO-3 train what one process trains.

This file is also what the processes run: accelerate takes FSDP for accelerators only, and here for CPUs too. What must
be refused is asked for in this process.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from kore_fast.cli import main
from kore_fast.data.conversations import ConversationDataset
from kore_fast.data.samples import Sample
from kore_fast.errors import ConstraintError
from kore_fast.training.loop import check_spread, last_whole_checkpoint, train
from kore_fast.training.methods import METHODS
from python_tests.conftest import recipe_text
from python_tests.constraint.stack import PYTHONPATH
from python_tests.training.test_loop import OPTIONS, lora_model, samples

ACCELERATE = Path(__file__).parents[2] / "recipes" / "accelerate"
METHODS_TRAINED: dict[str, dict[str, Any]] = {
    "full": {"kind": "full", "learning_rate": 1e-3},
    "lora": {"kind": "lora", "rank": 4, "learning_rate": 1e-2},
    "mica": {"kind": "mica", "rank": 4, "learning_rate": 1e-2},
    "kore": {"kind": "kore", "rank": 8, "learning_rate": 1e-2},
    "kore_projector": {"kind": "kore", "rank": 8, "learning_rate": 1e-2, "projector_learning_rate": 1e-3},
    "pissa": {"kind": "pissa", "rank": 4, "learning_rate": 1e-3},
    "osf": {"kind": "osf", "learning_rate": 1e-3},
    "ewc": {"kind": "lora", "rank": 4, "learning_rate": 1e-2, "ewc": {"strength": 1e4, "samples": 8}},
    "lwf": {"kind": "lora", "rank": 4, "learning_rate": 1e-2, "lwf": {"weight": 5}},
    "full_lwf": {"kind": "full", "learning_rate": 1e-3, "lwf": {"weight": 5}},
    "replay": {"kind": "kore", "rank": 8, "learning_rate": 1e-2, "projector_learning_rate": 1e-3, "replay": 0.3},
}
HALF = ("model.dtype=bfloat16", "training.precision=bf16")
SPREAD = ["full", "lora", "mica", "kore", "kore_projector"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, knowledge_folder: Path) -> Path:
    """A recipe's folder, and its run by one process."""
    folder = tmp_path_factory.mktemp("several")
    recipe = yaml.safe_load(recipe_text(tiny_model_folder, knowledge_folder))
    # Five samples a step, two at a time: an odd number for two processes, which go round twice.
    recipe |= {"methods": METHODS_TRAINED, "training": {**recipe["training"], "batch_size": 5, "per_device": 2}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    for stage in ("augment", "covariance", "init", "train"):
        assert main([stage, str(folder), "--run", str(folder / "run")]) == 0
    return folder


def run_of_its_own(trained: Path, run: Path) -> Path:
    """All that comes before training."""
    for stage in ("augment", "covariance", "init"):
        shutil.copytree(trained / "run" / stage, run / stage)
    return run


def launch(
    trained: Path, run: Path, method: str | None = None, settings: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    given = ["train", str(trained), "--run-dir", str(run), *([] if method is None else ["--method", method])]
    given += [f"--set={setting}" for setting in settings]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH, "DS_ACCELERATOR": "cpu", **environment}
    return subprocess.run(
        [*launcher, *given], env={**os.environ, **variables}, capture_output=True, text=True, timeout=500
    )


def environment_of(name: str, precision: str = "no") -> dict[str, str]:
    """What `accelerate launch` tells the processes of a configuration of ours, which has bf16 for ``precision``."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    changed = [] if precision == "bf16" else ["--mixed_precision", precision]
    given = ["--config_file", str(ACCELERATE / f"{name}.yaml"), *changed, "-m", "kore_fast"]
    checked, config, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    checked.main_process_port = 0
    # `accelerate launch` notes these where it starts DeepSpeed.
    checked.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config or ())
    made = prepare_deepspeed_cmd_env(checked)[1] if name == "zero3" else prepare_multi_gpu_env(checked)
    return {key: value for key, value in made.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(path for path in folder.rglob("*model.safetensors")))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def same_as_one_process(trained: Path, run: Path, name: str) -> None:
    one, two = (root / "train" / name for root in (trained / "run", run))
    assert files(one) == files(two)
    assert (one / "settings.json").read_bytes() == (two / "settings.json").read_bytes()
    rows = [list(csv.DictReader((folder / "loss.csv").open())) for folder in (one, two)]
    for single, shared in zip(*rows, strict=True):
        for column in ("loss", "grad_norm"):
            assert float(shared[column]) == pytest.approx(float(single[column]), rel=1e-4), (name, column)
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    kore = METHODS_TRAINED[name]["kind"] == "kore"
    for key, value in first.items():
        assert second[key].dtype == value.dtype
        if kore and "lora_A" in key:
            assert torch.equal(second[key], value), (name, key)
        else:
            # Of what was trained from zero, float32 sums in another order.
            assert float((second[key] - value).norm()) <= 1e-3 * float(value.norm()), (name, key)
    cost = json.loads((run / "cost" / "train" / f"{name}.json").read_text())
    assert cost["steps"] == 6


@pytest.mark.slow
def test_ddp_trains_every_method_as_one_process_does(trained: Path, tmp_path: Path) -> None:
    run = run_of_its_own(trained, tmp_path / "run")
    done = launch(trained, run)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in METHODS_TRAINED:
        same_as_one_process(trained, run, name)
        # One bar for both.
        assert done.stderr.count(f"train {name}: 100%") == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_spread_parameters_are_trained_as_one_process_does(trained: Path, tmp_path: Path, kind: str) -> None:
    if kind == "zero3":
        pytest.importorskip("deepspeed")
    environment = environment_of(kind)
    run = run_of_its_own(trained, tmp_path / "run")
    for name in SPREAD:
        done = launch(trained, run, name, NOTES=str(tmp_path), **environment)
        assert done.returncode == 0, done.stderr[-4000:]
        # Not by DDP, which would pass as well.
        assert [(tmp_path / f"{rank}.spread").read_text() for rank in range(2)] == ["True", "True"]
        same_as_one_process(trained, run, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method", "precision"),
    [
        ("ddp", "kore_projector", "no"),
        ("fsdp2", "kore_projector", "bf16"),
        ("fsdp2", "full", "no"),
        ("zero3", "kore_projector", "bf16"),
        ("zero3", "full", "no"),
    ],
)
def test_killed_it_ends_as_if_it_had_not_been(
    trained: Path, tmp_path: Path, kind: str, method: str, precision: str
) -> None:
    if kind == "zero3":
        pytest.importorskip("deepspeed")
    environment = {} if kind == "ddp" else environment_of(kind, precision)
    settings = HALF if precision == "bf16" else ()
    whole, broken = (run_of_its_own(trained, tmp_path / name) for name in ("whole", "broken"))
    assert launch(trained, whole, method, settings, **environment).returncode == 0
    killed = launch(trained, broken, method, settings, KILL_AT="5", NOTES=str(tmp_path), **environment)
    assert killed.returncode != 0
    checkpoints = broken / "train" / method / "checkpoints"
    assert {path.name for path in checkpoints.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    if kind != "ddp":  # what cannot be continued so is kept
        refused = launch(trained, broken, method, settings)
        assert refused.returncode == 1
        assert "go on as it began" in refused.stderr
        assert {path.name for path in checkpoints.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    done = launch(trained, broken, method, settings, **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    wanted, found = (root / "train" / method for root in (whole, broken))
    assert files(found) == files(wanted)
    assert [name for name in files(wanted) if (wanted / name).read_bytes() != (found / name).read_bytes()] == []
    assert json.loads((broken / "cost" / "train" / f"{method}.json").read_text())["steps"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_the_shipped_configuration_trains_in_bfloat16(trained: Path, tmp_path: Path, kind: str) -> None:
    """As it is, but for the device: A stays float32, and the first one; the losses are DDP's but for rounding."""
    if kind == "zero3":
        pytest.importorskip("deepspeed")
    rows = {}
    for name, environment in {"ddp": {}, kind: environment_of(kind, "bf16")}.items():
        run = run_of_its_own(trained, tmp_path / name)
        shutil.rmtree(run / "init")
        shutil.rmtree(run / "covariance")
        for stage in ("covariance", "init"):
            chosen = [] if stage == "covariance" else ["--method", "kore"]
            assert main([stage, str(trained), "--run", str(run), *chosen, *(f"--set={s}" for s in HALF)]) == 0
        done = launch(trained, run, "kore", HALF, **environment)
        assert done.returncode == 0, done.stderr[-4000:]
        start, found = (weights(run / stage / "kore") for stage in ("init", "train"))
        assert all(torch.equal(found[key], A) and A.dtype == torch.float32 for key, A in start.items() if "_A" in key)
        B = [tensor for key, tensor in found.items() if "_B" in key]
        assert all(tensor.dtype == torch.float32 and tensor.any() for tensor in B)
        # Of float32, not what bfloat16 would leave of it.
        assert not any(torch.equal(tensor, tensor.bfloat16().float()) for tensor in B)
        rows[name] = list(csv.DictReader((run / "train" / "kore" / "loss.csv").open()))
    for one, two in zip(*rows.values(), strict=True):
        assert float(two["loss"]) == pytest.approx(float(one["loss"]), rel=0.02)


@pytest.mark.slow
def test_a_loss_that_is_no_number_is_told_once(trained: Path, tmp_path: Path) -> None:
    run = run_of_its_own(trained, tmp_path / "run")
    done = launch(trained, run, "kore", POISON="1")
    assert done.returncode == 1
    # Behind the bar, on its line.
    assert done.stderr.count("kore-fast: ") == 1
    assert "kore-fast: the loss is nan at step 1: lower the learning rate" in done.stderr
    assert not (run / "cost").exists()


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    if request.param == "FSDP2":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
    else:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    return str(request.param)


both = pytest.mark.parametrize("spread", ["FSDP2", "DeepSpeed"], indirect=True)


@both
@pytest.mark.parametrize("kind", sorted(METHODS))
def test_a_method_that_needs_whole_weights_is_refused(spread: str, tmp_path: Path, kind: str) -> None:
    if kind in ("full", "lora", "mica", "kore"):
        check_spread(METHODS[kind], tmp_path)
        return
    with pytest.raises(ConstraintError, match=f"{kind}.*needs whole weights, which {spread} spreads"):
        check_spread(METHODS[kind], tmp_path)


@both
def test_terms_that_need_whole_weights_are_refused(spread: str, tmp_path: Path) -> None:
    with pytest.raises(ConstraintError, match=f"EWC and LwF need whole weights, which {spread} spreads"):
        check_spread(METHODS["lora"], tmp_path, adds_terms=True)


def checkpoint_of(spread: str, folder: Path, step: int, processes: int = 1) -> Path:
    """The files by which a whole checkpoint is known."""
    made = folder / f"checkpoint-{step}"
    files = {
        "DDP": ["adapter_model.safetensors", "optimizer.pt"],
        "FSDP2": ["pytorch_model_fsdp.bin", "optimizer.bin"],
        "DeepSpeed": ["latest", *(f"global_step{step}/zero_{rank}_optim_states.pt" for rank in range(processes))],
    }[spread]
    for name in (*files, "scheduler.pt", "rng_state_0.pth"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(b"")
    (made / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return made


@both
def test_checkpoints_of_its_own_are_taken_and_another_s_refused_and_kept(
    spread: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("DDP", "FSDP2", "DeepSpeed"):
        folder = tmp_path / other
        left = [checkpoint_of(other, folder, step) for step in (2, 4)]
        (left[1] / "trainer_state.json").unlink()  # killed while it was written
        if other == spread:
            check_spread(METHODS["kore"], folder)
            assert last_whole_checkpoint(folder) == str(left[0])
            assert [path.exists() for path in left] == [True, False]
            continue
        for asked in (lambda f: check_spread(METHODS["kore"], f), last_whole_checkpoint):
            with pytest.raises(
                ConstraintError, match=rf"checkpoint-2: written .* {other}, and this is {spread}; go on"
            ):
                asked(folder)
        assert all(path.exists() for path in left)
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ConstraintError, match=rf"checkpoint-2: written .* {spread}, and this is one process or DDP"):
        check_spread(METHODS["kore"], tmp_path / spread)
    with pytest.raises(ConstraintError, match="this is one process or DDP"):
        last_whole_checkpoint(tmp_path / spread)
    assert (tmp_path / spread / "checkpoint-2").exists()


def test_deepspeed_s_shards_want_as_many_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    left = checkpoint_of("DeepSpeed", tmp_path, 2, processes=3)
    with pytest.raises(ConstraintError, match="over 3 processes, and these are 1; go on with as many"):
        check_spread(METHODS["kore"], tmp_path)
    assert left.exists()
    # One that is being removed says nothing where a newer one is whole.
    checkpoint_of("DeepSpeed", tmp_path, 4)
    check_spread(METHODS["kore"], tmp_path)


def test_the_first_version_of_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ConstraintError, match="set fsdp_version: 2"):
        check_spread(METHODS["kore"], tmp_path)


@both
def test_a_recipe_is_refused_before_its_model_is_loaded(
    spread: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("kore_fast.recipe.work.base_model", unreachable)
    run = run_of_its_own(trained, tmp_path / "run")
    for name, reason in {"osf": "OSF", "pissa": "PiSSA", "ewc": "EWC and LwF"}.items():
        assert main(["train", str(trained), "--run", str(run), "--method", name]) == 1
        assert f"kore-fast: {reason}" in capsys.readouterr().err


@both
def test_processes_that_would_wait_for_a_picture_are_refused(
    spread: str,
    tiny_model_folder: Path,
    tiny_processor: Any,
    knowledge_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kore_fast.training.loop.place_among_ranks", lambda: (0, 2))
    monkeypatch.setattr(ConversationDataset, "lengths", lambda self, part: [5] * len(self.samples[::2]))
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    plain = Sample.model_validate({"id": "plain", "conversations": turns})
    mixed = ConversationDataset(tiny_processor, [*samples(), plain], knowledge_folder)
    with pytest.raises(ConstraintError, match=f"vision tower that the others wait for under {spread}"):
        train(lora_model(tiny_model_folder), mixed, replace(OPTIONS, batch_size=2, per_device=1), tmp_path)


def kill_at(step: int, notes: Path) -> None:
    """Both processes and their launcher, by the first, when the step is done."""
    from kore_fast.training.loop import _ShowSteps

    rank, real = os.environ["RANK"], _ShowSteps.on_step_end
    (notes / f"{rank}.pid").write_text(str(os.getpid()))

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
        real(self, args, state, control, **options)
        if rank == "0" and state.global_step == step:
            for pid in (os.getppid(), int((notes / "1.pid").read_text()), os.getpid()):
                os.kill(pid, signal.SIGKILL)

    _ShowSteps.on_step_end = on_step_end  # type: ignore[method-assign]


def note_spread(notes: Path) -> None:
    """Whether each process holds only a part of what was trained."""
    from kore_fast.modules.sharding import is_sharded
    from kore_fast.recipe import work

    real = work._save_trained

    def save(way: Any, model: Any, *given: Any) -> None:
        (notes / f"{os.environ['RANK']}.spread").write_text(str(is_sharded(model)))
        real(way, model, *given)

    work._save_trained = save


def poison() -> None:
    """The second process alone computes a loss that is no number."""
    from kore_fast.training.loop import _Trainer

    real = _Trainer.compute_loss

    def compute_loss(self: Any, *given: Any, **options: Any) -> Any:
        return real(self, *given, **options) * (float("nan") if os.environ["RANK"] == "1" else 1.0)

    _Trainer.compute_loss = compute_loss  # type: ignore[method-assign]


if __name__ == "__main__":
    from python_tests.training.test_trainers_distributed import allow_fsdp_on_cpus

    torch.set_num_threads(1)
    allow_fsdp_on_cpus()
    if "KILL_AT" in os.environ:
        kill_at(int(os.environ["KILL_AT"]), Path(os.environ["NOTES"]))
    elif "NOTES" in os.environ:
        note_spread(Path(os.environ["NOTES"]))
    if "POISON" in os.environ:
        poison()
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # threads of gloo that outlive their peers can abort while the interpreter ends
