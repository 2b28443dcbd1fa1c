"""Recipes: unknown keys with the nearest known one, wrong values, extending, overriding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from kore_fast.errors import RecipeError
from kore_fast.recipe.loading import load_plan, load_recipe

MINIMAL: dict[str, Any] = {
    "name": "small",
    "model": {"path": "model"},
    "items": "items.jsonl",
    "augmentation": {},
    "old_knowledge": {"texts": "texts.jsonl"},
    "covariance": {"sources": {"wiki": {"kind": "text"}}},
    "methods": {"lora": {"kind": "lora", "rank": 4, "learning_rate": 1e-3}},
    "training": {"steps": 5},
    "evaluation": {},
}


def changed(key: str, value: Any) -> dict[str, Any]:
    values = yaml.safe_load(yaml.safe_dump(MINIMAL))
    *parents, last = key.split(".")
    section = values
    for parent in parents:
        section = section[parent]
    section[last] = value
    return values


def write(folder: Path, values: Any, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


def test_paths_are_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    recipe = load_recipe(write(tmp_path, MINIMAL).parent)
    assert recipe.resolve(recipe.items) == tmp_path / "items.jsonl"
    assert recipe.model_path() == str(tmp_path / "model")
    (tmp_path / "model").rmdir()
    assert load_recipe(tmp_path).model_path() == "model"


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("trainin", "training"),
        ("model.pth", "path"),
        ("augmentation.sed", "seed"),
        ("old_knowledge.text", "texts"),
        ("covariance.batchsize", "batch_size"),
        ("covariance.sources.wiki.sample", "samples"),
        ("methods.lora.learnig_rate", "learning_rate"),
        ("training.step", "steps"),
        ("evaluation.capital", "capitals"),
    ],
)
def test_misspelt_key_in_every_section(tmp_path: Path, key: str, near: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, changed(key, 1)))
    assert f"recipe.yaml: {key}: unknown key; did you mean {near!r}?" in str(caught.value)


def test_unknown_key_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"training\.zzz: unknown key; known here: accumulation, batch_size"):
        load_recipe(write(tmp_path, changed("training.zzz", 1)))


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("training.epochs", 2, "one of 'steps' and 'epochs'"),
        ("training.steps", 0, "training.steps"),
        ("training.steps", "many", "training.steps"),
        ("training.warmup_ratio", 1.0, "training.warmup_ratio"),
        ("training.precision", "fp8", "training.precision"),
        ("methods.lora.learning_rate", -1, "methods.lora.learning_rate"),
        ("methods.lora.rank", None, "needs a rank"),
        ("methods.lora.rank", 0, "rank=0: want at least 1"),
        ("methods.lora.rank", "many", "rank='many': want a number"),
        ("methods.lora.rank", {"energy": 1e-4}, "LoRA takes a number"),
        ("methods.k", {"kind": "kore", "learning_rate": 1, "rank": {"energie": 1e-4}}, "did you mean 'energy'?"),
        ("methods.k", {"kind": "kore", "learning_rate": 1, "rank": {"energy": 2}}, "methods.k.rank"),
        ("methods.lora.kind", "dora", "methods.lora.kind"),
        ("methods.lora", {"kind": "full", "learning_rate": 1, "rank": 3}, "means nothing for full"),
        ("methods.k", {"kind": "kore", "learning_rate": 1, "rank": 3, "weight_decay": 0.1}, "weight_decay=0.1"),
        ("methods.k", {"kind": "kore", "learning_rate": 1, "rank": 3, "lora_dropout": 0.1}, "lora_dropout=0.1"),
        ("methods.k", {"kind": "kore", "learning_rate": 1, "rank": 3, "alpha": 2}, "alpha"),
        ("methods.k", {"kind": "kore", "learning_rate": 1, "rank": 3, "corda_mode": "kpm"}, "nothing for KORE"),
        ("methods.c", {"kind": "corda", "learning_rate": 1, "rank": 3, "corda_mode": "kpa"}, "corda_mode"),
        ("methods.p", {"kind": "pissa", "learning_rate": 1}, "kind 'pissa' needs a rank"),
        ("methods.p", {"kind": "pissa", "learning_rate": 1, "rank": {"energy": 1e-4}}, "PiSSA takes a number"),
        ("methods.p", {"kind": "pissa", "learning_rate": 1, "rank": 3, "lora_dropout": 0.1}, "has no dropout"),
        ("methods.o", {"kind": "osf", "learning_rate": 1, "rank": 3}, "which takes effective_rank"),
        ("methods.o", {"kind": "osf", "learning_rate": 1, "effective_rank": 1.5}, "a share of them between 0 and 1"),
        ("methods.o", {"kind": "osf", "learning_rate": 1, "projector_learning_rate": 1}, "cannot hold a projector"),
        ("methods.m", {"kind": "mica", "learning_rate": 1, "rank": 3, "freeze_a": True}, "freezes B and trains A"),
        ("methods.f", {"kind": "lora_fa", "learning_rate": 1, "rank": 3, "freeze_a": False}, "always frozen"),
        ("methods.lora.replay", 1, "methods.lora.replay"),
        ("methods.lora.replay", 0, "methods.lora.replay"),
        ("methods.lora.ewc", {}, "methods.lora.ewc.strength: missing"),
        ("methods.lora.ewc", {"strengt": 1}, "did you mean 'strength'?"),
        ("methods.lora.lwf", {"temperature": 0}, "methods.lora.lwf.temperature"),
        (
            "methods.l",
            {"kind": "lora", "learning_rate": 1, "rank": 3, "freeze_a": True, "weight_decay": 0.1},
            "weight_decay=0.1",
        ),
        ("methods.base", {"kind": "full", "learning_rate": 1}, "'base' is taken"),
        ("methods", ["lora"], "methods"),
        ("methods", None, "methods"),
        ("covariance.sources.wiki.kind", "pictures", "old_knowledge.pictures"),
        ("covariance.sources.wiki.positions", {"prmpt": 0}, "prmpt"),
        ("covariance.sources.wiki.weight", -1, "covariance.sources.wiki.weight"),
        ("base_folder", "/", "base_folder"),
        ("name", None, "name"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, key: str, value: Any, named: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, changed(key, value)))
    assert "recipe.yaml" in str(caught.value)
    assert named in str(caught.value)


@pytest.mark.parametrize("missing", ["name", "model", "items", "methods", "training"])
def test_missing_key_is_named(tmp_path: Path, missing: str) -> None:
    values = {key: value for key, value in MINIMAL.items() if key != missing}
    with pytest.raises(RecipeError, match=rf"{missing}: "):
        load_recipe(write(tmp_path, values))


@pytest.mark.parametrize("kind", ["kore", "corda", "lora_null"])
def test_some_kinds_need_covariances(tmp_path: Path, kind: str) -> None:
    values = changed("methods.mine", {"kind": kind, "rank": 4, "learning_rate": 1})
    del values["covariance"]
    with pytest.raises(RecipeError, match="'mine' needs covariances"):
        load_recipe(write(tmp_path, values))


@pytest.mark.parametrize(("given", "read"), [(8, 8), (8.0, 8), ("4e1", 40), (0.25, 0.25)])
def test_directions_are_a_number_or_a_share(tmp_path: Path, given: Any, read: float) -> None:
    values = changed("methods.o", {"kind": "osf", "learning_rate": 1, "effective_rank": given})
    found = load_recipe(write(tmp_path, values)).methods["o"].effective_rank
    assert found == read
    assert type(found) is type(read)


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    text = yaml.safe_dump(MINIMAL).replace("learning_rate: 0.001", "learning_rate: 2e-4")
    assert "2e-4" in text
    assert load_recipe(write(tmp_path, text)).methods["lora"].learning_rate == 2e-4


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "", "\t- x: {"])
def test_files_that_are_no_recipes(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml: "):
        load_recipe(write(tmp_path, text))


def test_no_such_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path)


def test_extends_changes_what_is_given(tmp_path: Path) -> None:
    write(tmp_path, changed("methods.second", {"kind": "lora", "rank": 2, "learning_rate": 1}))
    short = {
        "extends": "recipe.yaml",
        "name": "short",
        "training": {"batch_size": 2},
        "methods": {"lora": None, "second": {"rank": 3}},
    }
    recipe = load_recipe(write(tmp_path, short, "short.yaml"))
    assert recipe.name == "short"
    assert (recipe.training.steps, recipe.training.batch_size) == (5, 2)
    assert list(recipe.methods) == ["second"]
    assert (recipe.methods["second"].rank, recipe.methods["second"].learning_rate) == (3, 1)


def test_extends_in_a_circle_or_elsewhere(tmp_path: Path) -> None:
    write(tmp_path, {"extends": "b.yaml"}, "a.yaml")
    write(tmp_path, {"extends": "a.yaml"}, "b.yaml")
    with pytest.raises(RecipeError, match="extends it in turn"):
        load_recipe(tmp_path / "a.yaml")
    (tmp_path / "sub").mkdir()
    write(tmp_path, MINIMAL)
    write(tmp_path / "sub", {"extends": "../recipe.yaml"})
    with pytest.raises(RecipeError, match="in another folder"):
        load_recipe(tmp_path / "sub")
    write(tmp_path, {"extends": "gone.yaml"}, "c.yaml")
    with pytest.raises(RecipeError, match=r"gone\.yaml: no such recipe"):
        load_recipe(tmp_path / "c.yaml")


def test_set_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    recipe = load_recipe(path, {"training.steps": "9", "methods.lora.rank": "2", "evaluation.capitals": "false"})
    assert (recipe.training.steps, recipe.methods["lora"].rank, recipe.evaluation.capitals) == (9, 2, False)
    with pytest.raises(RecipeError, match="did you mean 'steps'"):
        load_recipe(path, {"training.stps": "9"})
    with pytest.raises(RecipeError, match=r"--set name\.x: name is not a section"):
        load_recipe(path, {"name.x": "9"})
    with pytest.raises(RecipeError, match="not a YAML value"):
        load_recipe(path, {"training.steps": "[9"})


def test_a_key_that_comes_twice_is_refused(tmp_path: Path) -> None:
    text = yaml.safe_dump(MINIMAL) + "seed: 1\nseed: 2\n"
    with pytest.raises(RecipeError, match="'seed' comes twice"):
        load_recipe(write(tmp_path, text))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"language_model.modell": "m"}, "language_model.modell: unknown key; did you mean 'model'?"),
        ({"language_model": "gpt-4o"}, "--set: language_model: want keys and values, as in {key: value}, found str"),
        ({"vqa": "many"}, "--set: vqa: "),
        ({"vqa": "3", "vqa.count": "3"}, "--set vqa.count: vqa is not a section of the augmentation"),
    ],
)
def test_options_without_a_recipe_are_blamed_on_the_command_line(
    tmp_path: Path, given: dict[str, str], said: str
) -> None:
    (tmp_path / "items.jsonl").write_text("")
    with pytest.raises(RecipeError) as raised:
        load_plan(tmp_path / "items.jsonl", given)
    assert said in str(raised.value)
    assert "items.jsonl" not in str(raised.value)
