from __future__ import annotations

import pytest

from kore_fast.augmentation.prose import sentences, shorten, summarise

PROSE = "Owls hunt at night. They hear\nvery well! Do they see by day? 'Yes,' says one. It is so."


def test_sentences_end_at_marks_before_a_capital() -> None:
    assert sentences(PROSE) == [
        "Owls hunt at night.",
        "They hear very well!",
        "Do they see by day?",
        "'Yes,' says one.",
        "It is so.",
    ]
    assert sentences("one e.g. two, at 3.5 m") == ["one e.g. two, at 3.5 m"]
    assert sentences('He said "no." Then he left.') == ['He said "no."', "Then he left."]


@pytest.mark.parametrize(
    ("words", "kept", "rest"),
    [
        (100, " ".join(PROSE.split()), ""),
        (8, "Owls hunt at night. They hear very well!", "Do they see by day? 'Yes,' says one. It is so."),
        (7, "Owls hunt at night.", "They hear very well! Do they see by day? 'Yes,' says one. It is so."),
        (3, "Owls hunt at …", "They hear very well! Do they see by day? 'Yes,' says one. It is so."),
    ],
)
def test_shorten_keeps_whole_sentences_and_gives_the_rest(words: int, kept: str, rest: str) -> None:
    assert shorten(PROSE, words) == (kept, rest)


def test_a_summary_is_the_opening_or_a_short_sentence_or_opening_clauses() -> None:
    assert summarise(PROSE, 9) == "Owls hunt at night. They hear very well!"
    assert summarise("This very first sentence is much too long. A short one is here.", 6) == "A short one is here."
    clauses = "They live in the old trees of the far north, where it is cold, and they seldom come out by day"
    assert summarise(clauses, 14) == "They live in the old trees of the far north, where it is cold."
    assert summarise(clauses, 9) == "They live in the old trees of the far …"
