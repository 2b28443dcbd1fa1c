"""Items: the pieces of new knowledge (a name, a picture, prose, facts), read from JSON lines beside an image folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr, ValidationError, field_validator

from kore_fast.data.images import MAX_PIXELS, check_image
from kore_fast.data.problems import describe_validation, raise_problems
from kore_fast.errors import DataError

IMAGE_TOKEN = "<image>"
SHAPES = (
    "items are read as JSON lines of {id, name, image, text[, type, facts, source, licence]}, or as EVOKE's JSON list "
    'of {"id", "image", "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": knowledge}]}'
)

PictureProblem = Callable[[str | Path, str], str | None]
"""What is wrong with a picture (its root, and its path below it), or None."""
FactValue = StrictStr | StrictInt | StrictFloat | list[StrictStr]


def _filled(key: str, value: str) -> str:
    if not value.strip():
        raise ValueError(f"{key!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{key!r} holds half a character (a lone surrogate), which no file can; correct it") from None
    if IMAGE_TOKEN in value:
        raise ValueError(f"{key!r} holds {IMAGE_TOKEN}, which marks a picture's place in samples; take it out")
    return value


class Item(BaseModel):
    """One piece of knowledge.

    ``image`` is a path relative to the folder of the items file; ``text`` is the knowledge as prose; ``facts`` maps a
    key (``race``, ``founded_in``) to a string, a number or a list of strings.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: StrictStr
    name: StrictStr
    image: StrictStr
    text: StrictStr
    type: StrictStr = "entity"
    facts: dict[StrictStr, FactValue] = Field(default_factory=dict)
    source: StrictStr | None = None
    licence: StrictStr | None = None

    @field_validator("id", "name", "image", "text", "type")
    @classmethod
    def _not_empty(cls, value: str, info: Any) -> str:
        return _filled(info.field_name, value)

    @field_validator("facts", mode="before")
    @classmethod
    def _fact_values(cls, facts: Any) -> Any:
        if not isinstance(facts, dict):
            raise ValueError("'facts' must be an object of key: value")
        for key, value in facts.items():
            values = value if isinstance(value, list) else [value]
            if not str(key).strip():
                raise ValueError("'facts' has an empty key")
            if not values:
                raise ValueError(f"fact {key!r} is an empty list; leave the key out")
            for one in values:
                if isinstance(one, bool) or not isinstance(one, str | int | float):
                    raise ValueError(f"fact {key!r} must be a string, a number or a list of strings, not {one!r}")
                if isinstance(value, list) and not isinstance(one, str):
                    raise ValueError(f"fact {key!r}: a list may only hold strings, not {one!r}")
                if isinstance(one, float) and not math.isfinite(one):
                    raise ValueError(f"fact {key!r} is not a finite number")
                if isinstance(one, str):
                    _filled(f"fact {key}", one)
        return facts


def load_items(
    path: str | Path,
    *,
    check_images: bool = True,
    max_pixels: int = MAX_PIXELS,
    skip: Callable[[str], object] | None = None,
    picture_problem: PictureProblem | None = None,
) -> list[Item]:
    """Read and check a JSON-lines file of items, or EVOKE's JSON list (see `read_evoke`, told apart by the first
    character); image paths are relative to the file's folder.

    Every picture is decoded in full (``check_images=False`` leaves that out).

    Args:
        skip: is told each problem, and the item is left out; by default a problem is an error.
        picture_problem: looks at a picture; by default `image_problem`.

    Raises:
        DataError: lists every problem of the file at once, with line numbers: bad JSON, an unknown or missing key, an
            empty name or text, two items with one id, a picture that is missing, broken, too large or outside. With
            ``skip``, only where no item is left.
    """
    path = Path(path)
    look = picture_problem or partial(image_problem, max_pixels=max_pixels)
    if is_evoke_file(path):
        from kore_fast.data.evoke import read_evoke  # it makes items itself

        return read_evoke(path, check_images=check_images, skip=skip, picture_problem=look).items
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; an items file has one JSON object a line") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 JSON lines ({error})") from None
    items: list[Item] = []
    problems: list[str] = []
    first_line: dict[str, int] = {}
    checked: dict[str, str | None] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # besides bad JSON: a number of thousands of digits, deep nesting
            problems.append(f"line {number}: not valid JSON ({error})")
            continue
        if not isinstance(record, dict):
            problems.append(f"line {number}: expected one JSON object, found {type(record).__name__}")
            continue
        place = f"line {number}"
        identity = record.get("id")
        if isinstance(identity, str) and identity.strip():
            place = f"line {number}, item {identity!r}"
            if identity in first_line:
                problems.append(f"{place}: the id is already used on line {first_line[identity]}; ids must differ")
                continue
            first_line[identity] = number
        try:
            item = Item.model_validate(record)
        except ValidationError as error:
            problems += [f"{place}: {message}" for message in describe_validation(error, Item.model_fields)]
            continue
        if check_images:
            if item.image not in checked:
                checked[item.image] = look(path.parent, item.image)
            problem = checked[item.image]
            if problem is not None:
                problems.append(f"{place}: {problem}")
                continue
        items.append(item)
    if problems and path.suffix == ".json" and not items:
        problems.insert(0, SHAPES)
    if not items and not problems:
        problems.append("there is no item in it; write one JSON object a line with id, name, image and text")
    if skip is None or not items:
        raise_problems(path, "items", problems)
    if skip is not None:
        for problem in problems:
            skip(problem)
    return items


def is_evoke_file(path: Path) -> bool:
    """Whether a file is a JSON list, as EVOKE's are; items of our own are JSON lines."""
    try:
        with open(path, "rb") as file:
            return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    except OSError:
        return False  # said where the file is read


def image_problem(root: str | Path, relative: str, *, max_pixels: int = MAX_PIXELS) -> str | None:
    """What is wrong with a picture (see :func:`check_image`), or None."""
    try:
        check_image(root, relative, max_pixels=max_pixels)
    except DataError as error:
        return str(error)
    return None
