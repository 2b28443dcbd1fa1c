from __future__ import annotations

import json
import time

import pytest

pytest.importorskip("json_repair", reason='needs json-repair: pip install "kore-fast[augment]"')

import contextlib

from kore_fast.augmentation.language.repair import LONGEST, LONGEST_REPAIRED, read_answer
from kore_fast.augmentation.language.schemas import (
    Answer,
    Answers,
    Judgement,
    Quadruplets,
    Questions,
    Summary,
    UnusableError,
)

TWO = ["Who is it?", "Where is it?"]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"questions": TWO}),
        json.dumps(TWO),
        f"Sure! Here they are:\n```json\n{json.dumps({'questions': TWO}, indent=2)}\n```\nI hope that {{helps}}.",
        f"Here: {json.dumps({'questions': TWO})} That is all.",
        '{"questions": ["Who is it?", "Where is it?",]}',
        "{'questions': ['Who is it?', 'Where is it?']}",
        '{questions: ["Who is it?", "Where is it?"]}',
        '{"questions": ["Who is it?" "Where is it?"]',
        '{"questions": ["Who is it?", "Where is it?", "Why is',
        '{"questions": ["Who is it?", "Where is it?", "Why',
        f"<think>The {{text}} is [odd].</think>\n{json.dumps({'questions': TWO})}",
        json.dumps({"questions": TWO, "note": "more than asked for"}),
        json.dumps({"questions": [{"question": one} for one in TWO]}),
        "1. Who is it?\n2. Where is it?\n\nLet me know!",
        "Here is the list: " + json.dumps(TWO),
    ],
)
def test_questions_are_found(content: str) -> None:
    got = read_answer(content, Questions).questions
    assert [one.lstrip("12. ") for one in got] == TWO


def test_a_cut_list_keeps_its_whole_elements() -> None:
    whole = {"question": "Who made it?", "answer": "Ann", "subject": "it", "hypernym": "thing"}
    text = json.dumps({"quadruplets": [whole, whole, whole]})
    start = text.rindex("{")
    for end in range(start, len(text) - 2):
        kept = read_answer(text[:end], Quadruplets, cut=True).quadruplets
        assert 1 <= len(kept) <= 2
        assert all(one.answer == "Ann" and one.hypernym == "thing" for one in kept)


def test_a_cut_text_ends_at_its_last_whole_sentence_or_is_refused() -> None:
    assert read_answer('{"answer": "It is red. It is big and', Answer).answer == "It is red."
    with pytest.raises(UnusableError, match="make it shorter"):
        read_answer('{"answer": "It is red and', Answer, cut=True)


def test_prose_will_do_for_one_text() -> None:
    assert read_answer("It lives in the hills.", Answer).answer == "It lives in the hills."
    assert read_answer("A hill giant.", Summary).summary == "A hill giant."


@pytest.mark.parametrize(
    ("content", "form", "said"),
    [
        ("I am sorry.", Questions, "expected a JSON object with 'questions'"),
        ("I am ready to help. What is your question?", Questions, "expected a JSON object"),
        ("It is red.", Answers, "expected a JSON object"),
        ('{"answer": 5}', Answer, "'answer'"),
        ('{"text": "x"}', Summary, "'summary' is missing"),
        ("5", Answer, "expected a JSON object"),
        ("null", Answer, "expected a JSON object"),
        ('{"quadruplets": [{"question": "Who?"}]}', Quadruplets, "'answer' is missing"),
        ("x" * 200_000, Answer, "more than 100,000 characters"),
        ("[" * 90_000, Questions, "90,000 characters of something else"),
        ("[" * 9_000, Questions, "expected a JSON object"),
        ('["' * 10_000, Questions, "more than 16 brackets inside each other"),
        ('{"questions": ' + "[" * 9_000, Questions, "more than 16 brackets inside each other"),
    ],
)
def test_what_cannot_be_read_is_said(content: str, form: type, said: str) -> None:
    with pytest.raises(UnusableError, match=said):
        read_answer(content, form)


PIECES = ['" ', "{", "[", '["', "{'", "[{", "{[", '{"questions": [', "\\", "```", '", "', "'a':", "[]", "{},", "a?\n"]


@pytest.mark.parametrize("piece", PIECES)
def test_no_answer_takes_long_to_read(piece: str) -> None:
    start = time.process_time()
    for head in ("", '{"questions": ["a?", ', '{"questions": '):
        with contextlib.suppress(UnusableError):
            read_answer((head + piece * LONGEST_REPAIRED)[:LONGEST_REPAIRED], Questions)
    assert time.process_time() - start < 3


@pytest.mark.parametrize("end", ["", "</think>", '</think>{"answer": "It is."}', "</thinking> It is. <think>"])
def test_thoughts_without_end_take_no_longer(end: str) -> None:
    start = time.process_time()
    with contextlib.suppress(UnusableError):
        read_answer("<think>" * ((LONGEST - len(end)) // 7) + end, Answer)
    assert time.process_time() - start < 1


def test_brackets_in_an_answer_do_no_harm() -> None:
    text = "It is :[ and [[a]] and (b) and {c} [" + "[x] " * 40
    assert read_answer(f"Here: {json.dumps({'answer': text})}", Answer).answer == text


@pytest.mark.parametrize(
    ("content", "decision"),
    [
        ('{"supported": true, "reason": "It says so."}', True),
        ('```json\n{"supported": false, "reason": null}\n```', False),
        ("<think>Is it? {no}</think> {supported: False}", False),
        ('{"supported": "yes"}', True),
        ('{"supported": false, "reason": "The text says th', False),
        ('{"supported": "true or false", "reason": "one short sentence"}', None),
        ('{"supported": maybe}', None),
        ('{"supported": fal', None),
        ('{"supported": tru', None),
        ('{"supported": null, "reason": "unclear"}', None),
        ('{"reason": "It says so."}', None),
        ("It is supported.", None),
        ("true", None),
    ],
)
def test_a_decision_is_read_or_refused_and_never_guessed(content: str, decision: bool | None) -> None:
    if decision is None:
        with pytest.raises(UnusableError):
            read_answer(content, Judgement, cut=True)
    else:
        assert read_answer(content, Judgement, cut=True).supported is decision
