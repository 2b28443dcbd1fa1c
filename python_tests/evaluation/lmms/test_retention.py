"""What is asked for, what is missing and why, and the mean; lmms-eval is not needed for any of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from kore_fast.errors import DataError
from kore_fast.evaluation.lmms import BENCHMARKS, EVOKE, RETENTION, Retention, Score, evaluate_retention, harness
from kore_fast.evaluation.lmms.benchmarks import BenchmarkName
from kore_fast.evaluation.lmms.identity import fingerprint
from kore_fast.evaluation.lmms.prompts import pictures_first
from kore_fast.evaluation.lmms.retention import bind_answers


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "version", lambda name: "0.7.3")


def test_the_twelve() -> None:
    assert len(RETENTION) == 12
    assert EVOKE not in RETENTION
    assert get_args(BenchmarkName) == tuple(BENCHMARKS)
    assert {b.name for b in RETENTION if b.judged} == {"mia_bench", "mmdu", "mathvista", "hallusionbench"}
    assert {b.name for b in BENCHMARKS.values() if b.own} == {"evoke", "ocrvqa", "mmdu"}
    for benchmark in BENCHMARKS.values():
        assert not benchmark.own or (harness.TASKS / benchmark.task).is_file()
        assert (benchmark.readable is not None) == benchmark.judged


@pytest.mark.parametrize(
    ("name", "metrics", "points"),
    [
        # LLaVA-v1.5-7B's published sums
        ("mme", {"mme_perception_score": 1510.7, "mme_cognition_score": 355.7}, 66.657142857),
        ("mme", {"mme_perception_score": 2000, "mme_cognition_score": 800}, 100),
        ("mmbench", {"gpt_eval_score": 64.3}, 64.3),
        ("seedbench2_plus", {"seedbench_2_plus_all": 0.4}, 40),
        ("mmmu", {"mmmu_acc": 0.36}, 36),
        ("mia_bench", {"gpt_eval_score": 0.7}, 70),
        ("mathvista", {"llm_as_judge_eval": None}, 0),
        ("mathvision", {"mathvision_standard_eval": 11.5}, 11.5),
        ("pope", {"pope_f1_score": 0.859}, 85.9),
        ("hallusionbench", {"aAcc": 45, "fAcc": 18, "qAcc": 12}, 25),
        ("evoke", {"cem": 0.3065, "f1": 0.4126}, 35.955),
    ],
)
def test_points(name: str, metrics: dict[str, float | None], points: float) -> None:
    assert set(metrics) <= set(BENCHMARKS[name].metrics)
    assert BENCHMARKS[name].points(metrics) == pytest.approx(points)


def test_mean_and_what_it_is() -> None:
    scores = [Score(b.name, points=float(i)) for i, b in enumerate(RETENTION)]
    whole = Retention("h", (*scores, Score("evoke", points=99.0)))
    assert whole.complete
    assert (whole.label, whole.mean) == ("K.R", 5.5)
    part = Retention("h", (*scores[:4], Score("mmdu", missing="no judge")))
    assert (part.label, part.mean) == ("mean of 4 of 12", 1.5)
    assert "| MMDU | missing: no judge |" in part.table()
    assert "| mean of 4 of 12 | 1.50 |" in part.table()
    assert Retention("h", (), limit=3).label == "mean of 0 of 12, first 3 questions of each"
    assert Retention("h", ()).mean is None
    json.dumps(part.row(), allow_nan=False)


def test_missing_is_not_zero(installed: None, tmp_path: Path) -> None:
    result = evaluate_retention(nn.Linear(1, 1), None, folder=tmp_path, hub=False)
    assert result.mean is None
    assert all(score.points is None for score in result.scores)
    reasons = {score.benchmark: score.missing or "" for score in result.scores}
    assert "no judge" in reasons["hallusionbench"]
    assert "no local data" in reasons["mme"]
    assert "DATA/ocrvqa" in reasons["ocrvqa"]
    assert json.loads((tmp_path / "retention.json").read_text())["label"] == "mean of 0 of 12"
    assert os.listdir(tmp_path) == ["retention.json"]


def test_a_finished_benchmark_is_kept(installed: None, tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    settings = {
        "harness": "lmms-eval 0.7.3",
        "task": "pope/pope.yaml",
        "limit": 5,
        "max_new_tokens": 9,
        "model": {"bf16": False, "loaded_weights": fingerprint(model)},
        "data": "hub",
    }
    score = Score("pope", points=50.0, metrics={"pope_f1_score": 0.5}, questions=5)
    (tmp_path / "pope").mkdir()
    (tmp_path / "pope/result.json").write_text(json.dumps({"settings": settings, "score": score.__dict__}))

    def measure(**options: Any) -> Retention:
        return evaluate_retention(model, None, ["pope"], folder=tmp_path, hub=False, **options)

    assert measure(limit=5, max_new_tokens=9).scores == (score,)
    with pytest.raises(DataError, match=r"other settings \(limit, max_new_tokens\)"):
        measure()
    with torch.no_grad():
        model.bias += 1
    for names in (["pope"], ["mme"]):
        with pytest.raises(DataError, match=r"pope.result\.json: measured on another model \(its loaded weights was"):
            evaluate_retention(model, None, names, folder=tmp_path, hub=False)
    with pytest.raises(DataError, match=r"its name was None, is now other"):
        measure(about={"name": "other"})


def test_answers_are_bound_to_whose_they_are(tmp_path: Path) -> None:
    given = {"model": {"loaded_weights": "a"}, "max_new_tokens": 9, "limit": 3, "judge": "one", "data": "hub"}
    bind_answers(tmp_path, given)
    bind_answers(tmp_path, {**given, "limit": None, "judge": "two"})  # no answer depends on these
    with pytest.raises(DataError, match=r"answers\.json: measured with other settings \(max_new_tokens\)"):
        bind_answers(tmp_path, {**given, "max_new_tokens": 10})
    (tmp_path / "answers.json").unlink()
    (tmp_path / "answers.jsonl").write_text("")
    with pytest.raises(DataError, match="but not whose"):
        bind_answers(tmp_path, given)


def test_a_model_s_fingerprint() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8))
    before = fingerprint(plain)
    assert fingerprint(plain) == before
    model: Any = get_peft_model(plain, LoraConfig(r=2, target_modules=["0"]))  # type: ignore[arg-type]
    adapted = fingerprint(model)
    assert adapted != before
    with model.disable_adapter():
        assert fingerprint(model) != adapted
    assert fingerprint(model) == adapted
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name)[3, 1] = 1
    assert fingerprint(model) != adapted
    assert fingerprint(model.bfloat16()) != fingerprint(model.float())


def test_refusals(installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*names: str, **options: Any) -> Retention:
        return evaluate_retention(nn.Linear(1, 1), None, names, folder=tmp_path, **options)

    with pytest.raises(DataError, match=r"no benchmark is called MMbenc; did you mean mmbench\?"):
        measure("mme", "MMbenc")
    with pytest.raises(DataError, match="no benchmark is called xyz; there are mme, mmbench"):
        measure("xyz")
    with pytest.raises(DataError, match="no benchmark is named"):
        measure()
    with pytest.raises(DataError, match="named twice"):
        measure("mme", "mme")
    with pytest.raises(DataError, match="no such folder"):
        measure("mme", data=tmp_path / "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DataError, match="one process"):
        measure("mme")


def test_without_lmms_eval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def none(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(harness, "version", none)
    with pytest.raises(DataError, match=r'pip install "kore-fast\[lmms-eval\]"'):
        evaluate_retention(nn.Linear(1, 1), None, folder=tmp_path)
    monkeypatch.setattr(harness, "version", lambda name: "0.8.0")
    with pytest.raises(DataError, match=r"lmms-eval 0\.8\.0 is installed"):
        evaluate_retention(nn.Linear(1, 1), None, folder=tmp_path)


def test_the_room_needs_no_lmms_eval() -> None:
    code = (
        "import sys, kore_fast.evaluation.lmms; "
        "assert not {'lmms_eval', 'datasets', 'pyarrow', 'loguru'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pictures_first() -> None:
    assert pictures_first("Which?", 2) == "<image>\n<image>\nWhich?"
    # An option that is a file's name, in SEED-Bench, becomes the mark of a picture that is not there.
    assert pictures_first("Which?\nA. <image>\nB. two", 1) == "<image>\nWhich?\nA. \nB. two"
    assert pictures_first("Tell.", 0) == "Tell."
