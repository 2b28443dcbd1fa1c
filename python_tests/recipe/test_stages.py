"""The stages end to end on the tiny model: killed anywhere they finish alike, and a change runs what depends on it."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kore_fast.cli import main
from kore_fast.errors import ConstraintError, DataError, RecipeError
from kore_fast.files import read_json
from kore_fast.recipe.checks import prepare
from kore_fast.recipe.loading import load_recipe
from kore_fast.recipe.stages import build_stages

STAGES = [
    "augment",
    "covariance",
    "init/lora",
    "init/kore",
    "train/lora",
    "train/kore",
    "evaluate/base",
    "evaluate/lora",
    "evaluate/kore",
    "report",
]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file but those that tell what a run took."""
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith("cost/")}


def ran(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    return [line.split()[1].rstrip(":") for line in lines if "nothing changed" not in line]


@pytest.fixture
def copied(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A copy of the finished run that may be changed."""
    shutil.copytree(finished / "run", tmp_path / "run")
    capsys.readouterr()
    return tmp_path / "run"


def run(recipe: Path, folder: Path, *settings: str, command: str = "run") -> None:
    assert main([command, str(recipe), "--run", str(folder), *(f"--set={s}" for s in settings)]) == 0


# Ends the process at the moment a path is opened, renamed to or removed: a kill -9 that always hits the same place.
KILLED_AT = """
import os, signal, sys

def hook(event, arguments):
    if event in ("open", "os.rename", "shutil.rmtree", "os.remove"):
        path = arguments[1] if event == "os.rename" else arguments[0]
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).endswith(os.environ["KILL_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
from kore_fast.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_killed_at_every_stage_ends_with_the_same_files(finished: Path, tmp_path: Path) -> None:
    command = ["run", str(finished), "--run", str(tmp_path / "run"), "--set=covariance.checkpoint_seconds=0"]
    points = [
        "augment/.questions.jsonl.partial",
        "covariance/text.checkpoint/b/slot.json",
        "covariance/chat.safetensors",
        "init/kore/stage.json",
        "init/kore/factors.checkpoint/00003.factors.safetensors",
        "init/kore/.leak.csv.partial",
        "train/lora/checkpoints/checkpoint-4/trainer_state.json",
        "train/kore/checkpoints",
        "evaluate/lora/pictures.jsonl",
        "report/report.html",
    ]
    for point in points:
        environment = {**os.environ, "KILL_AT": point, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(
            [sys.executable, "-c", KILLED_AT, *command], env=environment, capture_output=True, text=True
        )
        assert ended.returncode == -signal.SIGKILL, (point, ended.stderr)
    kept = (tmp_path / "run" / "covariance" / "text.safetensors").stat().st_mtime_ns
    assert main(command) == 0
    assert (tmp_path / "run" / "covariance" / "text.safetensors").stat().st_mtime_ns == kept
    wanted, found = tree(finished / "run"), tree(tmp_path / "run")
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if wanted[name] != found[name]] == []


def test_a_training_goes_on_with_other_options_of_memory(finished: Path, tmp_path: Path) -> None:
    """What an out-of-memory error asks for must not cost the steps before it; they are the same steps."""
    for done in ("augment", "covariance", "init"):
        shutil.copytree(finished / "run" / done, tmp_path / "run" / done)
    command = ["train", str(finished), "--run", str(tmp_path / "run"), "--method", "lora"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "KILL_AT": "train/lora/checkpoints/checkpoint-4/trainer_state.json",
    }
    ended = subprocess.run([sys.executable, "-c", KILLED_AT, *command], env=environment, capture_output=True)
    assert ended.returncode == -signal.SIGKILL
    memory = ["training.per_device=1", "training.gradient_checkpointing=true", "training.checkpoint_every=6"]
    assert main([*command, *(f"--set={s}" for s in memory)]) == 0
    # Of six steps two were in the checkpoint.
    assert read_json(tmp_path / "run" / "cost" / "train" / "lora.json")["steps"] == 4
    wanted, found = (folder / "run" / "train" / "lora" for folder in (finished, tmp_path))
    losses = [[float(row["loss"]) for row in csv.DictReader((f / "loss.csv").open())] for f in (wanted, found)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    before, after = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (wanted, found))
    start = load_file(finished / "run" / "init" / "lora" / "adapter_model.safetensors")
    for name, tensor in before.items():
        moved = (tensor - start[name]).abs().max()
        assert (after[name] - tensor).abs().max() < 1e-2 * moved, name


def test_a_finished_training_is_kept_with_other_options_of_memory(
    finished: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = ["training.per_device=1", "training.gradient_checkpointing=true", "training.checkpoint_every=3"]
    run(finished, copied, *memory)
    assert ran(capsys) == []
    run(finished, copied, "training.batch_size=2")
    assert "train/lora" in ran(capsys)


def test_an_interrupted_init_solves_no_input_twice(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight inputs: those before the kill are not solved again, nor any after the adapter is whole."""
    from kore_fast.constraint import factors

    for done in ("augment", "covariance"):
        shutil.copytree(finished / "run" / done, tmp_path / "run" / done)
    command = ["init", str(finished), "--run", str(tmp_path / "run")]
    solved: list[int] = []
    real = factors.nullspace

    def counted(C: torch.Tensor, rank: int, **given: object) -> object:
        solved.append(C.shape[0])
        return real(C, rank, **given)

    def kill(at: str) -> None:
        environment = {**os.environ, "KILL_AT": at, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run([sys.executable, "-c", KILLED_AT, *command], env=environment, capture_output=True)
        assert ended.returncode == -signal.SIGKILL

    monkeypatch.setattr(factors, "nullspace", counted)
    checkpoint = tmp_path / "run" / "init" / "kore" / "factors.checkpoint"
    kill("factors.checkpoint/00001.factors.safetensors")
    kept = len(list(checkpoint.glob("[0-9]*")))
    assert 2 <= kept < 8
    run(finished, tmp_path / "run", command="init")
    assert len(solved) == 8 - kept
    assert re.search(rf"null spaces: 100%.*{len(solved)}/{len(solved)}", capsys.readouterr().err)
    wanted, found = tree(finished / "run" / "init"), tree(tmp_path / "run" / "init")
    assert found == wanted
    shutil.rmtree(tmp_path / "run" / "init" / "kore")
    kill("init/kore/kore.json")  # the adapter is not whole, but all is solved
    assert len(list(checkpoint.glob("[0-9]*"))) == 8
    kill("init/kore/.leak.csv.partial")
    assert not checkpoint.exists()
    solved.clear()
    run(finished, tmp_path / "run", command="init")
    assert not solved
    assert tree(tmp_path / "run" / "init") == wanted


def test_two_runs_are_equal_files(finished: Path, tmp_path: Path) -> None:
    run(finished, tmp_path / "run")
    wanted, found = tree(finished / "run"), tree(tmp_path / "run")
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if wanted[name] != found[name]] == []


def test_every_stage_is_there_and_honest(finished: Path) -> None:
    folder = finished / "run"
    assert [s.name for s in build_stages(load_recipe(finished), folder)] == STAGES
    start, end = (load_file(folder / p / "adapter_model.safetensors") for p in ("init/kore", "train/kore/adapter"))
    assert start.keys() == end.keys()
    for key in start:
        assert torch.equal(start[key], end[key]) == ("lora_A" in key), key
    for method in ("lora", "kore"):
        rows = list(csv.DictReader((folder / "init" / method / "leak.csv").open()))
        assert len(rows) == 14
        assert not (folder / "train" / method / "checkpoints").exists()
        scores = json.loads((folder / "evaluate" / method / "scores.json").read_text())
        trained = load_file(folder / "train" / method / "adapter" / "adapter_model.safetensors")
        counted = sum(t.numel() for key, t in trained.items() if method == "lora" or "lora_B" in key)
        assert scores["trained_parameters"] == counted
        assert scores["settings"]["steps"] == 6
    leaks = {
        m: [float(r["leak"]) for r in csv.DictReader((folder / "init" / m / "leak.csv").open())]
        for m in ("lora", "kore")
    }
    assert max(leaks["kore"]) < 0.3 < min(leaks["lora"])
    base = json.loads((folder / "evaluate" / "base" / "scores.json").read_text())["metrics"]
    assert base["kl_text"]["value"] == base["kl_picture"]["value"] == 0
    assert (folder / "report" / "report.html").stat().st_size > 10_000


def test_a_second_run_does_nothing(
    finished: Path, copied: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import kore_fast.modules.loading as loading

    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("a model was loaded"))
    before = tree(copied)
    run(finished, copied)
    assert ran(capsys) == []
    assert tree(copied) == before


def test_a_method_s_option_runs_that_method_only(
    finished: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(copied)
    run(finished, copied, "methods.lora.learning_rate=0.02")
    assert ran(capsys) == ["train/lora", "evaluate/lora", "report"]
    after = tree(copied)
    changed = {name.rpartition("/")[0] for name in after if after[name] != before.get(name)}
    assert changed <= {"train/lora", "train/lora/adapter", "evaluate/lora", "report"}
    assert (
        before["train/lora/adapter/adapter_model.safetensors"] != after["train/lora/adapter/adapter_model.safetensors"]
    )


def test_another_rank_starts_at_its_start(finished: Path, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(finished, copied, "methods.kore.rank=4")
    assert ran(capsys) == ["init/kore", "train/kore", "evaluate/kore", "report"]


def test_an_option_of_the_evaluation_measures_everything_again(
    finished: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(finished, copied, "evaluation.texts=4")
    assert ran(capsys) == ["evaluate/base", "evaluate/lora", "evaluate/kore", "report"]


def test_a_replaced_adapter_is_kept_and_measured(
    finished: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    path = copied / "train" / "lora" / "adapter" / "adapter_model.safetensors"
    mine = {key: value * 3 for key, value in load_file(path).items()}
    save_file(mine, path, metadata={"format": "pt"})
    run(finished, copied)
    assert ran(capsys) == ["evaluate/lora", "report"]
    assert all(torch.equal(load_file(path)[key], mine[key]) for key in mine)


def test_a_changed_picture_is_a_changed_input(tmp_path: Path, finished: Path, knowledge_folder: Path) -> None:
    from PIL import Image

    from kore_fast.recipe.runner import _fingerprint

    shutil.copytree(knowledge_folder, tmp_path / "knowledge")
    text = (finished / "recipe.yaml").read_text().replace(str(knowledge_folder), str(tmp_path / "knowledge"))
    (tmp_path / "recipe.yaml").write_text(text)

    def fingerprints() -> dict[str, str]:
        stages = build_stages(load_recipe(tmp_path), finished / "run")
        return {stage.name: _fingerprint(finished / "run", stage) for stage in stages}

    before = fingerprints()
    Image.new("RGB", (28, 28), "white").save(tmp_path / "knowledge" / "images" / "red.png")
    after = fingerprints()
    assert {name.partition("/")[0] for name in before if before[name] != after[name]} == {
        "covariance",
        "train",
        "evaluate",
    }


@pytest.mark.parametrize("method", ["full", "frozen", "raw", "projector", "by_layer"])
def test_other_kinds_of_method(finished: Path, tmp_path: Path, method: str) -> None:
    options = {
        "full": "{kind: full, learning_rate: 1e-3}",
        "frozen": "{kind: lora, rank: 4, learning_rate: 1e-3, freeze_a: true}",
        "raw": "{kind: kore, rank: 4, learning_rate: 1e-3, freeze_a: false, samples: knowledge}",
        "projector": "{kind: kore, rank: 4, learning_rate: 1e-3, projector_learning_rate: 1e-4}",
        "by_layer": "{kind: kore, rank: {parameters: 5000, highest: 12}, learning_rate: 1e-3}",
    }[method]
    for done in ("augment", "covariance"):
        shutil.copytree(finished / "run" / done, tmp_path / "run" / done)
    settings = [f"methods.{method}={options}", "methods.lora=null", "methods.kore=null", "training.steps=4"]
    for command in ("train",) if method == "full" else ("init", "train"):
        run(finished, tmp_path / "run", *settings, command=command)
    made = tmp_path / "run" / "train" / method
    assert len(list(csv.DictReader((made / "loss.csv").open()))) == 4
    if method == "full":
        from kore_fast.constraint import decoder_linears
        from kore_fast.modules.loading import load_model

        base, trained = load_model(load_recipe(finished).model_path()), load_model(made / "model")
        linears = {f"{name}.weight" for name in decoder_linears(base)}
        state = base.state_dict()
        changed = {name for name, value in trained.state_dict().items() if not torch.equal(value, state[name])}
        assert changed == linears
    else:
        start, end = (
            load_file(folder / "adapter_model.safetensors")
            for folder in (tmp_path / "run" / "init" / method, made / "adapter")
        )
        changed = {key.split(".")[-2] for key in start if not torch.equal(start[key], end[key])}
        if method == "by_layer":
            trained = [value for key, value in end.items() if "lora_B" in key]
            assert len({value.shape[1] for value in trained}) > 1
            assert 4900 < sum(value.numel() for value in trained) <= 5000
        wanted = {
            "by_layer": {"lora_B"},
            "frozen": {"lora_B"},
            "raw": {"lora_A", "lora_B"},
            "projector": {"lora_B", "linear_1", "linear_2"},
        }
        assert changed == wanted[method]


def test_prepare_finds_what_is_wrong_before_any_work(recipe_file: Path, tmp_path: Path, knowledge_folder: Path) -> None:
    def load(key: str, value: str) -> None:
        prepare(load_recipe(recipe_file, {key: value}))

    prepare(load_recipe(recipe_file))
    with pytest.raises(ConstraintError, match=r"method 'kore': rank 17 is larger than the width of .*k_proj"):
        load("methods.kore.rank", "17")
    with pytest.raises(RecipeError, match=r"model\.path: no model .*nowhere"):
        load("model.path", str(tmp_path / "nowhere"))
    with pytest.raises(RecipeError, match=r"build\.py is not there"):
        load("model.build", "build.py")
    (tmp_path / "fails.py").write_text("raise SystemExit(3)")
    with pytest.raises(RecipeError, match=r"fails\.py could not build the model: it ended with status 3"):
        load("model.build", str(tmp_path / "fails.py"))
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        load("old_knowledge.texts", str(tmp_path / "gone.jsonl"))
    shutil.copytree(knowledge_folder / "images", tmp_path / "images")
    for name in ("pictures", "held_out"):
        shutil.copy(knowledge_folder / f"{name}.jsonl", tmp_path)
    picture = tmp_path / "images" / "green.png"
    picture.write_bytes(picture.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"pictures\.jsonl, line 2: image 'images/green\.png' cannot be decoded"):
        load("old_knowledge.pictures", str(tmp_path / "pictures.jsonl"))
    with pytest.raises(DataError, match=r"line 1: no \"choices\""):
        load("old_knowledge.held_out_pictures", str(knowledge_folder / "pictures.jsonl"))


def test_the_time_left_is_not_known_where_steps_follow_from_samples(finished: Path, tmp_path: Path) -> None:
    def seconds(**settings: str) -> float | None:
        recipe = load_recipe(finished, {f"training.{key}": value for key, value in settings.items()})
        return next(one.seconds for one in build_stages(recipe, tmp_path) if one.name == "train/lora")

    assert seconds(steps="null", epochs="6") is None
    assert seconds(steps="20") == 2 * seconds(steps="10") > 0  # type: ignore[operator]
