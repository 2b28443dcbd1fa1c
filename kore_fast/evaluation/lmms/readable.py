"""Whether an answer of a judge can be used: what lmms-eval's tasks read out of it is what it means."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module

Readable = Callable[[str, str], bool]
"""Of what the judge was asked and what it answered."""


def holds(pattern: str) -> Readable:
    """Where the answer has a match of a regular expression."""
    return lambda asked, answer: re.search(pattern, answer) is not None


# MathVista's judge is shown five examples of "Extracted answer: …" (14, 0.6, 1.45, [2007, 2008], B), then the question
# with its choices and what the model said, and completes the sixth.
_LAST_EXAMPLE = "Extracted answer: B\n\n"
_END = "\n\nExtracted answer:"
_CHOICES = re.compile(r"^Choices:\n((?:\([A-Z]\).*\n?)+)", re.MULTILINE)
_CHOICE = re.compile(r"\([A-Z]\) *(.+)")
_LETTER = re.compile(r"\([A-Za-z]\)")
_LIST = re.compile(r"\[.*\]", re.DOTALL)
# A number, or an option's letter: not the article that begins a sentence.
_VALUE = re.compile(r"\d|\bA\b(?! [a-z])|\b[B-H]\b")
_NONE = re.compile(
    r"\W*(none|null|nan|n/?a|unknown|not (applicable|given|provided|available|specified)|no (\w+ )*answer\b.*|"
    r".*\bresponse\b.*\b(not|no|cannot|nothing|empty|incomplete|unclear|cut off)\b.*|.*\bresponse\b.*n't\b.*)\W*",
    re.IGNORECASE | re.DOTALL,
)


def extraction(asked: str, answer: str) -> bool:
    """Where what MathVista's judge extracted from a response is a value, or the response has none.

    lmms-eval makes an answer of everything that a judge says: without a choice's letter the choice of the least edit
    distance, so that nonsense scores by chance or better. It reads as meant: the letter alone or in brackets; words of
    the choice that it takes for the nearest; a number; a list. That the response has no answer is an extraction too,
    and so are words of a response that holds neither number nor choice: these tell of the model, not of the judge.
    """
    answer = answer.strip()
    if re.fullmatch("[A-Z]", answer) or _LETTER.search(answer) or _is_number(answer) or _LIST.fullmatch(answer):
        return True
    if _NONE.fullmatch(answer):
        return True
    choices, said = _choices_and_response(asked)
    if choices:
        distance = import_module("Levenshtein").distance

        nearest = min(choices, key=lambda choice: distance(answer, choice))
        if _stands_in(nearest, answer) or _stands_in(answer, nearest):
            return True
    holds_value = _VALUE.search(said) or any(_stands_in(choice, said) for choice in choices)
    return not holds_value and _stands_in(answer, said)


def _choices_and_response(asked: str) -> tuple[list[str], str]:
    rest = asked.partition(_LAST_EXAMPLE)[2].rpartition(_END)[0]
    found = _CHOICES.search(rest)
    if found is None:
        return [], rest.partition("\n\n")[2]
    return _CHOICE.findall(found[1]), rest[found.end() :]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _stands_in(part: str, whole: str) -> bool:
    """As whole words, in upper or lower case."""
    part, whole = (" ".join(text.casefold().split()).strip(" .,:;!\"'*`") for text in (part, whole))
    return bool(part) and re.search(rf"(?<!\w){re.escape(part)}(?!\w)", whole) is not None
