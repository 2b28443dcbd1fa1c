"""The grounding check: is what a generated answer says in the item's text? Numbers, dates, names, negation, quotes.

It reads English by rules, needs no model, and explains every doubt. A sentence embedding and a judge (a language model)
can be added; `measure_grounding` tells precision and recall.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictStr

from kore_fast.augmentation.basis import Basis, code_mark
from kore_fast.augmentation.prose import sentences
from kore_fast.augmentation.quantities import MONTHS, Date, Number, dates, is_quantity, numbers
from kore_fast.augmentation.writer import Round
from kore_fast.data.items import FactValue, Item
from kore_fast.errors import DataError

Check = Literal["numbers", "dates", "entities", "roles", "negation", "opposites", "quotations", "yes_no", "words"]
CHECKS: tuple[Check, ...] = get_args(Check)


class GroundingOptions(BaseModel):
    """What is checked, and what becomes of an answer that is not supported."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    action: Literal["drop", "flag", "off"] = "drop"
    """Leave the round out, keep it and report it, or check nothing."""
    checks: tuple[Check, ...] = CHECKS
    words: Annotated[float, Field(ge=0, le=1)] = 0.2
    """A sentence with three or more content words that are not the question's is doubted when the text has a smaller
    share of them than this, in any form."""
    embedding: StrictStr | None = None
    """The folder of a sentence-embedding model in the transformers format (mean pooling), read from the disk only."""
    embedding_threshold: Annotated[float, Field(ge=-1, le=1)] = 0.3
    """A sentence whose cosine similarity to every sentence of the text is lower is doubted. It finds answers about
    something else altogether; a swapped name or number leaves a sentence as similar as it was."""
    judge: Literal["off", "doubtful", "all"] = "off"
    """Whom a judge is asked about: nobody, answers that the checks doubt (its word counts), or all answers (what either
    doubts is unsupported)."""


@dataclass(frozen=True)
class Verdict:
    """Whether a text supports an answer, and if not, why."""

    supported: bool
    reasons: tuple[str, ...] = ()


Case = tuple[str, str, str]
"""What a judge is asked about: (text, question, answer)."""


class Judge(Protocol):
    """Somebody, a language model mostly, who reads the text and decides."""

    def supports(self, text: str, question: str, answer: str) -> Verdict:
        """Whether ``text`` supports ``answer`` to ``question``; a reason for a no."""
        ...


class Memory(Protocol):
    """Where verdicts are kept between runs: `RequestCache`."""

    def derived(self, kind: str, item: str, basis: str) -> str | None:
        """What was kept for an item, if on the same basis."""
        ...

    def keep_derived(self, kind: str, item: str, basis: str, value: str) -> None:
        """Keep a value for an item."""
        ...


@dataclass(frozen=True)
class Finding:
    """A round whose answer is not supported."""

    item: str
    question: str
    answer: str
    reasons: tuple[str, ...]
    dropped: bool


@dataclass(frozen=True)
class Grounded:
    """An item's rounds after the check."""

    rounds: list[Round]
    findings: list[Finding]


class Grounding:
    """Checks rounds against their items.

    A judge that has to be prepared is prepared afterwards, with what `to_judge` names. With a ``memory``, what the
    checks have said of an item's rounds is not worked out again in a further run; `flush` keeps the last item's.

    Raises:
        DataError: options ask for a judge and there is none; the embedding's folder holds no model.
    """

    def __init__(
        self, options: GroundingOptions | None = None, *, judge: Judge | None = None, memory: Memory | None = None
    ) -> None:
        self.options = options or GroundingOptions()
        if self.options.judge != "off" and judge is None:
            raise DataError(
                f"grounding.judge is {self.options.judge!r}, but no judge is set up; name one, or set 'off'"
            )
        self._judge = judge
        self._embedding = Embedding(self.options.embedding) if self.options.embedding else None
        self._memory = None if memory is None else _Remembered(memory, self.options)

    def check(self, item: Item, question: str, answer: str) -> Verdict:
        """Whether the item's text, name and facts support ``answer``."""
        return self._judged(self._own_verdict(item, question, answer), item, question, answer)

    def check_text(self, text: str, name: str, facts: Mapping[str, FactValue], question: str, answer: str) -> Verdict:
        """`check` for what is not an `Item`."""
        verdict = self._own_verdict(told := _Told(text, name, facts), question, answer)
        return self._judged(verdict, told, question, answer)

    def flush(self) -> None:
        """Give what was found for the last item to the memory."""
        if self._memory is not None:
            self._memory.flush()

    def _judged(self, verdict: Verdict, told: Item | _Told, question: str, answer: str) -> Verdict:
        if self._judge is None or not self._is_to_judge(verdict):
            return verdict
        said = self._judge.supports(_evidence_text(told.text, told.name, told.facts), question, answer)
        if self.options.judge == "doubtful" and said.supported:
            return said
        return _both(verdict, said)

    def to_judge(self, item: Item, rounds: Iterable[Round]) -> list[Case]:
        """The cases that `check` and `ground` will put before the judge: what the judge has to be prepared for.

        The judge itself is not asked here.
        """
        if self.options.action == "off" or self.options.judge == "off":
            return []
        text = _evidence_text(item.text, item.name, item.facts)
        return [
            (text, one.question, one.answer)
            for one in rounds
            if self.options.judge == "all" or self._is_to_judge(self._own_verdict(item, one.question, one.answer))
        ]

    def _own_verdict(self, told: Item | _Told, question: str, answer: str) -> Verdict:
        """What the checks and the embedding say."""
        if self._memory is not None and isinstance(told, Item):
            verdict = self._memory.verdict(told, question, answer)
        else:
            verdict = check_answer(told.text, told.name, told.facts, question, answer, self.options)
        if self._embedding is not None:
            verdict = _both(verdict, self._likeness(told.text, told.name, told.facts, answer))
        return verdict

    def _is_to_judge(self, verdict: Verdict) -> bool:
        return self.options.judge == "all" or (self.options.judge == "doubtful" and not verdict.supported)

    def ground(self, item: Item, rounds: Sequence[Round]) -> Grounded:
        """The rounds to keep, and what was found. A dialogue that loses its first round keeps the others."""
        if self.options.action == "off":
            return Grounded(list(rounds), [])
        kept, findings = [], []
        for one in rounds:
            verdict = self.check(item, one.question, one.answer)
            if not verdict.supported:
                dropped = self.options.action == "drop"
                findings.append(Finding(item.id, one.question, one.answer, verdict.reasons, dropped))
                if dropped:
                    continue
            kept.append(one)
        return Grounded(kept, findings)

    def _likeness(self, text: str, name: str, facts: Mapping[str, FactValue], answer: str) -> Verdict:
        assert self._embedding is not None
        told = sentences(_evidence_text(text, name, facts))
        # A word or two ("Four guests.") has no meaning of its own to compare.
        said = [sentence for sentence in sentences(answer) if len(sentence.split()) >= 4]
        reasons = []
        for sentence, closest in zip(said, self._embedding.closest(said, told), strict=True):
            if closest < self.options.embedding_threshold:
                reasons.append(f"{sentence!r} is like no sentence of the text (similarity {closest:.2f})")
        return Verdict(not reasons, tuple(reasons))


@dataclass(frozen=True)
class _Told:
    """What of an item the checks read."""

    text: str
    name: str
    facts: Mapping[str, FactValue]


class _Remembered:
    """Verdicts of `check_answer`, kept item by item; one look into the memory an item."""

    # A sentence embedding, a judge and what becomes of a doubted answer come after the rules.
    _AFTERWARDS: ClassVar = {"action", "embedding", "embedding_threshold", "judge"}
    _CODE = ("kore_fast.augmentation.grounding", "kore_fast.augmentation.quantities", "kore_fast.augmentation.prose")

    def __init__(self, memory: Memory, options: GroundingOptions) -> None:
        self._memory, self._options = memory, options
        self._basis = Basis(code_mark(*self._CODE), options.model_dump(mode="json", exclude=self._AFTERWARDS))
        self._item: Item | None = None
        self._of_item = ""
        self._said: dict[str, list[str]] = {}
        """Reasons against an answer, by question and answer."""
        self._new = False

    def verdict(self, item: Item, question: str, answer: str) -> Verdict:
        """What `check_answer` says."""
        if item is not self._item:
            self._begin(item)
        both = f"{len(question)} {question}{answer}".encode("utf-8", "surrogatepass")
        asked = hashlib.blake2b(both, digest_size=16).hexdigest()
        if asked not in self._said:
            verdict = check_answer(item.text, item.name, item.facts, question, answer, self._options)
            self._said[asked] = list(verdict.reasons)
            self._new = True
        reasons = self._said[asked]
        return Verdict(not reasons, tuple(reasons))

    def _begin(self, item: Item) -> None:
        self.flush()
        facts = json.dumps(list(item.facts.items()))
        self._item, self._of_item = item, self._basis.of(item.text, item.name, facts)
        kept = self._memory.derived("verdicts", item.id, self._of_item)
        self._said = {} if kept is None else json.loads(kept)

    def flush(self) -> None:
        """Keep what was found for the last item."""
        if self._item is not None and self._new:
            self._memory.keep_derived("verdicts", self._item.id, self._of_item, json.dumps(self._said))
        self._item, self._new = None, False


def _both(one: Verdict, other: Verdict) -> Verdict:
    return Verdict(one.supported and other.supported, one.reasons + other.reasons)


def check_answer(
    text: str,
    name: str,
    facts: Mapping[str, FactValue],
    question: str,
    answer: str,
    options: GroundingOptions | None = None,
) -> Verdict:
    """Whether ``text`` (about ``name``, with its ``facts``) supports ``answer``, by rules alone.

    What the question says itself may be said again. Reasons name the words in doubt and what the text has instead.
    """
    options = options or GroundingOptions()
    told = _read(_evidence_text(text, name, facts))
    asked, said = _read(question), _read(answer)
    bare = re.fullmatch(r"\W*(yes|no)\W*", answer, re.IGNORECASE)
    reasons: list[str] = []
    if bare:
        if "yes_no" in options.checks:
            reasons = _yes_or_no(bare.group(1).lower() == "yes", asked, told)
        return Verdict(not reasons, tuple(reasons))
    checks = {
        "dates": lambda: _dates(said, told, asked),
        "numbers": lambda: _numbers(said, told, asked),
        "entities": lambda: _entities(said, told, asked),
        "roles": lambda: _roles(said, told, asked, _read(name)),
        "quotations": lambda: _quotations(said, told, asked),
        "negation": lambda: _negation(said, told, asked),
        "opposites": lambda: _opposites(said, told, asked),
        "words": lambda: _words_told(said, told, asked, options.words),
    }
    for check, run in checks.items():
        if check in options.checks:
            reasons += run()
    return Verdict(not reasons, tuple(dict.fromkeys(reasons)))


# Reading.


def _listed(words: str) -> frozenset[str]:
    return frozenset(words.split())


_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_FUNCTION = _listed(
    """
    a about above after again all almost also although am among an and another any anybody anyone anything are
    around as at away back be because been before being below between both but by can cannot could did do does
    done down during each either else enough even ever every everybody everyone everything few for from further
    gave get give given gives go goes had has have having he hence her here hers him his how however i if in
    indeed instead into is it its itself just kind later least less like likewise made make makes many may me
    might mine more most mostly much must my near nearly neither never no nobody none nor not nothing now of off
    often on once one only onto or other others our out over own per perhaps probably quite rather really same
    say says said see several shall she should since so some somebody someone something soon still such take
    taken takes than that the their them then there these they thing things this those though through thus to
    today together too took toward towards under until unto up upon us very via was we well went were what when
    where whether which while who whom whose why will with within without would yes yet you your located called
    named known based according alone alike both currently approximately roughly later originally today usually
    briefly short sentence picture image shown depicts depicted unlike despite nowadays early late
    """
)
_TITLES = _listed(
    """
    mr mrs ms miss dr prof professor sir lord lady saint st king queen president minister mayor captain
    """
)
_NEGATORS = _listed(
    """
    not never no none nobody nothing neither nor without cannot hardly nowhere
    """
)
_TOKEN = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|[,;:()]|\d[\d.,]*")
_STRIPPED = re.compile(r"(?<=[^\W\d_])['’](?:s\b|(?=\W|$))")


# Compared by identity: what is worked out for one is kept with it, as a text is held against many answers.
@dataclass(frozen=True, eq=False)
class _Sentence:
    words: tuple[str, ...]
    """As written; punctuation that separates clauses as itself."""
    stems: frozenset[str]
    """Content words."""

    @cached_property
    def folded(self) -> tuple[str, ...]:
        return tuple(_fold(word) for word in self.words)

    @cached_property
    def folded_set(self) -> frozenset[str]:
        return frozenset(self.folded)

    @cached_property
    def stemmed(self) -> tuple[str, ...]:
        """Each word without its ending, those without content too."""
        return tuple(_stem(word) for word in self.folded)

    @cached_property
    def quantities(self) -> frozenset[str]:
        """Its numbers and units in words, without endings."""
        return frozenset(_stem(word) for word in self.folded if is_quantity(word))

    @cached_property
    def short(self) -> frozenset[str]:
        """Its words of one or two letters, without endings."""
        folded = zip(self.words, self.stemmed, strict=True)
        return frozenset(stem for word, stem in folded if len(word) < 3)

    @cached_property
    def names(self) -> list[tuple[int, int, frozenset[str]]]:
        """(first place, last place, words) of each capitalised name."""
        return _names(self)

    @cached_property
    def scopes(self) -> list[tuple[str, list[str]]]:
        return _scopes(self)


@dataclass(frozen=True, eq=False)
class _Reading:
    text: str
    dates: tuple[Date, ...]
    numbers: tuple[Number, ...]
    years: frozenset[int]
    words: frozenset[str]
    """Every word, folded."""
    stems: frozenset[str]
    """Content words, without endings."""
    sentences: tuple[_Sentence, ...]
    spans: tuple[tuple[str, ...], ...] = field(default=())
    """Runs of capitalised words."""
    plain: frozenset[str] = frozenset()
    """Words written without a capital, folded."""

    @cached_property
    def initials(self) -> set[str]:
        """Of its names of several words."""
        return {"".join(w[0] for w in span).casefold() for span in self.spans if len(span) > 1}

    @cached_property
    def opposing(self) -> set[str]:
        """Its words, but for those that only compare numbers."""
        return {_fold(w) for w in _WORD.findall(re.sub(r"\b(more|less|fewer) than\b", "", self.text))}

    @cached_property
    def begins(self) -> set[str]:
        """The first letters of its content words."""
        return {stem[:5] for stem in self.stems if len(stem) >= 5}

    @cached_property
    def polarity(self) -> tuple[set[str], set[str], list[tuple[str, list[str]]]]:
        return _polarity(self)


def _evidence_text(text: str, name: str, facts: Mapping[str, FactValue]) -> str:
    parts = [text.strip(), f"{name}."]
    for key, value in facts.items():
        told = ", ".join(value) if isinstance(value, list) else str(value)
        parts.append(f"The {key.replace('_', ' ')} is {told}.")
    return "\n".join(parts)


# Letters that Unicode does not take apart into a letter and a mark.
_WHOLE_LETTERS = str.maketrans({"ø": "o", "Ø": "o", "ł": "l", "Ł": "l", "đ": "d", "Đ": "d", "æ": "ae", "Æ": "ae"})


# Few words make up most of all texts, and each is folded dozens of times for one answer.
@lru_cache(maxsize=1 << 16)
def _fold(word: str) -> str:
    bare = "".join(c for c in unicodedata.normalize("NFKD", word) if not unicodedata.combining(c))
    bare = bare.translate(_WHOLE_LETTERS)
    return _STRIPPED.sub("", bare.casefold())


@lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    """A word without its usual endings; good enough to compare, not to read."""
    if len(word) > 4:
        for ending, instead in (("ies", "y"), ("ied", "y"), ("sses", "ss"), ("ches", "ch"), ("shes", "sh")):
            if word.endswith(ending):
                return word[: -len(ending)] + instead
    if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3:
        word = word[:-1]
    for ending, least in (("ing", 3), ("ed", 3), ("er", 4), ("ly", 4), ("en", 4)):
        if word.endswith(ending) and len(word) - len(ending) >= least:
            word = word[: -len(ending)]
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "ls":
        word = word[:-1]
    return word.removesuffix("e") if len(word) > 3 else word


@lru_cache(maxsize=512)
def _read(text: str) -> _Reading:
    text = unicodedata.normalize("NFKC", text).replace("’", "'").replace("–", "-").replace("—", ", ")
    found, rest = dates(text)
    counted = _with_shared_units(numbers(rest))
    years = {one.year for one in found if one.year is not None}
    years |= {int(n.value) for n in counted if n.kind == "count" and n.unit is None and _is_year(n.value)}
    parts = []
    for line in text.split("\n"):
        for sentence in sentences(line) if line.strip() else []:
            tokens = tuple(_TOKEN.findall(sentence))
            stems = frozenset(_stem(_fold(w)) for w in tokens if w[0].isalpha() and _fold(w) not in _FUNCTION)
            parts.append(_Sentence(tokens, stems))
    written = [match.group() for match in _WORD.finditer(text)]
    words = frozenset(_fold(w) for w in written)
    return _Reading(
        text=text,
        dates=tuple(found),
        numbers=tuple(counted),
        years=frozenset(years),
        words=words,
        stems=frozenset(_stem(w) for w in words if w not in _FUNCTION),
        sentences=tuple(parts),
        spans=tuple(_spans(text)),
        plain=frozenset(_fold(w) for w in written if not w[0].isupper()),
    )


def _is_year(value: float) -> bool:
    return value == int(value) and 1000 <= value <= 2100


def _with_shared_units(found: list[Number]) -> list[Number]:
    """ "3 to 4 centimetres": the first number has the second's unit."""
    shared: list[Number] = []
    for one in reversed(found):
        if one.unit is None and one.kind == "count" and one.noun in ("to", "and", "or", "-") and shared:
            after = shared[-1]
            if after.unit is not None and after.kind == "count" and after.start - one.start < len(one.words) + 8:
                one = Number(one.value, one.kind, after.unit, after.noun, one.hedge, one.scaled, one.words, one.start)
        shared.append(one)
    return shared[::-1]


# Dates and numbers.


def _dates(said: _Reading, told: _Reading, asked: _Reading) -> list[str]:
    known = (*told.dates, *asked.dates)
    reasons = []
    for one in said.dates:
        if any(one.covers(other) for other in known):
            continue
        # "12 May" in one sentence and the only year in another.
        without_year = Date(None, one.month, one.day, one.words)
        if told.years == {one.year} and any(without_year.covers(other) and other.year is None for other in known):
            continue
        has = ", ".join(other.words for other in told.dates) or "none"
        reasons.append(f"date {one.words!r}: not in the text, whose dates are {has}")
    return reasons


def _numbers(said: _Reading, told: _Reading, asked: _Reading) -> list[str]:
    reasons = []
    for one in said.numbers:
        if one.words.lower() == "one" and one.unit is None:
            continue
        if any(_matches(one, other) and other.unit == one.unit for other in asked.numbers):
            continue
        reason = _number_doubt(one, told)
        if reason is not None:
            reasons.append(f"number {_with_noun(one)!r}: {reason}")
    return reasons


def _number_doubt(one: Number, told: _Reading) -> str | None:
    if one.kind == "decade":
        fits = any(one.value <= year < one.value + 10 for year in told.years)
        return None if fits or _any_equal(one, told) else "no year of the text is in that decade"
    if one.kind == "century":
        fits = any((year - 1) // 100 + 1 == one.value for year in told.years)
        return None if fits or _any_equal(one, told) else "no year of the text is in that century"
    if one.kind == "count" and one.unit is None and _is_year(one.value) and one.value in told.years:
        return None
    if one.kind == "count" and one.unit is not None and one.unit[0] == "time" and one.unit[1] > 3e7:
        years = sorted(told.years)
        if any(abs(late - early - one.value) <= 1 for early in years for late in years if late > early):
            return None
    equal = [other for other in told.numbers if _matches(one, other)]
    if equal:
        counts = one.unit is None and one.kind == "count" and not one.hedge
        if counts and one.noun not in _FUNCTION and one.noun.isalpha():
            noun = _stem(_fold(one.noun))
            counted = [n for n in told.numbers if n.kind == "count" and n.noun and _stem(_fold(n.noun)) == noun]
            if counted and not any(_matches(one, other) for other in counted):
                return f"the text has {', '.join(_with_noun(other) for other in counted)}"
        return None
    alike = [other for other in told.numbers if other.value == one.value]
    if alike:
        return f"the text has {', '.join(_with_noun(other) for other in alike)}"
    has = ", ".join(dict.fromkeys(_with_noun(other) for other in told.numbers)) or "none"
    return f"not in the text, whose numbers are {has}"


def _any_equal(one: Number, told: _Reading) -> bool:
    return any(other.kind == one.kind and other.value == one.value for other in told.numbers)


def _with_noun(one: Number) -> str:
    return f"{one.words} {one.noun}" if re.fullmatch(r"[\w%°²]+", one.noun) else one.words


def _matches(one: Number, other: Number) -> bool:
    """Whether the answer's number ``one`` is the text's ``other``: converted, rounded, or hedged."""
    if (one.kind == "part") != (other.kind == "part"):
        return False
    if one.kind == "ordinal" and other.kind not in ("ordinal", "count"):
        return False
    if one.kind == "count" and other.kind not in ("ordinal", "count"):
        return False
    mine, its = one.value, other.value
    if one.unit is not None and other.unit is not None:
        if one.unit[0] != other.unit[0]:
            return False
        mine, its = mine * one.unit[1], its * other.unit[1]
    elif one.unit is not None and other.noun and other.noun not in _FUNCTION and other.noun.isalpha():
        # "12 sailors" is not "12 metres".
        return False
    if abs(mine - its) <= 1e-6 * abs(its) or (one.unit != other.unit and abs(mine - its) <= 5e-3 * abs(its)):
        return True
    if one.kind == "part":
        return abs(mine - its) <= (0.03 if one.hedge else 0.006)
    if one.hedge == "about":
        return abs(mine - its) <= 0.06 * abs(its)
    if one.hedge == "over":
        return 0.75 * its <= mine <= its
    if one.hedge == "under":
        return its <= mine <= 1.25 * its
    return one.kind == "count" and not _is_year(one.value) and its >= 1000 and _rounded_to(mine, its)


def _rounded_to(rounded: float, exact: float) -> bool:
    """Whether ``rounded`` is ``exact`` to its own two or three leading digits: 1,200 for 1,213."""
    digits = len(f"{rounded:.6e}".partition("e")[0].rstrip("0").rstrip(".").replace(".", ""))
    return 2 <= digits <= 3 and float(f"{exact:.{digits - 1}e}") == rounded


# Names.


def _spans(text: str) -> Iterable[tuple[str, ...]]:
    for line in text.split("\n"):
        for sentence in sentences(line) if line.strip() else []:
            run: list[str] = []
            end = 0
            for match in _WORD.finditer(sentence):
                word, between = match.group(), sentence[end : match.start()]
                end = match.end()
                capital = word[0].isupper()
                if (
                    run
                    and capital
                    and re.fullmatch(r"\.? |-| & ", between)
                    and not (between == ". " and len(run[-1]) > 3)
                ):
                    run.append(word)
                    continue
                if run:
                    yield tuple(run)
                run = [word] if capital else []
            if run:
                yield tuple(run)


_VERB_NEXT = re.compile(r"^(?:'s|is|was|has|had|were|are|will|won|led|made|did|gave|wrote|\w+ed|and|leads|runs|makes)$")
_DEMONYM = ("ish", "ian", "ean", "an", "ese", "i", "er", "ic", "ch", "se")


def _entities(said: _Reading, told: _Reading, asked: _Reading) -> list[str]:
    if not said.spans:
        return []
    reasons = []
    openers = {sentence.words[0] for sentence in said.sentences if sentence.words}
    in_one_sentence = [sentence.folded_set for reading in (told, asked) for sentence in reading.sentences]
    for span in said.spans:
        words = list(span)
        if words[0] in openers and len(words) == 1 and not _looks_like_a_name(words[0], said):
            continue
        while words and (_fold(words[0]) in _FUNCTION or _fold(words[0]).rstrip(".") in _TITLES):
            words.pop(0)
        folded = [_fold(word) for word in words if _fold(word) not in MONTHS and _fold(word) not in _FUNCTION]
        if not folded or "".join(folded) in ("ok", "bc", "ad", "am", "pm"):
            continue
        unknown = [word for word in folded if not _name_known(word, words, told, asked, told.initials)]
        if unknown and "".join(w[0] for w in folded) not in told.words:
            reasons.append(f"name {' '.join(span)!r}: {', '.join(repr(word) for word in unknown)} not in the text")
            continue
        capital = {w for w in folded if len(w) > 1 and w in told.words | asked.words and w not in told.plain}
        if len(capital) > 1 and not any(capital <= together for together in in_one_sentence):
            reasons.append(f"name {' '.join(span)!r}: the text has these words, but not together")
    return reasons


def _looks_like_a_name(word: str, said: _Reading) -> bool:
    """A sentence's first word has a capital anyway; a name does something next, or stands alone."""
    folded = _fold(word)
    if folded in _FUNCTION or folded.endswith(("ing", "ed", "ly", "men")):
        return False
    for sentence in said.sentences:
        if sentence.words and sentence.words[0] == word:
            after = sentence.words[1:2]
            if "'" in word or not after or (_VERB_NEXT.match(after[0]) and not folded.endswith("s")):
                return True
    return False


def _name_known(word: str, span: Sequence[str], told: _Reading, asked: _Reading, initials: set[str]) -> bool:
    known = told.words | asked.words
    if word in known or _stem(word) in told.stems | asked.stems or word in initials:
        return True
    if len(word) == 1:
        return any(other.startswith(word) for other in known)
    if word.rstrip(".") in _TITLES or word in ("i", "yes", "no"):
        return True
    roots = [other for other in known if len(other) > 3 and other[:4] == word[:4]]
    return any(one.endswith(_DEMONYM) for one in (word, *roots)) and bool(roots) and len(word) > 4


def _roles(said: _Reading, told: _Reading, asked: _Reading, own: _Reading) -> list[str]:
    """What the text says of somebody else: "Tove Maas is the fiddler" of "fiddler Ruben Hsu".

    Only for a sentence with one name that is not the item's, whose other words stand, where a name is near, always
    nearer to another one.
    """
    reasons = []
    for sentence in said.sentences:
        names = list({name for _, name in _placed_names(sentence, own)})
        if len(names) != 1 or not names[0] & told.words:
            continue
        name = names[0]
        named = {_stem(word) for word in name} | sentence.quantities
        predicate = (sentence.stems - named) or (asked.stems - named)
        near: list[bool] = []
        others: list[str] = []
        for other in told.sentences:
            if predicate.isdisjoint(other.stemmed):
                continue
            placed = _placed_names(other, own)
            for place, (stem, word) in enumerate(zip(other.stemmed, other.folded, strict=True)):
                if stem not in predicate or not placed or any(word in one for _, one in placed):
                    continue
                distance = min(abs(at - place) for at, _ in placed)
                closest = [one for at, one in placed if abs(at - place) <= distance]
                near.append(any(one & name for one in closest))
                others += [" ".join(sorted(one)) for one in closest]
        if near and not any(near):
            reasons.append(f"says of {' '.join(sorted(name))!r} what the text says of {others[0]!r}")
    return reasons


def _placed_names(sentence: _Sentence, own: _Reading) -> list[tuple[int, frozenset[str]]]:
    """(place, words) of each capitalised name of a sentence that is not the item's, by its first and last place."""
    return [(at, name) for first, last, name in sentence.names if not name & own.words for at in (first, last)]


def _names(sentence: _Sentence) -> list[tuple[int, int, frozenset[str]]]:
    found = []
    run: list[int] = []
    for place, (word, folded) in enumerate(zip((*sentence.words, "."), (*sentence.folded, "."), strict=True)):
        if word[0].isupper() and folded not in _FUNCTION and folded not in MONTHS and folded not in _TITLES:
            run.append(place)
            continue
        # A sentence's first word alone may be any word.
        if run and run != [0]:
            found.append((run[0], run[-1], frozenset(sentence.folded[at] for at in run)))
        run = []
    return found


def _quotations(said: _Reading, told: _Reading, asked: _Reading) -> list[str]:
    def bare(text: str) -> str:
        return " ".join(_fold(word) for word in re.findall(r"\w+(?:'\w+)*", text))

    quoted = re.findall(r"[\"“„«]([^\"“”„«»]+)[\"”“»]", said.text)
    if not quoted:
        return []
    evidence = f" {bare(told.text)} {bare(asked.text)} "
    return [
        f"quotation {quote!r}: not in the text word for word"
        for quote in quoted
        if len(quote.split()) > 1 and f" {bare(quote)} " not in evidence
    ]


# What is denied, and what is turned round.

_NOT_DENYING = _listed(
    """
    more less longer later only other one fewer earlier doubt just
    """
)
_DENYING = re.compile(r"\b(?:fail|refus|unable|lack|prevent|forbid|banned|impossib|stop|instead|until)")


def _scopes(sentence: _Sentence) -> list[tuple[str, list[str]]]:
    """Each negation of a sentence and what it denies: up to four content words after it, in its clause."""
    words = sentence.folded
    scopes: list[tuple[str, list[str]]] = []
    if sentence.folded_set.isdisjoint(_NEGATORS) and not any(word.endswith("n't") for word in words):
        return scopes
    for place, word in enumerate(words):
        if not (word in _NEGATORS or word.endswith("n't")):
            continue
        after = words[place + 1 : place + 2]
        if after and after[0] in _NOT_DENYING and not (after[0] == "one" and word == "no"):
            continue
        if place == 0 and word == "no" and after == (",",):
            continue
        scope: list[str] = []
        for other in words[place + 1 :]:
            if other in (",", ";", ":", "but", "and", "(", ")", "until", "since", "because", "than") or len(scope) == 4:
                break
            if other[0].isalpha() and other not in _FUNCTION:
                scope.append(_stem(other))
        if scope:
            scopes.append((word, scope))
    return scopes


def _polarity(reading: _Reading) -> tuple[set[str], set[str], list[tuple[str, list[str]]]]:
    """(stems denied somewhere, stems said plainly somewhere, the scopes)."""
    denied: set[str] = set()
    plain: set[str] = set()
    scopes: list[tuple[str, list[str]]] = []
    for sentence in reading.sentences:
        here = sentence.scopes
        scopes += here
        inside = {stem for _, scope in here for stem in scope}
        denied |= inside
        plain |= sentence.stems - inside
    return denied, plain, scopes


def _denied_in_words(stem: str, told: _Reading) -> bool:
    """Whether the text says a thing with "failed to", "is forbidden": what denies it without a "not"."""
    for sentence in told.sentences:
        if stem not in sentence.stems:
            continue
        others = " ".join(word for word in sentence.folded if _stem(word) != stem)
        if _DENYING.search(others):
            return True
    return False


def _negation(said: _Reading, told: _Reading, asked: _Reading) -> list[str]:
    told_denied, told_plain, told_scopes = told.polarity
    said_denied, said_plain, scopes = said.polarity
    reasons = []
    for negator, scope in scopes:
        if negator == "without":  # "without power" may be said of what was lost
            continue
        known = [stem for stem in scope if stem in told_plain]
        if scope[0] not in known or any(stem in told_denied for stem in scope) or _denied_in_words(scope[0], told):
            continue
        if len(known) == len(scope) or any(stem in told.stems for stem in said_plain):
            reasons.append(f"denies {' '.join(known)!r}, which the text does not deny")
    if not _DENYING.search(said.text.casefold()):
        for _, scope in told_scopes:
            head = [stem for stem in scope[:2] if stem in said_plain and stem not in said_denied]
            only_denied = [stem for stem in head if stem not in told_plain]
            if only_denied and set(scope) & said_plain >= set(scope[:1]):
                reasons.append(f"says {only_denied[0]!r}, which the text denies")
    return reasons


_SIDES = [
    [set(one.split()), set(other.split())]
    for one, other in (
        ("north northern northward", "south southern southward"),
        ("east eastern eastward", "west western westward"),
        ("largest biggest greatest", "smallest tiniest"),
        ("oldest", "youngest newest"),
        ("highest tallest", "lowest"),
        ("longest", "shortest"),
        ("fastest quickest", "slowest"),
        ("deepest", "shallowest"),
        ("most", "fewest"),
        ("rose rise rises risen increase increased grew grown climbed higher dearer",
         "fell fall falls fallen decrease decreased dropped shrank lower cheaper declined sank"),
        ("won win wins victory", "lost lose loses defeat defeated"),
        ("open opened opens reopened", "closed closes shut"),
        ("more longer dearer", "fewer less cheaper"),
        ("earlier sooner", "later"),
        ("allowed legal permitted welcome may", "forbidden banned prohibited illegal forbids"),
        ("accepted", "refused rejected declined"),
        ("male males", "female females"),
        ("above", "below beneath"),
        ("steep steepest", "flat flattest"),
        ("rare rarely", "common frequent often"),
        ("supported supports", "opposed opposes"),
        ("bought buys", "sold sells"),
        ("guilty", "innocent"),
        ("inside", "outside"),
        ("free", "expensive"),
        ("hot heat warm", "cold cool"),
        ("wet rain rained rainy", "dry sunny sunshine"),
        ("everyone everybody", "nobody"),
        ("alive survived", "dead died"),
    )
]  # fmt: skip


def _opposites(said: _Reading, told: _Reading, asked: _Reading) -> list[str]:
    if any(word in _NEGATORS or word.endswith("n't") for word in said.words):
        return []
    said_words = said.opposing
    reasons = []
    for sides in _SIDES:
        for mine, other in (sides, sides[::-1]):
            if mine.isdisjoint(said_words):
                continue
            if not other & said_words and other & told.words and not mine & told.words:
                used, has = sorted(mine & said_words)[0], sorted(other & told.words)[0]
                if has not in ("may",) and used != "may":
                    reasons.append(f"says {used!r} where the text says {has!r}")
    return reasons


def _words_told(said: _Reading, told: _Reading, asked: _Reading, least: float) -> list[str]:
    begins = told.begins
    reasons = []
    for sentence in said.sentences:
        # The question's words come again whether the answer is right or not.
        new = sentence.stems - asked.stems - sentence.quantities - sentence.short
        told_here = {stem for stem in new if stem in told.stems or (len(stem) >= 5 and stem[:5] in begins)}
        if len(new) >= 3 and len(told_here) < least * len(new):
            reasons.append(f"says much that the text does not: {', '.join(sorted(new - told_here))}")
    return reasons


def _yes_or_no(yes: bool, asked: _Reading, told: _Reading) -> list[str]:
    """A bare "Yes" says what the question asks; a bare "No" denies it."""
    nothing = _read("")
    doubts = _dates(asked, told, nothing) + _numbers(asked, told, nothing) + _entities(asked, told, nothing)
    doubts += _opposites(asked, told, nothing)
    turned = _negation(asked, told, nothing)
    if yes:
        return doubts + turned
    in_one = any(asked.stems and asked.stems <= sentence.stems for sentence in told.sentences)
    if in_one and not doubts and not turned:
        return ["denies what a sentence of the text says"]
    return []


class Embedding:
    """Sentence vectors by mean pooling, from a model on the disk.

    Raises:
        DataError: the folder holds no such model, or transformers is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError:
            raise DataError('a sentence embedding needs transformers: pip install "kore-fast[pipeline]"') from None
        if not (Path(folder) / "config.json").is_file():
            raise DataError(f"sentence embedding {folder}: no config.json there; give the folder of a saved model")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        except (OSError, ValueError) as error:
            raise DataError(f"sentence embedding {folder}: cannot be loaded ({error})") from None

    def closest(self, said: Sequence[str], told: Sequence[str]) -> list[float]:
        """For each sentence of ``said`` the largest cosine similarity to one of ``told``."""
        if not said or not told:
            return [1.0] * len(said)
        return [float(value) for value in (self._vectors(said) @ self._vectors(told).T).max(dim=1).values]

    def _vectors(self, texts: Sequence[str]) -> Any:
        import torch

        rows = []
        # One by one: a sentence's vector then does not depend on its neighbours' padding.
        for text in texts:
            tokens = self._tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
            with torch.inference_mode():
                mean = self._model(**tokens).last_hidden_state[0].mean(dim=0)
            rows.append(torch.nn.functional.normalize(mean, dim=0))
        return torch.stack(rows)
