"""Samples: training conversations in the LLaVA format, read and written as JSON with one sample a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError, field_validator

from kore_fast.data.images import MAX_PIXELS
from kore_fast.data.items import IMAGE_TOKEN, image_problem
from kore_fast.data.problems import describe_validation, raise_problems
from kore_fast.errors import DataError
from kore_fast.files import read_json, write_text


class Turn(BaseModel):
    """One turn of a conversation: ``speaker`` is ``"human"`` or ``"gpt"`` (the key ``from`` in the file)."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    speaker: Literal["human", "gpt"] = Field(validation_alias="from", serialization_alias="from")
    value: StrictStr


class Sample(BaseModel):
    """One training conversation.

    ``image`` is a path relative to an image folder, a list of them, or None for text alone; each picture has one
    ``<image>`` in a human turn. ``item`` and ``branch`` say where an augmented sample comes from. Keys that are not
    known here (a user's own file may have some) are passed over.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    image: StrictStr | list[StrictStr] | None = None
    conversations: tuple[Turn, ...]
    item: StrictStr | None = None
    branch: StrictStr | None = None

    @field_validator("id", mode="before")
    @classmethod
    def _id_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @property
    def images(self) -> tuple[str, ...]:
        """The sample's pictures, in the order of their ``<image>`` marks."""
        if self.image is None:
            return ()
        return (self.image,) if isinstance(self.image, str) else tuple(self.image)

    def to_record(self) -> dict[str, Any]:
        """The sample as the JSON object that is written; keys without a value are left out."""
        return self.model_dump(by_alias=True, exclude_none=True, mode="json")


def conversation_problems(sample: Sample) -> list[str]:
    """What is wrong with a sample's turns and its count of pictures; an empty list when all is well."""
    problems = []
    if not sample.id.strip():
        problems.append("the id is empty")
    turns = sample.conversations
    if not turns:
        problems.append("there are no turns; a conversation starts with a human turn and ends with a gpt turn")
    for number, turn in enumerate(turns):
        expected = "human" if number % 2 == 0 else "gpt"
        if turn.speaker != expected:
            problems.append(f"turn {number + 1} is from {turn.speaker!r}, expected {expected!r}: turns alternate")
            break
    else:
        if len(turns) % 2:
            problems.append("the last human turn has no answer; end with a gpt turn")
    for number, turn in enumerate(turns):
        if not turn.value.replace(IMAGE_TOKEN, "").strip():
            problems.append(f"turn {number + 1} is empty")
        if turn.speaker == "gpt" and IMAGE_TOKEN in turn.value:
            problems.append(f"turn {number + 1} is an answer and holds {IMAGE_TOKEN}; pictures belong to human turns")
    marks = sum(turn.value.count(IMAGE_TOKEN) for turn in turns)
    if marks != len(sample.images):
        problems.append(
            f"{len(sample.images)} image(s), but {marks} {IMAGE_TOKEN} mark(s) in its turns; each image needs one mark"
        )
    return problems


def validate_sample(sample: Sample, image_root: str | Path | None = None, *, max_pixels: int = MAX_PIXELS) -> None:
    """Check one sample, and decode its pictures below ``image_root`` when that is given.

    Raises:
        DataError: names the sample and everything that is wrong with it.
    """
    problems = conversation_problems(sample)
    if image_root is not None:
        found = (image_problem(image_root, image, max_pixels=max_pixels) for image in sample.images)
        problems += [problem for problem in found if problem is not None]
    if problems:
        raise DataError(f"sample {sample.id!r}: " + "; ".join(problems))


def read_samples(
    path: str | Path, image_root: str | Path | None = None, *, max_pixels: int = MAX_PIXELS
) -> list[Sample]:
    """Read and check a LLaVA JSON file; with ``image_root``, every picture is decoded once.

    Raises:
        DataError: lists every problem of the file at once, each with its sample.
    """
    records = read_json(path)
    if not isinstance(records, list):
        raise DataError(f"{path}: expected a JSON list of samples, found {type(records).__name__}")
    samples: list[Sample] = []
    problems: list[str] = []
    for position, record in enumerate(records):
        identity = record.get("id") if isinstance(record, dict) else None
        place = f"sample {position}" if identity is None else f"sample {position}, id {identity!r}"
        try:
            sample = Sample.model_validate(record)
        except ValidationError as error:
            problems += [f"{place}: {message}" for message in describe_validation(error, Sample.model_fields)]
            continue
        samples.append(sample)
        problems += [f"{place}: {problem}" for problem in conversation_problems(sample)]
    if not records:
        problems.append("there is no sample in it")
    problems += repeated_ids([sample.id for sample in samples])
    if image_root is not None:
        problems += missing_images(
            [(f"sample {s.id!r}", image) for s in samples for image in s.images], image_root, max_pixels=max_pixels
        )
    raise_problems(path, "samples", problems)
    return samples


def write_samples(path: str | Path, samples: Sequence[Sample]) -> None:
    """Write samples as a JSON list, one sample a line, whole or not at all.

    Raises:
        DataError: a sample is not valid, or two have one id; nothing is written then.
    """
    problems = [f"sample {s.id!r}: {problem}" for s in samples for problem in conversation_problems(s)]
    problems += repeated_ids([sample.id for sample in samples])
    raise_problems(path, "samples", problems)
    rows = [json.dumps(sample.to_record(), ensure_ascii=False) for sample in samples]
    write_text(path, "[\n" + ",\n".join(rows) + "\n]\n" if rows else "[]\n")


def repeated_ids(ids: Iterable[str]) -> list[str]:
    """One problem for each id that comes more than once."""
    first: dict[str, int] = {}
    problems = []
    for position, identity in enumerate(ids):
        if identity in first:
            problems.append(f"id {identity!r} comes at {first[identity]} and again at {position}; ids must differ")
        else:
            first[identity] = position
    return problems


def missing_images(wanted: Iterable[tuple[str, str]], image_root: str | Path, *, max_pixels: int) -> list[str]:
    """One problem for each (owner, picture) that cannot be used; a picture named twice is decoded once."""
    checked: dict[str, str | None] = {}
    problems = []
    for owner, image in wanted:
        if image not in checked:
            checked[image] = image_problem(image_root, image, max_pixels=max_pixels)
        if checked[image] is not None:
            problems.append(f"{owner}: {checked[image]}")
    return problems
