"""The held-out questions: each fact asked in wordings that no training sample uses, by name and by picture."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from kore_fast.augmentation.chance import pick, shuffled
from kore_fast.augmentation.options import AugmentationOptions
from kore_fast.augmentation.wordings import Wordings, fill
from kore_fast.data.items import FactValue, Item
from kore_fast.data.questions import Question

MOST_WORDS = 6


def held_out_questions(
    items: Sequence[Item], wordings: Wordings, options: AugmentationOptions
) -> tuple[list[Question], dict[str, int]]:
    """Questions for evaluation, and how many were left out for which reason.

    By name, each fact with held-out wordings is asked once; by picture, ``options.by_picture`` of an item's facts. A
    question is left out when containment of the answer would prove nothing (it stands in the question, or matches any
    text), when several answers are right, or when the picture belongs to several items.
    """
    left_out: Counter[str] = Counter()
    questions = list(stream_questions(items, wordings, options, left_out))
    return questions, dict(sorted(left_out.items()))


def stream_questions(
    items: Sequence[Item], wordings: Wordings, options: AugmentationOptions, left_out: Counter[str]
) -> Iterator[Question]:
    """`held_out_questions` one by one; what is left out is counted in ``left_out``."""
    owners = Counter(item.image for item in items)
    for item in items:
        keys = [key for key in item.facts if wordings.fact(key).held_out]
        for key in keys:
            question = _question(item, key, "by_name", wordings.reference(item), wordings, options)
            if isinstance(question, Question):
                yield question
            else:
                left_out[f"by_name: {question}"] += 1
        if owners[item.image] > 1:
            left_out["by_picture: the picture belongs to several items"] += 1
            continue
        pictured = f"the {wordings.kind(item)} in the picture"
        asked = 0
        for key in shuffled(keys, options.seed, item.id, "by_picture"):
            if asked == options.by_picture:
                break
            question = _question(item, key, "by_picture", pictured, wordings, options)
            if isinstance(question, Question):
                yield question
                asked += 1
            else:
                left_out[f"by_picture: {question}"] += 1


def _question(
    item: Item, key: str, form: str, it: str, wordings: Wordings, options: AugmentationOptions
) -> Question | str:
    """The question, or the reason why there is none."""
    fact = wordings.fact(key)
    answer = short_answer(item.facts[key])
    if answer is None:
        return "several answers are right"
    if len(answer.split()) > MOST_WORDS:
        return f"the answer has more than {MOST_WORDS} words"
    if not re.search(r"\w", answer) or answer[0] in "\"'$" or answer.lower() in ("a", "an", "the"):
        return "the answer cannot be matched in a text"
    text = fill(
        pick(fact.held_out, options.seed, item.id, key, form), it=it, label=fact.label, subject=wordings.kind(item)
    )
    if contains(text, answer):
        return "the answer stands in the question"
    return Question(
        question_id=f"{item.id}-{key}-{form}",
        image=item.image,
        text=text,
        answer=answer,
        type=key,
        item=item.id,
        form="by_name" if form == "by_name" else "by_picture",
    )


def short_answer(value: FactValue) -> str | None:
    """The one right answer as text, or None when a list holds several."""
    if isinstance(value, list):
        return value[0] if len(value) == 1 else None
    return str(value)


def contains(text: str, answer: str) -> bool:
    """Whether ``answer`` stands in ``text`` on word boundaries, whatever the case."""
    # Most answers do not, and a pattern takes longer to compile than to match; beyond ASCII cases are less simple.
    if text.isascii() and answer.isascii() and answer.lower() not in text.lower():
        return False
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None
