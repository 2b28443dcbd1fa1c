"""The forms of a model's answers, and what of them is usable.

The schemas that a server sees say the shape only, in the words that all servers know. Everything else (lengths, empty
or doubled texts, marks that would break a sample) is checked here, on the answer.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from kore_fast.augmentation.prose import sentences, shorten, summarise
from kore_fast.augmentation.wordings import plain
from kore_fast.data.items import IMAGE_TOKEN

QUESTION_WORDS = 60
SHORT_ANSWER_WORDS = 10
SUBJECT_WORDS = 12
HYPERNYM_WORDS = 4
SENTENCE_WORDS = 40
REASON_WORDS = 60


class Form(BaseModel):
    """An answer, or a part of one. Keys that a server without schemas adds are passed over: they harm nothing."""

    model_config = ConfigDict(frozen=True, extra="ignore", json_schema_extra={"additionalProperties": False})


class Questions(Form):
    """What may be asked about an item."""

    questions: list[str]

    @field_validator("questions", mode="before")
    @classmethod
    def _plain_list(cls, value: Any) -> Any:
        # Small models wrap each question in an object.
        if not isinstance(value, list):
            return value
        return [next(iter(one.values())) if isinstance(one, dict) and len(one) == 1 else one for one in value]


class Answer(Form):
    """The answer to one question; empty where the material does not say."""

    answer: str


class NumberedAnswer(Form):
    """One of several answers."""

    number: int
    answer: str


class Answers(Form):
    """The answers to numbered questions."""

    answers: list[NumberedAnswer]


class Summary(Form):
    """An item in few words."""

    summary: str


class Quadruplet(Form):
    """A short question that names a subject, its answer, and what kind of thing the subject is."""

    question: str
    answer: str
    subject: str
    hypernym: str


class SpokenQuadruplet(Quadruplet):
    """A quadruplet whose answer is also given as a sentence."""

    sentence: str


class Quadruplets(Form):
    """Short questions about an item."""

    quadruplets: list[Quadruplet]


class SpokenQuadruplets(Form):
    """Short questions about an item, with whole sentences for answers."""

    quadruplets: list[SpokenQuadruplet]


class Judgement(Form):
    """Whether a text supports an answer, and why, or why not."""

    supported: bool
    reason: str

    @model_validator(mode="before")
    @classmethod
    def _without_reason(cls, value: Any) -> Any:
        # The decision is what counts; it is not asked for again because there are no words to it.
        return {**value, "reason": value.get("reason") or ""} if isinstance(value, dict) else value


class UnusableError(ValueError):
    """An answer has the right form and still cannot be used; says why, in words that the model is shown."""


_CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ud800-\\udfff]")
_SPECIAL = re.compile(r"<\|[^|\s]{1,40}\|>|\[/?INST\]|</?s>|<(?:start|end)_of_turn>")


def tidy(text: str) -> str:
    """A text on one line, without control characters."""
    return " ".join((text if text.isprintable() else _CONTROL.sub(" ", text)).split())


def _problem(text: str) -> str | None:
    """Why no sample may hold this text."""
    if not text:
        return "it is empty"
    if IMAGE_TOKEN in text:
        return f"it holds {IMAGE_TOKEN}"
    if _SPECIAL.search(text):
        return "it holds a chat template's mark"
    return None


def usable_questions(form: Questions, most: int) -> list[str]:
    """The questions without empty and doubled ones, at most ``most``.

    Raises:
        UnusableError: none is left.
    """
    kept: list[str] = []
    seen: set[str] = set()
    problems: list[str] = []
    for given in form.questions:
        question = re.sub(r"^(?:\(?\d{1,2}[.):]|[-*•])\s+", "", tidy(given))
        problem = _problem(question)
        if problem is None and not question.rstrip("\"'”’)").endswith("?"):
            problem = "it does not end with a question mark"
        if problem is None and len(question.split()) > QUESTION_WORDS:
            problem = f"it has more than {QUESTION_WORDS} words"
        if problem is not None:
            problems.append(f"{question[:60]!r}: {problem}")
        elif (words := plain(question)) not in seen:
            seen.add(words)
            kept.append(question)
    if not kept:
        raise UnusableError("there is no usable question in it" + _first(problems))
    return kept[:most]


def usable_answer(text: str, question: str, words: int) -> str:
    """An answer of at most about ``words`` words, cut at the end of a sentence; "" where the material does not say.

    Raises:
        UnusableError: it holds a mark that no sample may, or repeats the question.
    """
    answer = tidy(text)
    if not answer:
        return ""
    problem = _problem(answer)
    if problem is not None:
        raise UnusableError(f"the answer cannot be used: {problem}")
    if answer[:4].lower() == question[:4].lower() and plain(answer) == plain(question):
        raise UnusableError("the answer repeats the question")
    return shorten(answer, words)[0] if len(answer.split()) > words else answer


def usable_answers(form: Answers, questions: list[str], words: int) -> list[str]:
    """One answer a question, in their order.

    Raises:
        UnusableError: a number is missing, doubled or unknown, or an answer cannot be used.
    """
    numbers = [one.number for one in form.answers]
    if sorted(numbers) != list(range(1, len(questions) + 1)):
        raise UnusableError(f"expected the answers 1 to {len(questions)}, each once, found {numbers[:40]}")
    by_number = {one.number: one.answer for one in form.answers}
    return [usable_answer(by_number[place], question, words) for place, question in enumerate(questions, start=1)]


def usable_summary(form: Summary, words: int) -> str:
    """At most ``words`` words, cut where a reader would pause.

    Raises:
        UnusableError: it is empty or holds a mark that no sample may.
    """
    summary = tidy(form.summary)
    problem = _problem(summary)
    if problem is not None:
        raise UnusableError(f"the summary cannot be used: {problem}")
    if len(summary.split()) > words:
        summary = summarise(summary, words)
    return summary if summary.rstrip("\"'”’)")[-1:] in ".!?…" else f"{summary}."


def usable_judgement(form: Judgement) -> Judgement:
    """The decision, its reason on one line and of at most so many words. It goes into reports, never into a sample."""
    return Judgement(supported=form.supported, reason=" ".join(tidy(form.reason).split()[:REASON_WORDS]))


class VisualQuestion(BaseModel):
    """A quadruplet as it is used: the question speaks of what is in the picture."""

    model_config = ConfigDict(frozen=True)

    question: str
    answer: str
    subject: str
    hypernym: str
    sentence: str = ""

    @property
    def search(self) -> str:
        """What to search a picture by."""
        return f"{self.subject} {self.hypernym}"


def usable_quadruplets(form: Quadruplets | SpokenQuadruplets, name: str, most: int) -> list[VisualQuestion]:
    """The questions with the subject replaced by "the {hypernym} in the image"; bad and doubled ones are dropped.

    The replacement is made here and not by the model: it is then always made, and always the same.

    Raises:
        UnusableError: none is left.
    """
    kept: list[VisualQuestion] = []
    seen: set[str] = set()
    problems: list[str] = []
    for given in form.quadruplets:
        made = _visual_question(given, name)
        if isinstance(made, str):
            problems.append(f"{tidy(given.question)[:60]!r}: {made}")
        elif (words := plain(made.question)) not in seen:
            seen.add(words)
            kept.append(made)
    if not kept:
        raise UnusableError("there is no usable quadruplet in it" + _first(problems))
    return kept[:most]


def _visual_question(given: Quadruplet, name: str) -> VisualQuestion | str:
    question, answer, subject = tidy(given.question), tidy(given.answer).rstrip("."), tidy(given.subject)
    hypernym = re.sub(r"^(?:the|an?)\s+", "", tidy(given.hypernym), flags=re.IGNORECASE).rstrip(".")
    for key, text in {"question": question, "answer": answer, "subject": subject, "hypernym": hypernym}.items():
        problem = _problem(text)
        if problem is not None:
            return f"{key}: {problem}"
    if not question.endswith("?"):
        return "the question does not end with a question mark"
    for key, text, limit in (
        ("question", question, QUESTION_WORDS),
        ("answer", answer, SHORT_ANSWER_WORDS),
        ("subject", subject, SUBJECT_WORDS),
        ("hypernym", hypernym, HYPERNYM_WORDS),
    ):
        if len(text.split()) > limit:
            return f"the {key} has more than {limit} words"
    parts = _around(question, subject)
    if len(parts) == 1:
        return f"the question does not name the subject {subject!r}"
    said = [*(_ARTICLE.sub("", part) for part in parts[:-1]), parts[-1]]
    pictured = f"the {hypernym} in the image".join(said)
    pictured = pictured[:1].upper() + pictured[1:]
    if _holds(pictured, name):
        return f"the question names {name!r} apart from the subject"
    if _holds(pictured, answer):
        return "the answer stands in the question"
    sentence = ""
    if isinstance(given, SpokenQuadruplet):
        sentence = tidy(given.sentence)
        problem = _problem(sentence)
        if problem is not None:
            return f"sentence: {problem}"
        if len(sentence.split()) > SENTENCE_WORDS:
            return f"the sentence has more than {SENTENCE_WORDS} words"
        if not _holds(sentence, answer):
            return "the sentence does not hold the answer"
        if sentence[-1] not in ".!?":
            sentence += "."
    return VisualQuestion(question=pictured, answer=answer, subject=subject, hypernym=hypernym, sentence=sentence)


_ARTICLE = re.compile(r"(?<!\w)(?:the|an?)\s+$", re.IGNORECASE)


def _around(text: str, phrase: str) -> list[str]:
    """What stands between the places of a phrase, on word boundaries and whatever the case.

    The same as splitting by a regular expression, which would have to be compiled for each phrase.
    """
    low, wanted = text.lower(), phrase.lower()
    if len(low) != len(text) or not wanted:  # a letter that becomes two
        return re.split(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, flags=re.IGNORECASE)
    parts, start, place = [], 0, low.find(wanted)
    while place >= 0:
        end = place + len(wanted)
        if not (_is_word(text[place - 1 : place]) or _is_word(text[end : end + 1])):
            parts.append(text[start:place])
            start = place = end
        else:
            place += 1
        place = low.find(wanted, place)
    return [*parts, text[start:]]


def _is_word(mark: str) -> bool:
    return mark.isalnum() or mark == "_"


def _holds(text: str, phrase: str) -> bool:
    return len(_around(text, phrase)) > 1


def whole_sentences(text: str) -> str:
    """A text that was cut off, up to its last whole sentence; "" when there is none."""
    parts = sentences(text)
    if parts and parts[-1].rstrip("\"'”’)")[-1:] not in (".", "!", "?"):
        parts = parts[:-1]
    return " ".join(parts)


def _first(problems: list[str]) -> str:
    return ": " + "; ".join(problems[:3]) if problems else ""
