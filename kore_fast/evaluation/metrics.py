"""EVOKE's two scores for a free answer, and the KORE paper's numbers for adaptation, retention and both together."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

from kore_fast.intervals import mean_interval, wilson_interval

__all__ = [
    "RETENTION_BENCHMARKS",
    "Metric",
    "cover_exact_match",
    "cover_exact_match_corrected",
    "hars",
    "knowledge_adaptation",
    "knowledge_retention",
    "mean",
    "mean_interval",
    "mme_score",
    "normalise_answer",
    "share",
    "token_f1",
    "wilson_interval",
]

RETENTION_BENCHMARKS = (
    "MME", "MMBench", "SEEDBench2_Plus", "OCRVQA", "ScienceQA", "MMMU",
    "MIA-Bench", "MMDU", "MathVista", "MathVision", "POPE", "HallusionBench",
)  # fmt: skip
"""The twelve whose plain mean is the paper's knowledge retention, by its names."""
_MME_MOST = 2800
Metric = dict[str, float | int | None]
"""A figure: ``value``, its 95 % interval ``low`` and ``high``, and the ``count`` of what it is made of."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The reference hands a regular expression's flag to `sub` in the place of the number of replacements; its value is 32.
_MOST_PERIODS = 32
_NUMBERS = "zero one two three four five six seven eight nine ten"
_NUMBER_WORDS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS.split())}
_ARTICLES = frozenset({"a", "an", "the"})
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
    we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
    you'll you're you've
"""
# Every form that lacks exactly one of its apostrophes; the reference's table has one entry the wrong way round.
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, sign in enumerate(word)
    if sign == "'"
} | {"somebody'd": "somebodyd"}
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
# A quotation mark of any kind but an apostrophe inside a word.
_QUOTATION_MARK = re.compile(r"(?<!\w)['\"‘’“”«»]|['\"‘’“”«»](?!\w)")
_ARTICLE_WORD = re.compile(r"\b(?:a|an|the)\b")


def normalise_answer(text: str) -> str:
    """Bring an answer to the form in which EVOKE compares it (the VQA challenge's rules).

    A punctuation sign is dropped where it stands beside a space anywhere in the text, or where the text holds a number
    with a comma (1,000); else it becomes a space. Periods go unless a digit follows. Then lower case, number words from
    none to ten as digits, articles dropped, apostrophes of contractions restored. Single and curly quotation marks,
    ``$`` and other signs stay.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    comma_in_number = _COMMA_IN_NUMBER.search(text) is not None
    gaps = {sign: comma_in_number or f"{sign} " in text or f" {sign}" in text for sign in _PUNCTUATION}
    text = text.translate({ord(sign): "" if dropped else " " for sign, dropped in gaps.items()})
    text = _PERIOD.sub("", text, count=_MOST_PERIODS)
    words = [_NUMBER_WORDS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def cover_exact_match(prediction: str, truth: str) -> bool:
    """EVOKE's CEM: the normalised ``truth`` appears in the normalised ``prediction`` between word boundaries.

    Scores exactly as the reference does, with its two quirks: a truth that starts or ends with a sign that is no part
    of a word (in single or curly quotation marks, or starting with ``$``) does not match even itself; a truth that
    normalises to nothing matches every prediction that holds a word. `cover_exact_match_corrected` has neither.
    """
    pattern = rf"\b{re.escape(normalise_answer(truth))}\b"
    return re.search(pattern, normalise_answer(prediction)) is not None


def cover_exact_match_corrected(prediction: str, truth: str) -> bool:
    """`cover_exact_match` without its two quirks; report both, as published scores are the other.

    Beside all that the reference matches, quotation marks around words count for nothing in either text, and only a
    letter or digit at the edge of ``truth`` asks for a word's boundary there (``$5`` and ``40%`` match themselves). A
    truth that normalises to nothing matches nothing.
    """
    wanted = normalise_answer(_QUOTATION_MARK.sub(" ", truth))
    if not wanted:
        return False
    if cover_exact_match(prediction, truth):
        return True
    begins = r"(?<!\w)" if re.match(r"\w", wanted[0]) else ""
    ends = r"(?!\w)" if re.match(r"\w", wanted[-1]) else ""
    said = normalise_answer(_QUOTATION_MARK.sub(" ", prediction))
    return re.search(f"{begins}{re.escape(wanted)}{ends}", said) is not None


def token_f1(prediction: str, truth: str) -> float:
    """SQuAD's F1 of the two bags of words, from 0 to 1: lower case, without ASCII punctuation and articles.

    When either has no word left, 1 if both have none, else 0.
    """
    predicted, expected = _words(prediction), _words(truth)
    if not predicted or not expected:
        return float(predicted == expected)
    shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * shared / (len(predicted) + len(expected))


def knowledge_adaptation(cem: float, f1: float) -> float:
    """The paper's K.A: the mean of CEM and F1, on their scale."""
    return (cem + f1) / 2


def knowledge_retention(benchmarks: Mapping[str, float | None]) -> float:
    """The paper's K.R: the plain mean of all `RETENTION_BENCHMARKS`, in points (MME as `mme_score`).

    Raises:
        ValueError: one of the twelve is missing or None (a mean of eleven is no K.R, and a zero would be a lie), or a
            name is none of them.
    """
    if unknown := sorted(set(benchmarks) - set(RETENTION_BENCHMARKS)):
        raise ValueError(f"K.R knows no benchmark {unknown[0]!r}; its twelve are {', '.join(RETENTION_BENCHMARKS)}")
    scores = {name: benchmarks.get(name) for name in RETENTION_BENCHMARKS}
    if missing := [name for name, score in scores.items() if score is None]:
        raise ValueError(
            f"K.R is the mean of twelve benchmarks, and {len(missing)} are missing: {', '.join(missing)}; measure "
            "them, or compare the benchmarks that are there one by one"
        )
    return sum(score for score in scores.values() if score is not None) / len(scores)


def mme_score(perception: float, cognition: float) -> float:
    """MME's two sums (at most 2000 and 800) as the paper brings them to points: (perception + cognition) / 2800 · 100.

    Raises:
        ValueError: a sum below 0, or above its most.
    """
    if not (0 <= perception <= 2000 and 0 <= cognition <= 800):
        raise ValueError(f"MME's perception is 0…2000 and its cognition 0…800, not {perception} and {cognition}")
    return (perception + cognition) / _MME_MOST * 100


def hars(adaptation: float, retention: float, base_adaptation: float, base_retention: float) -> float:
    """The KORE paper's harmonic adaptation-retention score, in points.

    With G the gain over the base model in percent: fA = 100 · GA / (GA + 100), fR = GR + 100, and
    HARS = 2 · fA · fR / (fA + fR). All four on one scale each (shares or points); the paper's adaptation is
    (CEM + F1) / 2, its retention the mean of twelve benchmarks. Not positive where adaptation did
    not rise above the base.

    Raises:
        ValueError: the score is not defined: a base score or the adaptation is not positive, retention is negative, or
            fA + fR is not positive (adaptation fell far below the base).
    """
    if base_adaptation <= 0 or base_retention <= 0 or adaptation <= 0 or retention < 0:
        raise ValueError(
            "HARS needs positive base scores, a positive adaptation and no negative retention: "
            f"adaptation {adaptation} from {base_adaptation}, retention {retention} from {base_retention}"
        )
    adapted = 100 * (1 - base_adaptation / adaptation)
    retained = 100 * retention / base_retention
    if adapted + retained <= 0:
        raise ValueError(f"HARS is not defined: fA = {adapted:.1f} and fR = {retained:.1f} do not add up above 0")
    return 2 * adapted * retained / (adapted + retained)


def share(hits: Sequence[bool]) -> Metric:
    """The share of hits, with Wilson's interval."""
    low, high = wilson_interval(sum(hits), len(hits))
    return {"value": sum(hits) / len(hits), "low": low, "high": high, "count": len(hits)}


def mean(values: Sequence[float]) -> Metric:
    """The mean, with Student's interval where there are two values for one."""
    low, high = mean_interval(values) if len(values) > 1 else (None, None)
    return {"value": sum(values) / len(values), "low": low, "high": high, "count": len(values)}


def _words(text: str) -> list[str]:
    return _ARTICLE_WORD.sub(" ", text.lower().translate(_ASCII_PUNCTUATION)).split()
