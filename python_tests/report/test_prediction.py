"""Rank correlation against its definition, and intervals that do not take a method's seeds for evidence."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from kore_fast.report import build_comparison
from kore_fast.report.prediction import FEWEST_RUNS, predictions, spearman
from kore_fast.report.reading import parse_scores


def run(method: str, seed: int, drift: float, loss: float, capitals: float) -> dict[str, Any]:
    metrics = {"kl_text": drift, "wikipedia_loss": loss, "capitals": capitals, "adaptation_cem": 0.3}
    return {
        "method": method,
        "kind": "base" if method == "base" else "lora",
        "seed": seed,
        "settings": {} if method == "base" else {"learning_rate": 1e-3},
        "metrics": {name: {"value": value} for name, value in metrics.items()},
    }


def study(noise: float) -> list[dict[str, Any]]:
    chance = random.Random(3)
    runs = [run("base", 0, 0.0, 2.0, 0.5)]
    for number in range(6):
        for seed in range(2):
            drift = number / 10 + chance.random() / 100
            runs.append(run(f"m{number}", seed, drift, 2 + drift + noise * chance.random(), 0.5 - 0.1 * drift))
    return runs


def test_it_is_the_correlation_of_ranks() -> None:
    # 1 − 6 Σd² / (n(n² − 1)) without ties: ranks 1..5 against 2, 1, 4, 3, 5.
    points = [(10.0, 0.2), (20.0, 0.1), (30.0, 0.4), (40.0, 0.3), (1000.0, 9.0)]
    assert spearman(points) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert spearman([(x, -y) for x, y in points]) == pytest.approx(-0.8)
    # With ties, Pearson's of the mean ranks: 1.5, 1.5, 3 against 1, 2, 3.
    assert spearman([(1, 1), (1, 2), (2, 3)]) == pytest.approx(1.5 / (1.5 * 2) ** 0.5)
    assert spearman([(1, 1), (1, 2)]) is None
    assert spearman([(1, 1)]) is None


def test_a_measure_that_goes_with_the_loss_foretells_it() -> None:
    found = {(p.measure, p.retention): p for p in predictions([parse_scores(r, "r") for r in study(0.0)])}
    assert set(found) == {("kl_text", "wikipedia_loss"), ("kl_text", "capitals")}
    for one in found.values():  # capitals fall where the loss rises: both are losses
        assert one.rho == pytest.approx(1.0)
        assert (one.runs, one.methods) == (12, 6)
        assert one.high == pytest.approx(1.0)
    weak = {p.retention: p for p in predictions([parse_scores(r, "r") for r in study(5.0)])}["wikipedia_loss"]
    assert weak.low <= weak.rho <= weak.high
    assert weak.rho < 0.7
    assert weak.high - weak.low > 0.3


def test_seeds_of_one_method_are_not_evidence() -> None:
    few = [parse_scores(r, "r") for r in study(1.0)]
    many = [*few, *(r.model_copy(update={"seed": 9 + n}) for n in range(9) for r in few if r.kind != "base")]
    before, after = ({p.retention: p for p in predictions(runs)}["wikipedia_loss"] for runs in (few, many))
    assert after.runs == 10 * before.runs
    assert after.high - after.low == pytest.approx(before.high - before.low, abs=0.2)


def test_too_few_runs_say_nothing() -> None:
    runs = [parse_scores(r, "r") for r in study(0.0)]
    assert predictions(runs[:FEWEST_RUNS]) == []  # the base is one of them
    assert predictions(runs[1:]) == []  # no base to lose from


def test_it_stands_in_the_comparison(tmp_path: Path) -> None:
    found = build_comparison(study(0.0), tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    assert "over 12 runs of 6 methods" in text
    assert "| drift, text | 1.00 [" in text
    assert len(found.predictions) == 2
