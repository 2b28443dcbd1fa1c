"""The retention benchmarks of a recipe: measured on the base and on every method, and HARS where EVOKE is too."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from kore_fast.errors import DataError
from kore_fast.files import read_json
from kore_fast.progress import Progress
from kore_fast.recipe.schema import Recipe

FOLDER = "benchmarks"
"""In a run's folder: each method's benchmarks. They can take days and know what they were measured on, so they stay
when a stage is run anew for another reason; what no longer fits is replaced one by one."""
log = logging.getLogger(__name__)


def measure_benchmarks(
    recipe: Recipe, model: nn.Module, processor: Any, folder: Path, progress: Progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures, shares from 0 to 1, and what they were measured with.

    ``benchmark_<name>`` for each that was measured; ``k_r``, the paper's K.R, only where all twelve were, and whole.
    None has an interval: benchmarks score in too many ways for one.
    """
    from kore_fast.evaluation.lmms import evaluate_retention

    options = recipe.evaluation.retention
    assert options is not None
    found = evaluate_retention(
        model,
        processor,
        options.benchmarks,
        folder=folder,
        data=None if options.data is None else recipe.resolve(options.data),
        hub=options.hub,
        judge=options.judge,
        limit=options.limit,
        max_new_tokens=options.max_new_tokens,
        batch_size=recipe.evaluation.batch_size,
        bf16=recipe.bf16(),
        replace=True,
        progress=progress,
    )
    metrics = {
        f"benchmark_{score.benchmark}": _figure(score.points, score.questions)
        for score in found.scores
        if score.points is not None
    }
    if found.complete and found.limit is None:
        metrics["k_r"] = _figure(found.mean, len(found.measured))
    missing = defaultdict(list)
    for score in found.scores:
        if score.missing is not None:
            missing[score.missing].append(score.benchmark)
    not_measured = [f"{', '.join(names)} ({reason})" for reason, names in missing.items()]
    for said in not_measured:
        log.warning("%s: not measured: %s", folder.name, said)
    settings: dict[str, Any] = {"benchmarks_by": found.harness}
    if not_measured:
        settings["benchmarks_not_measured"] = "; ".join(not_measured)
    if found.limit is not None:
        settings["first_questions_of_benchmarks"] = found.limit
    if options.judge is not None:
        settings["judge_of_benchmarks"] = options.judge.model
    return metrics, settings


def _figure(points: float | None, count: int | None) -> dict[str, Any]:
    return {"value": None if points is None else points / 100, "low": None, "high": None, "count": count}


def with_hars(metrics: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """``metrics`` with HARS against the base's, where both have EVOKE's K.A and K.R and the score is defined."""
    from kore_fast.evaluation.metrics import hars

    values = [(scores.get(name) or {}).get("value") for name in ("evoke_ka", "k_r") for scores in (metrics, base)]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return dict(metrics)
    adaptation, base_adaptation, retention, base_retention = known
    try:
        score = hars(adaptation, retention, base_adaptation, base_retention)
    except ValueError as error:
        log.warning("%s", error)
        return dict(metrics)
    return {**metrics, "hars": _figure(score, None)}


def benchmark_files(recipe: Recipe) -> list[Path]:
    """The data of the benchmarks that are measured."""
    options = recipe.evaluation.retention
    if options is None or options.data is None:
        return []
    from kore_fast.evaluation.lmms import choose
    from kore_fast.evaluation.lmms.local_data import with_pictures

    data = recipe.resolve(options.data)
    return [file for benchmark in choose(options.benchmarks) for file in with_pictures(benchmark, data)]


def to_try_again(folder: Path) -> str:
    """Which of a method's benchmarks are lacking because a judge or the hub did not answer; empty where none is."""
    path = folder / "retention.json"
    if not path.is_file():
        return ""
    try:
        names = [score["benchmark"] for score in read_json(path)["scores"] if score.get("again")]
    except (DataError, KeyError, TypeError, AttributeError):
        return ""
    return f"a judge or the hub did not answer for {', '.join(names)}" if names else ""
