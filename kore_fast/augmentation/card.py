"""The data card of augmented samples: ``card.json`` for programs and a ``README.md`` as Hugging Face shows it.

`CardTotals` takes samples one by one and keeps counts only, so its memory does not grow with them but for an eight-byte
mark for each picture. Equal inputs give equal bytes: no times, no durations.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import kore_fast
from kore_fast.augmentation.provenance import PictureSource, Provenance
from kore_fast.data.items import Item
from kore_fast.data.samples import Sample, Written
from kore_fast.files import write_text

UNKNOWN = "unknown"
EXAMPLES = 5
LISTED = 40
TOLD = 12
_PERCENTILES = (5, 50, 95)
_HUB_LICENCES = {
    "cc0-1.0",
    "cc-by-3.0",
    "cc-by-4.0",
    "cc-by-sa-3.0",
    "cc-by-sa-4.0",
    "cc-by-nc-4.0",
    "gpl-2.0",
    "gpl-3.0",
    "mit",
    "apache-2.0",
}


@dataclass(frozen=True)
class Costs:
    """What the language model and the searches took; None is not known."""

    requests: int | None = None
    """Requests that were sent and answered; what came from the cache is not among them."""
    cached: int | None = None
    """Answers that came from the cache."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    money: float | None = None
    currency: str = "USD"
    searches: int | None = None
    """Picture searches that were sent."""
    downloads: int | None = None
    """Pictures that were fetched."""


@dataclass(frozen=True)
class CardInfo:
    """What a card says beside the counts."""

    name: str
    """The data set's name."""
    about: str = ""
    """A sentence on what it is about."""
    language: str | None = None
    """A language code such as ``en`` for the hub, None where it is not known."""
    data_file: str = "samples.json"
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    """What was used for what: ``{"writer": "gpt-4o-2024-08-06", "clip": "ViT-L-14-336/openai"}``."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Each prompt's version or hash."""
    costs: Costs = field(default_factory=Costs)


class CardTotals:
    """Counts of items, samples and rejects, taken up one by one."""

    def __init__(self) -> None:
        self._items = 0
        self._types: Counter[str] = Counter()
        self._item_licences: Counter[str] = Counter()
        self._item_sources: Counter[str] = Counter()
        self._item_unknown: list[str] = []
        self._branches: dict[str, _Branch] = {}
        self._seen: set[int] = set()
        self._found = _Pictures()
        self._rejects: dict[str, Counter[str]] = {}
        self._reject_examples: dict[str, list[dict[str, str]]] = {}

    def add_item(self, item: Item) -> None:
        """Take up an item: its type, and its picture's and text's source and licence."""
        self._items += 1
        self._types[item.type] += 1
        self._item_licences[item.licence or UNKNOWN] += 1
        self._item_sources[item.source or UNKNOWN] += 1
        if item.licence is None and len(self._item_unknown) < EXAMPLES:
            self._item_unknown.append(item.id)

    def add_sample(self, sample: Sample | Written, provenance: Provenance | None = None) -> None:
        """Take up a sample that was written."""
        origin = provenance or Provenance()
        branch = sample.branch or UNKNOWN
        if branch not in self._branches:
            self._branches[branch] = _Branch()
        self._branches[branch].add(sample, origin)
        for image, source in zip(sample.images, origin.pictures, strict=False):
            if source.own:
                continue
            mark = int.from_bytes(hashlib.blake2b(image.encode(), digest_size=8).digest(), "big")
            if mark not in self._seen:
                self._seen.add(mark)
                self._found.add(image, source)

    def add_reject(self, reason: str, *, item: str, branch: str = "", example: str = "") -> None:
        """Take up a sample or an answer that was left out; ``example`` is its text or what was wrong in detail."""
        self._rejects.setdefault(reason, Counter())[branch or UNKNOWN] += 1
        examples = self._reject_examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append({"item": item, "branch": branch or UNKNOWN, "example": example[:400]})

    def card(self, info: CardInfo) -> dict[str, Any]:
        """The card as plain JSON values."""
        return {
            "name": info.name,
            "about": info.about,
            "language": info.language or UNKNOWN,
            "data_file": info.data_file,
            "kore_fast": kore_fast.__version__,
            "seed": UNKNOWN if info.seed is None else info.seed,
            "options": dict(info.options),
            "models": dict(sorted(info.models.items())),
            "prompts": dict(sorted(info.prompts.items())),
            "items": {
                "items": self._items,
                "types": _ranked(self._types),
                "licences": _ranked(self._item_licences),
                "sources": _ranked(self._item_sources),
                "without_licence": self._item_unknown,
            },
            "samples": sum(branch.samples for branch in self._branches.values()),
            "branches": {name: branch.summary() for name, branch in sorted(self._branches.items())},
            "found_pictures": self._found.summary(),
            "rejects": {
                "total": sum(sum(counts.values()) for counts in self._rejects.values()),
                "reasons": {
                    reason: {
                        "count": sum(counts.values()),
                        "branches": _ranked(counts),
                        "examples": self._reject_examples[reason],
                    }
                    for reason, counts in sorted(
                        self._rejects.items(), key=lambda pair: (-sum(pair[1].values()), pair[0])
                    )
                },
            },
            "costs": {key: UNKNOWN if value is None else value for key, value in asdict(info.costs).items()},
        }


class _Lengths:
    """Exact percentiles of whole numbers from a histogram."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, length: int) -> None:
        self._counts[length] += 1

    def summary(self) -> dict[str, float | int]:
        ordered = sorted(self._counts.items())
        count = sum(self._counts.values())
        total = sum(length * times for length, times in ordered)
        made: dict[str, float | int] = {"total": total, "mean": round(total / count, 1) if count else 0.0}
        for percent in _PERCENTILES:
            # The smallest length that at least so many percent do not exceed.
            needed = -(-percent * count // 100)
            passed = 0
            for length, times in ordered:
                passed += times
                if passed >= needed:
                    made[f"p{percent}"] = length
                    break
        if ordered:
            made["max"] = ordered[-1][0]
        return made


class _Branch:
    def __init__(self) -> None:
        self.samples = 0
        self._rounds = _Lengths()
        self._question_words, self._answer_words = _Lengths(), _Lengths()
        self._characters = _Lengths()
        self._writers: Counter[str] = Counter()
        self._grounding: Counter[str] = Counter()
        self._flags: Counter[str] = Counter()
        self._pictures: Counter[str] = Counter()

    def add(self, sample: Sample | Written, origin: Provenance) -> None:
        self.samples += 1
        self._rounds.add(len(sample.sizes) // 2)
        # Turns alternate in every valid sample.
        for place, (words, _) in enumerate(sample.sizes):
            (self._answer_words if place % 2 else self._question_words).add(words)
        self._characters.add(sum(characters for _, characters in sample.sizes))
        self._writers[origin.writer] += 1
        self._grounding[origin.grounding or "not checked"] += 1
        for flag in origin.flags:
            self._flags[flag] += 1
        for place in range(len(sample.images)):
            known = place < len(origin.pictures)
            self._pictures[("own" if origin.pictures[place].own else "found") if known else UNKNOWN] += 1

    def summary(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "rounds": self._rounds.summary(),
            "words_a_question": self._question_words.summary(),
            "words_an_answer": self._answer_words.summary(),
            "characters_a_sample": self._characters.summary(),
            "writers": _ranked(self._writers),
            "grounding": _ranked(self._grounding),
            "flags": _ranked(self._flags),
            "pictures": _ranked(self._pictures),
        }


class _Pictures:
    def __init__(self) -> None:
        self._count = 0
        self._licences: Counter[str] = Counter()
        self._providers: Counter[str] = Counter()
        self._unknown: list[dict[str, str]] = []
        self._scores: Counter[int] = Counter()

    def add(self, image: str, source: PictureSource) -> None:
        self._count += 1
        self._licences[source.licence or UNKNOWN] += 1
        self._providers[source.provider or UNKNOWN] += 1
        if source.licence is None and len(self._unknown) < EXAMPLES:
            self._unknown.append({"image": image, "source": source.source or UNKNOWN})
        if source.clip is not None:
            self._scores[round(source.clip * 1000)] += 1

    def summary(self) -> dict[str, Any]:
        scores = _Lengths()
        scores._counts = self._scores
        return {
            "pictures": self._count,
            "licences": _ranked(self._licences),
            "providers": _ranked(self._providers),
            "without_licence": self._unknown,
            "clip": {
                "scored": sum(self._scores.values()),
                **{
                    key: round(value / 1000, 3)
                    for key, value in scores.summary().items()
                    if self._scores and key != "total"
                },
            },
        }


def _ranked(counts: Counter[str]) -> dict[str, int]:
    """By count, then name; beyond ``LISTED`` entries the rest is one."""
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    listed = dict(ordered[:LISTED])
    if len(ordered) > LISTED:
        listed[f"{len(ordered) - LISTED} others"] = sum(count for _, count in ordered[LISTED:])
    return listed


def write_card(folder: str | Path, card: Mapping[str, Any]) -> None:
    """Write ``card.json`` and ``README.md`` into a folder; equal cards give equal files."""
    # A text that a model answered may hold half characters, which no file can.
    text = json.dumps(card, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(Path(folder) / "card.json", text.encode("utf-8", "replace").decode("utf-8") + "\n")
    write_text(Path(folder) / "README.md", card_text(card))


def card_text(card: Mapping[str, Any]) -> str:
    """The card as Markdown with the front matter that the Hugging Face hub reads."""
    import yaml

    lines = ["---", yaml.safe_dump(_front_matter(card), sort_keys=False, allow_unicode=True).rstrip(), "---", ""]
    lines += [f"# {_plain(card['name'])}", ""]
    if card["about"]:
        lines += [_plain(card["about"], 2000), ""]
    items, found, rejects, costs = card["items"], card["found_pictures"], card["rejects"], card["costs"]
    lines += [
        f"{card['samples']:,} training conversations about {items['items']:,} pieces of knowledge, written by "
        f"kore_fast {_plain(card['kore_fast'])} in the LLaVA format (`{_plain(card['data_file'])}`).",
        "",
        "## Samples",
        "",
        *_table(
            (
                "branch",
                "samples",
                "rounds",
                "words an answer (median, 95 %)",
                "characters a sample (median)",
                "written by",
            ),
            [
                (
                    name,
                    f"{branch['samples']:,}",
                    f"{branch['rounds']['total']:,}",
                    f"{branch['words_an_answer'].get('p50', 0):,}, {branch['words_an_answer'].get('p95', 0):,}",
                    f"{branch['characters_a_sample'].get('p50', 0):,}",
                    _listing(branch["writers"]),
                )
                for name, branch in card["branches"].items()
            ],
        ),
        "",
        "Grounding: "
        + "; ".join(f"{_plain(name)}: {_listing(b['grounding'])}" for name, b in card["branches"].items())
        + ".",
        "",
        "## Items",
        "",
        f"Types: {_listing(items['types'])}.",
        "",
        f"Licences of the items' own texts and pictures: {_listing(items['licences'])}.",
        "",
        f"Sources: {_listing(items['sources'])}.",
        "",
    ]
    if items["without_licence"]:
        lines += [f"Items without a licence, the first: {_names(items['without_licence'])}.", ""]
    lines += ["## Found pictures", ""]
    if found["pictures"]:
        lines += [f"{found['pictures']:,} pictures were found by {_listing(found['providers'])}.", ""]
        lines += [f"Licences: {_listing(found['licences'])}.", ""]
        if found["without_licence"]:
            named = [f"{one['image']} ({one['source']})" for one in found["without_licence"]]
            lines += [f"Without a licence, the first: {_names(named)}.", ""]
        if found["clip"]["scored"]:
            lines += [
                f"CLIP similarity to the item's own picture: median {found['clip']['p50']}, 5 % below "
                f"{found['clip']['p5']}, measured for {found['clip']['scored']:,}.",
                "",
            ]
    else:
        lines += ["None: every sample shows an item's own picture.", ""]
    lines += ["## Left out", ""]
    if rejects["total"]:
        lines += _table(
            ("reason", "count", "branches", "example"),
            [
                (
                    reason,
                    f"{one['count']:,}",
                    _listing(one["branches"]),
                    f"{one['examples'][0]['item']}: {one['examples'][0]['example']}",
                )
                for reason, one in rejects["reasons"].items()
            ],
            trusted=(2,),
        )
    else:
        lines += ["Nothing."]
    lines += ["", "## Made with", ""]
    lines += _table(
        ("what", "value"),
        [
            ("seed", str(card["seed"])),
            *((f"model: {key}", value) for key, value in card["models"].items()),
            *((f"prompt: {key}", value) for key, value in card["prompts"].items()),
            *((f"option: {key}", str(value)) for key, value in card["options"].items()),
            *((f"cost: {key.replace('_', ' ')}", str(value)) for key, value in costs.items()),
        ],
    )
    return "\n".join(lines) + "\n"


def _front_matter(card: Mapping[str, Any]) -> dict[str, Any]:
    licences = {str(name).lower() for name in (*card["items"]["licences"], *card["found_pictures"]["licences"])}
    front: dict[str, Any] = {"pretty_name": _controls(card["name"])}
    front["license"] = next(iter(licences)) if len(licences) == 1 and licences <= _HUB_LICENCES else "other"
    if front["license"] == "other":
        front["license_name"] = "mixed-see-card"
    if card["language"] != UNKNOWN:
        front["language"] = [card["language"]]
    front["task_categories"] = ["image-text-to-text", "visual-question-answering"]
    front["tags"] = ["kore", "knowledge-injection", "synthetic"]
    front["size_categories"] = [_size(card["samples"])]
    front["configs"] = [{"config_name": "default", "data_files": _controls(card["data_file"])}]
    return front


def _size(samples: int) -> str:
    bounds = ((1_000, "1K"), (10_000, "10K"), (100_000, "100K"), (1_000_000, "1M"), (10_000_000, "10M"))
    lower = ""
    for bound, name in bounds:
        if samples < bound:
            return f"{lower}<n<{name}" if lower else f"n<{name}"
        lower = name
    return "n>10M"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]], trusted: tuple[int, ...] = (5,)) -> list[str]:
    """A Markdown table; columns in ``trusted`` hold what `_listing` has made plain already."""
    made = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for row in rows:
        cells = [cell if place in trusted else _plain(cell) for place, cell in enumerate(row)]
        made.append(f"| {' | '.join(cells)} |")
    return made


def _listing(counts: Mapping[str, int]) -> str:
    """The most frequent ones; card.json has more."""
    listed = [f"{_plain(name)} {count:,}" for name, count in list(counts.items())[:TOLD]]
    if len(counts) > TOLD:
        listed.append(f"and {len(counts) - TOLD} more")
    return ", ".join(listed) or "none"


def _names(names: list[str]) -> str:
    return ", ".join(_plain(name) for name in names)


_MARKS = re.compile(r"([\\`*_\[\]|#~])")


def _controls(text: str) -> str:
    """On one line, without control characters or half characters."""
    kept = "".join(letter if letter.isprintable() else " " for letter in str(text))
    return " ".join(kept.encode("utf-8", "replace").decode("utf-8").split())


def _plain(text: Any, limit: int = 160) -> str:
    """Text that neither Markdown nor HTML reads as anything else."""
    flat = _controls(str(text))
    short = flat if len(flat) <= limit else flat[: limit - 1] + "…"
    return _MARKS.sub(r"\\\1", html.escape(short, quote=False))
