"""The experiments on the tiny VLM: their recipes hold, their committed results are of what the recipes say now."""

from __future__ import annotations

import csv
import json
import runpy
import shutil
from pathlib import Path

import pytest

from kore_fast.cli import main
from kore_fast.files import read_json
from kore_fast.recipe.dry_run import dry_run
from kore_fast.recipe.loading import load_recipe
from kore_fast.recipe.study import jobs_of

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
DATA = RECIPES / "quickstart" / "data"
STUDIES = ("tiny_vlm_study", "tiny_vlm_experiments")
SEQUENTIAL = ("recipe", "second", "second_lora")


def test_the_parts_of_the_items_are_theirs_and_do_not_meet() -> None:
    every, first, second = (
        (DATA / f"{name}.jsonl").read_text().splitlines() for name in ("items", "sixteen", "another_sixteen")
    )
    assert first == every[0::4]
    assert second == every[2::4]


@pytest.mark.parametrize("name", [*STUDIES, *(f"tiny_vlm_sequential/{part}.yaml" for part in SEQUENTIAL)])
def test_it_passes_its_dry_run(name: str) -> None:
    assert dry_run(load_recipe(RECIPES / name)).problems == []


@pytest.mark.parametrize("name", STUDIES)
def test_kept_scores_are_of_what_the_study_says(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stale ones would not be counted: the committed comparison is what the committed scores give."""
    folder = RECIPES / name
    kept = sorted(path.stem for path in (folder / "results" / "runs").glob("*.json") if path.stem != "base")
    known = {job.name: job for job in jobs_of(load_recipe(folder))}
    assert set(kept) <= set(known)
    notes = [read_json(folder / "results" / "runs" / f"{job}.json")["made_from"] for job in kept]
    assert len({note["options"] for note in notes}) == len(notes)
    # What is in the repository, in the packages of fixed versions or makes the model: the same on every machine.
    old = ("texts", "pictures", "held_out_pictures")
    wanted = {"items", "model", "study.depends_on", *(f"old_knowledge.{name}" for name in old)}
    assert all(set(note["files"]) == wanted for note in notes)
    results = tmp_path / "results"
    results.mkdir()
    (results / "runs").symlink_to(folder / "results" / "runs")
    changed = f"study.results={json.dumps(str(results))}"
    assert main(["compare", str(folder), "--table", "--set", changed, "--run", str(tmp_path / "run")]) == 0
    assert (results / "comparison.md").read_text() == (folder / "results" / "comparison.md").read_text()
    rows = list(csv.DictReader((results / "comparison.csv").open()))
    shown = {(row["method"], float(row["learning_rate"])) for row in rows if row["method"] != "base"}
    assert shown == {(job.method, job.learning_rate) for job in map(known.__getitem__, kept)}


@pytest.mark.parametrize("name", STUDIES)
def test_kept_scores_outlive_the_data(name: str, tmp_path: Path) -> None:
    """In another checkout, where no model is built and no package fetched yet."""
    for folder in (name, "tiny_vlm", "quickstart"):
        shutil.copytree(RECIPES / folder, tmp_path / "recipes" / folder)
    committed = (RECIPES / name / "results" / "comparison.csv").read_text()
    (tmp_path / "recipes" / name / "results" / "comparison.csv").unlink()
    command = ["compare", str(tmp_path / "recipes" / name), "--table", "--run", str(tmp_path / "run")]
    assert main(command) == 0
    assert (tmp_path / "recipes" / name / "results" / "comparison.csv").read_text() == committed


def test_the_sequence_runs_in_small(
    tiny_model_folder: Path,
    knowledge_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each of its runs, as its README gives them: what the first has injected is asked again after the second."""
    monkeypatch.chdir(tmp_path)
    knowledge = str(knowledge_folder)
    changed = {
        "model": {"path": str(tiny_model_folder), "build": None, "config": None},
        "items": f"{knowledge}/items.jsonl",
        "old_knowledge": {
            "texts": f"{knowledge}/texts.jsonl",
            "pictures": f"{knowledge}/pictures.jsonl",
            "held_out_pictures": f"{knowledge}/held_out.jsonl",
        },
        "training.steps": 2,
        "training.checkpoint_every": 2,
        "evaluation": {"questions": 4, "capitals": False, "texts": 4, "pictures": 2, "max_new_tokens": 4},
    }
    ranks = {
        "recipe": {"kore": 8, "lora": 4},
        "second": {"kore": 8, "first_heavy": 8, "unaware": 8},
        "second_lora": {"lora": 4},
    }
    for part in SEQUENTIAL:
        path = RECIPES / "tiny_vlm_sequential" / f"{part}.yaml"
        settings = dict(changed)
        settings |= {f"methods.{method}.rank": rank for method, rank in ranks[part].items()}
        if part != "second_lora":
            for name in load_recipe(path).covariance.sources:  # type: ignore[union-attr]
                settings[f"covariance.sources.{name}.samples"] = 4
        if part != "recipe":
            settings |= {"after.run": str(tmp_path / "runs" / "tiny_vlm_sequential"), "after.images": knowledge}
        if part == "second":
            source = "covariance.sources.first"
            made = tmp_path / "runs" / "tiny_vlm_sequential" / "augment" / "samples.json"
            settings |= {f"{source}.file": str(made), f"{source}.images": knowledge}
        given = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
        assert main(["run", str(path), *given]) == 0
        if part != "recipe":
            for method in ("base", *ranks[part]):
                run = tmp_path / "runs" / f"tiny_vlm_sequential_{part}"
                assert "earlier_cem" in read_json(run / "evaluate" / method / "scores.json")["metrics"]
    capsys.readouterr()
    script = runpy.run_path(str(RECIPES / "tiny_vlm_sequential" / "leak_by_source.py"))
    script["main"]([str(tmp_path / "runs" / "tiny_vlm_sequential_second")])
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    leaks = {(row["source"], row["start"]): float(row["leak"]) for row in rows}
    assert {start for _, start in leaks} == set(ranks["second"])
    assert leaks["first", "first_heavy"] < leaks["first", "kore"] < leaks["first", "unaware"]
