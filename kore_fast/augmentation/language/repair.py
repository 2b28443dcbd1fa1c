"""A model's answer → the form it should have: out of fences and prose, with small mistakes of JSON put right."""

from __future__ import annotations

import json
import re
from itertools import accumulate
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from kore_fast.augmentation.language.schemas import UnusableError, whole_sentences
from kore_fast.data.problems import describe_validation
from kore_fast.endpoint.packages import needed

LONGEST = 100_000
"""Characters of an answer that is read."""
LONGEST_REPAIRED = 20_000
"""Characters of an answer that is repaired; no form here needs half of it."""
DEEPEST = 16
"""Brackets inside each other in an answer that is repaired, which takes up to 20 seconds where it is nothing but
brackets; no form here has more than four."""

FormT = TypeVar("FormT", bound=BaseModel)


def read_answer(content: str, form: type[FormT], *, cut: bool = False) -> FormT:
    """Read an answer as ``form``.

    Right JSON is taken as it is. Else: thoughts in ``<think>`` and what stands around the JSON are left out, what
    json-repair can put right is put right, a list that was cut off keeps its whole elements, a bare list becomes the
    form's list; and where there is no JSON at all, prose is taken for a form of one text (its whole sentences only,
    where the reply was ``cut``), and lines that are questions for a form of one list.

    Raises:
        UnusableError: nothing of that form can be found; says what is wrong.
    """
    if len(content) > LONGEST:
        raise UnusableError(f"the answer has more than {LONGEST:,} characters")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        text = _without_thoughts(content)
        if len(text) > LONGEST_REPAIRED:
            raise UnusableError(f"expected JSON, found {len(text):,} characters of something else") from None
        value = _repaired(text, form, cut)
    if isinstance(value, list):
        value = {_only_field(form): value} if _only_field(form) else value
    if not isinstance(value, dict):
        raise UnusableError(f"expected a JSON object with {_keys(form)}, found no such object")
    try:
        return form.model_validate(value)
    except ValidationError as error:
        raise UnusableError("; ".join(describe_validation(error, form.model_fields)[:3])) from None


def _repaired(text: str, form: type[BaseModel], cut: bool) -> Any:
    fenced = re.search(r"```(?:json)?\s*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    if fenced and re.search(r"[{\[]", fenced.group(1)):
        text = fenced.group(1)
    starts = [place for key in form.model_fields if (place := _object_with(text, key)) is not None]
    begins = re.search(r"\[\s*[\"'{]", text) if _only_field(form) else None
    start = min(starts) if starts else begins.start() if begins else None
    if start is None:
        return _prose(text, form, cut)
    text = text[start:]
    end, unfinished = _end(text)
    if _depth(text[:end]) > DEEPEST:
        raise UnusableError(f"expected JSON, found more than {DEEPEST} brackets inside each other")
    try:
        value = needed("json_repair").repair_json(text[:end], return_objects=True, skip_json_loads=False)
    except (ValueError, RecursionError):
        return None
    return _without_last(value, form) if unfinished else value


def _object_with(text: str, key: str) -> int | None:
    found = re.search(rf"\{{\s*[\"'“]?{re.escape(key)}[\"'”]?\s*:", text)
    return found.start() if found else None


def _end(text: str) -> tuple[int, bool]:
    """Where the bracket that ``text`` begins with is closed, and whether something inside it was cut off.

    Where only the last bracket is missing, nothing was.
    """
    depth, quoted, escaped = 0, False, False
    for place, mark in enumerate(text):
        if escaped:
            escaped = False
        elif mark == "\\":
            escaped = quoted
        elif mark == '"':
            quoted = not quoted
        elif not quoted and mark in "{[":
            depth += 1
        elif not quoted and mark in "}]":
            depth -= 1
            if depth == 0:
                return place + 1, False
    return len(text), depth > 1 or quoted or text.rstrip()[-1:] not in "]}\"'"


def _depth(text: str) -> int:
    """The most brackets that are open at once, those in strings too: where strings end is what repair has to guess."""
    steps = (1 if mark in "{[" else -1 for mark in text if mark in "{[}]")
    return max(accumulate(steps), default=0)


def _without_last(value: Any, form: type[BaseModel]) -> Any:
    """A cut answer without what was being written when it ended."""
    if isinstance(value, list):
        return value[:-1]
    if not isinstance(value, dict) or not value:
        return value
    key = list(value)[-1]
    if isinstance(value[key], list):
        return {**value, key: value[key][:-1]}
    if isinstance(value[key], str) and len(form.model_fields) == 1:
        kept = whole_sentences(value[key])
        if not kept:
            raise UnusableError("the answer was cut off; make it shorter")
        return {**value, key: kept}
    return value


def _prose(text: str, form: type[BaseModel], cut: bool) -> Any:
    """An answer without any JSON, for the forms where words will do."""
    key = _only_field(form)
    if key is None or not text.strip() or "{" in text:
        return None
    kind = form.model_fields[key].annotation
    if kind is str:
        return {key: whole_sentences(text) if cut else text.strip()}
    if get_origin(kind) is list and get_args(kind) == (str,):
        lines = [line.strip() for line in text.splitlines() if line.strip().endswith("?")]
        # One line alone is rather the model asking back ("What is your question?").
        return {key: lines} if len(lines) > 1 else None
    return None


def _without_thoughts(text: str) -> str:
    # Nothing is sought behind the last end: from each of many beginnings, that would be a walk to the text's end.
    end = max(text.rfind("</think>"), text.rfind("</thinking>")) + len("</thinking>")
    return (re.sub(r"<think(?:ing)?>.*?</think(?:ing)?>", "", text[:end], flags=re.DOTALL) + text[end:]).strip()


def _only_field(form: type[BaseModel]) -> str | None:
    fields = list(form.model_fields)
    return fields[0] if len(fields) == 1 else None


def _keys(form: type[BaseModel]) -> str:
    return ", ".join(repr(key) for key in form.model_fields)
