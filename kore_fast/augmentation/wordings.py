"""How facts are asked for and told: wordings for one's own fact keys from a YAML file, generic ones for any other key.

``ask`` and ``tell`` are used for training. ``held_out`` is used for evaluation and for nothing else: a wording that is
in both is an error.
"""

from __future__ import annotations

import difflib
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from kore_fast.augmentation.generic import GENERIC_ASK, GENERIC_HELD_OUT, GENERIC_TELL
from kore_fast.data.items import FactValue, Item
from kore_fast.data.problems import describe_validation, raise_problems
from kore_fast.errors import DataError

_FIELDS = {"it", "name", "subject", "label", "value", "a_value"}


class FactWordings(BaseModel):
    """The wordings of one fact key. What is left out is taken from the generic wordings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str | None = None
    """The key in plain words; by default the key with spaces for underscores."""
    ask: tuple[str, ...] | None = None
    """Training questions; each holds ``{it}``."""
    tell: tuple[str, ...] | None = None
    """Training answers, whole sentences; each holds ``{value}`` or ``{a_value}`` ("an elf")."""
    held_out: tuple[str, ...] | None = None
    """Evaluation questions; each holds ``{it}``. An empty list: the fact is taught but not asked for."""
    join: Literal["and", "or"] = "and"
    """The word before the last of several values."""

    @model_validator(mode="after")
    def _placeholders(self) -> FactWordings:
        for key in ("ask", "tell", "held_out"):
            for wording in getattr(self, key) or ():
                _check_placeholders(key, wording)
        for key in ("ask", "tell"):
            if getattr(self, key) == ():
                raise ValueError(f"{key!r} is an empty list; leave it out to use the generic wordings")
        return self


class Wordings(BaseModel):
    """Wordings for a set of items.

    ``refer`` is how a sentence speaks of an item ("the {name}"); ``subject`` is the general word for what the items
    are ("unit"; by default the item's type); ``pronoun`` and ``possessive`` stand for an item already named.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    refer: str = "{name}"
    subject: str | None = None
    pronoun: str = "it"
    possessive: str = "its"
    facts: dict[str, FactWordings] = {}

    @model_validator(mode="after")
    def _refer_names(self) -> Wordings:
        if _fields(self.refer) != {"name"}:
            raise ValueError(f"'refer' must hold {{name}} and no other placeholder: {self.refer!r}")
        for key in self.facts:
            fact = self.fact(key)
            taught = {plain(wording) for wording in fact.ask}
            for wording in fact.held_out:
                if plain(wording) in taught:
                    raise ValueError(f"fact {key!r}: held-out wording {wording!r} is also used for training; reword it")
        return self

    def fact(self, key: str) -> Fact:
        """The wordings for one fact key, generic where none are given."""
        found = self.known_facts.get(key)
        if found is None:
            found = self.known_facts[key] = self._fact(key)
        return found

    @cached_property
    def known_facts(self) -> dict[str, Fact]:
        """What `fact` has made so far."""
        return {}

    def _fact(self, key: str) -> Fact:
        given = self.facts.get(key, FactWordings())
        return Fact(
            label=given.label or key.replace("_", " ").strip(),
            ask=given.ask or GENERIC_ASK,
            tell=given.tell or GENERIC_TELL,
            held_out=GENERIC_HELD_OUT if given.held_out is None else given.held_out,
            join=given.join,
        )

    def reference(self, item: Item) -> str:
        """How a sentence names the item: "the Elvish Archer"."""
        return self.refer.replace("{name}", item.name)

    def kind(self, item: Item) -> str:
        """The general word for the item: "unit"."""
        return self.subject or item.type

    def check_keys(self, items: Iterable[Item]) -> None:
        """Refuse a worded fact key that looks like a misspelling of one that the items have.

        Raises:
            DataError: names both keys.
        """
        present = {key for item in items for key in item.facts}
        for key in self.facts:
            close = difflib.get_close_matches(key, sorted(present - self.facts.keys()), n=1)
            if key not in present and close:
                raise DataError(f"wordings: no item has the fact {key!r}; did you mean {close[0]!r}?")


@dataclass(frozen=True)
class Fact:
    """The wordings in force for one fact key."""

    label: str
    ask: Sequence[str]
    tell: Sequence[str]
    held_out: Sequence[str]
    join: str

    def spoken(self, value: FactValue) -> str:
        """A value in a sentence: "Elvish Ranger or Elvish Marksman"."""
        if not isinstance(value, list):
            return str(value)
        if len(value) == 1:
            return value[0]
        return f"{', '.join(value[:-1])} {self.join} {value[-1]}"


def load_wordings(path: str | Path) -> Wordings:
    """Read and check a wordings file.

    Raises:
        DataError: not YAML, an unknown or misspelt key, an unknown placeholder, a wording held out and trained on.
    """
    try:
        record = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(record, dict):
        raise DataError(f"{path}: expected keys such as 'refer' and 'facts' at its top")
    try:
        return Wordings.model_validate(record)
    except ValidationError as error:
        known = Wordings.model_fields.keys() | FactWordings.model_fields.keys()
        raise_problems(path, "wordings", describe_validation(error, known))
        raise


def wordings_beside(items: str | Path) -> Wordings:
    """The wordings in ``wordings.yaml`` beside an items file, or the generic ones when there is none."""
    path = Path(items).with_name("wordings.yaml")
    return load_wordings(path) if path.is_file() else Wordings()


def with_possessive(wording: str, possessive: str) -> str:
    """A wording for ``{it}`` as a pronoun: "the race of {it}" becomes "its race"."""
    return re.sub(r"\b[Tt]he ([\w{} -]+?) of \{it\}", lambda match: f"{possessive} {match.group(1)}", wording)


def fill(wording: str, **words: str) -> str:
    """Put words in a wording's places and begin it with a capital."""
    value = words.get("value", "")
    text = wording.format(a_value=f"{'an' if value[:1].lower() in tuple('aeiou') else 'a'} {value}", **words)
    return text[:1].upper() + text[1:]


def plain(wording: str) -> str:
    """A wording with nothing left but its words, to tell whether two are the same question."""
    return " ".join(re.findall(r"[\w{}]+", wording.lower()))


def _fields(wording: str) -> set[str]:
    try:
        return {name for _, name, _, _ in string.Formatter().parse(wording) if name is not None}
    except ValueError as error:
        raise ValueError(f"{wording!r}: {error}; write {{{{ and }}}} for braces") from None


def _check_placeholders(key: str, wording: str) -> None:
    fields = _fields(wording)
    for field in sorted(fields - _FIELDS):
        close = difflib.get_close_matches(field, sorted(_FIELDS), n=1)
        hint = f"did you mean {{{close[0]}}}?" if close else "known: " + ", ".join(sorted(_FIELDS))
        raise ValueError(f"{key!r}: unknown placeholder {{{field}}} in {wording!r}; {hint}")
    if key == "tell":
        if not fields & {"value", "a_value"}:
            raise ValueError(f"'tell': {wording!r} does not hold {{value}} or {{a_value}}")
    else:
        if "it" not in fields or "name" in fields:
            raise ValueError(f"{key!r}: {wording!r} must speak of the item as {{it}}, which stands for name or picture")
        if fields & {"value", "a_value"}:
            raise ValueError(f"{key!r}: {wording!r} holds the answer; a question has no {{value}}")
