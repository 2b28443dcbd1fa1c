"""How well measures that need no benchmark predict what is kept: rank correlations over a study's runs."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kore_fast.report.reading import Scores
from kore_fast.report.tables import markdown_table
from kore_fast.report.words import DRIFT, METRICS, MISSING, RETENTION, MetricWords, minus

FEWEST_RUNS = 8
"""Below so many runs a rank correlation says nothing."""
_DRAWS = 2000


@dataclass(frozen=True)
class Prediction:
    """Spearman's ρ between a measure of drift and what was lost, over runs."""

    measure: str
    retention: str
    rho: float
    """1: more drift always went with more loss; 0: no relation."""
    low: float
    high: float
    """95 % of the correlations in runs drawn anew, whole methods at a time: seeds and rates of one method are alike, so
    they count as one observation."""
    runs: int
    methods: int


def predictions(scores: Sequence[Scores]) -> list[Prediction]:
    """Each measure of drift against each retention metric's loss from the base, where enough runs have both.

    The held-out loss is measured on the passages of the drift on text, so these two are hardly apart by nature.
    """
    base = next((run for run in scores if run.kind == "base"), None)
    trained = [run for run in scores if run.kind != "base"]
    found = []
    for measure in (words for words in METRICS if words.group == DRIFT):
        for retention in RETENTION:
            before = base.value(retention.name) if base else None
            if before is None:
                continue
            points = _points(trained, measure, retention, before)
            count = sum(map(len, points.values()))
            if count < FEWEST_RUNS or len(points) < 3:
                continue
            rho = spearman([point for group in points.values() for point in group])
            if rho is not None:
                low, high = _interval(list(points.values()))
                found.append(Prediction(measure.name, retention.name, rho, low, high, count, len(points)))
    return found


def prediction_table(found: Sequence[Prediction]) -> str:
    """Markdown: a measure a line, a retention metric a column."""
    cells = {(one.measure, one.retention): one for one in found}
    columns = [words for words in RETENTION if any(one.retention == words.name for one in found)]
    rows = [
        [words.short, *(_cell(cells.get((words.name, column.name))) for column in columns)]
        for words in METRICS
        if any(one.measure == words.name for one in found)
    ]
    return markdown_table(["measure", *(f"loss of {column.short}" for column in columns)], rows)


def spearman(points: Sequence[tuple[float, float]]) -> float | None:
    """Rank correlation; equal values share their mean rank. None where one side does not vary."""
    if len(points) < 2:
        return None
    xs, ys = (_ranks([point[side] for point in points]) for side in (0, 1))
    middle = (len(points) + 1) / 2
    cross = sum((x - middle) * (y - middle) for x, y in zip(xs, ys, strict=True))
    size = sum((x - middle) ** 2 for x in xs) * sum((y - middle) ** 2 for y in ys)
    return cross / size**0.5 if size > 0 else None


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for place in order[start:end]:
            ranks[place] = (start + 1 + end) / 2
        start = end
    return ranks


def _points(
    runs: Sequence[Scores], measure: MetricWords, retention: MetricWords, before: float
) -> dict[str, list[tuple[float, float]]]:
    """Method → (drift, loss) of its runs; a loss is positive where something was lost."""
    lost: Callable[[float], float] = (lambda v: before - v) if retention.higher_is_better else (lambda v: v - before)
    points: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        x, y = run.value(measure.name), run.value(retention.name)
        if x is not None and y is not None:
            points.setdefault(run.method, []).append((x, lost(y)))
    return points


def _interval(groups: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, float]:
    chance = random.Random(0)
    draws: list[float] = []
    while len(draws) < _DRAWS:
        drawn = [point for _ in groups for point in chance.choice(groups)]
        rho = spearman(drawn)
        # One method drawn throughout may not vary.
        draws.append(0.0 if rho is None else rho)
    draws.sort()
    return draws[round(0.025 * _DRAWS)], draws[round(0.975 * _DRAWS) - 1]


def _cell(one: Prediction | None) -> str:
    return (
        MISSING
        if one is None
        else minus(f"{one.rho:.2f}") + f" [{minus(f'{one.low:.2f}')}, {minus(f'{one.high:.2f}')}]"
    )


def as_values(found: Sequence[Prediction]) -> list[Mapping[str, object]]:
    """Plain JSON values."""
    return [dict(vars(one)) for one in found]
