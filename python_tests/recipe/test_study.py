"""A study: what it expands to, which rates it chooses, that it runs each job once, and what a change makes stale."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from kore_fast.cli import main
from kore_fast.errors import RecipeError
from kore_fast.recipe.loading import load_recipe
from kore_fast.recipe.locks import alone_in
from kore_fast.recipe.study import Job, _bound_to_us, _Runner, _Running, choose, expand, jobs_of

STUDY = """
study:
  seeds: [0, 1]
  match: lora
  results: results
  experiments: { "Both ways": [lora, kore] }
  keep_weights: false
"""


@pytest.fixture
def study_file(recipe_file: Path) -> Path:
    values = yaml.safe_load(recipe_file.read_text() + STUDY)
    values["methods"] = {
        "lora": {"kind": "lora", "rank": 4, "learning_rates": [1e-3, "2e-2"]},
        "kore": {"kind": "kore", "rank": 8, "learning_rate": 1e-2, "seeds": [0]},
    }
    values["training"]["steps"] = 2
    recipe_file.write_text(yaml.safe_dump(values, sort_keys=False))
    return recipe_file


def edit(path: Path, change: Any) -> None:
    values = yaml.safe_load(path.read_text())
    change(values)
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def test_each_combination_is_one_method(study_file: Path) -> None:
    recipe = load_recipe(study_file)
    assert list(recipe.methods) == ["lora_1em3_s0", "lora_2em2_s0", "lora_1em3_s1", "lora_2em2_s1", "kore_1em2_s0"]
    assert recipe.methods["lora_2em2_s1"].learning_rate == 0.02
    assert recipe.methods["lora_2em2_s1"].seed == 1
    assert jobs_of(recipe) == [
        Job("lora", 0.001, 0, "lora_1em3_s0"),
        Job("lora", 0.02, 0, "lora_2em2_s0"),
        Job("kore", 0.01, 0, "kore_1em2_s0"),
        Job("lora", 0.001, 1, "lora_1em3_s1"),
        Job("lora", 0.02, 1, "lora_2em2_s1"),
    ]


def test_a_plain_recipe_is_a_study_of_its_methods(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert jobs_of(recipe) == [Job("lora", 0.001, 0, "lora"), Job("kore", 0.01, 0, "kore")]
    assert expand({"methods": {"a": {}}}) == {"methods": {"a": {}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["methods"]["lora"].update(learning_rate=1), "not both"),
        (lambda v: v["methods"]["lora"].update(learning_rates=[]), "empty"),
        (lambda v: v["study"].update(match="loar"), "'match' names a method that is not there"),
        (lambda v: v["study"]["experiments"].update(x=["what"]), "'x' names a method that is not there"),
        (lambda v: v["study"].update(sedes=[1]), "did you mean 'seeds'"),
        (lambda v: v["study"].update(jobs={}), "leave it out"),
        (lambda v: v.pop("study"), "methods.lora.learning_rates: unknown key"),
        (lambda v: v["methods"]["lora"].update(learning_rates=[0.001, "1e-3"]), "called lora_1em3_s0"),
    ],
)
def test_what_is_wrong_is_named(study_file: Path, change: Any, message: str) -> None:
    edit(study_file, change)
    with pytest.raises(RecipeError, match=message):
        load_recipe(study_file)


def test_rates_are_matched_on_what_was_learned() -> None:
    def found(value: float, kept: float) -> dict[str, Any]:
        return {"metrics": {"adaptation_cem": {"value": value}, "capitals": {"value": kept}}}

    scores = {
        Job("lora", 1e-3, 0, "a"): found(0.2, 0.9),
        Job("lora", 2e-3, 0, "b"): found(0.4, 0.1),
        Job("kore", 1e-3, 0, "c"): found(0.38, 0.2),
        Job("kore", 2e-3, 0, "d"): found(0.6, 1.0),
        Job("kore", 2e-3, 1, "e"): found(0.4, 1.0),  # a further seed decides nothing
    }
    assert choose(scores, "lora") == {"lora": 2e-3, "kore": 1e-3}
    assert choose(scores, None) == {"lora": 2e-3, "kore": 2e-3}
    assert choose({}, "lora") == {}


def test_rates_are_matched_on_evoke_where_the_items_give_no_questions() -> None:
    """EVOKE's items have no facts of their own: the recipes of the paper's models measure K.A only."""

    def found(ka: float | None) -> dict[str, Any]:
        return {"metrics": {"adaptation_cem": {"value": None}, "evoke_ka": {"value": ka}, "capitals": {"value": 0.5}}}

    scores = {
        Job("lora", 1e-4, 0, "a"): found(0.3),
        Job("lora", 2e-4, 0, "b"): found(0.4),
        Job("kore", 2e-4, 0, "c"): found(0.41),
        Job("kore", 4e-4, 0, "d"): found(0.5),
        Job("full", 2e-5, 0, "e"): found(None),  # nothing to choose from
    }
    assert choose(scores, "lora") == {"lora": 2e-4, "kore": 2e-4, "full": 2e-5}
    assert choose(scores, None) == {"lora": 2e-4, "kore": 4e-4, "full": 2e-5}
    scores[Job("full", 4e-5, 0, "f")] = found(None)
    with pytest.raises(RecipeError, match="neither new facts asked by name, CEM nor EVOKE"):
        choose(scores, "lora")


def test_no_job_outlives_a_study_that_is_told_to_end(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = _Runner(study_file, load_recipe(study_file), tmp_path / "run", (), 2, float("inf"), print)
    started: list[subprocess.Popen[bytes]] = []

    def start(job: Job, first: str, place: int, log: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["bash", "-c", "sleep 600; true"], start_new_session=True))
        if len(started) == 2:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return started[-1]

    monkeypatch.setattr(runner, "_start", start)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        runner.jobs(jobs_of(runner.recipe))
    assert left.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert [process.poll() for process in started] == [-signal.SIGTERM] * 2


WORKING = """
import sys, time
from kore_fast.recipe.study import _bound_to_us

_bound_to_us('while :; do date +%s%N >"$0"; sleep 0.05; done', sys.argv[1])
time.sleep(600)
"""


def test_no_job_outlives_a_study_that_is_killed(tmp_path: Path) -> None:
    clock = tmp_path / "clock"
    study = subprocess.Popen([sys.executable, "-c", WORKING, str(clock)])
    try:
        wait_until(clock.exists)
        before = clock.read_text()
        wait_until(lambda: clock.read_text() not in ("", before))
    finally:
        study.kill()
        study.wait()
    time.sleep(1.0)
    stopped = clock.read_text()
    time.sleep(1.0)
    assert clock.read_text() == stopped


def test_a_job_s_status_is_its_last_stage_s(tmp_path: Path) -> None:
    assert _bound_to_us('"$0" "$@"', "true").wait() == 0
    assert _bound_to_us('"$0" "$@"; true', "bash", "-c", "exit 3").wait() == 3


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_one_study_at_a_time(study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with alone_in(tmp_path / "run", "compare"):
        assert main(["compare", str(study_file), "--run", str(tmp_path / "run")]) == 1
    assert "compare: another process is at work on it" in capsys.readouterr().err


def test_a_job_waits_while_another_makes_its_start(study_file: Path, tmp_path: Path) -> None:
    runner = _Runner(study_file, load_recipe(study_file), tmp_path / "run", (), 2, float("inf"), print)
    jobs = {job.name: job for job in jobs_of(runner.recipe)}
    process = subprocess.Popen(["true"])
    process.wait()
    waiting = [jobs["lora_2em2_s0"], jobs["kore_1em2_s0"]]
    for stage, wanted in (("init", "kore_1em2_s0"), ("train", "lora_2em2_s0")):
        running = {jobs["lora_1em3_s0"]: _Running(process, stage, 0, None)}
        assert runner._next(waiting, running) is jobs[wanted]
    assert runner._next(waiting[:1], {jobs["lora_1em3_s0"]: _Running(process, "init", 0, None)}) is None


@pytest.mark.parametrize(
    ("chosen", "count", "wanted"),
    [
        (None, 2, ["0", "1", "0"]),
        ("4,5", 2, ["4", "5", "4"]),
        ("GPU-8a2f, MIG-17", 2, ["GPU-8a2f", "MIG-17", "GPU-8a2f"]),
        ("3,-1,2", 1, ["3", "3", "3"]),  # CUDA looks no further than a number that is none
        ("", 0, [None, None, None]),
    ],
)
def test_jobs_share_the_gpus_that_the_user_chose(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None, count: int, wanted: list[Any]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    given: list[dict[str, str]] = []
    monkeypatch.setattr("kore_fast.recipe.study._bound_to_us", lambda *_, env, **__: given.append(env))
    runner = _Runner(study_file, load_recipe(study_file), tmp_path / "run", (), 3, float("inf"), print)
    for place in range(3):
        runner._start(jobs_of(runner.recipe)[place], "train", place, None)
    assert [environment.get("CUDA_VISIBLE_DEVICES") for environment in given] == wanted


@pytest.mark.slow
def test_a_study_runs_once_continues_and_repeats_only_what_changed(
    study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def go(*extra: str) -> list[str]:
        assert main(["compare", str(study_file), "--run", str(tmp_path / "run"), *extra]) == 0
        return [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if ": started" in line]

    assert main(["compare", str(study_file), "--run", str(tmp_path / "run"), "--table"]) == 1
    assert "no job of the study is done" in capsys.readouterr().err
    # No time for any job: what they share is made, and then there is nothing to show.
    assert main(["compare", str(study_file), "--run", str(tmp_path / "run"), "--minutes", "0"]) == 1
    capsys.readouterr()
    started = go("--jobs", "2")
    # The second waits while the first makes the start that both have.
    assert started[:3] == ["lora_1em3_s0", "kore_1em2_s0", "lora_2em2_s0"]
    assert len(started) == 4, "the second seed runs at the chosen rate only"
    results = tmp_path / "results"
    kept = sorted(path.name for path in (results / "runs").iterdir())
    assert kept == sorted(["base.json", *(f"{name}.json" for name in started)])
    table = (results / "comparison.md").read_text()
    assert "## Both ways" in table
    assert (results / "comparison-both-ways.png").is_file()
    assert json.loads((results / "runs" / f"{started[0]}.json").read_text())["scores"]["method"] == "lora"
    assert not (tmp_path / "run" / "train" / started[0]).exists(), "keep_weights is false"
    assert go() == []
    assert go("--table") == []
    assert (results / "comparison.md").read_text() == table
    # Another run's folder, as in another checkout: the kept scores are enough.
    assert main(["compare", str(study_file), "--run", str(tmp_path / "other"), "--table"]) == 0
    edit(study_file, lambda v: v["methods"]["kore"].update(rank=6))
    assert go() == ["kore_1em2_s0"]
    edit(study_file, lambda v: v["evaluation"].update(questions=11))
    assert len(go()) == 4


@pytest.mark.slow
def test_a_job_that_fails_is_named_and_the_others_go_on(
    study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A loss that is no number ends a training.
    edit(study_file, lambda v: v["methods"]["lora"].update(learning_rates=[1e30], seeds=[0]))
    edit(study_file, lambda v: v["training"].update(steps=6))
    assert main(["compare", str(study_file), "--run", str(tmp_path / "run")]) == 1
    said = capsys.readouterr()
    assert "1 jobs failed" in said.err
    assert "lora_1e30_s0.log" in said.err
    assert "kore_1em2_s0: " in said.out
    assert (tmp_path / "results" / "runs" / "kore_1em2_s0.json").exists()
