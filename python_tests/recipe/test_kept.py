"""Kept scores: what makes them stale, what does not, and that they outlive the data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kore_fast.recipe.kept import file_digests, options_digest, still_fits
from kore_fast.recipe.loading import load_recipe
from kore_fast.recipe.schema import Recipe
from python_tests.conftest import recipe_text

MORE = """
samples: { file: data/samples.json, images: data }
model: { path: model }
evaluation: { evoke: data/evoke.jsonl }
study: { depends_on: [data/extra.txt] }
extends: base.yaml
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_model_folder: Path, knowledge_folder: Path) -> Path:
    """A recipe that names every kind of file, beside its model and its data."""
    shutil.copytree(knowledge_folder, tmp_path / "data")
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    (tmp_path / "base.yaml").write_text(recipe_text(tiny_model_folder, Path("data")))
    (tmp_path / "recipe.yaml").write_text(MORE)
    for name in ("samples.json", "source.json"):
        (tmp_path / "data" / name).write_text("[]")
    (tmp_path / "data" / "extra.txt").write_text("extra")
    shutil.copy(tmp_path / "data" / "images" / "red.png", tmp_path / "data" / "images" / "asked.png")
    question = {"question_id": "q", "image": "images/asked.png", "text": "Where?", "answer": "hills"}
    (tmp_path / "data" / "evoke.jsonl").write_text(json.dumps({**question, "type": "home", "cnn_wiki_type": "wiki"}))
    return tmp_path


def read(folder: Path, **settings: object) -> Recipe:
    source = {"kind": "samples", "file": "data/source.json"}
    given = {"covariance.sources.more": source, **{key.replace("__", "."): v for key, v in settings.items()}}
    return load_recipe(folder, {key: json.dumps(value) for key, value in given.items()})


def note(recipe: Recipe) -> tuple[str, dict[str, str]]:
    method = next(method for name, method in recipe.methods.items() if name.startswith("kore"))
    return options_digest(recipe, method), file_digests(recipe)


def kept(folder: Path) -> dict[str, object]:
    options, files = note(read(folder))
    return {"options": options, "files": files}


NAMED = [
    "data/items.jsonl",
    "data/images/red.png",
    "data/texts.jsonl",
    "data/pictures.jsonl",
    "data/held_out.jsonl",
    "data/samples.json",
    "data/source.json",
    "data/evoke.jsonl",
    "data/images/asked.png",
    "data/extra.txt",
    "model/config.json",
]


@pytest.mark.parametrize("name", NAMED)
def test_a_file_that_changes_makes_scores_stale(folder: Path, name: str) -> None:
    before = kept(folder)
    assert still_fits(before, *note(read(folder)))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content + b"\n")
    assert not still_fits(before, *note(read(folder)))
    (folder / name).write_bytes(content)
    assert still_fits(before, *note(read(folder)))


def test_a_file_that_comes_beside_the_items_does_too(folder: Path) -> None:
    before = kept(folder)
    (folder / "data" / "wordings.yaml").write_text("{}")
    assert not still_fits(before, *note(read(folder)))


@pytest.mark.parametrize("name", ["data", "model", *NAMED[:-1]])
def test_a_file_that_is_not_here_does_not(folder: Path, name: str) -> None:
    before = kept(folder)
    shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    assert still_fits(before, *note(read(folder)))


@pytest.mark.parametrize(
    ("settings", "fits"),
    [
        ({"training__per_device": 2}, True),
        ({"training__checkpoint_every": 3}, True),
        ({"training__gradient_checkpointing": True}, True),
        ({"covariance__max_memory": 10_000_000}, True),
        ({"methods__lora__learning_rate": 5e-3}, True),
        ({"title": "Another"}, True),
        ({"methods__kore__learning_rate": 5e-3}, False),
        ({"training__batch_size": 2}, False),
        ({"covariance__sources__text__samples": 9}, False),
        ({"evaluation__questions": 3}, False),
    ],
)
def test_options_count_that_change_the_figures(folder: Path, settings: dict[str, object], fits: bool) -> None:
    assert still_fits(kept(folder), *note(read(folder, **settings))) is fits


def test_a_model_that_a_script_makes_is_told_by_the_script(folder: Path) -> None:
    """Its bytes may differ from machine to machine."""
    (folder / "build.py").write_text("# makes it")
    options, files = note(read(folder, model__build="build.py"))
    before = {"options": options, "files": files}
    (folder / "model" / "config.json").write_text("{}")
    assert still_fits(before, *note(read(folder, model__build="build.py")))
    (folder / "build.py").write_text("# makes another")
    assert not still_fits(before, *note(read(folder, model__build="build.py")))


def test_an_earlier_run_counts_with_what_it_trained_and_measured(folder: Path) -> None:
    run = folder / "first"
    for name in ("train/kore/adapter/adapter_model.safetensors", "covariance/old.safetensors"):
        (run / name).parent.mkdir(parents=True)
        (run / name).write_text("one")
    change: Callable[[], Recipe] = lambda: read(folder, after={"run": "first"})  # noqa: E731
    options, files = note(change())
    for name in ("train/kore/adapter/adapter_model.safetensors", "covariance/old.safetensors"):
        (run / name).write_text("two")
        assert not still_fits({"options": options, "files": files}, *note(change()))
        (run / name).write_text("one")
    shutil.rmtree(run)
    assert still_fits({"options": options, "files": files}, *note(change()))


def test_a_note_of_an_earlier_version_fits_nothing(folder: Path) -> None:
    assert not still_fits("5f2a", *note(read(folder)))
