"""Samples: training conversations in the LLaVA format, read and written as JSON with one sample a line.

Reading and writing hold one sample at a time, so files of any length pass through; see ``data/formats`` for others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError, field_validator, model_validator

from kore_fast.data.images import MAX_PIXELS
from kore_fast.data.items import IMAGE_TOKEN, image_problem
from kore_fast.data.problems import Problems, describe_validation
from kore_fast.errors import DataError
from kore_fast.files import inside, iterate_json, json_line, write_json_lines, write_json_list


class Turn(BaseModel):
    """One turn of a conversation: ``speaker`` is ``"human"`` or ``"gpt"`` (the key ``from`` in the file)."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    speaker: Literal["human", "gpt"] = Field(validation_alias="from", serialization_alias="from")
    value: StrictStr


class Sample(BaseModel):
    """One training conversation.

    ``image`` is a path relative to an image folder, a list of them, or None for text alone; each picture has one
    ``<image>`` in a human turn. ``item`` and ``branch`` say where an augmented sample comes from. ``system`` is what
    the model is told before the conversation; a first turn from ``"system"`` is read as it. Keys that are not known
    here (a user's own file may have some) are passed over.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    image: StrictStr | list[StrictStr] | None = None
    conversations: tuple[Turn, ...]
    item: StrictStr | None = None
    branch: StrictStr | None = None
    system: StrictStr | None = None

    @model_validator(mode="before")
    @classmethod
    def _system_turn(cls, record: Any) -> Any:
        turns = record.get("conversations") if isinstance(record, dict) else None
        if isinstance(turns, list) and turns and isinstance(turns[0], dict) and turns[0].get("from") == "system":
            return {**record, "system": turns[0].get("value"), "conversations": turns[1:]}
        return record

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
        record = {
            "id": self.id,
            "image": self.image,
            "conversations": [{"from": turn.speaker, "value": turn.value} for turn in self.conversations],
            "item": self.item,
            "branch": self.branch,
            "system": self.system,
        }
        return {key: value for key, value in record.items() if value is not None}

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(words, characters) of each turn, ``<image>`` left out."""
        texts = [turn.value.replace(IMAGE_TOKEN, "").strip() for turn in self.conversations]
        return tuple((len(text.split()), len(text)) for text in texts)


@dataclass(frozen=True)
class Written:
    """A valid sample as the line of its file, with what is told of it without reading the line."""

    id: str
    branch: str | None
    images: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    """See `Sample.sizes`."""
    line: str

    @classmethod
    def of(cls, sample: Sample) -> Written:
        """Raises `DataError` where the sample is not valid."""
        validate_sample(sample)
        return cls(sample.id, sample.branch, sample.images, sample.sizes, json_line(sample.to_record()))

    def read(self) -> Sample:
        """The sample itself."""
        return Sample.model_validate_json(self.line)


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
    marks = 0
    for number, turn in enumerate(turns):
        held = turn.value.count(IMAGE_TOKEN)
        marks += held
        if not (turn.value.replace(IMAGE_TOKEN, "") if held else turn.value).strip():
            problems.append(f"turn {number + 1} is empty")
        if held and turn.speaker == "gpt":
            problems.append(f"turn {number + 1} is an answer and holds {IMAGE_TOKEN}; pictures belong to human turns")
        if _halves(turn.value):
            problems.append(f"turn {number + 1} holds half a character (a lone surrogate), which no file can")
    if sample.system is not None:
        if not sample.system.strip():
            problems.append("the system turn is empty; leave it out")
        if IMAGE_TOKEN in sample.system:
            problems.append(f"the system turn holds {IMAGE_TOKEN}; pictures belong to human turns")
    if marks != len(sample.images):
        problems.append(
            f"{len(sample.images)} image(s), but {marks} {IMAGE_TOKEN} mark(s) in its turns; each image needs one mark"
        )
    return problems


def _halves(text: str) -> bool:
    if text.isascii():
        return False
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


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


class SampleChecks:
    """What is wrong with samples that come one after another: each alone, and ids that come twice.

    Kept between samples are their ids, and each picture's verdict when ``image_root`` is given: with
    ``decode=False`` that it is there below the folder, else that it can be decoded in full.
    """

    def __init__(
        self, image_root: str | Path | None = None, *, decode: bool = True, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.count = 0
        self.problems = Problems()
        self._root, self._decode, self._max_pixels = image_root, decode, max_pixels
        self._first: dict[str, int] = {}
        self._pictures: dict[str, str | None] = {}

    def add(self, sample: Sample, place: str) -> None:
        """Check the next sample; what is wrong goes to ``problems``, named by ``place``."""
        self.problems.add(*(f"{place}: {problem}" for problem in conversation_problems(sample)))
        if sample.id in self._first:
            self.problems.add(_repeated(sample.id, self._first[sample.id], self.count))
        else:
            self._first[sample.id] = self.count
        self.count += 1
        if self._root is None:
            return
        for image in sample.images:
            if image not in self._pictures:
                self._pictures[image] = self._look(image)
            if self._pictures[image] is not None:
                self.problems.add(f"sample {sample.id!r}: {self._pictures[image]}")

    def _look(self, image: str) -> str | None:
        assert self._root is not None
        if self._decode:
            return image_problem(self._root, image, max_pixels=self._max_pixels)
        return missing_image(self._root, image)


def read_samples(
    path: str | Path, image_root: str | Path | None = None, *, max_pixels: int = MAX_PIXELS
) -> list[Sample]:
    """Read and check a LLaVA JSON file; with ``image_root``, every picture is decoded once.

    Raises:
        DataError: lists every problem of the file at once, each with its sample.
    """
    checks = SampleChecks(image_root, max_pixels=max_pixels)
    samples = list(_checked(path, checks))
    _settle(path, checks)
    return samples


def stream_samples(
    path: str | Path, image_root: str | Path | None = None, *, max_pixels: int = MAX_PIXELS
) -> Iterator[Sample]:
    """`read_samples` for files that do not fit in memory: the whole file is checked here, then its samples come one by
    one from a second reading."""
    checks = SampleChecks(image_root, max_pixels=max_pixels)
    for _ in _checked(path, checks):
        pass
    _settle(path, checks)
    return (Sample.model_validate(record) for _, record in iterate_json(path))


def _checked(path: str | Path, checks: SampleChecks) -> Iterator[Sample]:
    for place, record in iterate_json(path):
        if not place.startswith("sample"):
            raise DataError(f"{path}: expected a JSON list of samples, found {type(record).__name__}")
        identity = record.get("id") if isinstance(record, dict) else None
        named = place if identity is None else f"{place}, id {identity!r}"
        try:
            sample = Sample.model_validate(record)
        except ValidationError as error:
            checks.problems.add(*(f"{named}: {said}" for said in describe_validation(error, Sample.model_fields)))
            continue
        checks.add(sample, named)
        yield sample


def _settle(path: str | Path, checks: SampleChecks) -> None:
    if not checks.count:
        checks.problems.add("there is no sample in it")
    checks.problems.raise_any(path, "samples")


def write_written(path: str | Path, samples: Iterable[Written]) -> None:
    """`write_samples` for samples whose lines are there.

    Raises:
        DataError: two have one id; nothing is written then.
    """
    problems = Problems()

    def lines() -> Iterator[str]:
        first: dict[str, int] = {}
        for count, sample in enumerate(samples):
            if sample.id in first:
                problems.add(_repeated(sample.id, first[sample.id], count))
            else:
                first[sample.id] = count
                yield sample.line
        problems.raise_any(path, "samples")

    write_json_lines(path, lines())


def write_samples(path: str | Path, samples: Iterable[Sample]) -> None:
    """Write samples as a JSON list, one sample a line, whole or not at all; one is held at a time.

    Raises:
        DataError: a sample is not valid, or two have one id; nothing is written then.
    """
    checks = SampleChecks()
    write_json_list(path, (sample.to_record() for sample in checked_for_writing(path, samples, checks)))


def checked_for_writing(path: str | Path, samples: Iterable[Sample], checks: SampleChecks) -> Iterator[Sample]:
    """The samples that are valid, as they come; raises after the last one if any was not.

    A writer that takes them into a file which is written whole or not at all leaves none behind then.
    """
    for sample in samples:
        before = checks.problems.count
        checks.add(sample, f"sample {sample.id!r}")
        if checks.problems.count == before:
            yield sample
    checks.problems.raise_any(path, "samples")


def _repeated(identity: str, first: int, again: int) -> str:
    return f"id {identity!r} comes at {first} and again at {again}; ids must differ"


def repeated_ids(ids: Iterable[str]) -> list[str]:
    """One problem for each id that comes more than once."""
    first: dict[str, int] = {}
    problems = []
    for position, identity in enumerate(ids):
        if identity in first:
            problems.append(_repeated(identity, first[identity], position))
        else:
            first[identity] = position
    return problems


def missing_image(image_root: str | Path, image: str) -> str | None:
    """Why a picture's file is not there below its folder, or None; the file is not opened."""
    try:
        found = inside(image_root, image).is_file()
    except (DataError, OSError, RuntimeError, ValueError) as error:
        return f"image {image!r} is not a usable path ({error})"
    return None if found else f"no image {image!r} below {image_root}; put the file there or correct the path"


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
