"""Questions: the held-out evaluation questions, in EVOKE's JSON-lines form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, StrictStr, ValidationError, field_validator

from kore_fast.data.images import MAX_PIXELS
from kore_fast.data.problems import describe_validation, raise_problems
from kore_fast.data.samples import missing_images, repeated_ids
from kore_fast.files import read_jsonl, write_jsonl


class Question(BaseModel):
    """One question with its expected answer.

    ``type`` is the fact asked for. ``form``: ``"by_name"`` names the item, ``"by_picture"`` only points at the picture;
    EVOKE's own files have neither ``item`` nor ``form``, and ``cnn_wiki_type`` is theirs: ``"news"``, or ``"wiki"`` for
    an entity. Other keys are passed over.
    """

    model_config = ConfigDict(frozen=True)

    question_id: str
    image: StrictStr
    text: StrictStr
    answer: str
    type: StrictStr | None = None
    cnn_wiki_type: StrictStr | None = None
    item: StrictStr | None = None
    form: Literal["by_name", "by_picture"] | None = None

    @field_validator("question_id", "answer", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @field_validator("question_id", "image", "text", "answer")
    @classmethod
    def _not_empty(cls, value: str, info: Any) -> str:
        if not value.strip():
            raise ValueError(f"{info.field_name!r} is empty")
        return value


def read_questions(
    path: str | Path, image_root: str | Path | None = None, *, max_pixels: int = MAX_PIXELS
) -> list[Question]:
    """Read and check a JSON-lines file of questions; with ``image_root``, every picture is decoded once.

    Raises:
        DataError: lists every problem of the file at once, with line numbers.
    """
    questions: list[Question] = []
    problems: list[str] = []
    for number, record in read_jsonl(path):
        try:
            questions.append(Question.model_validate(record))
        except ValidationError as error:
            problems += [f"line {number}: {message}" for message in describe_validation(error, Question.model_fields)]
    if not questions and not problems:
        problems.append("there is no question in it")
    problems += repeated_ids([question.question_id for question in questions])
    if image_root is not None:
        wanted = [(f"question {question.question_id!r}", question.image) for question in questions]
        problems += missing_images(wanted, image_root, max_pixels=max_pixels)
    raise_problems(path, "questions", problems)
    return questions


def write_questions(path: str | Path, questions: Iterable[Question]) -> None:
    """Write questions one a line, whole or not at all; one is held at a time.

    Raises:
        DataError: two questions have one id; nothing is written then.
    """
    ids: list[str] = []

    def rows() -> Iterator[dict[str, Any]]:
        for question in questions:
            ids.append(question.question_id)
            yield question.model_dump(exclude_none=True, mode="json")
        raise_problems(path, "questions", repeated_ids(ids))

    write_jsonl(path, rows())
