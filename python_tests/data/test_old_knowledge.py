"""Old knowledge: a fixed split by title, questions that do not ask what is measured, errors with lines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kore_fast.data.old_knowledge import capital_questions, chat_questions, read_pictures, read_texts
from kore_fast.errors import DataError


def test_texts_are_split_by_title_in_either_form(tmp_path: Path) -> None:
    rows = [{"title": f"T{n}", "text": f"Text {n}."} for n in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps({row["title"]: {"extract": row["text"]} for row in rows}))
    for name in ("a.jsonl", "b.json"):
        held, kept = (read_texts(tmp_path / name, held_out=side) for side in (True, False))
        assert {t.title for t in held}.isdisjoint(t.title for t in kept)
        assert len(held) + len(kept) == 300
        assert 10 <= len(held) <= 60
        assert all(t.text == f"Text {t.title[1:]}." for t in held)
    assert read_texts(tmp_path / "a.jsonl", held_out=True) == read_texts(tmp_path / "b.json", held_out=True)
    # A title's side does not depend on what else is in the file.
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows[:200])))
    assert set(read_texts(tmp_path / "c.jsonl", held_out=True)) <= set(read_texts(tmp_path / "a.jsonl", held_out=True))


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.jsonl", '{"title": "x"}\n', r"a\.jsonl, line 1: want an object"),
        ("a.jsonl", '{"title": "x", "text": "y"}\n3\n', r"a\.jsonl, line 2"),
        ("a.json", "[]", r"a\.json: want a JSON object"),
        ("a.json", '{"x": {"text": "y"}}', r"a\.json: 'x' has no \"extract\""),
        ("a.jsonl", "", r"a\.jsonl: no text on the held-out side"),
        ("a.jsonl", '{"title": "T1", "text": "  "}\n', "no text on the held-out side"),
    ],
)
def test_texts_that_cannot_be_used(tmp_path: Path, name: str, content: str, named: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=named):
        read_texts(tmp_path / name, held_out=True)


def test_pictures_beside_their_file(knowledge_folder: Path) -> None:
    pictures = read_pictures(knowledge_folder / "held_out.jsonl", need_choices=True, check_images=True)
    assert [p.name for p in pictures][:2] == ["red square", "green square"]
    assert all(p.path.is_file() and p.name in p.choices and len(p.choices) == 4 for p in pictures)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ("[]", "want an object"),
        ('{"id": "a", "image": "images/red.png"}', "no 'name'"),
        ('{"id": 1, "image": "images/red.png", "name": "red"}', "no 'id'"),
        ('{"id": "a", "image": "images/gone.png", "name": "red"}', r"images/gone\.png"),
        ('{"id": "a", "image": "../red.png", "name": "red"}', "leaves its folder"),
        ('{"id": "a", "image": "images/cut.png", "name": "red"}', "cannot be decoded"),
        (
            '{"id": "a", "image": "images/red.png", "name": "red", "choices": ["blue", "green"]}',
            "not among its choices",
        ),
        ('{"id": "a", "image": "images/red.png", "name": "red"}', 'no "choices"'),
        ('{"id": "a", "image": "images/red.png", "name": "red", "choices": ["red", "red"]}', "comes twice"),
        ('{"id": "a", "image": "images/red.png", "name": "red", "choices": ["red"]}', 'no "choices"'),
    ],
)
def test_pictures_that_cannot_be_used(tmp_path: Path, knowledge_folder: Path, row: str, named: str) -> None:
    shutil.copytree(knowledge_folder / "images", tmp_path / "images")
    whole = (tmp_path / "images" / "red.png").read_bytes()
    (tmp_path / "images" / "cut.png").write_bytes(whole[:-30])
    good = '{"id": "g", "image": "images/red.png", "name": "red", "choices": ["red", "blue"]}\n'
    (tmp_path / "p.jsonl").write_text(good + row + "\n")
    need_choices = "choices" in named
    with pytest.raises(DataError, match=rf"p\.jsonl, line 2: .*{named}"):
        read_pictures(tmp_path / "p.jsonl", need_choices=need_choices, check_images=True)


def test_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no pictures in it"):
        read_pictures(tmp_path / "p.jsonl")


def test_capitals_are_many_and_not_given_away() -> None:
    questions = capital_questions()
    assert 120 < len(questions) < 200
    assert len({q.id for q in questions}) == len(questions)
    found = {q.id: q for q in questions}
    assert found["FRA"].answer == "Paris"
    assert all(q.answer.lower() not in q.text.lower() for q in questions)


def test_calibration_never_asks_for_a_capital() -> None:
    titles = [f"Title {n}" for n in range(50)]
    questions = chat_questions(titles, 60, seed=1)
    assert len(questions) == len({q.id for q in questions}) == 60
    assert not any("capital" in q.text.lower() for q in questions)
    assert chat_questions(titles, 60, seed=1) == questions
    assert chat_questions(titles, 60, seed=2) != questions
    about_titles = [q for q in questions if "Title" in q.text]
    assert len(about_titles) == 40
    assert len(chat_questions([], 9, seed=1)) == 9
