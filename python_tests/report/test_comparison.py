"""A study's comparison: means and intervals over seeds, the chosen learning rates, and what equal adaptation means."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from kore_fast.errors import DataError
from kore_fast.intervals import mean_interval
from kore_fast.report import build_comparison
from kore_fast.report.comparison import equal_adaptation
from kore_fast.report.figures import _percent
from kore_fast.report.reading import Scores, pretty


def scores(
    method: str, seed: int, rate: float | None, new: float, capitals: float = 0.4, loss: float | None = 2.9
) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "adaptation_cem": {"value": new, "low": new - 0.05, "high": new + 0.05, "count": 300},
        "capitals": {"value": capitals, "low": capitals - 0.05, "high": capitals + 0.05, "count": 200},
    }
    if loss is not None:
        metrics["wikipedia_loss"] = {"value": loss, "low": loss - 0.1, "high": loss + 0.1, "count": 64}
    settings = {} if rate is None else {"learning_rate": rate}
    return {"method": method, "kind": method, "seed": seed, "trained_parameters": 9, "settings": settings} | {
        "metrics": metrics
    }


BASE = scores("base", 0, None, 0.05, 0.42, 2.8)


@pytest.fixture
def runs() -> list[dict[str, Any]]:
    return [
        BASE,
        scores("lora", 0, 1e-4, 0.40, 0.30, 2.95),
        scores("lora", 0, 3e-4, 0.60, 0.20, 3.3),
        scores("lora", 1, 3e-4, 0.61, 0.21, 3.4),
        scores("lora", 2, 3e-4, 0.65, 0.19, 3.5),
        scores("kore", 0, 1e-3, 0.60, 0.42, 2.82),
        scores("kore", 1, 1e-3, 0.62, 0.40, 2.84),
        scores("full", 0, 1e-5, 0.3),
        scores("full", 1, 1e-5, 0.34),
    ]


def test_means_and_what_the_intervals_are(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    build_comparison(runs, tmp_path)
    with open(tmp_path / "comparison.csv", newline="") as file:
        rows = {(row["method"], row["learning_rate"], row["metric"]): row for row in csv.DictReader(file)}
    lora = rows["lora", "0.0003", "wikipedia_loss"]
    assert float(lora["mean"]) == pytest.approx(3.4)
    assert (float(lora["low"]), float(lora["high"])) == pytest.approx(mean_interval([3.3, 3.4, 3.5]))
    assert (lora["seeds"], lora["interval"], lora["selected"]) == ("3", "Student's t, 95 %", "yes")
    kore = rows["kore", "0.001", "adaptation_cem"]
    assert (float(kore["low"]), float(kore["high"]), kore["interval"]) == (0.60, 0.62, "lowest to highest")
    grid = rows["lora", "0.0001", "capitals"]
    assert (float(grid["low"]), grid["interval"], grid["selected"]) == (0.25, "one run, 95 % over questions", "no")
    assert rows["base", "", "capitals"]["selected"] == "yes"


def test_the_interval_of_a_share_stays_possible(tmp_path: Path) -> None:
    outcome = build_comparison(
        [scores("kore", seed, 1e-3, value) for seed, value in enumerate([0.9, 0.99, 0.6])], tmp_path
    )
    assert outcome.groups[0].spreads["adaptation_cem"].high == 1.0


def test_the_table_shows_the_selected_rates_only(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    markdown = build_comparison(runs, tmp_path).markdown
    assert (tmp_path / "comparison.md").read_text() == markdown
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["base", "full fine-tuning", "LoRA", "KORE"]
    assert "0.0001" not in markdown
    assert "lowest and highest of two seeds" in markdown
    chosen = build_comparison(runs, tmp_path, selected={"lora": 1e-4}).markdown
    assert "| LoRA | 0.0001 | 1 |" in chosen
    with pytest.raises(DataError, match=r"selected learning rate 0\.5"):
        build_comparison(runs, tmp_path, selected={"lora": 0.5})


def test_equal_adaptation_pairs_only_what_is_equal(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    outcome = {one.method: one for one in build_comparison(runs, tmp_path).equal}
    kore = outcome["kore"]
    assert (kore.pairs, kore.seeds) == (2, (0, 1))
    assert kore.loss_increase == pytest.approx(0.03)
    assert kore.other_loss_increase == pytest.approx(0.55)
    assert kore.loss_ratio == pytest.approx(0.03 / 0.55)
    assert kore.kept["capitals"] == pytest.approx(0.41 / 0.42)
    assert kore.other_kept["capitals"] == pytest.approx(0.205 / 0.42)
    assert "rises by 0.030 with KORE against 0.550 with LoRA (5 % of it)" in kore.sentence()
    assert "of the base's capitals KORE keeps 98 % and LoRA 49 %" in kore.sentence()
    assert outcome["full"].pairs == 0
    assert "nothing to compare" in outcome["full"].sentence()
    written = json.loads((tmp_path / "comparison.json").read_text())["equal_adaptation"]
    assert [one["sentence"] for one in written] == [one.sentence() for one in outcome.values()]


def test_equal_adaptation_is_no_praise_when_kore_loses(tmp_path: Path) -> None:
    runs = [BASE, scores("lora", 0, 1e-4, 0.6, 0.4, 2.9), scores("kore", 0, 1e-3, 0.61, 0.2, 3.3)]
    (one,) = build_comparison(runs, tmp_path).equal
    assert one.loss_ratio == pytest.approx(5.0)
    assert "rises by 0.500 with KORE against 0.100 with LoRA (500 % of it)" in one.sentence()


def test_runs_on_evoke_are_compared_on_its_adaptation(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    """The same table, pairs and picture, where K.A is what was measured in the place of questions about facts."""
    asked = build_comparison(runs, tmp_path / "asked")
    evoke = [{**run, "metrics": dict(run["metrics"])} for run in runs]
    for run in evoke:
        run["metrics"]["evoke_ka"] = run["metrics"].pop("adaptation_cem")
    found = build_comparison(evoke, tmp_path / "evoke")
    assert found.equal == asked.equal
    assert [group.selected for group in found.groups] == [group.selected for group in asked.groups]
    assert (tmp_path / "evoke" / "comparison.png").is_file()


def test_runs_that_learned_nothing_are_not_paired() -> None:
    runs = [BASE, scores("lora", 0, 1e-6, 0.06), scores("kore", 0, 1e-6, 0.06)]
    assert equal_adaptation([Scores.model_validate(run) for run in runs], "kore", "lora").pairs == 0


def test_the_same_seed_is_preferred() -> None:
    runs = [
        BASE,
        scores("lora", 0, 1e-4, 0.60, loss=3.0),
        scores("lora", 1, 1e-4, 0.61, loss=4.0),
        scores("kore", 0, 1e-3, 0.61),
    ]
    one = equal_adaptation([Scores.model_validate(run) for run in runs], "kore", "lora")
    assert one.other_loss_increase == pytest.approx(0.2)


def test_without_losses_or_base_nothing_is_made_up(tmp_path: Path) -> None:
    runs = [scores("lora", 0, 1e-4, 0.6, loss=None), scores("kore", 0, 1e-3, 0.6, loss=None)]
    outcome = build_comparison(runs, tmp_path)
    (one,) = outcome.equal
    assert (one.loss_increase, one.loss_ratio, one.kept) == (None, None, {})
    assert "no retention was measured" in one.sentence()
    assert "Wikipedia" not in outcome.markdown


def test_equal_inputs_give_equal_files_in_any_order(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    build_comparison(runs, tmp_path / "one")
    random.Random(0).shuffle(runs)
    build_comparison(runs, tmp_path / "two")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["comparison.csv", "comparison.json", "comparison.md", "comparison.png"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_hostile_names_stay_in_their_cell(tmp_path: Path) -> None:
    runs = [BASE, scores("a|b<script>\n$x$", 0, 1e-3, 0.6)]
    markdown = build_comparison(runs, tmp_path).markdown
    assert r"| a\|b&lt;script&gt;?$x$ | 0.001 |" in markdown


def test_bad_runs_are_named(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run to compare"):
        build_comparison([], tmp_path)
    with pytest.raises(DataError, match=r"two runs of 'lora' with learning rate 0.0003 and seed 1"):
        build_comparison([*runs, runs[3]], tmp_path)
    with pytest.raises(DataError, match="run 2: kind"):
        build_comparison([BASE, {"method": "x", "metrics": {}}], tmp_path)


@pytest.mark.parametrize(
    ("name", "prose"),
    [
        ("lora", "LoRA"),
        ("lora_fa", "LoRA-FA"),
        ("lora_frozen_a", "LoRA (frozen A)"),
        ("kore_no_augmentation", "KORE (no augmentation)"),
        ("lora_null_2", "LoRA-Null (2)"),
        ("no_vqa", "no VQA"),
        ("a_quarter", "a quarter"),
        ("koret", "koret"),
        ("_", "_"),
    ],
)
def test_names_in_prose(name: str, prose: str) -> None:
    assert pretty(name) == prose


@pytest.mark.parametrize(("low", "high"), [(0.512, 0.6), (0.0, 0.5), (0.141, 0.149), (0.02, 0.95), (0.3, 0.3004)])
def test_no_tick_of_a_share_is_rounded(low: float, high: float) -> None:
    figure = Figure()
    axis = figure.subplots()
    axis.plot([low, high], [0, 1])
    _percent(axis.xaxis)
    figure.canvas.draw()
    for place, label in zip(axis.get_xticks(), axis.get_xticklabels(), strict=True):
        assert float(label.get_text().removesuffix("%").replace("−", "-")) == pytest.approx(100 * place, abs=1e-6)
