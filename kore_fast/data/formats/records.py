"""One record of any user's format → a sample, and a sample's turns as messages; what each format has in common."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kore_fast.data.items import IMAGE_TOKEN
from kore_fast.data.problems import describe_validation
from kore_fast.data.samples import Sample

ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "bot": "gpt", "model": "gpt"}
SYSTEM = "system"
_MESSAGE_KEYS = ("messages", "conversations", "conversation")
_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value")


class RecordError(ValueError):
    """A record is no conversation with pictures; ``problems`` says why, each in a sentence."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True)
class Keys:
    """Under which keys a file keeps what is wanted; by default the usual ones are tried."""

    messages: Sequence[str] = _MESSAGE_KEYS
    images: Sequence[str] = ("images", "image")
    system: Sequence[str] = (SYSTEM,)
    role: Sequence[str] = _ROLE_KEYS
    content: Sequence[str] = _CONTENT_KEYS
    roles: Mapping[str, str] | None = None
    """Roles of a file's own → ``human``, ``gpt`` or ``system``, added to the usual ones."""


def messages_of(sample: Sample) -> list[dict[str, str]]:
    """The conversation as ``{"role", "content"}``, the system turn first; pictures stay ``<image>`` marks."""
    messages = [] if sample.system is None else [{"role": SYSTEM, "content": sample.system}]
    roles = {"human": "user", "gpt": "assistant"}
    return messages + [{"role": roles[turn.speaker], "content": turn.value} for turn in sample.conversations]


def provenance(sample: Sample) -> dict[str, str]:
    """``item`` and ``branch``, where the sample has them: extra keys that trainers pass over."""
    return {key: value for key, value in (("item", sample.item), ("branch", sample.branch)) if value is not None}


def sample_of(record: Any, number: int, *, image_root: str | Path | None = None, keys: Keys | None = None) -> Sample:
    """A record of LLaVA's, LLaMA-Factory's, ms-swift's or TRL's form as a sample.

    Args:
        number: the record's place in its file, for an id (``row-N``) where it has none.
        image_root: absolute picture paths below it are made relative to it.

    Raises:
        RecordError: everything that is wrong with the record's form. What the turns say is checked elsewhere.
    """
    keys = keys or Keys()
    if not isinstance(record, Mapping):
        raise RecordError([f"expected a JSON object, found {type(record).__name__}"])
    problems: list[str] = []
    system, turns, inline = _turns(_messages(record, keys, problems), keys, problems)
    for key in keys.system:
        if isinstance(record.get(key), str) and record[key].strip():
            if system is not None and system != record[key]:
                problems.append(f"there is a system turn and another text under {key!r}; keep one")
            system = record[key]
    images = _images(record, keys, inline, image_root, problems)
    if problems:
        raise RecordError(problems)
    given = record.get("id")
    made = {
        "id": f"row-{number}" if given is None else given,
        "image": images[0] if len(images) == 1 and not isinstance(record.get("image"), list) else images or None,
        "conversations": turns,
        "item": record.get("item"),
        "branch": record.get("branch"),
        "system": system,
    }
    try:
        return Sample.model_validate(made)
    except ValidationError as error:
        raise RecordError(describe_validation(error, Sample.model_fields)) from None


def _messages(record: Mapping[str, Any], keys: Keys, problems: list[str]) -> list[Any]:
    for key in keys.messages:
        if isinstance(record.get(key), list):
            return list(record[key])
    if isinstance(record.get("query"), str) and isinstance(record.get("response"), str):
        pairs = [*(record.get("history") or []), [record["query"], record["response"]]]
        return [
            {"role": role, "content": text}
            for pair in pairs
            if isinstance(pair, list)
            for role, text in zip(("user", "assistant"), pair, strict=False)
        ]
    problems.append(
        f"no list of turns under {' or '.join(repr(key) for key in keys.messages)}; "
        f"its keys are {', '.join(map(repr, record)) or 'none'}"
    )
    return []


def _turns(messages: list[Any], keys: Keys, problems: list[str]) -> tuple[str | None, list[dict[str, str]], list[str]]:
    roles = {**ROLES, SYSTEM: SYSTEM, **(keys.roles or {})}
    system: str | None = None
    turns: list[dict[str, str]] = []
    inline: list[str] = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            problems.append(f"turn {number} is {type(message).__name__}, expected an object with role and content")
            continue
        role = next((message[key] for key in keys.role if message.get(key) is not None), None)
        content = next((message[key] for key in keys.content if message.get(key) is not None), None)
        speaker = roles.get(role) if isinstance(role, str) else None
        if speaker is None:
            problems.append(f"turn {number} has the role {role!r}; known roles: {', '.join(sorted(roles))}")
            continue
        if isinstance(content, str):
            text = content
        elif isinstance(content, list):
            text = join_parts(content, f"turn {number}", inline, problems)
        else:
            problems.append(f"turn {number} has no text or list of parts under {' or '.join(map(repr, keys.content))}")
            continue
        if speaker == SYSTEM and number == 1:
            system = text
        elif speaker == SYSTEM:
            problems.append(f"turn {number} is a system turn; it may only come first")
        else:
            turns.append({"from": speaker, "value": text})
    return system, turns, inline


def _images(
    record: Mapping[str, Any], keys: Keys, inline: list[str], image_root: str | Path | None, problems: list[str]
) -> list[str]:
    given = {key: record[key] for key in keys.images if record.get(key) not in (None, [])}
    lists = [value if isinstance(value, list) else [value] for value in given.values()]
    if len(lists) > 1 and lists[0] != lists[1]:
        problems.append(f"{' and '.join(map(repr, given))} differ; keep one")
    found = lists[0] if lists else list(inline)
    images = []
    for image in found:
        path = image.get("path") if isinstance(image, Mapping) else image
        if not isinstance(path, str) or not path.strip():
            problems.append(f"a picture is given as {image!r:.60}, expected its path below the image folder")
            continue
        images.append(_below(path, image_root, problems))
    return images


def _below(path: str, image_root: str | Path | None, problems: list[str]) -> str:
    if image_root is None or not Path(path).is_absolute():
        return path
    for root in (Path(image_root).absolute(), Path(image_root).resolve()):
        if Path(path).is_relative_to(root):
            return Path(path).relative_to(root).as_posix()
    problems.append(f"image {path!r} is outside the image folder {image_root}; name the folder that holds it")
    return path


_SPLIT = re.compile(f"({re.escape(IMAGE_TOKEN)})")


def split_parts(text: str) -> list[dict[str, str]]:
    """A turn as ``{"type": "image"}`` and ``{"type": "text", "text"}`` parts.

    A single line break between a picture and its text is left out, as chat templates set their own. An empty text part
    stands between two that touch without one. `join_parts` gives back the same text.
    """
    pieces = [piece for piece in _SPLIT.split(text) if piece]
    parts: list[dict[str, str]] = []
    for place, piece in enumerate(pieces):
        if piece == IMAGE_TOKEN:
            if place and pieces[place - 1] == IMAGE_TOKEN:
                parts.append({"type": "text", "text": ""})
            parts.append({"type": "image"})
            continue
        after, before = place > 0, place < len(pieces) - 1
        if piece == "\n" and after and before:
            continue
        inner = piece
        if after and inner.startswith("\n") and not inner[1:2].isspace() and len(inner) > 1:
            inner = inner[1:]
        elif after and not inner[0].isspace():
            parts.append({"type": "text", "text": ""})
        glued = before and not piece[-1].isspace()
        if before and inner.endswith("\n") and not inner[-2:-1].isspace() and len(inner) > 1:
            inner = inner[:-1]
        parts.append({"type": "text", "text": inner})
        if glued:
            parts.append({"type": "text", "text": ""})
    return parts


def join_parts(parts: Sequence[Any], place: str, inline: list[str], problems: list[str]) -> str:
    """The text of a turn with ``<image>`` marks; paths given inside image parts are added to ``inline``."""
    text, last = "", ""
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            piece = part["text"]
            if piece == "":
                last = "empty"
                continue
        elif kind == "image":
            piece = IMAGE_TOKEN
            path = next((part[key] for key in ("image", "path") if isinstance(part.get(key), str)), None)
            if path is not None:
                inline.append(path)
        else:
            problems.append(f"{place} has a part of type {kind!r}; known are 'image' and 'text'")
            continue
        now = "image" if piece == IMAGE_TOKEN and kind == "image" else "text"
        apart = {"image", "text"} == {last, now} or last == now == "image"
        if apart and not (now == "text" and piece[0].isspace()) and not (last == "text" and text[-1:].isspace()):
            text += "\n"
        text += piece
        last = now
    return text
