"""Links between items (one names another, a fact or a rare name is shared) and questions over two items at once.

The paper asks about one item at a time; comparison and multi-hop questions are its fourth open question. All of it goes
through inverted indices: the work grows with the length of the texts, not with the number of pairs.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from kore_fast.augmentation.chance import rank, shuffled
from kore_fast.augmentation.prose import sentences, summarise
from kore_fast.augmentation.quantities import MONTHS
from kore_fast.augmentation.wordings import Wordings, fill, plain
from kore_fast.data.items import IMAGE_TOKEN, Item
from kore_fast.data.samples import Sample, Turn

LinkKind = Literal["reference", "mention", "entity", "fact", "number"]
KINDS: tuple[LinkKind, ...] = get_args(LinkKind)


class LinkOptions(BaseModel):
    """How many links are made, and what their questions show."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = 0
    per_item: Annotated[int, Field(ge=1)] = 2
    """Links an item takes part in, at most."""
    common: Annotated[int, Field(ge=2)] = 50
    """A fact value or a name in prose that more items share than this says little about any two of them."""
    pictures: Literal["first", "both"] = "first"
    """A question shows the first item's picture, or both items' in the order in which it names them."""
    words: Annotated[int, Field(ge=8)] = 25
    """The most words of prose that an answer quotes for one item."""


@dataclass(frozen=True)
class Link:
    """What ties two items together.

    ``reference``: the fact ``key`` of ``first`` is ``second``'s name. ``mention``: the prose of ``first`` names
    ``second`` and no other item. ``entity``: both texts name ``value``. ``fact``: both have ``value`` under ``key``.
    ``number``: both have a number under ``key``, not the same.
    """

    kind: LinkKind
    first: str
    second: str
    key: str | None = None
    value: str | None = None


def find_links(items: Sequence[Item], options: LinkOptions | None = None) -> list[Link]:
    """At most ``options.per_item`` links for each item, each kind before any second one of a kind.

    The same for any order of ``items``. Names that two items share link nothing. Items that share a value are linked
    around a ring, not each with each.
    """
    options = options or LinkOptions()
    items = sorted(items, key=lambda item: item.id)
    names = Counter(item.name for item in items)
    by_name = {item.name: item.id for item in items if names[item.name] == 1}
    found: list[Link] = []
    shared: dict[tuple[LinkKind, str | None, str], list[str]] = defaultdict(list)
    finder = _NameFinder(by_name)
    for item in items:
        for key, value in sorted(item.facts.items()):
            for one in value if isinstance(value, list) else [value]:
                other = by_name.get(one) if isinstance(one, str) else None
                if other is not None and other != item.id:
                    found.append(Link("reference", item.id, other, key, str(one)))
            if isinstance(value, int | float):
                shared["number", key, item.type].append(item.id)
            elif isinstance(value, str):
                shared["fact", key, value].append(item.id)
        named = [name for name in finder.names_in(item.text) if by_name[name] != item.id and name not in item.name]
        if len(named) == 1:
            found.append(Link("mention", item.id, by_name[named[0]], None, named[0]))
        for entity in _entities(item):
            shared["entity", None, entity].append(item.id)
    numbers = {item.id: item.facts for item in items}
    for (kind, under, what), ids in shared.items():
        if kind != "number" and not 2 <= len(ids) <= options.common:
            continue
        ring = sorted(ids, key=lambda one: rank(options.seed, kind, under, what, one))  # used at once
        for first, second in zip(ring, ring[1:] + ring[:1] if len(ring) > 2 else ring[1:], strict=False):
            if kind != "number":
                found.append(Link(kind, first, second, under, what))
            elif under is not None and numbers[first][under] != numbers[second][under]:
                found.append(Link(kind, first, second, under))
    return _bounded(found, options)


def _bounded(found: Iterable[Link], options: LinkOptions) -> list[Link]:
    order = sorted(
        found,
        key=lambda link: (KINDS.index(link.kind), rank(options.seed, link.first, link.second, link.key, link.value)),
    )
    taken: Counter[str] = Counter()
    of_kind: Counter[tuple[str, LinkKind]] = Counter()
    pairs: set[frozenset[str]] = set()
    kept: list[Link] = []
    for most_of_a_kind in (1, options.per_item):
        for link in order:
            ends = (link.first, link.second)
            if frozenset(ends) in pairs or any(taken[end] >= options.per_item for end in ends):
                continue
            if any(of_kind[end, link.kind] >= most_of_a_kind for end in ends):
                continue
            for end in ends:
                taken[end] += 1
                of_kind[end, link.kind] += 1
            pairs.add(frozenset(ends))
            kept.append(link)
    return sorted(kept, key=lambda link: (link.first, KINDS.index(link.kind), link.second, link.key or ""))


class _NameFinder:
    """Finds many names in a text at once, the longest where several begin at one word."""

    def __init__(self, names: Iterable[str]) -> None:
        self._by_first: dict[str, list[tuple[tuple[str, ...], str]]] = defaultdict(list)
        for name in names:
            words = tuple(re.findall(r"\w+", name))
            if words and words[0][0].isupper():
                self._by_first[words[0]].append((words, name))
        for several in self._by_first.values():
            several.sort(key=lambda entry: (-len(entry[0]), entry[1]))

    def names_in(self, text: str) -> list[str]:
        """Each name once, in the text's order.

        A name of one word does not count where it begins a sentence (it may be any word) or is part of a longer name.
        """
        found: dict[str, None] = {}
        for sentence in sentences(text):
            words = re.findall(r"\w+", sentence)
            place = 0
            while place < len(words):
                for candidate, name in self._by_first.get(words[place], ()):
                    if tuple(words[place : place + len(candidate)]) != candidate:
                        continue
                    beside = [words[place - 1][0] if place else "A", *[one[0] for one in words[place + 1 : place + 2]]]
                    if len(candidate) > 1 or not any(letter.isupper() for letter in beside):
                        found[name] = None
                        place += len(candidate) - 1
                        break
                place += 1
        return list(found)


_CALENDAR = frozenset(name.capitalize() for name in MONTHS) | frozenset(
    ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
)


def _entities(item: Item) -> set[str]:
    """Capitalised names in the prose, but for the item's own words and what only begins a sentence."""
    own = {word for name in re.findall(r"\w+", item.name) for word in (name, f"{name}s", name.removesuffix("s"))}
    found = set()
    for sentence in sentences(item.text):
        for match in re.finditer(r"[A-Z][\w'’-]+(?: [A-Z][\w'’-]+)*", sentence):
            name = re.sub(r"['’]s?$", "", match.group())
            if match.start() == 0:
                # The first word has its capital anyway.
                name = name.partition(" ")[2]
            if len(name) > 2 and not (own | _CALENDAR) & set(name.split()):
                found.add(name)
    return found


# Questions. {a} and {b} name the items, {label} is a fact key in plain words, {other} a second one.

COMPARE_ASK = (
    "Which of the two has the higher {label}, {a} or {b}?",
    "Compare {a} and {b} by their {label}: which one is ahead?",
    "Between {a} and {b}, which has the higher {label}?",
    "Set {a} beside {b}. Which of them is ahead in {label}?",
)
COMPARE_TELL = (
    "{more} has the higher {label}: {high}, while {less} has {low}.",
    "That is {more}, with {label} {high} against {low} for {less}.",
    "{more} is ahead in {label}, with {high}; {less} has {low}.",
)
COMMON_ASK = (
    "What do {a} and {b} have in common?",
    "In what are {a} and {b} alike?",
    "Name something that {a} shares with {b}.",
    "How do {a} and {b} resemble each other?",
)
COMMON_TELL = (
    "{a} and {b} share this: {shared}.",
    "Both have this in common: {shared}.",
    "They are alike in this: {shared}.",
)
HOP_ASK = (
    'Look up "{label}" of {a}. What is the {other} of what you find there?',
    'Take what stands under "{label}" for {a}: which {other} does that one have?',
    'Go from {a} to its "{label}". What is the {other} there?',
)
HOP_TELL = (
    'Under "{label}", {a} has {b}, and the {other} of {b} is {value}.',
    "That leads to {b}: the {other} of {b} is {value}.",
    'The "{label}" of {a} is {b}. Its {other} is {value}.',
)
MENTION_ASK = (
    "Whom or what else does the description of {a} speak of, and what is that?",
    "The account of {a} names another one. Which, and what is known of it?",
    "Who else comes up when one tells of {a}? Say something about that one too.",
)
MENTION_TELL = ("It speaks of {b}. {prose}", "That is {b}. {prose}", "{b} comes up there. {prose}")
ENTITY_ASK = (
    "What do {a} and {b} have to do with {value}?",
    "{value} comes up with {a} and with {b}. How?",
    "How is {value} connected with {a}, and how with {b}?",
)
ENTITY_TELL = ("Of {a} it is told: {first} Of {b}: {second}", "For {a}: {first} For {b}: {second}")


def link_samples(
    items: Sequence[Item],
    links: Iterable[Link],
    wordings: Wordings | None = None,
    options: LinkOptions | None = None,
    *,
    image: Callable[[Item], str] | None = None,
) -> Iterator[Sample]:
    """One question for each link that has one, as samples of the branch "links", one after the other.

    Answers come from facts and prose alone. A question that holds one of the held-out questions about its items word
    for word is asked in another way, or not at all. ``image`` gives an item's picture (by default its own).
    """
    wordings, options = wordings or Wordings(), options or LinkOptions()
    by_id = {item.id: item for item in items}
    number: Counter[str] = Counter()
    for link in links:
        first, second = by_id[link.first], by_id[link.second]
        written = _write(link, first, second, wordings, options)
        if written is None:
            continue
        question, answer = written
        shown = (first, second) if options.pictures == "both" else (first,)
        pictures = [image(item) if image else item.image for item in shown]
        marks = f"{IMAGE_TOKEN}\n" * len(pictures)
        yield Sample(
            id=f"{first.id}-links-{number[first.id]}",
            image=pictures[0] if len(pictures) == 1 else pictures,
            conversations=(Turn(speaker="human", value=marks + question), Turn(speaker="gpt", value=answer)),
            item=first.id,
            branch="links",
        )
        number[first.id] += 1


def _write(link: Link, first: Item, second: Item, wordings: Wordings, options: LinkOptions) -> tuple[str, str] | None:
    write = {
        "number": _compare,
        "fact": _common,
        "reference": _hop,
        "mention": _mention,
        "entity": _entity,
    }[link.kind]
    drafted = write(link, first, second, wordings, options)
    if drafted is None:
        return None
    asks, tells, words = drafted
    words = {"a": wordings.reference(first), "b": wordings.reference(second), **words}
    names = (options.seed, link.kind, link.first, link.second, link.key)
    answer = _capital(shuffled(tells, *names, "tell")[0].format_map(words))
    held_out = [form for item in (first, second) for form in _held_out(item, wordings)]
    for ask in shuffled(asks, *names, "ask"):
        question = _capital(ask.format_map(words))
        padded = f" {plain(question)} "
        if not any(f" {form} " in padded for form in held_out):
            return question, answer
    return None


def _held_out(item: Item, wordings: Wordings) -> Iterator[str]:
    """The held-out questions about an item by name, as bare words."""
    for key in item.facts:
        fact = wordings.fact(key)
        for wording in fact.held_out:
            yield plain(
                fill(
                    wording, it=wordings.reference(item), label=fact.label, subject=wordings.kind(item), name=item.name
                )
            )


_Draft = tuple[Sequence[str], Sequence[str], Mapping[str, str]]


def _compare(link: Link, first: Item, second: Item, wordings: Wordings, options: LinkOptions) -> _Draft | None:
    assert link.key is not None
    one, other = first.facts[link.key], second.facts[link.key]
    if not isinstance(one, int | float) or not isinstance(other, int | float) or one == other:
        return None
    more, less = (first, second) if one > other else (second, first)
    return COMPARE_ASK, COMPARE_TELL, {
        "label": wordings.fact(link.key).label,
        "more": wordings.reference(more),
        "less": wordings.reference(less),
        "high": str(max(one, other)),
        "low": str(min(one, other)),
    }  # fmt: skip


def _common(link: Link, first: Item, second: Item, wordings: Wordings, options: LinkOptions) -> _Draft | None:
    keys = [key for key, value in sorted(first.facts.items()) if second.facts.get(key) == value]
    # The link's own fact first, and two more at most.
    keys = [key for key in keys if key == link.key] + [key for key in keys if key != link.key][:2]
    if not keys:
        return None
    told = [f"the {wordings.fact(key).label} {wordings.fact(key).spoken(first.facts[key])}" for key in keys]
    shared = told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"
    return COMMON_ASK, COMMON_TELL, {"shared": shared}


def _hop(link: Link, first: Item, second: Item, wordings: Wordings, options: LinkOptions) -> _Draft | None:
    assert link.key is not None
    value = first.facts[link.key]
    if isinstance(value, list) and len(value) > 1:
        return None  # several ways to go, several right answers
    keys = [key for key in sorted(second.facts) if key != link.key and not isinstance(second.facts[key], list)]
    if not keys:
        return None
    key = shuffled(keys, options.seed, "hop", first.id, second.id)[0]
    fact = wordings.fact(key)
    return HOP_ASK, HOP_TELL, {
        "label": wordings.fact(link.key).label, "other": fact.label, "value": fact.spoken(second.facts[key])
    }  # fmt: skip


def _mention(link: Link, first: Item, second: Item, wordings: Wordings, options: LinkOptions) -> _Draft | None:
    return MENTION_ASK, MENTION_TELL, {"prose": summarise(second.text, options.words)}


def _entity(link: Link, first: Item, second: Item, wordings: Wordings, options: LinkOptions) -> _Draft | None:
    assert link.value is not None
    told = []
    for item in (first, second):
        named = [one for one in sentences(item.text) if re.search(rf"\b{re.escape(link.value)}\b", one)]
        short = [one for one in named if len(one.split()) <= 2 * options.words]
        if not short:
            return None
        told.append(short[0] if short[0][-1] in ".!?…\"'”’)" else f"{short[0]}.")
    return ENTITY_ASK, ENTITY_TELL, {"value": link.value, "first": told[0], "second": told[1]}


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
