"""EVOKE's own files as items and questions: ``evoke_injection_data.json`` and ``evoke_evaluation_data.jsonl``.

An injection record is a LLaVA sample, ``{"id", "image", "conversations"}``: a template question that names the kind of
thing ("Can you describe the castle depicted in the image?") and the knowledge as its answer. It has no name and no
type, so both are derived, by the rules of `Naming`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import ValidationError

from kore_fast.data.images import MAX_PIXELS
from kore_fast.data.items import IMAGE_TOKEN, SHAPES, Item, PictureProblem, image_problem
from kore_fast.data.problems import Problems, describe_validation
from kore_fast.data.questions import Question, read_questions
from kore_fast.errors import DataError
from kore_fast.files import inside, iterate_json, read_json

Naming = Literal["names file", "record", "question", "image file", "opening of the text"]
"""Where an item's name was found, tried in this order: the names file; a title, headline, name or entity of the record;
a quoted title in the question; an image file called ``NAME_wiki.EXT`` (EVOKE's entities); the text's subject ("The
Orrery Bridge is a …") or first sentence (news)."""

_TITLE_KEYS = ("title", "headline", "name", "entity_name", "entity")
_FOLDERS = {"injection": ("", "imgs/injection", "injection", "imgs", "images"), "evaluation": ("", "imgs/evaluation")}
_QUOTED = re.compile(r"[\"“«]([^\"“”«»]{3,200})[\"”»]|(?<!\w)['‘]([^'‘’]{3,200})['’](?!\w)")
_KIND = re.compile(
    r"\b(?:the|this|that)\s+(?P<kind>[^?.,]{2,60}?)\s+"
    r"(?:(?:that is\s+)?(?:depicted|shown|displayed|presented|pictured|featured|seen|portrayed|illustrated)\s+)?"
    r"in\s+(?:the|this)\s+(?:image|picture|photo|photograph)\b",
    re.IGNORECASE,
)
_SUBJECT = re.compile(r"^(?:The\s+)?(?P<name>[^.!?;:\n]{2,80}?),?\s+(?:is|are|was|were)\s+(?:an?|the|one of)\b")
_SENTENCE = re.compile(r"^(.+?[.!?][\"”')\]]*)(?=\s+[\"“'(\[]?[A-Z0-9]|\s*$)", re.DOTALL)
_APART = re.compile(r"\s*\([^()]*\)$")
_NAME_WORDS = 25


@dataclass(frozen=True)
class EvokeKnowledge:
    """The items of an injection file, in its order."""

    items: list[Item]
    named_by: dict[str, int]
    """How many items were named by each rule; see `Naming`."""


def is_evoke(record: Any) -> bool:
    """Whether a value is an injection record of EVOKE's: a conversation of a question and the knowledge."""
    return isinstance(record, dict) and isinstance(record.get("conversations"), list)


def read_evoke(
    path: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    check_images: bool = True,
    max_pixels: int = MAX_PIXELS,
    skip: Callable[[str], object] | None = None,
    picture_problem: PictureProblem | None = None,
) -> EvokeKnowledge:
    """Read an injection file as it is released.

    Pictures are looked for below the file's folder as the records say, then below ``imgs/injection``, ``injection``,
    ``imgs`` and ``images`` in it; an item's ``image`` is the path that was found. The knowledge text stays as it is.

    Args:
        names: id → name, where the derived name is wrong or there is none; by default ``STEM.names.json`` beside the
            file, if there is one.
        skip, picture_problem: see `load_items`.

    Raises:
        DataError: lists every problem of the file at once: no answer in a record, no name to be had, two records with
            one id, a picture that is missing, broken, too large or outside.
    """
    path = Path(path)
    look = picture_problem or partial(image_problem, max_pixels=max_pixels)
    names = _names_beside(path) if names is None else names
    problems = Problems(skip)
    items: list[Item] = []
    rules: Counter[str] = Counter()
    first: dict[str, str] = {}
    verdicts: dict[str, str | None] = {}
    found = False
    for place, record in iterate_json(path):
        found = True
        place = place.replace("sample", "record")
        if not is_evoke(record):
            what = f"the keys {', '.join(map(repr, record))}" if isinstance(record, dict) else type(record).__name__
            problems.add(f"{place}: found {what}; {SHAPES}")
            continue
        identity = str(record.get("id", "")).strip()
        named = f"{place}, id {identity!r}" if identity else place
        if identity in first:
            problems.add(f"{named}: the id is already used by {first[identity]}; ids must differ")
            continue
        first[identity] = place
        item, rule, wrong = _item(record, identity, names, path.parent)
        problems.add(*(f"{named}: {one}" for one in wrong))
        if item is None:
            continue
        if check_images:
            if item.image not in verdicts:
                verdicts[item.image] = look(path.parent, item.image)
            if verdicts[item.image] is not None:
                problems.add(f"{named}: {verdicts[item.image]}")
                continue
        items.append(item)
        rules[rule] += 1
    if not found:
        problems.add(f"there is no item in it; {SHAPES}")
    if skip is None or not items:
        problems.raise_any(path, "items")
    return EvokeKnowledge(items, dict(sorted(rules.items())))


def read_evoke_questions(
    path: str | Path,
    items: Sequence[Item] = (),
    *,
    check_images: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> list[Question]:
    """Read an evaluation file as it is released; text and answer stay as they are.

    EVOKE's ``question_id`` is the id of the item that is asked about; with ``items`` it becomes the question's
    ``item``. All of EVOKE's questions point at their picture, so their ``form`` is ``"by_picture"``. Pictures are
    looked for below the file's folder, then below ``imgs/evaluation`` in it.

    Raises:
        DataError: lists every problem of the file at once.
    """
    path = Path(path)
    known = {item.id for item in items}
    questions = [
        question.model_copy(
            update={
                "image": _find(path.parent, question.image, _FOLDERS["evaluation"]),
                "item": question.question_id if question.question_id in known else question.item,
                "form": question.form or "by_picture",
            }
        )
        for question in read_questions(path)
    ]
    if check_images:
        check_question_images(path, questions, max_pixels=max_pixels)
    return questions


def check_question_images(path: str | Path, questions: Sequence[Question], *, max_pixels: int = MAX_PIXELS) -> None:
    """Decode every picture of ``questions``, which are some of the evaluation file at ``path``.

    Raises:
        DataError: lists every picture at once that is missing, broken, too large or outside.
    """
    problems = Problems()
    verdicts: dict[str, str | None] = {}
    for question in questions:
        if question.image not in verdicts:
            verdicts[question.image] = image_problem(Path(path).parent, question.image, max_pixels=max_pixels)
        if verdicts[question.image] is not None:
            problems.add(f"question {question.question_id!r}: {verdicts[question.image]}")
    problems.raise_any(path, "questions")


def _item(
    record: Mapping[str, Any], identity: str, names: Mapping[str, str], folder: Path
) -> tuple[Item | None, str, list[str]]:
    question, text, problems = _turns(record["conversations"])
    image = record.get("image")
    if not isinstance(image, str) or not image.strip():
        problems.append(f"'image' is {image!r}, expected a path")
    if not identity:
        problems.append("'id' is missing or empty")
    if problems:
        return None, "", problems
    kind = _kind(record, question, str(image))
    name, rule = _name(record, identity, names, question, text, str(image))
    if name is None:
        return (
            None,
            "",
            [
                f"no name for it in its keys ({', '.join(_TITLE_KEYS)}), its question, its image file {image!r} or its "
                f'text; give one in the names file ({{"{identity}": "its name"}} in STEM.names.json beside it)'
            ],
        )
    made = {
        "id": identity,
        "name": name,
        "type": kind,
        "text": text,
        "image": _find(folder, str(image), _FOLDERS["injection"]),
        "source": record.get("source") if isinstance(record.get("source"), str) else None,
        "licence": next((v for k in ("licence", "license") if isinstance(v := record.get(k), str)), None),
    }
    try:
        return Item.model_validate(made), rule, []
    except ValidationError as error:
        return None, "", describe_validation(error, Item.model_fields)


def _turns(conversation: list[Any]) -> tuple[str, str, list[str]]:
    """(question without the picture's mark, knowledge text, problems)."""
    values = [turn.get("value") if isinstance(turn, Mapping) else None for turn in conversation[:2]]
    if len(values) < 2 or not all(isinstance(value, str) for value in values):
        return "", "", ["'conversations' wants a human turn with the question and a gpt turn with the knowledge"]
    question, text = (str(value) for value in values)
    problems = [] if text.strip() else ["the knowledge ('conversations[1].value') is empty"]
    return question.replace(IMAGE_TOKEN, "").strip(), text, problems


def _kind(record: Mapping[str, Any], question: str, image: str) -> str:
    """The item's type: the record's, the kind in the template question, or news or entity by the picture's folder."""
    if isinstance(record.get("type"), str) and record["type"].strip():
        return str(record["type"])
    match = _KIND.search(question)
    if match:
        return " ".join(match["kind"].split()).lower()
    return "news" if _is_news(record, "", image) else "entity"


def _is_news(record: Mapping[str, Any], question: str, image: str) -> bool:
    said = record.get("cnn_wiki_type")
    if isinstance(said, str):
        return said == "news"
    folder = PurePosixPath(image).parent.as_posix().lower()
    return "news" in folder or "cnn" in folder or bool(re.search(r"\bnews\b", question, re.IGNORECASE))


def _name(
    record: Mapping[str, Any], identity: str, names: Mapping[str, str], question: str, text: str, image: str
) -> tuple[str | None, Naming]:
    if identity in names:
        return " ".join(names[identity].split()), "names file"
    for key in _TITLE_KEYS:
        if isinstance(record.get(key), str) and record[key].strip():
            return " ".join(record[key].split()), "record"
    quoted = _QUOTED.search(question)
    if quoted:
        return " ".join((quoted[1] or quoted[2]).split()).rstrip(",."), "question"
    stem = PurePosixPath(image.replace("\\", "/")).stem
    flat = " ".join(text.split())
    if stem.lower().endswith("_wiki") and stem[:-5].strip():
        name = " ".join(stem[:-5].replace("_", " ").split())
        bare = _APART.sub("", name)
        # "Reed (film)" tells articles apart; the text says "Reed".
        return bare if bare and bare in flat and name not in flat else name, "image file"
    subject = None if _is_news(record, question, image) else _SUBJECT.match(flat)
    if subject and len(subject["name"].split()) <= 12:
        return re.split(r",\s+(?:an?|the)\b", subject["name"])[0].strip(), "opening of the text"
    sentence = _SENTENCE.match(flat)
    opening = (sentence[1] if sentence else flat).rstrip(".").strip()
    if opening and len(opening.split()) <= _NAME_WORDS and any(letter.isalnum() for letter in opening):
        return opening, "opening of the text"
    clause = re.split(r"[,;:—]", opening, maxsplit=1)[0].strip()
    if 4 <= len(clause.split()) <= _NAME_WORDS:
        return clause, "opening of the text"
    return None, "opening of the text"


def _find(folder: Path, image: str, below: Iterable[str]) -> str:
    """The path of a picture with the first of the folders below which it is; as it stands where it is in none."""
    for prefix in below:
        path = f"{prefix}/{image}" if prefix else image
        try:
            if inside(folder, path).is_file():
                return path
        except (DataError, OSError, RuntimeError, ValueError):
            return image
    return image


def _names_beside(path: Path) -> dict[str, str]:
    file = path.with_name(f"{path.stem}.names.json")
    if not file.exists():
        return {}
    names = read_json(file)
    if not isinstance(names, dict) or not all(isinstance(name, str) and name.strip() for name in names.values()):
        raise DataError(f"{file}: expected an object from id to name, such as {json.dumps({'17': 'Orrery Bridge'})}")
    return names
