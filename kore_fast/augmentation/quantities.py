"""Numbers and dates in English prose, as values: "forty-five thousand", "2.8 m", "92 %", "12 March", "2024-03-12"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven",
    "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SMALL = {word: float(value) for value, word in enumerate(_ONES)} | {
    word: 20.0 + 10 * place for place, word in enumerate(_TENS)
}
_SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12, "bn": 1e9, "mn": 1e6}
_ORDINALS = {
    "first": 1, "second": 2, "third": 3, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9,
    "tenth": 10, "eleventh": 11, "twelfth": 12, "thirteenth": 13, "fourteenth": 14, "fifteenth": 15, "sixteenth": 16,
    "seventeenth": 17, "eighteenth": 18, "nineteenth": 19, "twentieth": 20, "thirtieth": 30, "fortieth": 40,
    "fiftieth": 50, "sixtieth": 60, "seventieth": 70, "eightieth": 80, "ninetieth": 90, "hundredth": 100,
}  # fmt: skip
_PARTS = {"half": 2, "halves": 2, "third": 3, "thirds": 3, "quarter": 4, "quarters": 4, "fifth": 5, "fifths": 5,
          "tenth": 10, "tenths": 10}  # fmt: skip
_TIMES = {"once": 1.0, "twice": 2.0, "thrice": 3.0, "dozen": 12.0, "couple": 2.0, "pair": 2.0}
MONTHS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
    "december",
)  # fmt: skip
_MONTH = {name: place for place, name in enumerate(MONTHS, 1)} | {
    name[:3]: place for place, name in enumerate(MONTHS, 1) if name != "may"
} | {"sept": 9}  # fmt: skip

# Names of a unit → (what it measures, how many of that dimension's base unit it is).
_UNITS: dict[str, tuple[str, float]] = {}
for _dimension, _names in {
    "length": "mm millimetre millimeter=0.001|cm centimetre centimeter=0.01|m metre meter=1|"
    "km kilometre kilometer=1000|mile mi=1609.344|ft foot feet=0.3048|inch inches in.=0.0254|yard=0.9144",
    "area": "km² sq.km=1000000|hectare ha=10000|acre=4046.86|m²=1",
    "mass": "mg milligram=0.001|g gram gramme=1|kg kilo kilogram kilogramme=1000|tonne ton=1000000|pound_ lb=453.592",
    "time": "second=1|minute min=60|hour=3600|day=86400|week=604800|month=2629800|year=31557600|decade=315576000|"
    "century centuries=3155760000",
    "dollar": "dollar $ usd=1",
    "euro": "euro € eur=1",
    "pound": "pound £ gbp quid=1",
    "yen": "yen ¥=1",
    "percent": "percent %=1",
    "temperature": "degree °c °=1",
    "volume": "millilitre ml=0.001|litre liter l=1|gallon=4.546",
    "other money": "peso=1|franc=2|crown=3|mark=4|florin=5|thaler=6|rupee=7|lira=8|cent=9",
}.items():
    for _group in _names.split("|"):
        _all, _, _factor = _group.partition("=")
        for _one in _all.split():
            _UNITS[_one] = (_dimension, float(_factor))

_BEGIN = {*_SMALL, *_ORDINALS, *_TIMES, "half", "quarter", "a", "an"}
"""The words that a number may begin with."""
_TOKEN = re.compile(
    r"(?P<money>[$€£¥])\s?(?=\d)|(?P<digits>\d{1,3}(?:[,  ]\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?)"
    r"(?P<suffix>st|nd|rd|th|s|bn|mn|k)?(?![\w])|(?P<joined>\d+(?:\.\d+)?)(?=[a-zA-Z°%])|"
    r"(?P<word>[^\W\d_]+\.?(?:²)?)|(?P<sign>%|°C?|\S)"
)
_HEDGES = {
    "about": "about", "around": "about", "roughly": "about", "approximately": "about", "some": "about",
    "circa": "about", "ca": "about", "over": "over", "exceeding": "over", "nearly": "under", "almost": "under",
    "under": "under", "below": "under",
}  # fmt: skip


@dataclass(frozen=True)
class Number:
    """One number of a text."""

    value: float
    kind: str
    """"count", "ordinal", "part" (a fraction or percentage, as a share of 1), "decade" or "century"."""
    unit: tuple[str, float] | None
    """(dimension, size in its base unit), None for a bare number."""
    noun: str
    """The word that follows, lower case; what is counted, mostly."""
    hedge: str
    """"about", "over", "under" or nothing."""
    scaled: bool
    """Written with "thousand", "million": rounded, probably."""
    words: str
    """As it stands in the text."""
    start: int


@dataclass(frozen=True)
class Date:
    """A date with what is known of it."""

    year: int | None
    month: int | None
    day: int | None
    words: str

    def covers(self, other: Date) -> bool:
        """Whether ``other`` says all that this one says ("March 2024" covers "12 March 2024")."""
        return all(
            mine is None or mine == its
            for mine, its in ((self.year, other.year), (self.month, other.month), (self.day, other.day))
        )


_NAMES = "|".join(sorted(_MONTH, key=len, reverse=True))
_DATES = [
    re.compile(
        rf"\b(?P<day>\d{{1,2}})(?:st|nd|rd|th)?(?:\s+of)?\s+(?P<month>{_NAMES})\b\.?(?:,?\s+(?P<year>\d{{4}})\b)?", re.I
    ),
    re.compile(
        rf"\b(?P<month>{_NAMES})\b\.?\s+(?P<day>\d{{1,2}})(?:st|nd|rd|th)?\b(?!\d)(?:,?\s+(?P<year>\d{{4}})\b)?", re.I
    ),
    re.compile(rf"\b(?P<month>{_NAMES})\b\.?,?\s+(?:of\s+)?(?P<year>\d{{4}})\b", re.I),
    re.compile(r"\b(?P<year>\d{4})-(?P<month>\d{1,2})-(?P<day>\d{1,2})\b"),
    re.compile(r"\b(?P<day>\d{1,2})[./](?P<month>\d{1,2})[./](?P<year>\d{4})\b"),
]
_BARE_MONTH = re.compile(
    rf"\b(?P<month>{'|'.join(name.capitalize() for name in MONTHS if name not in ('may', 'march', 'august'))})\b|"
    r"(?<=\bin )(?P<rare>May|March|August)\b|(?<=[a-z] )(?P<mid>August|May|March)\b(?=[.,;]|$| and | or | to )"
)
_ANY_MONTH = re.compile(_NAMES, re.I)
_BY_NAME, _IN_FIGURES = _DATES[:3], _DATES[3:]


def dates(text: str) -> tuple[list[Date], str]:
    """The dates of a text, and the text with blanks in their place."""
    found: list[Date] = []
    named = _ANY_MONTH.search(text) is not None
    for pattern in [*(_BY_NAME if named else ()), *(_IN_FIGURES if re.search(r"\d[-./]\d", text) else ())]:
        for match in pattern.finditer(text):
            parts = match.groupdict()
            said = parts["month"].lower().rstrip(".")
            month = _MONTH[said] if said in _MONTH else int(said)
            day = int(parts["day"]) if parts.get("day") else None
            year = int(parts["year"]) if parts.get("year") else None
            if 1 <= month <= 12 and (day is None or 1 <= day <= 31):
                found.append(Date(year, month, day, match.group()))
                text = text[: match.start()] + " " * len(match.group()) + text[match.end() :]
    for match in _BARE_MONTH.finditer(text) if named else ():
        word = match.group()
        found.append(Date(None, _MONTH[word.lower()], None, word))
        text = text[: match.start()] + " " * len(word) + text[match.end() :]
    return found, text


def numbers(text: str) -> list[Number]:
    """The numbers of a text, in its order; dates are to be taken out before (`dates`)."""
    text = text.replace("per cent", "percent")
    tokens = list(_TOKEN.finditer(text))
    found: list[Number] = []
    place = 0
    while place < len(tokens):
        word, sign = tokens[place]["word"], tokens[place]["sign"]
        if sign or (word and word.lower().rstrip(".") not in _BEGIN):
            place += 1
            continue
        number, after = _number_at(text, tokens, place)
        if number is not None:
            found.append(number)
        place = max(after, place + 1)
    return found


def _number_at(text: str, tokens: list[re.Match[str]], place: int) -> tuple[Number | None, int]:
    start, money = place, ""
    if tokens[place]["money"]:
        money, place = tokens[place]["money"], place + 1
    token = tokens[place]
    kind, scaled, value = "count", False, 0.0
    digits = token["digits"] or token["joined"]
    if digits:
        value = float(re.sub(r"[^\d.]", "", digits))
        suffix = token["suffix"] or ""
        place += 1
        if suffix in ("st", "nd", "rd", "th"):
            kind = "ordinal"
        elif suffix == "s":
            kind = "decade" if value % 10 == 0 and value >= 100 else "count"
        elif suffix:
            value, scaled = value * {"bn": 1e9, "mn": 1e6, "k": 1e3}[suffix], True
    else:
        read = _spelled(tokens, place)
        if read is None:
            return None, place + 1
        value, kind, place, scaled = read
    while place < len(tokens) and (scale := _SCALES.get((tokens[place]["word"] or "").lower().rstrip("."))):
        value, scaled, place = value * scale, True, place + 1
    following = [(one["word"] or one["sign"] or "").lower() for one in tokens[place : place + 3]]
    if following[:1] == ["-"]:
        following = following[1:]
    unit = _UNITS.get(money) if money else None
    noun = following[0].rstrip(".") if following else ""
    if following and unit is None:
        square = following[0] == "square" and len(following) > 1
        word = following[1 if square else 0]
        unit = _unit(word)
        if unit is not None and square:
            unit = ("area", unit[1] ** 2)
    if kind == "ordinal" and noun in ("century", "centuries"):
        kind, unit = "century", None
    elif kind == "count" and unit is not None and unit[0] == "percent":
        kind, unit, value = "part", None, value / 100
    elif kind == "ordinal":
        unit = None
    before = [(one["word"] or "").lower().rstrip(".") for one in tokens[max(0, start - 2) : start]]
    hedge = _HEDGES.get(before[-1], "") if before else ""
    if before[-2:] in (["more", "than"], ["greater", "than"]):
        hedge = "over"
    elif before[-2:] in (["less", "than"], ["fewer", "than"]):
        hedge = "under"
    words = text[tokens[start].start() : tokens[place - 1].end()]
    return Number(value, kind, unit, noun, hedge, scaled, words, tokens[start].start()), place


@lru_cache(maxsize=1 << 16)
def is_quantity(word: str) -> bool:
    """Whether a lower-case word is a number or a unit: "forty", "million", "km", "days"."""
    return word in _SMALL or word in _SCALES or word in _ORDINALS or _unit(word) is not None


def _unit(word: str) -> tuple[str, float] | None:
    for form in (word, word.rstrip("."), word.rstrip(".").removesuffix("s")):
        if form in _UNITS:
            return _UNITS[form]
    return None


def _spelled(tokens: list[re.Match[str]], place: int) -> tuple[float, str, int, bool] | None:
    """(value, kind, next place, scaled) of a number in words that starts at ``place``."""

    def word(at: int) -> str:
        return (tokens[at]["word"] or "").lower().rstrip(".") if at < len(tokens) else ""

    def joined(at: int) -> int:
        """Past a hyphen."""
        return at + 1 if at < len(tokens) and tokens[at]["sign"] == "-" else at

    first = word(place)
    if first in _TIMES:
        return _TIMES[first], "count", place + 1, False
    if first in ("half", "quarter") or (first in ("a", "an") and word(place + 1) in _PARTS):
        named = first if first in _PARTS else word(place + 1)
        return 1 / _PARTS[named], "part", place + (1 if first in _PARTS else 2), False
    if first in ("a", "an") and word(place + 1) in ("hundred", "thousand", "million", "billion"):
        total, current, place, seen = 0.0, 1.0, place + 1, True
    elif first in ("a", "an") and _UNITS.get(word(place + 1), ("", 0))[0] in ("length", "mass", "time"):
        return 1.0, "count", place + 1, False
    elif first in _SMALL:
        total, current, seen = 0.0, 0.0, False
    elif first in _ORDINALS:
        return float(_ORDINALS[first]), "ordinal", place + 1, False
    else:
        return None
    scaled = False
    while True:
        here = word(place)
        if here in _SMALL and (not seen or current == 0 or current % 100 == 0 or (_SMALL[here] < 10 <= current % 100)):
            if seen and current % 100 >= 10 and not (current % 100 >= 20 and current % 10 == 0):
                break
            current, seen, place = current + _SMALL[here], True, joined(place + 1)
        elif here == "hundred" and seen:
            current, place = max(current, 1.0) * 100, place + 1
        elif here in _SCALES and seen:
            total, current, scaled, place = total + max(current, 1.0) * _SCALES[here], 0.0, True, place + 1
        elif here == "and" and seen and word(place + 1) in _SMALL and (current % 100 == 0) and (current or total):
            place += 1
        elif here in _ORDINALS and seen and current % 10 == 0 and current % 100 >= 20 and _ORDINALS[here] < 10:
            return total + current + _ORDINALS[here], "ordinal", place + 1, False
        elif here in _PARTS and seen and total == 0 and here not in ("second",):
            return current / _PARTS[here], "part", place + 1, False
        else:
            break
    # A hyphen that joined nothing ("two-storey") belongs to what follows.
    if place > 0 and place <= len(tokens) and tokens[place - 1]["sign"] == "-":
        place -= 1
    return total + current, "count", place, scaled
