"""A working directory in which everything that the pages name lies under that name, small."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kore_fast.recipe.loading import load_recipe
from kore_fast.recipe.study import _Runner, jobs_of
from python_tests.augmentation.language.server import Reply, Server
from python_tests.constraint.test_official import llava_layout, split, write
from python_tests.data.test_evoke import build

STUDIES = ("tiny_vlm_study", "tiny_vlm_experiments")
STUDY = {"seeds": [0], "match": "lora", "results": "results"}


@pytest.fixture(scope="session")
def tiny_recipe(finished: Path) -> dict[str, Any]:
    """The recipe of the finished run."""
    return dict(yaml.safe_load((finished / "recipe.yaml").read_text()))


@pytest.fixture(scope="session")
def whole_place(
    tmp_path_factory: pytest.TempPathFactory,
    finished: Path,
    tiny_recipe: dict[str, Any],
    tiny_model_folder: Path,
    knowledge_folder: Path,
) -> Path:
    """The directory, to copy only."""
    import torch
    from PIL import Image

    from kore_fast.modules.loading import load_model

    place = tmp_path_factory.mktemp("place")
    for name in ("quickstart", "llava_v1_5_7b", *STUDIES):
        values = {**tiny_recipe, "name": name}
        if name in STUDIES:
            values["study"] = STUDY
        (place / "recipes" / name).mkdir(parents=True)
        (place / "recipes" / name / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        shutil.copytree(finished / "run", place / "runs" / name)
    shutil.copytree(finished / "run" / "train" / "kore" / "adapter", place / "ADAPTER")
    shutil.copytree(tiny_model_folder, place / "BASE")
    shutil.copytree(tiny_model_folder, place / "tiny_vlm")
    write(llava_layout(split(load_model(tiny_model_folder), ("ALinear",)), torch.float32), place / "CHECKPOINT")
    shutil.copytree(knowledge_folder / "images", place / "images")
    shutil.copyfile(knowledge_folder / "items.jsonl", place / "items.jsonl")
    shutil.copytree(finished / "run" / "augment", place / "runs" / "mine" / "augment")
    Image.new("RGB", (40, 40), "red").save(place / "picture.png")
    build(place, prefix="imgs/injection")
    evoke_questions(place)
    return place


def evoke_questions(folder: Path) -> None:
    """EVOKE's evaluation file, of three questions about the pictures of its injection file."""
    images = sorted((folder / "imgs" / "injection" / "wikidata_imgs").iterdir())
    rows = []
    for number, image in enumerate(images, start=1):
        copy = folder / "imgs" / "evaluation" / "eval_wikidata_imgs" / image.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image, copy)
        question = {
            "question_id": number,
            "image": f"eval_wikidata_imgs/{image.name}",
            "text": f"What is it, {number}?",
        }
        rows.append({**question, "answer": "red", "type": "thing", "cnn_wiki_type": "wiki"})
    (folder / "evoke_evaluation_data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def place(whole_place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the directory, in which the test runs."""
    shutil.copytree(whole_place, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    # No key of the developer's is sent anywhere.
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return tmp_path / "place"


@pytest.fixture
def server() -> Iterator[Server]:
    """What answers where the pages say http://localhost:8000/v1: the writer's questions, and those about pictures."""

    def answer(body: dict[str, Any], times: int) -> Reply:
        shows = any(not isinstance(message["content"], str) for message in body["messages"])
        return Reply(content="It is red.") if shows else Reply()

    with Server(answer) as running:
        yield running


def keep_scores(place: Path) -> None:
    """As if the jobs of the studies had run: their scores are kept."""
    for name in STUDIES:
        file, run = place / "recipes" / name / "recipe.yaml", place / "runs" / name
        recipe = load_recipe(file)
        runner = _Runner(file, recipe, run, (), 1, 0.0, print)
        runner._keep(run / "evaluate" / "base" / "scores.json", runner.base, {"method": "base"})
        for job in jobs_of(recipe):
            scores = run / "evaluate" / job.method / "scores.json"
            runner._keep(scores, runner._kept(job), {"method": job.method}, runner._made_from(job))
