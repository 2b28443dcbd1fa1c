"""Which answers of a judge can be used: what a judge sensibly extracts, against what lmms-eval would misread."""

from __future__ import annotations

import pytest

from kore_fast.evaluation.lmms.readable import extraction, holds

LETTER = "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end."
INTEGER = "Hint: Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3."
BARS = f"{LETTER}\nQuestion: Which bar is longest?\nChoices:\n(A) the green bar\n(B) red\n(C) None of these"
CORNERS = f"{INTEGER}\nQuestion: How many corners are there?"


def asked(query: str, response: str) -> str:
    """As lmms-eval's MathVista asks its judge; only the end of its examples matters here."""
    return (
        f"Please read the following example.\n\nQuestion: x\\nChoices:\n(A) 3/11\n(B) 8/11\n\n"
        f"Model response: (B) 8/11.\n\nExtracted answer: B\n\n{query}\n\n{response}\n\nExtracted answer: "
    )


@pytest.fixture(autouse=True)
def distances() -> None:
    """MathVista's task needs it, and so does what tells how it reads."""
    pytest.importorskip("Levenshtein", reason='needs pip install "kore-fast[lmms-eval]"')


@pytest.mark.parametrize(
    ("query", "response", "answer"),
    [
        (BARS, "It must be B.", "B"),
        (BARS, "It must be B.", " (B) red\n"),
        (BARS, "It must be B.", "red."),
        (BARS, "The green one.", "green"),
        (BARS, "The green one.", "B. Red"),
        (BARS, "Neither of them.", "none of these"),
        (BARS, "It is 7.", "7"),
        (CORNERS, "I count 14.", "14"),
        (CORNERS, "I count 14.", "-14.0"),
        (CORNERS, "From 2007 to 2008.", "[2007, 2008]"),
        # What says that a model answered nothing is no fault of the judge.
        (CORNERS, "What a nice picture!", "None"),
        (CORNERS, "What a nice picture!", "N/A"),
        (CORNERS, "What a nice picture!", "No clear answer is given."),
        (CORNERS, "What a nice picture!", "The model response does not provide an answer."),
        (CORNERS, "What a nice picture!", "The response doesn't contain a number"),
        (CORNERS, "The woman is smiling.\n\nA lot.", "the woman is smiling"),
        (BARS, "A tall one.", "a tall one"),
    ],
)
def test_extractions(query: str, response: str, answer: str) -> None:
    assert extraction(asked(query, response), answer)


@pytest.mark.parametrize(
    ("query", "response", "answer"),
    [
        (BARS, "It must be B.", "I would rather talk about the weather."),
        (CORNERS, "I count 14.", "I would rather talk about the weather."),
        (CORNERS, "I count 14.", "I'm sorry, I can't help with that."),
        (CORNERS, "I count 14.", "  "),
        # A judge that repeats instead of extracting: lmms-eval reads no number, or the choice nearest to "The answer…".
        (CORNERS, "I count 14.", "I count 14."),
        (CORNERS, "I count 14.", "Extracted answer: 14"),
        (BARS, "The answer is B.", "The answer is B."),
        # Of less distance to another choice than to the one that is meant.
        (BARS, "The answer is B.", "The answer is red."),
        (BARS, "The answer is C.", "C."),
    ],
)
def test_what_is_none(query: str, response: str, answer: str) -> None:
    assert not extraction(asked(query, response), answer)


def test_lmms_eval_s_own_examples_end_as_they_are_taken_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its judge's task, as this version writes it."""
    pytest.importorskip("lmms_eval", reason='needs pip install "kore-fast[lmms-eval]"')
    monkeypatch.setenv("OPENAI_API_KEY", "none")  # it makes a client when it is imported
    from lmms_eval.tasks.mathvista.mathvista_evals import DEMO_PROMPT, MathVistaEvaluator

    evaluator = MathVistaEvaluator.__new__(MathVistaEvaluator)
    written = evaluator.create_test_prompt(DEMO_PROMPT, BARS, "The green one.")
    assert extraction(written, "green")
    # Of the examples' own choices it is none.
    assert not extraction(written, "8/11")
    # What it makes of answers that are called readable, and of some that are not.
    choices = ["the green bar", "red", "None of these"]
    for answer, read in (
        ("B", 1),
        ("(B) red", 1),
        ("B. Red", 1),
        ("none of these", 2),
        ("The answer is red.", 0),
        ("C.", 1),
    ):
        assert evaluator.normalize_extracted_answer(answer, choices, "multi_choice", "text", None) == choices[read]
    assert evaluator.normalize_extracted_answer("Extracted answer: 14", None, "free_form", "integer", None) is None


def test_holds() -> None:
    assert holds("(?i)total score: [0-9]+")("anything", "So: Total score: 7")
    assert not holds("(?i)total score: [0-9]+")("Total score: 7", "No.")
