"""Every block of Python on the pages is run, every piece of a recipe is read by its schema, every line of JSON too."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

import kore_fast as kf
from kore_fast.data.items import Item
from kore_fast.modules.loading import load_model
from kore_fast.recipe.loading import load_recipe
from kore_fast.recipe.schema import Recipe
from python_tests.docs.pages import PAGES, ROOT, Found, blocks, inline_keys

# What is as wide as a real model on the pages, and fits none of the tiny one's layers.
SMALLER = {"256": "8"}
ELSEWHERE = {"SFTTrainer": "python_tests/training/test_sft.py"}
"""Word in a block that needs a package which the tests' environment lacks (TRL) → the test that runs it where there is
one. Here the block is compiled only."""

PYTHON = {page: found for page in PAGES if (found := blocks(page, "python"))}


def code(block: Found) -> str:
    """The block, for the tiny model."""
    text = block.text
    for wide, narrow in SMALLER.items():
        text = text.replace(wide, narrow)
    return text


def presupposed(place: Path, processor: Any, finished: Path) -> dict[str, Any]:
    """What the pages speak of without making it; anew for each block, as blocks change models in place."""
    import accelerate
    import transformers

    torch.manual_seed(0)
    ids = torch.randint(4, 200, (4, 24))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(2)]
    model = load_model(place / "BASE")
    linear = torch.nn.Linear(16, 12)
    x = torch.randn(64, 16, dtype=torch.float64)
    rows = [{"input_ids": part, "labels": part} for part in ids]
    adapter = finished / "run" / "train" / "kore" / "adapter"
    return {
        "kf": kf,
        "model": model,
        "base": load_model(place / "BASE"),
        "adapted": kf.load_kore_model(load_model(place / "BASE"), adapter, is_trainable=True),
        "processor": processor,
        "batches": batches,
        "store": kf.CovarianceStore.load(finished / "run" / "covariance"),
        "linear": linear,
        "covariance": x.T @ x,
        "data": rows,
        "args": transformers.TrainingArguments("out", use_cpu=True, report_to=[], max_steps=1, save_steps=1),
        "accelerator": accelerate.Accelerator(cpu=True),
    }


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_of_python(
    page: Path, place: Path, finished: Path, tiny_processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = finished / "run" / "train" / "kore" / "adapter"
    shutil.copytree(adapter, place / "adapter")
    (place / "store").mkdir()
    names: dict[str, Any] = {}
    for block in PYTHON[page]:
        compiled = compile(code(block), str(block), "exec")
        if missing := [word for word in ELSEWHERE if word in block.text]:
            assert missing[0] in (ROOT / ELSEWHERE[missing[0]]).read_text(encoding="utf-8")
            continue
        names |= presupposed(place, tiny_processor, finished)
        if "store-of-others" in block.text:
            kf.collect_covariance(names["base"], names["batches"], source="others").save(
                "store-of-others/others.safetensors"
            )
        if page.name == "train.md":  # which begins with a model that is KORE's
            names["model"] = names["adapted"]
        exec(compiled, names)
        if "trainer = " in block.text:
            names["trainer"].train()
        if "save_pretrained" in block.text or "save_kore_adapter" in block.text:
            # What the pages promise: it loads where kore_fast is not used.
            from peft import PeftModel

            loaded = PeftModel.from_pretrained(load_model(place / "BASE"), str(place / "adapter"))
            assert any("lora_A" in name for name, _ in loaded.named_parameters())


def laid_over(tiny: dict[str, Any], piece: dict[str, Any], folder: Path) -> Recipe:
    """The tiny recipe with the piece's sections in the place of its own."""
    path = folder / "piece.yaml"
    path.write_text(yaml.safe_dump({**tiny, **piece}, sort_keys=False))
    return load_recipe(path)


@pytest.mark.parametrize("block", [block for page in PAGES for block in blocks(page, "yaml")], ids=str)
def test_pieces_of_recipes(block: Found, tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    piece = yaml.safe_load(block.text)
    recipe = laid_over(tiny_recipe, piece, tmp_path)
    for section, given in piece.items():
        for key in given if section != "methods" else ():
            assert getattr(recipe, section).model_fields_set >= {key}


def of_a_recipe(found: Found) -> dict[str, Any] | None:
    try:
        value = yaml.safe_load(found.text)
    except yaml.YAMLError:
        return None
    sections = isinstance(value, dict) and all(isinstance(section, dict) for section in value.values())
    return value if sections and set(value) <= set(Recipe.model_fields) else None


INLINE = [found for page in PAGES for found in inline_keys(page) if of_a_recipe(found)]


@pytest.mark.parametrize("found", INLINE, ids=str)
def test_pieces_of_recipes_in_the_text(found: Found, tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    piece = of_a_recipe(found)
    assert piece is not None
    laid_over(tiny_recipe, piece, tmp_path)


# LLaMA-Factory's, Axolotl's and DeepSpeed's.
OF_OTHERS = {"adapter_name_or_path", "lora_model_dir", "bf16", "torch_autocast"}


@pytest.mark.parametrize("found", [f for page in PAGES for f in inline_keys(page)], ids=str)
def test_keys_in_the_text_are_known(found: Found) -> None:
    key = found.text.partition(":")[0]
    if key in OF_OTHERS:
        return
    assert f"{key}:" in known_keys(), (
        f"{found}: no option of a recipe, its methods or an augmentation is called {key!r}"
    )


def known_keys() -> str:
    """The lines of the modules that hold the options, where each stands as ``key: type``."""
    files = [ROOT / "kore_fast" / "recipe" / name for name in ("schema.py", "loading.py")]
    files += (ROOT / "kore_fast" / "augmentation").rglob("*.py")
    files.append(ROOT / "kore_fast" / "endpoint" / "options.py")
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


@pytest.mark.parametrize("block", [block for page in PAGES for block in blocks(page, "json")], ids=str)
def test_lines_of_json(block: Found) -> None:
    for line in block.text.splitlines():
        row = json.loads(line)
        try:
            item = Item.model_validate(row)
        except ValidationError as error:
            raise AssertionError(f"{block}: {error}") from None
        assert item.model_dump(exclude_defaults=True).keys() == row.keys()


def test_blocks_speak_of_what_the_package_offers() -> None:
    wanted = set()
    for page, found in PYTHON.items():
        for block in found:
            tree = ast.parse(block.text, str(page))
            wanted |= {
                node.attr
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "kf"
            }
    assert wanted - set(kf.__all__) == set()
