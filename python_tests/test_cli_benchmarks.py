"""kore-fast evaluate --benchmarks: a model and its adapter, VLMEvalKit's way, one clear line for each bad input."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from kore_fast.cli import main
from kore_fast.evaluation.lmms import harness
from kore_fast.files import read_json
from python_tests.evaluation.lmms.conftest import LoopbackJudge, write_benchmarks
from python_tests.evaluation.lmms.standing_in import INSTALLED, stand_in
from python_tests.test_cli import fails


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmarks(tmp_path_factory.mktemp("data"))


@pytest.fixture
def harness_here(monkeypatch: pytest.MonkeyPatch) -> None:
    if not INSTALLED:
        stand_in(monkeypatch)


@pytest.fixture
def any_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "version", lambda name: "0.7.3")


def run(*arguments: Any) -> int:
    return main(["evaluate", *(str(argument) for argument in arguments)])


def test_a_model_and_then_its_adapter(
    harness_here: None,
    data: Path,
    finished: Path,
    tiny_model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--benchmarks", "pope", "mathvision", "mia_bench", "--model", tiny_model_folder, "--data", data]
    given += ["--no-hub", "--device", "cpu", "--max-new-tokens", 4]
    assert run(*given, "--run", tmp_path / "base") == 0
    shown = capsys.readouterr().out
    assert "| mean of 2 of 12 |" in shown
    assert "| MIA-Bench | missing: no judge" in shown
    assert str(tmp_path / "base" / "BENCHMARK" / "predictions.jsonl") in shown
    kept = read_json(tmp_path / "base" / "pope" / "result.json")
    assert kept["settings"]["model"]["model"] == tiny_model_folder.name
    assert run(*given, "--run", tmp_path / "base") == 0
    assert capsys.readouterr().out == shown
    adapter = finished / "run" / "train" / "kore" / "adapter"
    assert run(*given, "--adapter", adapter, "--run", tmp_path / "kore") == 0
    assert read_json(tmp_path / "kore" / "pope" / "result.json")["settings"]["model"]["adapter"] == "adapter"
    problem = fails(capsys, "evaluate", *given, "--adapter", adapter, "--run", tmp_path / "base")
    assert "measured on another model (its" in problem
    problem = fails(capsys, "evaluate", *given, "--limit", 2, "--run", tmp_path / "base")
    assert "measured with other settings (limit)" in problem


def test_the_twelve_with_a_judge(
    harness_here: None, data: Path, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = LoopbackJudge()
    try:
        options = ["--model", tiny_model_folder, "--data", data, "--no-hub", "--device", "cpu", "--max-new-tokens", 4]
        options += ["--judge-url", judge.base_url, "--judge-model", "teacher", "--run", tmp_path / "run"]
        assert run("--benchmarks", *options) == 0
    finally:
        judge.server.shutdown()
        judge.server.server_close()
    assert "| K.R |" in capsys.readouterr().out
    assert read_json(tmp_path / "run" / "retention.json")["complete"] is True


def test_nothing_measured_is_an_error_after_the_table(
    harness_here: None, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    given = ["--benchmarks", "pope", "mmdu", "--model", tiny_model_folder, "--data", tmp_path / "data", "--no-hub"]
    assert run(*given, "--device", "cpu", "--run", tmp_path / "run") == 1
    told = capsys.readouterr()
    assert "| POPE | missing: no" in told.out
    assert "nothing could be measured" in told.err


def test_vlmevalkit_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "served"
    given = ["--benchmarks", "mme", "pope", "--endpoint", "http://localhost:8000/v1", "--model", "kore"]
    assert run(*given, "--api-key-env", "KEY", "--run", folder) == 0
    shown = capsys.readouterr().out
    assert 'OPENAI_API_KEY="$KEY" python run.py --config' in shown
    assert f"kore-fast evaluate --vlmevalkit {folder}" in shown
    config = json.loads((folder / "vlmevalkit.json").read_text())
    assert set(config["data"]) == {"MME", "POPE"}
    results = folder / "served" / "T1"
    results.mkdir(parents=True)
    (results / "served_MME_score.csv").write_text('"perception","reasoning"\n"1400","280"\n')
    assert run("--vlmevalkit", folder) == 0
    shown = capsys.readouterr().out
    assert "| MME | 60.00 |" in shown
    assert "| mean of 1 of 12 | 60.00 |" in shown
    assert run("--vlmevalkit", folder, "--benchmarks", "mme") == 0
    assert "POPE" not in capsys.readouterr().out


ENDPOINT = ["--benchmarks", "pope", "--endpoint", "http://h/v1", "--model", "m"]
ONE = ["--benchmarks", "pope", "--model", "MODEL"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--benchmarks"], ["--benchmarks: name the model with --model"]),
        (["RECIPE", "--benchmarks"], ["one of them"]),
        (["--evoke", "e.jsonl", "--benchmarks", "mme", "--model", "MODEL"], ["one of them"]),
        (["RECIPE", "--data", "DATA"], ["--data", "evaluation.retention"]),
        (["--evoke", "e.jsonl", "--model", "MODEL", "--judge-url", "http://h/v1"], ["--judge-url", "--benchmarks"]),
        ([*ONE, "--set", "a=1"], ["--benchmarks: --method and --set are a recipe's"]),
        (["--benchmarks", "pop", "--model", "MODEL"], ["no benchmark is called pop; did you mean pope?"]),
        (["--benchmarks", "pope", "pope", "--model", "MODEL"], ["named twice"]),
        ([*ONE, "--data", "/no/such"], ["/no/such: no such folder"]),
        ([*ONE, "--data", "BROKEN"], ["pope", "holds no data file"]),
        ([*ONE, "--no-hub"], ["--no-hub", "--data"]),
        (["--benchmarks", "pope", "--model", "/no/model", "--data", "DATA"], ["/no/model", "cannot load a model"]),
        ([*ONE, "--data", "DATA", "--adapter", "/no/adapter"], ["/no/adapter", "no adapter there"]),
        ([*ONE, "--api-key-env", "K"], ["--api-key-env", "--endpoint"]),
        ([*ONE, "--judge-url", "http://h/v1"], ["--judge-url URL and --judge-model NAME, both"]),
        ([*ONE, "--judge-key-env", "K"], ["--judge-key-env", "--judge-url"]),
        ([*ONE, "--judge-url", "h:80", "--judge-model", "t"], ["--judge-url h:80", "want an address"]),
        (
            [*ONE, "--judge-url", "http://h/v1", "--judge-model", "t", "--judge-key-env", "NOT_SET_HERE"],
            ["NOT_SET_HERE is not set"],
        ),
        ([*ENDPOINT, "--data", "DATA"], ["--data has no place here", "VLMEvalKit"]),
        ([*ENDPOINT, "--limit", "3"], ["--limit has no place here"]),
        ([*ENDPOINT, "--adapter", "a"], ["--adapter has no place here"]),
        ([*ENDPOINT[:3], "localhost", *ENDPOINT[4:]], ["--endpoint localhost: want an address"]),
        ([*ENDPOINT[:1], "evoke", *ENDPOINT[2:]], ["VLMEvalKit does not have EVOKE"]),
        (["--vlmevalkit", "/no/results"], ["/no/results: no such folder"]),
        (["--vlmevalkit", "DATA", "--model", "m"], ["--model has no place here"]),
    ],
)
def test_bad_input_is_one_clear_line(
    any_version: None,
    data: Path,
    recipe_file: Path,
    tiny_model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    named: list[str],
) -> None:
    (tmp_path / "broken" / "pope").mkdir(parents=True)
    real = {"DATA": data, "BROKEN": tmp_path / "broken", "MODEL": tiny_model_folder, "RECIPE": recipe_file}
    run_there = [] if "--vlmevalkit" in arguments else ["--run", tmp_path / "run"]
    problem = fails(capsys, "evaluate", *[real.get(a, a) for a in arguments], *run_there)
    for words in named:
        assert words in problem
    assert problem.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_without_lmms_eval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def none(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(harness, "version", none)
    problem = fails(capsys, "evaluate", "--benchmarks", "--model", "/no/model", "--run", tmp_path / "run")
    assert 'pip install "kore-fast[lmms-eval]"' in problem
    assert problem.count("\n") == 1
