from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kore_fast.data.questions import Question, read_questions, write_questions
from kore_fast.errors import DataError


def record(identity: Any = "q1", **changes: Any) -> dict[str, Any]:
    made = {"question_id": identity, "image": "a.png", "text": "What is it?", "answer": "owl"} | changes
    return {key: value for key, value in made.items() if value is not None}


def save(root: Path, *records: Any) -> Path:
    path = root / "questions.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def test_questions_are_written_and_read_back(tmp_path: Path) -> None:
    questions = [Question.model_validate(record(f"q{n}", type="race", item="a", form="by_name")) for n in range(3)]
    write_questions(tmp_path / "out.jsonl", questions)
    assert read_questions(tmp_path / "out.jsonl") == questions


def test_evokes_own_form_loads(tmp_path: Path) -> None:
    path = save(tmp_path, record(12, type="sports", cnn_wiki_type="news", answer=1958))
    (question,) = read_questions(path)
    assert (question.question_id, question.answer, question.item, question.form) == ("12", "1958", None, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": " "}, "line 1: 'answer' is empty"),
        ({"text": None}, "line 1: 'text' is missing"),
        ({"form": "by_touch"}, "line 1: 'form': input should be 'by_name' or 'by_picture'"),
        ({"answer": ["owl"]}, "line 1: 'answer': input should be a valid string"),
    ],
)
def test_what_is_wrong_with_a_question_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_questions(save(tmp_path, record(**changes)))
    assert message in str(caught.value)
    assert "questions.jsonl" in str(caught.value)


def test_pictures_ids_and_lines_are_checked(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert read_questions(save(tmp_path, record()), tmp_path)[0].image == "a.png"
    with pytest.raises(DataError, match=r"question 'q1': no image 'b\.png'"):
        read_questions(save(tmp_path, record(image="b.png")), tmp_path)
    with pytest.raises(DataError, match="id 'q1' comes at 0 and again at 1"):
        read_questions(save(tmp_path, record(), record()))
    with pytest.raises(DataError, match="there is no question in it"):
        read_questions(save(tmp_path))
    question = Question.model_validate(record())
    with pytest.raises(DataError, match="id 'q1'"):
        write_questions(tmp_path / "out.jsonl", [question, question])
    assert not (tmp_path / "out.jsonl").exists()
