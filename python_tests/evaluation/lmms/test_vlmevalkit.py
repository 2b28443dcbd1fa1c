"""VLMEvalKit: its configuration, and its result files in the shape in which it writes them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kore_fast.errors import DataError
from kore_fast.evaluation.lmms import RETENTION, Judge, read_vlmevalkit, write_vlmevalkit_config

FILES = {
    "MME_score.csv": '"perception","reasoning","OCR"\n"1510.7","355.7","125"\n',
    "MMBench_DEV_EN_acc.csv": '"split","Overall","AR"\n"dev","0.643","0.7"\n',
    "SEEDBench2_Plus_acc.csv": '"split","Overall"\n"none","0.41"\n',
    "OCRVQA_TESTCORE_acc.csv": '"Overall"\n"60.6"\n',
    "ScienceQA_TEST_acc.csv": '"split","Overall"\n"test","0.69"\n',
    "MMMU_DEV_VAL_acc.csv": '"split","Overall"\n"dev","0.3"\n"validation","0.36"\n',
    "MIA-Bench_gpt-4o_score.csv": '"0","1"\n"describe","0.8"\n"total_score","0.66"\n',
    "MMDU_gpt-4o_score.csv": '"set","Creativity","Overall Score"\n"all","30","26.5"\n"valid","31","27"\n',
    "MathVista_MINI_gpt-4o-mini_score.csv": '"Task&Skill","tot","acc"\n"statistical","9","1"\n"Overall","99","25.5"\n',
    "MathVision_gpt-4o-mini_score.csv": '"Subject","tot","acc"\n"algebra","9","1"\n"Overall","99","11.5"\n',
    "POPE_score.csv": '"split","Overall","acc"\n"Overall","86.1","87"\n"random","88","88"\n',
    "HallusionBench_score.csv": '"split","aAcc","fAcc","qAcc"\n"Overall","45","18","12"\n"VD","1","1","1"\n',
}
POINTS = [
    100 * (1510.7 + 355.7) / 2800,
    64.3,
    41,
    60.6,
    69,
    36,
    66,
    26.5,
    25.5,
    11.5,
    86.1,
    25,
]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "kore/T20261126_G1234567"
    folder.mkdir(parents=True)
    for name, text in FILES.items():
        (folder / f"kore_{name}").write_text(text)
    # Files of another data set whose name begins alike, and of the same run that are no result.
    (folder / "kore_MathVision_MINI_gpt-4o_score.csv").write_text('"Subject","tot","acc"\n"Overall","9","99"\n')
    (folder / "kore_POPE.xlsx").write_bytes(b"")
    return tmp_path / "kore"


def test_result_files(results: Path) -> None:
    found = read_vlmevalkit(results)
    assert [score.benchmark for score in found.scores] == [benchmark.name for benchmark in RETENTION]
    assert [score.points for score in found.scores] == pytest.approx(POINTS)
    assert found.label == "K.R"
    assert found.mean == pytest.approx(sum(POINTS) / 12)
    assert "points (VLMEvalKit)" in found.table()


def test_missing_and_newest(results: Path) -> None:
    next(results.rglob("*MMDU*")).unlink()
    older = next(results.rglob("*_POPE_score.csv"))
    newer = results / "T20261127_G1234567/kore_POPE_score.csv"
    newer.parent.mkdir()
    newer.write_text('"split","Overall"\n"Overall","80"\n')
    os.utime(older, ns=(1, 1))
    found = {score.benchmark: score for score in read_vlmevalkit(results).scores}
    assert found["mmdu"].points is None
    assert "no file *_MMDU_*_score.csv" in str(found["mmdu"].missing)
    assert found["pope"].points == 80


@pytest.mark.parametrize("text", ["", '"split","acc"\n"Overall","1"\n', '"split","Overall"\n"random","1"\n'])
def test_a_file_that_is_none(results: Path, text: str) -> None:
    next(results.rglob("*_POPE_score.csv")).write_text(text)
    with pytest.raises(DataError, match=r"kore_POPE_score\.csv: not VLMEvalKit's result of POPE"):
        read_vlmevalkit(results)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read_vlmevalkit(tmp_path / "none")


def test_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    judge = Judge(base_url="http://127.0.0.1:9/v1", model="teacher", api_key_env="JUDGE_KEY")
    run = write_vlmevalkit_config(tmp_path / "kore", base_url="http://h:8000/v1/", model="kore", judge=judge)
    assert run.results == tmp_path / "kore/kore"
    plain = json.loads((tmp_path / "kore/vlmevalkit.json").read_text())
    judged = json.loads((tmp_path / "kore/vlmevalkit_judged.json").read_text())
    assert plain["model"]["kore"]["api_base"] == "http://h:8000/v1/chat/completions"
    assert plain["data"]["POPE"] == {"class": "ImageYORNDataset", "dataset": "POPE"}
    assert set(judged["data"]) == {"MIA-Bench", "MMDU", "MathVista_MINI", "MathVision"}
    assert len(plain["data"]) + len(judged["data"]) == 12
    first, second = run.commands
    assert "--judge exact_matching" in first
    assert second.endswith('--judge teacher --judge-base-url http://127.0.0.1:9/v1 --reuse --judge-key "$JUDGE_KEY"')
    assert "secret" not in "".join(run.commands)
    (alone,) = write_vlmevalkit_config(tmp_path / "b", base_url="http://h/v1", model="m").commands
    assert "judged" not in alone
    with pytest.raises(DataError, match="VLMEvalKit does not have EVOKE"):
        write_vlmevalkit_config(tmp_path / "c", base_url="http://h/v1", model="m", benchmarks=["pope", "evoke"])
