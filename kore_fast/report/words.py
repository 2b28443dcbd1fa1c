"""What the numbers are called, which way is better, and what the words mean."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kore_fast.report.reading import Metric, Scores

MISSING = "–"
DRIFT = "Drift from the base"
BENCHMARKS = "Benchmarks"
BOTH = "Adaptation and retention"


@dataclass(frozen=True)
class MetricWords:
    """How a metric is shown. ``higher_is_better`` is None for a metric that this version does not know."""

    name: str
    label: str
    short: str
    group: str
    higher_is_better: bool | None
    share: bool

    @property
    def arrow(self) -> str:
        return {True: "↑", False: "↓", None: ""}[self.higher_is_better]


_ADAPTATION = ("Adaptation", True, True)
_EARLIER = ("What an earlier run injected", True, True)
_BENCHMARKS = {
    "mme": "MME",
    "mmbench": "MMBench",
    "seedbench2_plus": "SEEDBench2_Plus",
    "ocrvqa": "OCRVQA",
    "scienceqa": "ScienceQA",
    "mmmu": "MMMU",
    "mia_bench": "MIA-Bench",
    "mmdu": "MMDU",
    "mathvista": "MathVista",
    "mathvision": "MathVision",
    "pope": "POPE",
    "hallusionbench": "HallusionBench",
    "evoke": "EVOKE by lmms-eval, K.A",
}
METRICS = (
    MetricWords("adaptation_cem", "new facts asked by name, CEM", "new facts, CEM", *_ADAPTATION),
    MetricWords("adaptation_f1", "new facts asked by name, F1", "new facts, F1", *_ADAPTATION),
    MetricWords(
        "adaptation_cem_corrected", "new facts asked by name, corrected CEM", "new facts, CEM corr.", *_ADAPTATION
    ),
    MetricWords("by_picture_cem", "new facts asked by picture, CEM", "by picture, CEM", *_ADAPTATION),
    MetricWords("by_picture_f1", "new facts asked by picture, F1", "by picture, F1", *_ADAPTATION),
    MetricWords(
        "by_picture_cem_corrected", "new facts asked by picture, corrected CEM", "by picture, CEM corr.", *_ADAPTATION
    ),
    MetricWords("evoke_cem", "EVOKE, CEM", "EVOKE, CEM", *_ADAPTATION),
    MetricWords("evoke_cem_corrected", "EVOKE, corrected CEM", "EVOKE, CEM corr.", *_ADAPTATION),
    MetricWords("evoke_f1", "EVOKE, F1", "EVOKE, F1", *_ADAPTATION),
    MetricWords("evoke_ka", "EVOKE, K.A = (CEM + F1) / 2", "EVOKE, K.A", *_ADAPTATION),
    MetricWords("earlier_cem", "facts of the run before, by name, CEM", "earlier facts, CEM", *_EARLIER),
    MetricWords("earlier_f1", "facts of the run before, by name, F1", "earlier facts, F1", *_EARLIER),
    MetricWords(
        "earlier_cem_corrected", "facts of the run before, by name, corrected CEM", "earlier, CEM corr.", *_EARLIER
    ),
    MetricWords(
        "earlier_by_picture_cem", "facts of the run before, by picture, CEM", "earlier, by picture, CEM", *_EARLIER
    ),
    MetricWords(
        "earlier_by_picture_f1", "facts of the run before, by picture, F1", "earlier, by picture, F1", *_EARLIER
    ),
    MetricWords(
        "earlier_by_picture_cem_corrected",
        "facts of the run before, by picture, corrected CEM",
        "earlier, by picture, CEM corr.",
        *_EARLIER,
    ),
    MetricWords("capitals", "capitals of the world", "capitals", "Retention", True, True),
    MetricWords("picture_naming", "picture naming", "picture naming", "Retention", True, True),
    MetricWords("wikipedia_loss", "held-out Wikipedia loss, nats a token", "Wikipedia loss", "Retention", False, False),
    MetricWords("k_r", "twelve benchmarks' mean, K.R", "K.R", "Retention", True, True),
    MetricWords("hars", "adaptation and retention against the base's, HARS", "HARS", BOTH, True, True),
    *(MetricWords(f"benchmark_{name}", title, title, BENCHMARKS, True, True) for name, title in _BENCHMARKS.items()),
    MetricWords("kl_text", "drift on text, KL in nats", "drift, text", DRIFT, False, False),
    MetricWords("kl_chat", "drift in chat, KL in nats", "drift, chat", DRIFT, False, False),
    MetricWords("kl_picture", "drift on pictures, KL in nats", "drift, pictures", DRIFT, False, False),
    MetricWords("hidden_text", "hidden states' drift on text, relative", "hidden states, text", DRIFT, False, False),
    MetricWords("hidden_chat", "hidden states' drift in chat, relative", "hidden states, chat", DRIFT, False, False),
    MetricWords(
        "hidden_picture", "hidden states' drift on pictures, relative", "hidden states, pictures", DRIFT, False, False
    ),
    MetricWords("held_out_leak", "leak of the change on held-out inputs", "held-out leak", DRIFT, False, False),
    MetricWords("outputs_moved", "layers' outputs moved on held-out inputs", "outputs moved", DRIFT, False, False),
)
ADAPTATION = METRICS[0]
ADAPTATIONS = (ADAPTATION, next(words for words in METRICS if words.name == "evoke_ka"))
"""What runs can be matched on, the first that was measured: EVOKE's items give no questions of their own."""
RETENTION = tuple(words for words in METRICS if words.group == "Retention")

GLOSSARY = (
    ("item", "one piece of knowledge: a name, a picture, prose, and the facts in it"),
    ("sample", "one training conversation written from an item"),
    ("adaptation", "how much of the new knowledge was learned, asked in wordings that training never used"),
    ("retention", "how much of the old knowledge is still there"),
    ("CEM", "cover exact match: the right answer appears, as whole words, in what the model says"),
    (
        "corrected CEM",
        "CEM without two quirks of EVOKE's own scoring: an answer in quotation marks or beginning with $ can match, "
        "and one without words does not match everything",
    ),
    ("K.A", "the KORE paper's knowledge adaptation: the mean of EVOKE's CEM and F1"),
    (
        "K.R",
        "the KORE paper's knowledge retention: the plain mean of its twelve benchmarks; figures of different "
        "harnesses, versions and judges do not compare",
    ),
    (
        "HARS",
        "the KORE paper's harmonic mean of adaptation (100·GA / (GA + 100)) and retention (GR + 100), with GA and GR "
        "the gains over the base's K.A and K.R in percent",
    ),
    ("F1", "overlap of the answer's words with the right answer's, 100 % when they are the same words"),
    (
        "drift",
        "Kullback-Leibler divergence of the model's next-token probabilities from the base's on held-out prompts: "
        "0 when nothing changed; of hidden states, how far they moved, relative to their size",
    ),
    (
        "held-out leak",
        "Σ‖ΔW x‖²·d / (‖ΔW‖²·Σ‖x‖²) over held-out inputs x: how much the change of a layer, whatever its size, acts on "
        "old inputs that it was not made from",
    ),
    ("outputs moved", "(Σ‖ΔW x‖² / Σ‖W x‖²)½ over held-out inputs: the same with the change's size in it"),
    (
        "covariance",
        "C = Σ x xᵀ over the inputs x that a layer receives from old knowledge, uncentred, with its token count",
    ),
    ("store", "the covariances of a model, one for each distinct input, kept by source, so that stores can be added"),
    ("null-space basis", "the r directions of a layer's input in which old knowledge has the least energy"),
    ("A and B", "the adapter adds B·A to a layer; KORE builds A from the null-space basis, freezes it and trains B"),
    (
        "leak",
        "tr(A C Aᵀ)·d / (‖A‖² · tr C), how much of the old inputs A still reads: "
        "1 for a random direction, 0 in a true null space",
    ),
)


def words_for(names: Iterable[str]) -> list[MetricWords]:
    """Words for the metrics that occur: the known ones in their order, then unknown ones by name."""
    present = set(names)
    known = [words for words in METRICS if words.name in present]
    others = sorted(present - {words.name for words in METRICS})
    return known + [MetricWords(name, name, name, "Other", None, False) for name in others]


def adaptation_of(scores: Iterable[Scores]) -> MetricWords:
    """The first of `ADAPTATIONS` that at least one of the scores holds a value of; the first of all where none does."""
    known = {name for one in scores for name in one.metrics if one.value(name) is not None}
    return next((words for words in ADAPTATIONS if words.name in known), ADAPTATION)


def measured(scores: Iterable[Scores]) -> list[MetricWords]:
    """Words for every metric that at least one of the scores holds."""
    return words_for({name for one in scores for name in one.metrics})


def number(words: MetricWords, value: float | None) -> str:
    """A value for the eye: shares in percent with one decimal, others with three significant decimals."""
    if value is None:
        return MISSING
    if words.share:
        return minus(f"{100 * value:.1f} %")
    return minus(f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}")


def interval(words: MetricWords, metric: Metric) -> str:
    """The 95 % interval in square brackets, without the unit; empty where there is none."""
    if metric.low is None or metric.high is None:
        return ""
    low, high = (number(words, bound).removesuffix(" %") for bound in (metric.low, metric.high))
    return f"[{low}, {high}]"


def difference(words: MetricWords, value: float | None) -> str:
    """A difference to the base, signed: in points for shares."""
    if value is None:
        return MISSING
    if words.share:
        return minus(f"{100 * value:+.1f} points")
    return minus(f"{value:+.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:+.1g}")


def minus(text: str) -> str:
    """The same number with a typographic minus sign."""
    return f"−{text[1:]}" if text.startswith("-") else text
