"""The command line under torchrun, on two processes: they share a stage, one writes, and the files are those of one."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kore_fast.cli import main
from kore_fast.constraint import CovarianceStore
from python_tests.constraint.stack import PYTHONPATH

RECIPES = Path(__file__).parents[2] / "recipes"
COMMAND = ("-m", "kore_fast")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")

# The command, with processes that end at a chosen moment. $KILL is "rank event path's-end": when that rank is about to
# do this to such a path, it kills itself; with $ALL first the launcher and the other rank. Finished inputs are noted.
HOOKED = """
import os, signal, sys
from pathlib import Path

rank, notes = os.environ["RANK"], Path(os.environ["NOTES"])
killed, event, end = os.environ["KILL"].split()
(notes / f"{rank}.pid").write_text(str(os.getpid()))

def hook(name, arguments):
    if name not in ("os.rename", "os.listdir"):
        return
    path = os.fspath(arguments[1] if name == "os.rename" else arguments[0])
    if (rank, name) == (killed, event) and path.endswith(end):
        if "ALL" in os.environ:
            others = [int(file.read_text()) for file in notes.glob("*.pid") if file.stem != rank]
            for pid in [os.getppid(), *others]:
                os.kill(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "os.rename" and path.endswith(".factors.safetensors"):
        with open(notes / f"{rank}.solved", "a") as file:
            print(os.path.basename(path), file=file)

sys.addaudithook(hook)
from kore_fast.cli import main
sys.exit(main(sys.argv[1:]))
"""


def launch(
    arguments: Sequence[str | Path], *, command: Sequence[str | Path] = COMMAND, **environment: str
) -> subprocess.CompletedProcess[str]:
    # As many threads as this process has: other sums would round differently.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH, **environment}
    return subprocess.run(
        [*TORCHRUN, *command, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def collected(finished: Path, tmp_path: Path) -> Path:
    """A run's folder with its covariances."""
    shutil.copytree(finished / "run" / "covariance", tmp_path / "run" / "covariance")
    return tmp_path / "run"


def test_two_processes_make_the_start_that_one_makes(finished: Path, collected: Path) -> None:
    done = launch(["init", finished, "--run-dir", collected])
    assert done.returncode == 0, done.stderr
    heads = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("[")]
    assert heads == ["init/lora:", "init/kore:"]
    # Of eight inputs, and with one bar.
    assert done.stderr.count("null spaces: 100%") == 1
    assert "4/4" in done.stderr
    assert "WORLD_SIZE" not in done.stderr
    wanted, found = tree(finished / "run" / "init"), tree(collected / "init")
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if wanted[name] != found[name]] == []


def test_killed_processes_leave_what_the_next_continue(finished: Path, collected: Path, tmp_path: Path) -> None:
    (tmp_path / "hooked.py").write_text(HOOKED)
    folder = collected / "init" / "kore"
    arguments = ["init", finished, "--run-dir", collected, "--method", "kore"]

    def killed(kill: str, notes: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        notes.mkdir()
        given = {"KILL": kill, "NOTES": str(notes), **environment}
        ended = launch(arguments, command=[tmp_path / "hooked.py"], **given)
        assert ended.returncode != 0
        assert not json.loads((folder / "stage.json").read_text())["done"], ended.stderr
        return ended

    # Everything, when rank 0 has solved the third of its four inputs, but not kept it.
    killed("0 os.rename 00000.factors.safetensors", tmp_path / "first", ALL="1")
    kept = {path.name for path in (folder / "factors.checkpoint").glob("[0-9]*")}
    assert 2 <= len(kept) < 8
    # Rank 1 alone, when all is solved and the adapter is saved: it is about to look what there is to remove.
    killed("1 os.listdir factors.checkpoint", tmp_path / "second")
    solved = [name for file in (tmp_path / "second").glob("*.solved") for name in file.read_text().split()]
    assert sorted([*kept, *solved]) == [f"{number:05d}.factors.safetensors" for number in range(8)]
    assert (folder / "adapter_model.safetensors").exists()
    done = launch(arguments)
    assert done.returncode == 0, done.stderr
    assert "null spaces" not in done.stderr
    wanted, found = tree(finished / "run" / "init" / "kore"), tree(folder)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if wanted[name] != found[name]] == []


def test_two_processes_collect_what_one_collects(finished: Path, tmp_path: Path) -> None:
    # What one process left when it was killed.
    left = tmp_path / "run" / "covariance" / "text.checkpoint" / "a" / "00000.safetensors"
    left.parent.mkdir(parents=True)
    left.write_text("half of a sum")
    state = json.loads((finished / "run" / "covariance" / "stage.json").read_text())
    (tmp_path / "run" / "covariance" / "stage.json").write_text(json.dumps({**state, "done": False}))
    done = launch(["covariance", finished, "--run-dir", tmp_path / "run"])
    assert done.returncode == 0, done.stderr
    wanted, found = tree(finished / "run" / "covariance"), tree(tmp_path / "run" / "covariance")
    assert found.keys() == wanted.keys()
    assert found["chat.jsonl"] == wanted["chat.jsonl"]
    one, two = (CovarianceStore.load(root / "run" / "covariance") for root in (finished, tmp_path))
    assert one.groups == two.groups
    for group in one.groups:
        torch.testing.assert_close(two.covariance(group), one.covariance(group), rtol=1e-5, atol=1e-8)


def test_two_processes_train_what_one_trains(finished: Path, tmp_path: Path) -> None:
    """Three samples a step do not divide by two: a fourth place is filled and teaches nothing."""
    given = ["--set=training.batch_size=3", "--set=training.per_device=2", "--method=kore"]
    for name in ("one", "two"):
        for stage in ("augment", "init", "covariance"):
            shutil.copytree(finished / "run" / stage, tmp_path / name / stage)
    assert main(["train", str(finished), "--run-dir", str(tmp_path / "one"), *given]) == 0
    done = launch(["train", finished, "--run-dir", tmp_path / "two", *given])
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = (tmp_path / name / "train" / "kore" for name in ("one", "two"))
    assert tree(one).keys() == tree(two).keys()
    assert (one / "settings.json").read_bytes() == (two / "settings.json").read_bytes()
    rows = [list(csv.DictReader((folder / "loss.csv").open())) for folder in (one, two)]
    for single, shared in zip(*rows, strict=True):
        assert float(shared["loss"]) == pytest.approx(float(single["loss"]), rel=1e-3)
    first, second = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two))
    for key, value in first.items():
        if "lora_A" in key:
            assert torch.equal(second[key], value)
        else:
            assert float((second[key] - value).norm()) < 1e-2 * float(value.norm()), key


@pytest.mark.slow
def test_accelerate_launches_what_torchrun_does(finished: Path, tmp_path: Path) -> None:
    """With the configuration for GPUs, two processes on the CPUs. (``--cpu`` would make it one, with no torchrun.)"""
    for name in ("torchrun", "accelerate"):
        for stage in ("augment", "init", "covariance"):
            shutil.copytree(finished / "run" / stage, tmp_path / name / stage)
    assert launch(["train", finished, "--run-dir", tmp_path / "torchrun", "--method=kore"]).returncode == 0
    given = ["--config_file", RECIPES / "accelerate" / "ddp.yaml", "--num_processes=2", "--mixed_precision=no"]
    given += ["--num_cpu_threads_per_process=1", "--main_process_port=0", *COMMAND, "train", finished]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            *given,
            "--run-dir",
            tmp_path / "accelerate",
            "--method=kore",
        ],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("train kore: 100%") == 1
    wanted, found = (tree(tmp_path / name / "train" / "kore") for name in ("torchrun", "accelerate"))
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if wanted[name] != found[name]] == []


def test_what_is_not_shared_is_refused(finished: Path, tmp_path: Path) -> None:
    done = launch(["run", finished, "--run-dir", tmp_path / "run"])
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("kore-fast: ")]
    assert len(errors) == 1
    assert errors[0].endswith(
        "covariance, init and train share their work over the processes of torchrun. Give `kore-fast run` without "
        "torchrun"
    )
    # torchrun may end one when the other has ended.
    assert "exitcode  : 1 " in done.stderr
    assert not (tmp_path / "run").exists()
