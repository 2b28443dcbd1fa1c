"""A study's runs side by side: means over seeds with intervals, and what is kept at equal adaptation."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from kore_fast.errors import DataError
from kore_fast.files import write_json, write_text
from kore_fast.intervals import mean_interval
from kore_fast.report.figures import learning_rate, study_scatter
from kore_fast.report.findings import EQUAL_ADAPTATION, listing
from kore_fast.report.page import write_bytes
from kore_fast.report.prediction import Prediction, as_values, prediction_table, predictions
from kore_fast.report.reading import Metric, Scores, kind_order, parse_scores, pretty
from kore_fast.report.tables import csv_text, markdown_table
from kore_fast.report.words import (
    BENCHMARKS,
    DRIFT,
    MISSING,
    RETENTION,
    MetricWords,
    adaptation_of,
    interval,
    measured,
    minus,
    number,
)

_LOSS = "wikipedia_loss"
_OVER_SEEDS = "Student's t, 95 %"
_TOO_FEW = "lowest to highest"
_ONE_RUN = "one run, 95 % over questions"


@dataclass(frozen=True)
class Spread:
    """A metric's mean over the seeds of one method at one learning rate, and what its interval is."""

    mean: float
    low: float | None
    high: float | None
    seeds: int
    interval: str

    def as_metric(self) -> Metric:
        return Metric(value=self.mean, low=self.low, high=self.high, count=self.seeds)


@dataclass(frozen=True)
class Group:
    """The runs of one method at one learning rate."""

    method: str
    kind: str
    learning_rate: float | None
    trained_parameters: int | None
    runs: Sequence[Scores]
    spreads: Mapping[str, Spread]
    selected: bool


@dataclass(frozen=True)
class Pair:
    """Two runs of two methods whose adaptation differs by no more than the tolerance."""

    one: Scores
    other: Scores


@dataclass(frozen=True)
class EqualAdaptation:
    """What two methods keep where both learned the same.

    ``loss_increase`` and ``other_loss_increase`` are mean rises of the held-out loss over the base in nats a token;
    ``kept`` and ``other_kept`` are shares of the base's value, by retention metric.
    """

    method: str
    other: str
    tolerance: float
    pairs: int
    seeds: tuple[int | None, ...]
    adaptation: float | None
    other_adaptation: float | None
    loss_increase: float | None
    other_loss_increase: float | None
    loss_ratio: float | None
    kept: Mapping[str, float]
    other_kept: Mapping[str, float]

    def sentence(self) -> str:
        """The comparison in words, whichever way it went."""
        one, other = pretty(self.method), pretty(self.other)
        points = f"{100 * self.tolerance:g} points"
        if self.pairs == 0:
            return f"No runs of {one} and {other} learned equally much (within {points}): there is nothing to compare."
        parts = []
        if self.loss_increase is not None and self.other_loss_increase is not None:
            ratio = "" if self.loss_ratio is None else f" ({minus(f'{100 * self.loss_ratio:.0f}')} % of it)"
            ours, theirs = minus(f"{self.loss_increase:.3f}"), minus(f"{self.other_loss_increase:.3f}")
            parts.append(f"the held-out loss rises by {ours} with {one} against {theirs} with {other}{ratio}")
        parts += [
            f"of the base's {words.short} {one} keeps {100 * self.kept[words.name]:.0f} % "
            f"and {other} {100 * self.other_kept[words.name]:.0f} %"
            for words in RETENTION
            if words.name in self.kept
        ]
        runs = f"within {points}; {_counted(self.pairs, 'pair')} of runs, {_counted(len(self.seeds), 'seed')}"
        if not parts:
            return f"At equal adaptation ({runs}) no retention was measured for {one} and {other}."
        return f"At equal adaptation ({runs}), {'; '.join(parts)}."


@dataclass(frozen=True)
class Comparison:
    """A study's outcome, as written to comparison.json."""

    groups: Sequence[Group]
    equal: Sequence[EqualAdaptation]
    predictions: Sequence[Prediction]
    markdown: str
    folder: Path


def build_comparison(
    runs: Iterable[Mapping[str, Any]],
    out: Path,
    *,
    selected: Mapping[str, float] | None = None,
    experiments: Mapping[str, Sequence[str]] | None = None,
    reference: str = "lora",
) -> Comparison:
    """Compare the runs of a study and write comparison.{csv,json,md,png} into ``out``; with experiments a
    comparison-NAME.png for each in the place of comparison.png.

    Runs are grouped by method and ``settings["learning_rate"]``; each group's metrics are averaged over its seeds, with
    Student's 95 % interval from three seeds on, the lowest and highest value for two, and the run's own interval over
    questions for one. Equal inputs give equal files, whatever the order of the runs.

    Args:
        runs: what the ``scores.json`` files hold.
        out: folder for the files.
        selected: the learning rate chosen for each method, for the table and the filled marks. Without one a method's
            group with the most seeds is taken, and among those the one of the highest adaptation.
        experiments: heading → methods that stand in a table and a picture of their own, the base beside them; those
            without a run yet are left out.
        reference: the method that every other is held against at equal adaptation (see `words.adaptation_of`).

    Raises:
        DataError: no run, a run without a needed field, two runs of one method, learning rate and seed, or a selected
            learning rate at which the method has no run.
    """
    scores = [parse_scores(run, f"run {place}") for place, run in enumerate(runs, start=1)]
    if not scores:
        raise DataError("there is no run to compare: give the contents of at least one evaluate/METHOD/scores.json")
    scores.sort(key=_order)
    for before, after in pairwise(scores):
        if _identity(before) == _identity(after):
            raise DataError(
                f"two runs of {after.method!r} with learning rate {learning_rate(after)} and seed {after.seed}: "
                "give each run once"
            )
    groups = _groups(scores, selected or {})
    equal = [
        equal_adaptation(scores, method, reference)
        for method in dict.fromkeys(run.method for run in scores)
        if method not in ("base", reference) and any(run.method == reference for run in scores)
    ]
    out = Path(out)
    foretold = predictions(scores)
    pictures = _pictures(scores, groups, experiments or {})
    markdown = _markdown(groups, equal, foretold, experiments or {}, pictures)
    comparison = Comparison(groups, equal, foretold, markdown, out)
    write_text(out / "comparison.csv", _csv(groups))
    write_json(out / "comparison.json", _json(comparison))
    write_text(out / "comparison.md", comparison.markdown)
    for stale in {path.name for path in out.glob("comparison*.png")} - {name for name, _ in pictures.values()}:
        (out / stale).unlink()
    for name, picture in pictures.values():
        write_bytes(out / name, picture)
    return comparison


def equal_adaptation(
    runs: Sequence[Scores], method: str, other: str, tolerance: float = EQUAL_ADAPTATION
) -> EqualAdaptation:
    """Pair each run of ``method`` with the run of ``other`` nearest in adaptation, and compare what the pairs keep.

    A pair counts when the adaptation (CEM; of EVOKE's items K.A) differs by at most ``tolerance`` and both rose
    above the base by more than that: two runs that learned nothing say nothing. The same seed is preferred, then the
    smallest difference. All learning rates take part, so that a method may be met at any level it reached; a run of
    ``other`` may serve more than one pair.
    """
    base = next((run for run in runs if run.kind == "base"), None)
    measure = adaptation_of(runs).name
    floor = base.value(measure) if base else None
    learned = [
        run
        for run in runs
        if (value := run.value(measure)) is not None and (floor is None or value > floor + tolerance)
    ]
    pairs = []
    for run in learned:
        near = [
            (partner.seed != run.seed, gap, learning_rate(partner) or 0.0, place)
            for place, partner in enumerate(learned)
            if run.method == method
            and partner.method == other
            and (gap := _gap(run, partner, measure)) <= tolerance + 1e-12
        ]
        if near:
            pairs.append(Pair(run, learned[min(near)[-1]]))
    rise, other_rise = _rises(pairs, base)
    kept, other_kept = _kept(pairs, base)
    return EqualAdaptation(
        method=method,
        other=other,
        tolerance=tolerance,
        pairs=len(pairs),
        seeds=tuple(sorted({pair.one.seed for pair in pairs}, key=lambda seed: (seed is None, seed or 0))),
        adaptation=_mean([pair.one.value(measure) for pair in pairs]),
        other_adaptation=_mean([pair.other.value(measure) for pair in pairs]),
        loss_increase=rise,
        other_loss_increase=other_rise,
        loss_ratio=rise / other_rise if rise is not None and other_rise is not None and other_rise > 0 else None,
        kept=kept,
        other_kept=other_kept,
    )


def _groups(scores: Sequence[Scores], selected: Mapping[str, float]) -> list[Group]:
    by_key: dict[tuple[str, float | None], list[Scores]] = {}
    for run in scores:
        by_key.setdefault((run.method, learning_rate(run)), []).append(run)
    chosen: dict[str, float | None] = {}
    measure = adaptation_of(scores).name
    for method in dict.fromkeys(run.method for run in scores):
        rates = [rate for name, rate in by_key if name == method]
        if method in selected:
            if selected[method] not in rates:
                raise DataError(
                    f"no run of {method!r} at its selected learning rate {selected[method]:g}; runs: {rates}"
                )
            chosen[method] = selected[method]
        else:
            chosen[method] = max(rates, key=lambda rate: _worth(by_key[method, rate], measure))
    return [
        Group(
            method=method,
            kind=runs[0].kind,
            learning_rate=rate,
            trained_parameters=runs[0].trained_parameters,
            runs=runs,
            spreads={words.name: spread for words in measured(runs) if (spread := _spread(words, runs))},
            selected=chosen[method] == rate,
        )
        for (method, rate), runs in by_key.items()
    ]


def _worth(runs: Sequence[Scores], measure: str) -> tuple[int, float]:
    mean = _mean([run.value(measure) for run in runs])
    return len(runs), -math.inf if mean is None else mean


def _spread(words: MetricWords, runs: Sequence[Scores]) -> Spread | None:
    metrics = [metric for run in runs if (metric := run.metric(words.name)) is not None]
    values = [metric.value for metric in metrics if metric.value is not None]
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Spread(mean, metrics[0].low, metrics[0].high, 1, _ONE_RUN)
    if len(values) == 2:
        return Spread(mean, min(values), max(values), 2, _TOO_FEW)
    low, high = mean_interval(values)
    if words.share:
        low, high = max(0.0, low), min(1.0, high)
    return Spread(mean, low, high, len(values), _OVER_SEEDS)


def _pictures(
    scores: Sequence[Scores], groups: Sequence[Group], experiments: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, bytes]]:
    """Heading → file and picture: one for each experiment or, without any, one of everything under no heading."""
    found = {}
    for heading, methods in experiments.items() or [("", [group.method for group in groups])]:
        shown = {*methods, "base"}
        picture = study_scatter(
            [run for run in scores if run.method in shown],
            {
                (group.method, group.learning_rate): {name: one.as_metric() for name, one in group.spreads.items()}
                for group in groups
                if group.selected and group.method in shown
            },
        )
        ending = re.sub(r"[^a-z0-9]+", "-", f"-{heading.lower()}").rstrip("-")
        if picture is not None:
            found[heading] = (f"comparison{ending}.png", picture)
    return found


def _markdown(
    groups: Sequence[Group],
    equal: Sequence[EqualAdaptation],
    foretold: Sequence[Prediction],
    experiments: Mapping[str, Sequence[str]],
    pictures: Mapping[str, tuple[str, bytes]],
) -> str:
    rows = [group for group in groups if group.selected]
    lines = []
    for heading, methods in experiments.items():
        shown = [group for name in ("base", *methods) for group in rows if group.method == name]
        if len(shown) > 1:
            lines += [f"## {heading}\n", _table(shown, brief=True)]
            if heading in pictures:
                lines.append(f"![{heading}: kept against learned]({pictures[heading][0]})\n")
    if experiments:
        lines.append("## All methods\n")
    lines.append(_table(rows))
    kinds = {spread.interval: spread.seeds for group in rows for spread in group.spreads.values()}
    meanings = {
        _OVER_SEEDS: "Student's 95 % interval of the mean over three or more seeds",
        _TOO_FEW: "the lowest and highest of two seeds",
        _ONE_RUN: "for a single run, its 95 % interval over questions",
    }
    brackets = listing([meanings[kind] for kind in meanings if kind in kinds]) if kinds else ""
    if brackets:
        lines.append(f"Mean over seeds; in brackets {brackets}. {MISSING}: not measured.\n")
    if equal:
        lines.append("".join(f"- {one.sentence()}\n" for one in equal))
    if foretold:
        count, kinds_of_run = max((one.runs, one.methods) for one in foretold)
        lines += [
            "## What foretells forgetting\n",
            f"Spearman's rank correlation of each measure with what was lost, over {count} runs of {kinds_of_run} "
            "methods; in brackets 95 % of the correlations when methods are drawn anew. The held-out loss is of the "
            "same passages as the drift on text.\n",
            prediction_table(foretold),
        ]
    return "\n".join(lines)


def _table(rows: Sequence[Group], *, brief: bool = False) -> str:
    metrics = measured(run for group in rows for run in group.runs)
    if brief:
        metrics = [
            words
            for words in metrics
            if words.group != BENCHMARKS and (words.group != DRIFT or words.name.startswith("kl_"))
        ]
    header = [
        "method",
        "learning rate",
        "seeds",
        "trained parameters",
        *(f"{words.short} {words.arrow}".rstrip() for words in metrics),
    ]
    cells = [
        [
            pretty(group.method),
            MISSING if group.learning_rate is None else f"{group.learning_rate:g}",
            str(len(group.runs)),
            MISSING if group.trained_parameters is None else f"{group.trained_parameters:,}",
            *(_cell(words, group.spreads.get(words.name)) for words in metrics),
        ]
        for group in rows
    ]
    return markdown_table(header, cells)


def _cell(words: MetricWords, spread: Spread | None) -> str:
    if spread is None:
        return MISSING
    return f"{number(words, spread.mean)} {interval(words, spread.as_metric())}".rstrip()


def _csv(groups: Sequence[Group]) -> str:
    header = (
        "method",
        "kind",
        "learning_rate",
        "selected",
        "trained_parameters",
        "metric",
        "mean",
        "low",
        "high",
        "seeds",
        "interval",
    )
    return csv_text(
        header,
        (
            (
                group.method,
                group.kind,
                group.learning_rate,
                "yes" if group.selected else "no",
                group.trained_parameters,
                words.name,
                spread.mean,
                spread.low,
                spread.high,
                spread.seeds,
                spread.interval,
            )
            for group in groups
            for words in measured(group.runs)
            if (spread := group.spreads.get(words.name)) is not None
        ),
    )


def _json(comparison: Comparison) -> dict[str, Any]:
    return {
        "groups": [
            {
                "method": group.method,
                "kind": group.kind,
                "learning_rate": group.learning_rate,
                "selected": group.selected,
                "trained_parameters": group.trained_parameters,
                "metrics": {name: asdict(spread) for name, spread in group.spreads.items()},
                "runs": [run.model_dump() for run in group.runs],
            }
            for group in comparison.groups
        ],
        "predictions": as_values(comparison.predictions),
        "equal_adaptation": [{**asdict(one), "sentence": one.sentence()} for one in comparison.equal],
    }


def _rises(pairs: Sequence[Pair], base: Scores | None) -> tuple[float | None, float | None]:
    before = base.value(_LOSS) if base else None
    ours, theirs = _both(pairs, _LOSS)
    if before is None or not ours:
        return None, None
    return math.fsum(ours) / len(ours) - before, math.fsum(theirs) / len(theirs) - before


def _kept(pairs: Sequence[Pair], base: Scores | None) -> tuple[dict[str, float], dict[str, float]]:
    kept, other_kept = {}, {}
    for words in RETENTION:
        before = base.value(words.name) if base else None
        ours, theirs = _both(pairs, words.name)
        if words.share and before and ours:
            kept[words.name] = math.fsum(ours) / len(ours) / before
            other_kept[words.name] = math.fsum(theirs) / len(theirs) / before
    return kept, other_kept


def _both(pairs: Sequence[Pair], name: str) -> tuple[list[float], list[float]]:
    """The metric of both runs, over the pairs in which both have it."""
    known = [
        (ours, theirs)
        for pair in pairs
        if (ours := pair.one.value(name)) is not None and (theirs := pair.other.value(name)) is not None
    ]
    return [ours for ours, _ in known], [theirs for _, theirs in known]


def _gap(one: Scores, other: Scores, measure: str) -> float:
    ours, theirs = one.value(measure), other.value(measure)
    return math.inf if ours is None or theirs is None else abs(ours - theirs)


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _identity(run: Scores) -> tuple[Any, ...]:
    return run.method, learning_rate(run), run.seed


def _order(run: Scores) -> tuple[Any, ...]:
    rate = learning_rate(run)
    return kind_order(run.kind), run.method, rate is not None, rate or 0.0, run.seed is not None, run.seed or 0
