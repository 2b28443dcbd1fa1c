"""Prompts from readable files, and the material in them: quoted as data between marks that the data cannot hold."""

from __future__ import annotations

import difflib
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from string import Template
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kore_fast.augmentation.chance import pick
from kore_fast.augmentation.language.schemas import tidy
from kore_fast.augmentation.prose import sentences
from kore_fast.data.items import Item
from kore_fast.data.problems import describe_validation, raise_problems
from kore_fast.endpoint.tokens import BYTES_PER_TOKEN
from kore_fast.errors import DataError

WRITER_TASKS = ("questions", "answer", "answers", "summary", "quadruplets", "spoken_quadruplets")
TASKS = (*WRITER_TASKS, "judge")
_PLACES = {
    "questions": {"fence", "material", "count"},
    "answer": {"fence", "material", "question_fence", "question", "words"},
    "answers": {"fence", "material", "question_fence", "question", "count", "words"},
    "summary": {"fence", "material", "words"},
    "quadruplets": {"fence", "material", "count"},
    "spoken_quadruplets": {"fence", "material", "count"},
    "judge": {"fence", "material", "question_fence", "question", "answer_fence", "answer"},
}
_QUOTED = {"material", "question", "answer"}


class Prompt(BaseModel):
    """One task's prompt: several wordings of the system's and of the user's message, chosen apart."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Annotated[str, Field(min_length=1)]
    """Part of the request cache's key, with the wording itself."""
    system: Annotated[tuple[str, ...], Field(min_length=1)]
    user: Annotated[tuple[str, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _quoted_apart(self) -> Prompt:
        for text in self.system:
            if _places(text)[0] & _QUOTED:
                data = ", ".join(f"${place}" for place in sorted(_QUOTED))
                raise ValueError(f"'system' must not hold {data}: data belongs into the user's message")
        return self

    def chosen(self, seed: int, identity: str, task: str) -> Chosen:
        """The wordings that an item gets; they depend on the seed and its id."""
        return Chosen(
            Template(pick(self.system, seed, identity, "prompt", task, "system")),
            Template(pick(self.user, seed, identity, "prompt", task, "user")),
        )


@dataclass(frozen=True)
class Chosen:
    """One wording of each message."""

    system: Template
    user: Template

    def messages(self, words: dict[str, str]) -> list[dict[str, str]]:
        """The messages of one request."""
        # One pass: what is put in is never read as a wording again.
        return [
            {"role": "system", "content": self.system.substitute(words).strip()},
            {"role": "user", "content": self.user.substitute(words).strip()},
        ]


@cache
def built_in_prompts() -> dict[str, Prompt]:
    """The prompts that come with the package."""
    folder = resources.files("kore_fast.augmentation.language") / "prompts"
    return {task: _read(f"{task}.yaml", (folder / f"{task}.yaml").read_text(encoding="utf-8"), task) for task in TASKS}


def load_prompts(folder: str | Path | None = None) -> dict[str, Prompt]:
    """The built-in prompts, those in ``folder`` put over them.

    Raises:
        DataError: the folder is missing or holds no prompt, a file has another name, is not YAML, lacks a key or a
            place, or has one that its task does not.
    """
    if folder is None:
        return built_in_prompts()
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of prompts; correct 'prompts'")
    own: dict[str, Prompt] = {}
    for path in sorted(folder.glob("*.yaml")):
        if path.stem not in TASKS:
            close = difflib.get_close_matches(path.stem, TASKS, n=1)
            hint = f"did you mean {close[0]}.yaml?" if close else "known: " + ", ".join(TASKS)
            raise DataError(f"{path}: there is no task of that name; {hint}")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as UTF-8 ({error})") from None
        own[path.stem] = _read(path, text, path.stem)
    if not own:
        raise DataError(f"{folder}: holds no prompt; name a file after its task, such as questions.yaml")
    return {**built_in_prompts(), **own}


def _read(path: str | Path, text: str, task: str) -> Prompt:
    try:
        record = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(record, dict):
        raise DataError(f"{path}: expected the keys 'version', 'system' and 'user'")
    try:
        prompt = Prompt.model_validate(record)
    except ValidationError as error:
        raise_problems(path, "prompt", describe_validation(error, Prompt.model_fields))
        raise
    known = _PLACES[task]
    for wording in (*prompt.system, *prompt.user):
        places, valid = _places(wording)
        if not valid:
            raise DataError(f"{path}: a $ stands without a name in {wording[:60]!r}; write $$ for the sign itself")
        for place in sorted(places - known):
            raise DataError(f"{path}: unknown place ${place}; known for {task}: {', '.join(sorted(known))}")
    for wording in prompt.user:
        for place in sorted(known & _QUOTED - _places(wording)[0]):
            raise DataError(f"{path}: {wording[:60]!r} has no ${place}")
    return prompt


def _places(wording: str) -> tuple[set[str], bool]:
    """The names after each ``$``, and whether each ``$`` has one (Python 3.11 has this in ``Template``)."""
    found = [match.groupdict() for match in Template.pattern.finditer(wording)]
    names = {match["named"] or match["braced"] for match in found}
    return names - {None}, all(match["invalid"] is None for match in found)


@dataclass(frozen=True)
class Quoted:
    """A text between marks that it does not hold."""

    fence: str
    """The mark: ``<fence>`` opens, ``</fence>`` closes."""
    text: str
    """Marks and text."""


def quote(kind: str, text: str) -> Quoted:
    """Put a text between marks made from its own hash: its writer could not foresee them, and it does not hold them."""
    attempt = 0
    while True:
        digest = hashlib.sha256(f"{attempt} {text}".encode("utf-8", "replace")).hexdigest()
        fence = f"{kind}-{digest[:12]}"
        if fence not in text:
            return Quoted(fence, f"<{fence}>\n{text}\n</{fence}>")
        attempt += 1


# What the chat templates of common models write between turns. A server that reads it as such would let a text begin a
# turn of its own; with a blank in it, it is text again.
_TURNS = re.compile(
    r"<(?=\|)|<(?=/?(?:s|bos|eos|start_of_turn|end_of_turn|think|tool_call)>)|\[(?=/?(?:INST|SYS)\])|<(?=</?SYS>>)|<(?=｜)"
)


def harmless(text: str) -> str:
    """A text without control characters (line breaks and tabs stay) and without any chat template's marks."""
    lines = [tidy_line(line) for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    return _TURNS.sub(lambda match: f"{match.group()} ", "\n".join(lines)).strip()


def tidy_line(line: str) -> str:
    """`tidy`, but for blanks and tabs inside the line."""
    return line if line.isprintable() else tidy(line)


@dataclass(frozen=True)
class Material:
    """An item as a model sees it."""

    quoted: Quoted
    cut: bool
    """Whether the text was longer than allowed."""


def material(item: Item, max_tokens: int, include_facts: bool = True) -> Material:
    """Name, kind, text and facts of an item, quoted; a text of more than ``max_tokens`` ends at a whole sentence."""
    text, cut = bounded(item.text, max_tokens)
    lines = [f"name: {harmless(tidy(item.name))}", f"kind: {harmless(tidy(item.type))}", "", harmless(text)]
    if include_facts and item.facts:
        told = [f"- {key.replace('_', ' ')}: {_told(value)}" for key, value in sorted(item.facts.items())]
        facts, facts_cut = bounded("\n".join(told), max_tokens)
        lines += ["", "facts:", harmless(facts)]
        cut = cut or facts_cut
    return Material(quote("material", "\n".join(lines)), cut)


def _told(value: object) -> str:
    return tidy(", ".join(value) if isinstance(value, list) else str(value))


def bounded(text: str, max_tokens: int) -> tuple[str, bool]:
    """A text of at most so many tokens, ended at a whole sentence, and whether anything was cut off."""
    limit = max_tokens * BYTES_PER_TOKEN
    # Characters are at least as many bytes: a long text is cut before it is encoded.
    data = text[:limit].encode("utf-8", "replace")
    if len(text) <= limit and len(data) <= limit:
        return text, False
    kept = data[:limit].decode("utf-8", "ignore")
    whole = sentences(kept)
    if len(whole) > 1 and whole[-1][-1:] not in ".!?":
        kept = " ".join(whole[:-1])
    return kept, True
