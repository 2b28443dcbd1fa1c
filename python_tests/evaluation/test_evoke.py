"""EVOKE: asked as its own code asks, every answer kept through kills, scores that follow from the kept answers."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kore_fast.data.evoke import read_evoke_questions
from kore_fast.data.questions import Question
from kore_fast.errors import DataError, LanguageModelError
from kore_fast.evaluation.answering import Answer, EndpointAnswerer, load_answerer
from kore_fast.evaluation.evoke import evaluate_evoke
from kore_fast.evaluation.generation import Prompt
from kore_fast.evaluation.metrics import cover_exact_match, cover_exact_match_corrected, token_f1
from kore_fast.files import read_jsonl
from kore_fast.intervals import mean_interval, wilson_interval
from kore_fast.progress import Progress, silent
from python_tests.augmentation.language.server import Reply, Server
from python_tests.evaluation.conftest import SUFFIX

ANSWERS = ["moss", "It was $419,300.", "a fern", "2001", "'moss'", "no idea", "Fern", "in 1958", "grass", "$5"]


class Says:
    """Answers from a list, two at a time."""

    def __init__(self, answers: Sequence[str | None] = ANSWERS, **about: Any) -> None:
        self.given = answers
        self.about: Mapping[str, Any] = {"model": "list", **about}
        self.asked: list[int] = []
        self.prompts: list[Prompt] = []

    def answers(
        self, prompts: Sequence[Prompt], wanted: Sequence[int], progress: Progress = silent, label: str = ""
    ) -> Iterator[Mapping[int, Answer]]:
        self.prompts = list(prompts)
        for start in range(0, len(wanted), 2):
            batch = wanted[start : start + 2]
            self.asked += batch
            yield {
                i: Answer(text) if (text := self.given[i]) is not None else Answer(None, "the server is down")
                for i in batch
            }


@pytest.fixture
def questions(evoke_file: Path) -> list[Question]:
    return read_evoke_questions(evoke_file)


def predictions(folder: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(folder / "predictions.jsonl")]


def test_scores_and_tables_follow_from_the_kept_predictions(
    evoke_file: Path, questions: list[Question], tmp_path: Path
) -> None:
    answerer = Says()
    scores = evaluate_evoke(questions, evoke_file.parent, answerer, tmp_path)
    assert all(prompt.text.endswith(SUFFIX) for prompt in answerer.prompts)
    assert [prompt.text for prompt in answerer.prompts] == [question.text for question in questions]
    assert all(prompt.image and prompt.image.is_file() for prompt in answerer.prompts)
    kept = predictions(tmp_path)
    assert [row["question_id"] for row in kept] == [str(n + 1) for n in range(10)]
    assert [row["prediction"] for row in kept] == ANSWERS
    for row in kept:
        assert row["cem"] == cover_exact_match(row["prediction"], row["answer"])
        assert row["cem_corrected"] == cover_exact_match_corrected(row["prediction"], row["answer"])
        assert row["f1"] == token_f1(row["prediction"], row["answer"])
    # By hand: the reference misses every quoted truth and every one with $.
    assert [row["cem"] for row in kept] == [False, False, True, False, False, False, True, True, False, False]
    assert [row["cem_corrected"] for row in kept] == [True, True, True, False, True, False, True, True, False, False]
    metrics = scores["metrics"]
    assert {name: metrics[name]["value"] for name in ("evoke_cem", "evoke_cem_corrected")} == {
        "evoke_cem": 0.3,
        "evoke_cem_corrected": 0.6,
    }
    assert (metrics["evoke_cem"]["low"], metrics["evoke_cem"]["high"]) == wilson_interval(3, 10)
    f1, halves = [row["f1"] for row in kept], [(row["cem"] + row["f1"]) / 2 for row in kept]
    assert (metrics["evoke_f1"]["low"], metrics["evoke_f1"]["high"]) == mean_interval(f1)
    assert (metrics["evoke_ka"]["low"], metrics["evoke_ka"]["high"]) == mean_interval(halves)
    ka = (metrics["evoke_cem"]["value"] + metrics["evoke_f1"]["value"]) / 2
    assert metrics["evoke_ka"]["value"] == pytest.approx(ka)
    assert json.loads((tmp_path / "scores.json").read_text()) == scores

    assert list(scores["by_kind"]) == ["news", "entity"]
    assert list(scores["by_type"]) == ["health", "film", "human"]
    for part, column, value in (("by_kind", "cnn_wiki_type", "wiki"), ("by_type", "type", "film")):
        chosen = [row for row in kept if row[column] == value]
        found = scores[part]["entity" if value == "wiki" else value]
        assert found["questions"] == len(chosen)
        assert found["metrics"]["evoke_f1"]["value"] == pytest.approx(sum(r["f1"] for r in chosen) / len(chosen))
    for part in ("by_kind", "by_type"):
        hits = [p["metrics"]["evoke_cem"]["value"] * p["questions"] for p in scores[part].values()]
        assert sum(hits) == pytest.approx(3)

    table = list(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines()))
    assert [(row["part"], row["name"]) for row in table] == [
        ("all", ""), ("kind", "news"), ("kind", "entity"), ("type", "health"), ("type", "film"), ("type", "human"),
    ]  # fmt: skip
    assert float(table[0]["cem"]) == 0.3
    assert float(table[0]["ka_high"]) == metrics["evoke_ka"]["high"]
    page = (tmp_path / "scores.md").read_text()
    assert "| **all** | 10 | 30.00 [10.8, 60.3] | 60.00 [" in page
    assert "| film | 3 |" in page
    assert "no answer" not in page


def test_what_is_there_is_not_asked_again_and_a_limit_loses_nothing(
    evoke_file: Path, questions: list[Question], tmp_path: Path
) -> None:
    first = Says()
    of_four = evaluate_evoke(questions, evoke_file.parent, first, tmp_path, limit=4)
    assert first.asked == [0, 1, 2, 3]
    assert (of_four["questions"], of_four["metrics"]["evoke_cem"]["count"]) == (4, 4)
    second = Says()
    whole = evaluate_evoke(questions, evoke_file.parent, second, tmp_path)
    assert second.asked == [4, 5, 6, 7, 8, 9]
    assert whole["questions"] == 10
    third = Says()
    assert evaluate_evoke(questions, evoke_file.parent, third, tmp_path, limit=4) == of_four
    assert third.asked == []
    assert len(predictions(tmp_path)) == 10
    calm = tmp_path / "calm"
    evaluate_evoke(questions, evoke_file.parent, Says(), calm)
    assert (calm / "predictions.jsonl").read_bytes() == (tmp_path / "predictions.jsonl").read_bytes()


def test_a_changed_question_is_asked_again(evoke_file: Path, questions: list[Question], tmp_path: Path) -> None:
    evaluate_evoke(questions, evoke_file.parent, Says(), tmp_path)
    changed = [
        question.model_copy(update={"text": "Another?"}) if n == 5 else question for n, question in enumerate(questions)
    ]
    again = Says()
    evaluate_evoke(changed, evoke_file.parent, again, tmp_path)
    assert again.asked == [5]
    assert predictions(tmp_path)[5]["text"] == "Another?"


def test_a_changed_picture_is_asked_again(evoke_file: Path, questions: list[Question], tmp_path: Path) -> None:
    """Also under the same name; and how many answers were there is told."""
    run, told = tmp_path / "run", list[str]()
    evaluate_evoke(questions, evoke_file.parent, Says(), run, say=told.append)
    assert told == []
    picture = evoke_file.parent / questions[5].image
    same = [n for n, question in enumerate(questions) if question.image == questions[5].image]
    Image.new("RGB", (9, 9), "purple").save(picture)
    again = Says()
    evaluate_evoke(questions, evoke_file.parent, again, run, say=told.append)
    assert again.asked == same
    assert told == [f"EVOKE: {10 - len(same)} of 10 answers are there already, in {run}"]
    # Of an interrupted call too.
    with pytest.raises(KeyboardInterrupt):
        evaluate_evoke(questions, evoke_file.parent, Interrupted(), tmp_path / "other")
    Image.new("RGB", (9, 9), "teal").save(evoke_file.parent / questions[0].image)
    again = Says()
    evaluate_evoke(questions, evoke_file.parent, again, tmp_path / "other")
    assert 0 in again.asked


def test_missing_answers_are_told_count_nowhere_and_are_asked_again(
    evoke_file: Path, questions: list[Question], tmp_path: Path
) -> None:
    broken = [None if n in (2, 6) else text for n, text in enumerate(ANSWERS)]
    scores = evaluate_evoke(questions, evoke_file.parent, Says(broken), tmp_path)
    assert (scores["questions"], scores["answered"], scores["missing"]) == (10, 8, 2)
    assert scores["metrics"]["evoke_cem"]["value"] == 1 / 8
    assert predictions(tmp_path)[2]["prediction"] is None
    assert predictions(tmp_path)[2]["missing"] == "the server is down"
    assert "2 of 10 questions have no answer" in (tmp_path / "scores.md").read_text()
    again = Says()
    whole = evaluate_evoke(questions, evoke_file.parent, again, tmp_path)
    assert again.asked == [2, 6]
    assert whole["missing"] == 0
    nothing: list[str | None] = [None] * 10
    with pytest.raises(LanguageModelError, match="none of the 10 questions was answered; the first, as the server is"):
        evaluate_evoke(questions, evoke_file.parent, Says(nothing), tmp_path / "none")


def test_answers_of_two_models_are_never_mixed(evoke_file: Path, questions: list[Question], tmp_path: Path) -> None:
    evaluate_evoke(questions, evoke_file.parent, Says(weights="a", server="http://one/v1"), tmp_path)
    evaluate_evoke(questions, evoke_file.parent, Says(weights="a", server="http://two/v1"), tmp_path)
    with pytest.raises(DataError, match=r"holds answers given under another weights \(a, now b\)"):
        evaluate_evoke(questions, evoke_file.parent, Says(weights="b"), tmp_path)
    with pytest.raises(DataError, match="another adapter"):
        evaluate_evoke(questions, evoke_file.parent, Says(weights="a", adapter="x"), tmp_path)
    (tmp_path / "answers.json").unlink()
    with pytest.raises(DataError, match="holds predictions, but not whose"):
        evaluate_evoke(questions, evoke_file.parent, Says(weights="a"), tmp_path)


class Interrupted(Says):
    def answers(self, *given: Any, **options: Any) -> Iterator[Mapping[int, Answer]]:
        for number, batch in enumerate(super().answers(*given, **options)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize("torn", ["", '{"key": "9", "que', '{"key": "9", "question": ["x", "y"], "answer": "z"}'])
def test_an_interrupted_call_goes_on_also_after_a_torn_line(
    evoke_file: Path, questions: list[Question], tmp_path: Path, torn: str
) -> None:
    calm = tmp_path / "calm"
    evaluate_evoke(questions, evoke_file.parent, Says(), calm)
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        evaluate_evoke(questions, evoke_file.parent, Interrupted(), folder)
    with open(folder / "predictions.partial.jsonl", "a") as file:
        file.write(torn)
    again = Says()
    evaluate_evoke(questions, evoke_file.parent, again, folder)
    assert again.asked == [4, 5, 6, 7, 8, 9]
    assert {p.name for p in folder.iterdir()} == {p.name for p in calm.iterdir()}
    for path in calm.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    (folder / "predictions.partial.jsonl").write_text('{"key": 1}\n')
    with pytest.raises(DataError, match=r"predictions\.partial\.jsonl, line 1: not a row"):
        evaluate_evoke(questions, evoke_file.parent, Says(), folder)


COMMAND = """
import sys, time
import torch
from kore_fast.evaluation import generation
from kore_fast.cli import main
torch.set_num_threads(1)
real = generation.encode_prompt
def slow(*given):
    time.sleep(0.15)  # so that the kill falls between batches
    return real(*given)
generation.encode_prompt = slow
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_evaluation_ends_with_the_files_of_an_uninterrupted_one(
    evoke_file: Path, questions: list[Question], loud_model_folder: Path, tmp_path: Path
) -> None:
    calm, folder = tmp_path / "calm", tmp_path / "run"
    answerer = load_answerer(loud_model_folder, max_new_tokens=8, batch_size=2)
    evaluate_evoke(questions, evoke_file.parent, answerer, calm)
    arguments = ["evaluate", "--evoke", evoke_file, "--model", loud_model_folder, "--run", folder, "--batch-size", "2"]
    arguments += ["--max-new-tokens", "8", "--device", "cpu"]
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    journal = folder / "predictions.partial.jsonl"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not journal.exists() or journal.read_bytes().count(b"\n") < 4):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = journal.read_bytes().splitlines()
    assert 4 <= len(kept) < 10
    assert not (folder / "predictions.jsonl").exists()
    before = {json.loads(line)["key"]: json.loads(line)["answer"] for line in kept}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| **all** | 10 |" in done.stdout
    for name in ("predictions.jsonl", "scores.json", "scores.csv", "scores.md"):
        assert (folder / name).read_bytes() == (calm / name).read_bytes(), name
    assert not journal.exists()
    assert all(row["prediction"] == before.get(row["question_id"], row["prediction"]) for row in predictions(folder))


def test_an_endpoint_is_asked_again_only_for_what_it_left_out(
    evoke_file: Path, questions: list[Question], tmp_path: Path
) -> None:
    def number(body: dict[str, Any]) -> int:
        return int(body["messages"][0]["content"][1]["text"].partition("number ")[2].partition("?")[0])

    down = True

    def script(body: dict[str, Any], times: int) -> Reply:
        if down and number(body) % 4 == 3:
            return Reply(raw=b"<html>bad gateway</html>")
        return Reply(content=ANSWERS[number(body)])

    with Server(script) as server:
        answerer = EndpointAnswerer.greedy("m", server.url, attempts=2, backoff=0.01, concurrency=3)
        first = evaluate_evoke(questions, evoke_file.parent, answerer, tmp_path)
        assert first["missing"] == 2
        down = False
        sent = len(server.requests)
        whole = evaluate_evoke(questions, evoke_file.parent, answerer, tmp_path)
        assert len(server.requests) - sent == 2
    assert whole["missing"] == 0
    assert [row["prediction"] for row in predictions(tmp_path)] == ANSWERS


def test_a_dying_server_loses_no_answer(evoke_file: Path, questions: list[Question], tmp_path: Path) -> None:
    dead = False

    def script(body: dict[str, Any], times: int) -> Reply:
        nonlocal dead
        dead = dead or len(server.requests) > 5
        return Reply(status=401, body={"error": {"message": "no"}}) if dead else Reply(content="moss")

    with Server(script) as server:
        answerer = EndpointAnswerer.greedy("m", server.url, attempts=2, backoff=0.01, concurrency=1)
        with pytest.raises(LanguageModelError, match="refuses the key"):
            evaluate_evoke(questions, evoke_file.parent, answerer, tmp_path)
        assert len(read_jsonl(tmp_path / "predictions.partial.jsonl")) == 5
        server.script = lambda body, times: Reply(content="moss")
        sent = len(server.requests)
        evaluate_evoke(questions, evoke_file.parent, answerer, tmp_path)
        assert len(server.requests) - sent == 5


def test_no_questions_and_unwritable_folders_are_clear(evoke_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no questions"):
        evaluate_evoke([], evoke_file.parent, Says(), tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(evoke_file.parent, copy)
    (copy / "imgs" / "evaluation" / "eval_wikidata_imgs" / "blue thing_0.png").unlink()
    with pytest.raises(DataError, match="blue thing_0"):
        read_evoke_questions(copy / evoke_file.name)
