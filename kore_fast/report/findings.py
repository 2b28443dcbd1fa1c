"""Sentences derived from the numbers: what the run shows, and what stands in the way of reading it so."""

from __future__ import annotations

import math
from typing import Literal

from kore_fast.report.reading import Method, Metric, Run
from kore_fast.report.words import (
    ADAPTATION,
    BOTH,
    DRIFT,
    RETENTION,
    MetricWords,
    adaptation_of,
    difference,
    measured,
    minus,
    number,
)

EQUAL_ADAPTATION = 0.02
EQUAL_PARAMETERS = 0.05
# Any of these may say what a method was trained on: a fingerprint, the file's name, the number of samples.
DATA_SETTINGS = ("data", "samples", "sample_count")

Verdict = Literal["more", "less", "even"]

_RETENTION_PHRASES = {
    "capitals": "capitals",
    "picture_naming": "picture naming",
    "wikipedia_loss": "held-out loss",
    "k_r": "the twelve benchmarks",
}


def headline(run: Run) -> str:
    """One or two sentences on adaptation and retention, from whatever was measured; as frank when KORE loses."""
    kore, lora = run.of_kind("kore"), run.of_kind("lora")
    if kore is not None and lora is not None:
        return f"{_adaptation_sentence(kore, lora)} {_retention_sentence(kore, lora, run.base)}"
    trained = [method for method in run.methods if method.scores.kind != "base"]
    if not trained:
        return "Only the base model was evaluated; nothing was trained."
    return " ".join(_alone(method, run.base) for method in trained)


def notes(run: Run) -> list[str]:
    """What a reader must know before comparing: unlike data, unlike sizes, missing numbers, diverged training."""
    trained = [method for method in run.methods if method.scores.kind != "base"]
    found = [_data_note(trained), *_size_notes(run), *(_unlike_note(trained, name) for name in ("steps", "batch_size"))]
    if run.base is None:
        found.append("The base model was not evaluated, so no difference to it can be shown.")
    metrics = measured(method.scores for method in run.methods)
    for method in run.methods:
        # The base's drift from itself is nothing by definition, and so is its gain over itself.
        expected = [words for words in metrics if not (method is run.base and words.group in (BOTH, DRIFT))]
        without = [words.label for words in expected if method.scores.value(words.name) is None]
        if without:
            found.append(f"Not measured for {method.label} (shown as –): {'; '.join(without)}.")
    for method in run.methods:
        broken = [row.step for row in method.losses if math.isnan(row.loss)]
        if broken:
            found.append(f"The training loss of {method.label} was not a finite number from step {broken[0]} on.")
    seeds = {method.scores.seed for method in trained if method.scores.seed is not None}
    if len(seeds) == 1:
        found.append(
            f"One training seed ({seeds.pop()}): the intervals cover the choice of questions, not the luck of training."
        )
    return [note for note in found if note]


def verdict(words: MetricWords, one: Metric, other: Metric) -> Verdict:
    """Whether ``one`` is better, worse or not distinguishable: overlapping 95 % intervals count as even."""
    if one.value is None or other.value is None or one.value == other.value:
        return "even"
    bounds = (one.low, one.high, other.low, other.high)
    if None not in bounds and one.low <= other.high and other.low <= one.high:  # type: ignore[operator]
        return "even"
    return "more" if (one.value > other.value) == bool(words.higher_is_better) else "less"


def listing(parts: list[str]) -> str:
    """Parts joined as in prose: a, b and c."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def _adaptation_sentence(kore: Method, lora: Method) -> str:
    words = adaptation_of([kore.scores, lora.scores])
    ours, theirs = kore.scores.metric(words.name), lora.scores.metric(words.name)
    if ours is None or theirs is None or ours.value is None or theirs.value is None:
        return "Adaptation was not measured for both methods;"
    asked = "of the questions about new facts rightly" if words is ADAPTATION else f"of {words.label}"
    verb = "answers" if words is ADAPTATION else "reaches"
    values = f"{kore.label} {verb} {number(words, ours.value)} {asked}, {lora.label} {number(words, theirs.value)}"
    if abs(ours.value - theirs.value) <= EQUAL_ADAPTATION + 1e-12:
        return f"At about equal adaptation ({values}),"
    if verdict(words, ours, theirs) == "even":
        return f"{values}, a difference within the sampling error;"
    return f"{kore.label} learned {verdict(words, ours, theirs)} than {lora.label} ({values});"


def _retention_sentence(kore: Method, lora: Method, base: Method | None) -> str:
    verdicts: dict[Verdict, list[str]] = {"more": [], "less": [], "even": []}
    for words in RETENTION:
        ours, theirs = kore.scores.metric(words.name), lora.scores.metric(words.name)
        if ours is None or theirs is None:
            continue
        values = f"{_RETENTION_PHRASES[words.name]} {number(words, ours.value)} against {number(words, theirs.value)}"
        before = base.scores.value(words.name) if base else None
        if before is not None:
            values += f" (base {number(words, before)})"
        verdicts[verdict(words, ours, theirs)].append(values)
    parts = []
    if verdicts["more"]:
        parts.append(f"{kore.label} kept more of the old knowledge than {lora.label}: {listing(verdicts['more'])}")
    if verdicts["less"]:
        again = "it kept less" if parts else f"{kore.label} kept less of the old knowledge than {lora.label}"
        parts.append(f"{again}: {listing(verdicts['less'])}")
    if verdicts["even"]:
        parts.append(f"there is no difference beyond the sampling error in {listing(verdicts['even'])}")
    return "; ".join(parts) + "." if parts else "retention was not measured for both methods."


def _alone(method: Method, base: Method | None) -> str:
    parts = []
    for words in (adaptation_of([method.scores]), *RETENTION):
        value = method.scores.value(words.name)
        if value is None:
            continue
        before = base.scores.value(words.name) if base else None
        part = f"{words.short} {number(words, value)}"
        parts.append(part if before is None else f"{part} ({difference(words, value - before)} to the base)")
    return f"{method.label}: {listing(parts)}." if parts else f"{method.label}: nothing was measured."


def _data_note(trained: list[Method]) -> str:
    if len(trained) < 2:
        return ""
    data = [tuple(method.scores.settings.get(name) for name in DATA_SETTINGS) for method in trained]
    unknown = [method.label for method, value in zip(trained, data, strict=True) if not any(value)]
    if unknown:
        return f"Whether all methods trained on the same data is not recorded for {listing(unknown)}."
    if len(set(data)) == 1:
        return "All methods trained on the same data."
    reference = data[-1]
    others = [method.label for method, value in zip(trained, data, strict=True) if value != reference]
    return f"Not the same data: {listing(others)} trained on other samples than {trained[-1].label}."


def _size_notes(run: Run) -> list[str]:
    kore, lora = run.of_kind("kore"), run.of_kind("lora")
    if kore is None or lora is None:
        return []
    ours, theirs = kore.scores.trained_parameters, lora.scores.trained_parameters
    if not ours or not theirs:
        return ["The number of trained parameters is not recorded for both methods."]
    numbers = f"{kore.label} {ours:,}, {lora.label} {theirs:,}"
    if ours == theirs:
        return [f"{kore.label} and {lora.label} train the same number of parameters ({ours:,})."]
    share = ours / theirs - 1
    if abs(share) <= EQUAL_PARAMETERS:
        return [f"{kore.label} and {lora.label} train about the same number of parameters ({numbers})."]
    return [f"Not the same number of trained parameters: {numbers} ({minus(f'{100 * share:+.0f} %')})."]


def _unlike_note(trained: list[Method], setting: str) -> str:
    values = {method.label: method.scores.settings.get(setting) for method in trained}
    known = [f"{label} {value}" for label, value in values.items() if value is not None]
    if len({value for value in values.values() if value is not None}) < 2:
        return ""
    return f"Not the same {setting.replace('_', ' ')}: {', '.join(known)}."
