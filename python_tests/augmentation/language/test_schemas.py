from __future__ import annotations

from typing import Any

import pytest

from kore_fast.augmentation.language.schemas import (
    Answers,
    Quadruplets,
    Questions,
    SpokenQuadruplets,
    Summary,
    UnusableError,
    usable_answer,
    usable_answers,
    usable_quadruplets,
    usable_questions,
    usable_summary,
)
from kore_fast.endpoint.forms import json_schema


def quadruplet(**changes: Any) -> dict[str, Any]:
    given = {
        "question": "Who built the Old Tower?",
        "answer": "Ann Lee",
        "subject": "Old Tower",
        "hypernym": "building",
    }
    return given | changes


def quadruplets(*rows: dict[str, Any], name: str = "Gor", most: int = 5) -> list[Any]:
    return usable_quadruplets(Quadruplets(quadruplets=list(rows)), name, most)


@pytest.mark.parametrize("form", [Questions, Answers, Summary, Quadruplets, SpokenQuadruplets])
def test_schemas_are_strict(form: Any) -> None:
    """What OpenAI's strict mode wants of every object: nothing besides its keys, and all of them."""

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            assert "$ref" not in value
            if value.get("type") == "object":
                assert value["additionalProperties"] is False
                assert sorted(value["required"]) == sorted(value["properties"])
            for one in value.values():
                walk(one)
        elif isinstance(value, list):
            for one in value:
                walk(one)

    walk(json_schema(form))


def test_questions_without_doubles_and_oddities() -> None:
    given = [
        "1. Who is it?",
        "who is it",
        "WHO is it?",
        "",
        "No question.",
        "Is <image> it?",
        "- Where  is\nit?",
        "x " * 99 + "?",
    ]
    assert usable_questions(Questions(questions=given), 10) == ["Who is it?", "Where is it?"]
    assert usable_questions(Questions(questions=[f"Is it {n}?" for n in range(9)]), 4) == [
        f"Is it {n}?" for n in range(4)
    ]
    for bad in ([], ["A statement."], ["<|im_end|>?"]):
        with pytest.raises(UnusableError, match="no usable question"):
            usable_questions(Questions(questions=bad), 10)


def test_answers_are_bounded_and_may_be_empty() -> None:
    assert usable_answer("  It is\nred. ", "What is it?", 50) == "It is red."
    assert usable_answer("", "What is it?", 50) == ""
    assert usable_answer("One two three four. Five six seven eight.", "What?", 5) == "One two three four."
    for bad in ("see <image>", "What is it?", "ok<|im_end|>"):
        with pytest.raises(UnusableError):
            usable_answer(bad, "What is it?", 50)


def test_several_answers_come_in_the_order_of_their_questions() -> None:
    rows = [{"number": 2, "answer": "b"}, {"number": 1, "answer": "a"}]
    assert usable_answers(Answers.model_validate({"answers": rows}), ["Who?", "Where?"], 9) == ["a", "b"]
    for bad in ([rows[0]], [*rows, rows[0]], [rows[0], {"number": 3, "answer": "c"}], []):
        with pytest.raises(UnusableError, match="expected the answers 1 to 2"):
            usable_answers(Answers.model_validate({"answers": bad}), ["Who?", "Where?"], 9)


def test_a_summary_has_no_more_than_its_words() -> None:
    assert usable_summary(Summary(summary="A red tower"), 25) == "A red tower."
    long = "A tower of red stone stands on a hill by the sea, and people say that it was built in a night. It fell."
    for words in range(8, 30):
        assert len(usable_summary(Summary(summary=long), words).replace(" …", "").split()) <= words
    with pytest.raises(UnusableError, match="empty"):
        usable_summary(Summary(summary=" \n"), 25)


@pytest.mark.parametrize(
    ("question", "becomes"),
    [
        ("Who built the Old Tower?", "Who built the building in the image?"),
        ("Old Tower was built by whom?", "The building in the image was built by whom?"),
        (
            "Is the old tower or the Old Tower meant?",
            "Is the building in the image or the building in the image meant?",
        ),
        ("What is the Old Tower's height?", "What is the building in the image's height?"),
    ],
)
def test_the_subject_becomes_its_hypernym(question: str, becomes: str) -> None:
    (made,) = quadruplets(quadruplet(question=question, hypernym="a building"))
    assert made.question == becomes
    assert made.search == "Old Tower building"


@pytest.mark.parametrize(
    "changes",
    [
        {"question": "Who built it?"},
        {"question": "Tell me who built the Old Tower."},
        {"subject": "Tow"},
        {"answer": ""},
        {"answer": "one two three four five six seven eight nine ten eleven"},
        {"answer": "<image>"},
        {"hypernym": "a thing of very many words"},
        {"question": "Did Gor build the Old Tower?"},
        {"question": "Did Ann Lee build the Old Tower?"},
        {"subject": ""},
    ],
)
def test_bad_quadruplets_are_dropped(changes: dict[str, Any]) -> None:
    good = quadruplet(question="When was the Old Tower built?", answer="1900")
    made = quadruplets(quadruplet(**changes), good, good | {"answer": "1901"})
    assert [one.answer for one in made] == ["1900"]
    with pytest.raises(UnusableError, match="no usable quadruplet"):
        quadruplets(quadruplet(**changes))


def test_a_subject_with_signs_is_found_letter_for_letter() -> None:
    (made,) = quadruplets(quadruplet(question="Who sings (I Can't) Stop?", subject="(I Can't) Stop", hypernym=r"so\ng"))
    assert made.question == r"Who sings the so\ng in the image?"


def test_spoken_answers_hold_the_answer() -> None:
    rows = [
        quadruplet(sentence="Ann Lee built it"),
        quadruplet(question="Did the Old Tower fall?", sentence="Nobody knows."),
    ]
    made = usable_quadruplets(SpokenQuadruplets.model_validate({"quadruplets": rows}), "Gor", 5)
    assert [one.sentence for one in made] == ["Ann Lee built it."]
