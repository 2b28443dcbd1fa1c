"""What a method chooses for itself: its layers, its branches, its mix of covariances."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from kore_fast.cli import main
from kore_fast.constraint.store import CovarianceStore
from kore_fast.data.samples import read_samples
from kore_fast.errors import RecipeError
from kore_fast.modules.adapter import lora_layers
from kore_fast.modules.loading import load_model
from kore_fast.ops.factors import leak
from kore_fast.recipe.loading import load_recipe
from kore_fast.recipe.materials import chosen_samples
from kore_fast.training.methods.interface import open_adapter


@pytest.fixture
def recipe_with(finished: Path, tmp_path: Path) -> Any:
    """Writes the finished run's recipe with other methods beside a copy of the run, whose covariances it uses."""

    def write(**methods: dict[str, Any]) -> Path:
        values = yaml.safe_load((finished / "recipe.yaml").read_text())
        values["methods"] = methods
        values["training"]["steps"] = 2
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        for name in ("augment", "covariance"):
            shutil.copytree(finished / "run" / name, tmp_path / "run" / name, dirs_exist_ok=True)
        return path

    return write


def test_each_method_has_its_layers_and_its_covariance(
    recipe_with: Any, tmp_path: Path, tiny_model_folder: Path
) -> None:
    options = {"kind": "kore", "rank": 8, "learning_rate": 1e-3}
    path = recipe_with(
        all_of_it=options,
        mlp={**options, "layers": {"part": "mlp"}},
        last={**options, "layers": {"depth": "last third"}},
        text={**options, "source_weights": {"text": 1}},
        lora={"kind": "lora", "rank": 4, "learning_rate": 1e-3, "layers": {"part": "attention", "depth": "last third"}},
    )
    recipe = load_recipe(path)
    assert len({recipe.start_of(name) for name in recipe.methods}) == 5
    assert main(["init", str(path), "--run", str(tmp_path / "run")]) == 0
    layers: dict[str, set[str]] = {}
    A: dict[str, Any] = {}
    for name in recipe.methods:
        adapted = open_adapter(load_model(tiny_model_folder), tmp_path / "run" / "init" / name)
        found = lora_layers(adapted)
        layers[name] = set(found)
        A[name] = {layer: module.lora_A["default"].weight.detach() for layer, module in found.items()}
    assert len(layers["all_of_it"]) == 14
    assert layers["mlp"] == {layer for layer in layers["all_of_it"] if ".mlp." in layer}
    assert layers["last"] == {layer for layer in layers["all_of_it"] if ".layers.1." in layer}
    assert layers["lora"] == {layer for layer in layers["last"] if ".self_attn." in layer}
    store = CovarianceStore.load(tmp_path / "run" / "covariance")
    for layer in layers["all_of_it"]:
        # Each is the best for its own mix.
        mixed, text = store.covariance(layer), store.covariance(layer, {"text": 1, "chat": 0, "pictures": 0})
        assert leak(A["text"][layer], text) <= leak(A["all_of_it"][layer], text) * 1.05 + 1e-9
        assert leak(A["all_of_it"][layer], mixed) <= leak(A["text"][layer], mixed) * 1.05 + 1e-9


def test_branches_choose_samples(recipe_with: Any, finished: Path, tmp_path: Path, knowledge_folder: Path) -> None:
    file = finished / "run" / "augment" / "samples.json"
    every = read_samples(file, knowledge_folder)
    path = recipe_with(
        some={"kind": "lora", "rank": 2, "learning_rate": 1e-3, "branches": ["caption", "vqa"]},
        links={"kind": "lora", "rank": 2, "learning_rate": 1e-3, "branches": ["links"]},
    )
    methods = load_recipe(path).methods
    chosen = chosen_samples(methods["some"], file, knowledge_folder)
    assert chosen == [sample for sample in every if sample.branch in ("caption", "vqa")]
    assert 0 < len(chosen) < len(every)
    with pytest.raises(RecipeError, match="no sample of links; there are caption, dialogue, recognition, vqa"):
        chosen_samples(methods["links"], file, knowledge_folder)
    run = str(tmp_path / "run")
    assert main(["init", str(path), "--run", run, "--method", "some"]) == 0
    assert main(["train", str(path), "--run", run, "--method", "some"]) == 0
    settings = json.loads((tmp_path / "run" / "train" / "some" / "settings.json").read_text())
    assert settings["sample_count"] == len(chosen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "lora", "rank": 2, "source_weights": {"text": 1}}, "means nothing for LoRA"),
        ({"kind": "kore", "rank": 2, "source_weights": {"txet": 1}}, "'txet', which is no source"),
        ({"kind": "kore", "rank": 2, "source_weights": {"text": -1}}, "greater than or equal to 0"),
        ({"kind": "lora", "rank": 2, "samples": "knowledge", "branches": ["vqa"]}, "raw knowledge has none"),
        ({"kind": "lora", "rank": 2, "branches": []}, "at least 1 item"),
        ({"kind": "lora", "rank": 2, "layers": {"depth": "half"}}, "first third"),
    ],
)
def test_what_means_nothing_is_refused(recipe_with: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_with(one={"learning_rate": 1e-3, **options}))
