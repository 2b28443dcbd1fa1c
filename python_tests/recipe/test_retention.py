"""The retention benchmarks in a recipe: figures, K.R of all twelve only, HARS, and what runs again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kore_fast.cli import main
from kore_fast.evaluation.lmms import RETENTION
from kore_fast.files import read_json
from kore_fast.recipe import work
from kore_fast.recipe.retention import to_try_again, with_hars
from kore_fast.report.words import BENCHMARKS, METRICS
from kore_fast.report.words import RETENTION as SHOWN
from python_tests.evaluation.lmms.conftest import LoopbackJudge, write_benchmarks
from python_tests.evaluation.lmms.standing_in import INSTALLED, stand_in
from python_tests.test_cli import fails


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_benchmarks(tmp_path / "data")


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return [] if INSTALLED else stand_in(monkeypatch)


def evaluate(folder: Path, data: Path, *settings: str, command: str = "evaluate") -> int:
    given = [f"evaluation.retention.data={data}", "evaluation.retention.hub=false"]
    given += ["evaluation.retention.max_new_tokens=4", *settings]
    return main([command, str(folder), "--run", str(folder / "run"), *(f"--set={one}" for one in given)])


def scores(folder: Path, method: str) -> Any:
    return read_json(folder / "run" / "evaluate" / method / "scores.json")


def test_a_few_benchmarks(
    copied: Path, data: Path, measured: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    few = "evaluation.retention.benchmarks=[pope, mme, mia_bench]"
    assert evaluate(copied, data, few, command="run") == 0
    for method in ("base", "lora", "kore"):
        found = scores(copied, method)
        assert {"benchmark_pope", "benchmark_mme"} <= found["metrics"].keys()
        assert not {"benchmark_mia_bench", "k_r", "hars"} & found["metrics"].keys()
        assert 0 <= found["metrics"]["benchmark_pope"]["value"] <= 1
        assert found["settings"]["benchmarks_by"].startswith("lmms-eval 0.7.")
        assert (copied / "run" / "benchmarks" / method / "pope" / "predictions.jsonl").is_file()
    assert "kore: not measured: mia_bench (no judge" in caplog.text
    page = (copied / "run" / "report" / "report.html").read_text()
    assert ">Benchmarks<" in page
    assert "mia_bench (no judge" in page
    capsys.readouterr()
    assert evaluate(copied, data, few) == 0
    assert capsys.readouterr().err.count("nothing changed") == 3
    # A picture that lies beside a benchmark's rows is an input too.
    shutil.copyfile(data / "pope" / "red.png", data / "pope" / "green.png")
    assert evaluate(copied, data, few) == 0
    assert "nothing changed" not in capsys.readouterr().err


def test_all_twelve_with_a_judge(
    copied: Path, data: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    judge = LoopbackJudge()
    told = f"evaluation.retention.judge={{base_url: '{judge.base_url}', model: teacher}}"
    try:
        assert evaluate(copied, data, told) == 0
    finally:
        judge.server.shutdown()
        judge.server.server_close()
    for method in ("base", "lora", "kore"):
        metrics = scores(copied, method)["metrics"]
        twelve = [metrics[f"benchmark_{benchmark.name}"]["value"] for benchmark in RETENTION]
        assert metrics["k_r"]["value"] == pytest.approx(sum(twelve) / 12)
        assert metrics["k_r"]["count"] == 12
        assert scores(copied, method)["settings"]["judge_of_benchmarks"] == "teacher"
    capsys.readouterr()
    # Where the judge is decides nothing.
    assert evaluate(copied, data, told.replace(judge.base_url, "http://elsewhere/v1")) == 0
    assert capsys.readouterr().err.count("nothing changed") == 3


def test_benchmarks_stay_when_something_else_is_measured_anew(copied: Path, data: Path, measured: list[str]) -> None:
    """Another part of the evaluation, or another benchmark; a benchmark's own data measures that one again."""

    def when(name: str) -> int:
        return (copied / "run" / "benchmarks" / "kore" / name / "result.json").stat().st_mtime_ns

    assert evaluate(copied, data, "evaluation.retention.benchmarks=[pope, mme]") == 0
    first = {name: when(name) for name in ("pope", "mme")}
    before = (copied / "run" / "evaluate" / "kore" / "stage.json").read_text()
    more = "evaluation.retention.benchmarks=[pope, mme, seedbench2_plus]"
    assert evaluate(copied, data, more, "evaluation.texts=4") == 0
    assert (copied / "run" / "evaluate" / "kore" / "stage.json").read_text() != before
    assert {name: when(name) for name in first} == first
    assert "benchmark_seedbench2_plus" in scores(copied, "kore")["metrics"]
    shutil.copyfile(data / "pope" / "red.png", data / "pope" / "green.png")
    assert evaluate(copied, data, more, "evaluation.texts=4") == 0
    assert when("pope") > first["pope"]
    assert when("mme") == first["mme"]


def test_benchmarks_of_another_model_are_measured_anew(copied: Path, data: Path, measured: list[str]) -> None:
    few = "evaluation.retention.benchmarks=[pope]"
    assert evaluate(copied, data, few) == 0
    folder = copied / "run" / "benchmarks"
    before = {name: read_json(folder / name / "pope" / "result.json") for name in ("base", "kore")}
    given = [few, "training.steps=4", f"evaluation.retention.data={data}", "evaluation.retention.hub=false"]
    given.append("evaluation.retention.max_new_tokens=4")
    assert main(["run", str(copied), "--run", str(copied / "run"), *(f"--set={one}" for one in given)]) == 0
    after = {name: read_json(folder / name / "pope" / "result.json") for name in ("base", "kore")}
    assert after["base"] == before["base"]
    assert after["kore"]["settings"]["model"] != before["kore"]["settings"]["model"]


def test_a_limit_makes_no_k_r(copied: Path, data: Path, measured: list[str]) -> None:
    judge = LoopbackJudge()
    told = f"evaluation.retention.judge={{base_url: '{judge.base_url}', model: teacher}}"
    try:
        assert evaluate(copied, data, told, "evaluation.retention.limit=6") == 0
    finally:
        judge.server.shutdown()
        judge.server.server_close()
    found = scores(copied, "kore")
    assert "benchmark_mme" in found["metrics"]
    assert "k_r" not in found["metrics"]
    assert found["settings"]["first_questions_of_benchmarks"] == 6


def test_what_a_judge_did_not_answer_is_tried_again(tmp_path: Path) -> None:
    from kore_fast.evaluation.lmms import Retention, Score
    from kore_fast.files import write_json

    assert to_try_again(tmp_path) == ""
    lacking = Score("mmdu", missing="the judge failed", again=True)
    for found, told in (([Score("pope", points=1.0), Score("mme", missing="no")], ""), ([lacking], "mmdu")):
        write_json(tmp_path / "retention.json", Retention("h", tuple(found)).row())
        assert told in to_try_again(tmp_path)
        assert bool(told) == bool(to_try_again(tmp_path))


def test_hars() -> None:
    def figures(adaptation: float | None, retention: float | None) -> dict[str, Any]:
        return {"evoke_ka": {"value": adaptation}, "k_r": {"value": retention}}

    # fA = 100·(1 - 20/40) = 50, fR = 100·45/50 = 90, 2·50·90/140
    found = with_hars(figures(0.40, 0.45), figures(0.20, 0.50))
    assert found["hars"]["value"] == pytest.approx(9000 / 140 / 100)
    assert found.keys() == {"evoke_ka", "k_r", "hars"}
    for undefined in (figures(0.0, 0.45), figures(None, 0.45), figures(0.4, None), {}):
        assert "hars" not in with_hars(undefined, figures(0.2, 0.5))
        assert "hars" not in with_hars(figures(0.4, 0.45), undefined)


@pytest.mark.parametrize("first", [None, 1])
def test_no_hars_on_the_first_of_evokes_questions(
    copied: Path, data: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch, first: int | None
) -> None:
    adaptation, retention = iter([0.20, 0.30, 0.40]), iter([0.50, 0.40, 0.45])
    monkeypatch.setattr(work, "_evaluate_evoke", lambda *_: {"evoke_ka": {"value": next(adaptation)}})
    monkeypatch.setattr(work, "measure_benchmarks", lambda *_: ({"k_r": {"value": next(retention)}}, {}))
    asked = copied / "evoke_evaluation_data.jsonl"
    picture = copied / "imgs" / "evaluation" / "eval_wikidata_imgs" / "red_0.png"
    picture.parent.mkdir(parents=True)
    shutil.copyfile(data / "pope" / "red.png", picture)
    row = {"image": "eval_wikidata_imgs/red_0.png", "text": "What?", "answer": "red"}
    rows = [{"question_id": n, **row, "type": "film", "cnn_wiki_type": "wiki"} for n in (1, 2)]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    limit = [f"evaluation.evoke_questions={first}"] if first else []
    assert evaluate(copied, data, "evaluation.retention.benchmarks=[pope]", f"evaluation.evoke={asked}", *limit) == 0
    for method in ("lora", "kore"):
        metrics = scores(copied, method)["metrics"]
        assert {"evoke_ka", "k_r"} <= metrics.keys()
        assert ("hars" in metrics) == (first is None)


def test_words() -> None:
    names = {words.name: words for words in METRICS}
    assert {f"benchmark_{benchmark.name}" for benchmark in RETENTION} <= names.keys()
    assert all(
        names[f"benchmark_{benchmark.name}"].label == benchmark.title.partition(" (")[0] for benchmark in RETENTION
    )
    # The plots have a panel for each of these.
    assert [words.name for words in SHOWN] == ["capitals", "picture_naming", "wikipedia_loss", "k_r"]
    assert names["benchmark_mme"].group == BENCHMARKS


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("benchmarks=[mme, popee]", ["evaluation.retention: no benchmark is called popee; did you mean pope?"]),
        ("benchmarks=[]", ["no benchmark is named"]),
        ("data=/no/such/folder", ["/no/such/folder", "no such folder"]),
        ("data=null", ["'hub' false"]),
        ("judge={base_url: h, model: m}", ["evaluation.retention.judge.base_url"]),
        ("judge={base_url: 'http://h/v1', model: m, api_key_env: NOT_SET_HERE}", ["NOT_SET_HERE is not set"]),
        ("limits=3", ["did you mean 'limit'?"]),
    ],
)
def test_bad_settings(
    copied: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    setting: str,
    named: list[str],
) -> None:
    stand_in(monkeypatch)
    sets = [f"data={data}", "hub=false", setting]
    before = scores(copied, "kore")
    problem = fails(
        capsys, "evaluate", copied, "--run", copied / "run", *(f"--set=evaluation.retention.{one}" for one in sets)
    )
    for words in named:
        assert words in problem
    assert problem.count("\n") == 1
    assert scores(copied, "kore") == before


def test_without_lmms_eval(
    copied: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib.metadata import PackageNotFoundError

    from kore_fast.evaluation.lmms import harness

    def none(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(harness, "version", none)
    assert evaluate(copied, data) == 1
    assert 'pip install "kore-fast[lmms-eval]"' in capsys.readouterr().err
