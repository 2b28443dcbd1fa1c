"""kore-fast evaluate --evoke: one model, an adapter or a server, one clear line for each bad input; and in a recipe."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kore_fast.cli import main
from kore_fast.files import read_json, read_jsonl
from python_tests.augmentation.language.server import Reply, Server, error
from python_tests.test_cli import fails


@pytest.fixture
def evoke(tmp_path: Path, knowledge_folder: Path) -> Path:
    """EVOKE's form, with the knowledge folder's pictures."""
    folder = tmp_path / "evoke"
    shutil.copytree(knowledge_folder / "images", folder / "imgs" / "evaluation" / "eval_wikidata_imgs")
    rows = [
        {
            "question_id": number,
            "image": f"eval_wikidata_imgs/{colour}.png",
            "text": f"What colour has thing {number}?",
            "answer": colour,
            "type": "colour",
            "cnn_wiki_type": ["wiki", "news"][number % 2],
        }
        for number, colour in enumerate(("red", "green", "blue"), start=1)
    ]
    path = folder / "evoke_evaluation_data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_model_and_then_its_adapter(
    evoke: Path, finished: Path, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["evaluate", "--evoke", evoke, "--model", tiny_model_folder, "--max-new-tokens", 4, "--device", "cpu"]
    assert main([str(a) for a in [*given, "--run", tmp_path / "base", "--limit", 2]]) == 0
    shown = capsys.readouterr().out
    assert "| **all** | 2 |" in shown
    assert "CEM, corrected" in shown
    assert str(tmp_path / "base" / "predictions.jsonl") in shown
    assert main([str(a) for a in [*given, "--run", tmp_path / "base"]]) == 0
    assert read_json(tmp_path / "base" / "scores.json")["questions"] == 3
    adapter = finished / "run" / "train" / "kore" / "adapter"
    assert main([str(a) for a in [*given, "--run", tmp_path / "kore", "--adapter", adapter]]) == 0
    assert read_json(tmp_path / "kore" / "scores.json")["answerer"]["adapter"] == "adapter"
    problem = fails(capsys, *given, "--run", tmp_path / "base", "--adapter", adapter)
    assert "holds answers given under another adapter" in problem


def test_a_server(evoke: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Server(lambda body, times: Reply(content="It is red.")) as server:
        given = ["evaluate", "--evoke", evoke, "--endpoint", server.url, "--model", "vlm", "--run", tmp_path / "run"]
        assert main([str(a) for a in given]) == 0
        assert len(server.requests) == 3
        assert main([str(a) for a in given]) == 0
        assert len(server.requests) == 3
    assert "33.33" in capsys.readouterr().out
    assert [row["cem"] for _, row in read_jsonl(tmp_path / "run" / "predictions.jsonl")] == [True, False, False]
    with Server(lambda body, times: error(404, "no such model")) as server:
        other = [*given[:4], server.url, *given[5:-1], tmp_path / "other"]
        assert main([str(a) for a in other]) == 1
    # After a progress bar.
    problem = capsys.readouterr().err.splitlines()[-1]
    assert problem.startswith("kore-fast: ")
    assert "no model 'vlm' there (404)" in problem


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], ["give a recipe or --evoke FILE"]),
        (["--evoke", "FILE"], ["--model"]),
        (["--evoke", "/no/such.jsonl", "--model", "MODEL"], ["/no/such.jsonl", "no such file"]),
        (["--evoke", "FILE", "--model", "/no/such/model"], ["/no/such/model", "cannot load a model"]),
        (["--evoke", "FILE", "--model", "MODEL", "--adapter", "/no/adapter"], ["/no/adapter", "no adapter there"]),
        (["--evoke", "FILE", "--model", "MODEL", "--set", "a=1"], ["--set"]),
        (["--evoke", "FILE", "--model", "MODEL", "--api-key-env", "K"], ["--api-key-env goes with --endpoint"]),
        (["--evoke", "FILE", "--model", "m", "--endpoint", "localhost"], ["'base_url' must look like"]),
        (["--evoke", "FILE", "--model", "m", "--endpoint", "http://h/v1", "--adapter", "a"], ["--adapter is for the"]),
        (["RECIPE", "--model", "MODEL"], ["--model goes with --evoke"]),
        (["RECIPE", "--evoke", "FILE"], ["one of them"]),
    ],
)
def test_bad_input_is_one_clear_line(
    evoke: Path,
    recipe_file: Path,
    tiny_model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    named: list[str],
) -> None:
    real = {"FILE": evoke, "MODEL": tiny_model_folder, "RECIPE": recipe_file}
    problem = fails(capsys, "evaluate", *[real.get(a, a) for a in arguments], "--run", tmp_path / "run")
    for words in named:
        assert words in problem
    assert problem.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_missing_picture_is_found_first(
    evoke: Path, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (evoke.parent / "imgs" / "evaluation" / "eval_wikidata_imgs" / "blue.png").unlink()
    given: list[Any] = ["evaluate", "--evoke", evoke, "--model", tiny_model_folder, "--run", tmp_path / "run"]
    assert "question '3'" in fails(capsys, *given)
    assert not (tmp_path / "run").exists()
    # Not one of those that are asked.
    assert main([str(a) for a in [*given, "--limit", 2, "--max-new-tokens", 2, "--device", "cpu"]]) == 0


def test_in_a_recipe(evoke: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    given = [folder, "--run", folder / "run", "--set", f"evaluation.evoke={evoke}"]
    for place, setting in ((evoke.with_name("no.jsonl"), "no such file"), (evoke.parent / "bad.jsonl", "line 1")):
        if setting == "line 1":
            place.write_text('{"question_id": 1}\n')
        problem = fails(capsys, "run", *given, "--set", f"evaluation.evoke={place}")
        assert place.name in problem
        assert setting in problem
    assert main([str(a) for a in ["run", *given]]) == 0
    for method in ("base", "lora", "kore"):
        metrics = read_json(folder / "run" / "evaluate" / method / "scores.json")["metrics"]
        assert {"evoke_cem", "evoke_cem_corrected", "evoke_f1", "evoke_ka"} <= metrics.keys()
        assert {"adaptation_cem_corrected", "by_picture_cem_corrected"} <= metrics.keys()
        assert metrics["evoke_ka"]["count"] == 3
        assert len(read_jsonl(folder / "run" / "evaluate" / method / "evoke" / "predictions.jsonl")) == 3
    with open(folder / "run" / "report" / "results.csv", newline="") as file:
        assert "evoke_ka" in {value for row in csv.reader(file) for value in row}
    assert "EVOKE, K.A" in (folder / "run" / "report" / "report.html").read_text()
    # A changed picture is a changed input.
    shutil.copyfile(
        evoke.parent / "imgs" / "evaluation" / "eval_wikidata_imgs" / "red.png",
        evoke.parent / "imgs" / "evaluation" / "eval_wikidata_imgs" / "blue.png",
    )
    capsys.readouterr()
    assert main([str(a) for a in ["evaluate", *given, "--method", "base"]]) == 0
    assert "nothing changed" not in capsys.readouterr().err
