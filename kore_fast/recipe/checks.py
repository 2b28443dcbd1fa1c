"""What can be known to be wrong before any long work starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kore_fast.errors import ConstraintError, RecipeError
from kore_fast.files import read_json
from kore_fast.recipe.materials import earlier_adapter
from kore_fast.recipe.schema import Recipe

# Of a saved configuration, what says nothing about the architecture.
_ASIDE = {"transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "_attn_implementation"}


def prepare(recipe: Recipe) -> None:
    """Make the model's folder where the recipe says how, and find what is wrong before any long work.

    Raises:
        KoreError: an item, a picture or a text that cannot be used, a rank too large for the model.
    """
    from kore_fast.data.evoke import check_question_images, read_evoke_questions
    from kore_fast.data.items import load_items
    from kore_fast.data.old_knowledge import read_pictures, read_texts
    from kore_fast.evaluation.lmms import check_retention

    for method in recipe.methods.values():
        method.way.check_available()
    missing = missing_data(recipe)
    if missing and recipe.where:
        raise RecipeError("; ".join(missing))
    load_items(recipe.resolve(recipe.items), skip=_ignore if recipe.augmentation.skip_bad_items else None)
    if recipe.model.build is not None:
        script = recipe.resolve(recipe.model.build)
        if not script.is_file():
            raise RecipeError(f"model.build: {script} is not there")
        command = [sys.executable, str(script), "--output", recipe.model_path()]
        status = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
        if status:
            raise RecipeError(f"{script} could not build the model: it ended with status {status}, see above")
    old = recipe.old_knowledge
    if old.texts is not None:
        read_texts(recipe.resolve(old.texts), held_out=True)
    if old.pictures is not None:
        read_pictures(recipe.resolve(old.pictures), check_images=True)
    if old.held_out_pictures is not None:
        read_pictures(recipe.resolve(old.held_out_pictures), need_choices=True, check_images=True)
    if recipe.evaluation.evoke is not None:
        evoke = recipe.resolve(recipe.evaluation.evoke)
        questions = read_evoke_questions(evoke, check_images=False)[: recipe.evaluation.evoke_questions]
        check_question_images(evoke, questions)
    if recipe.evaluation.retention is not None:
        benchmarks = recipe.evaluation.retention
        data = None if benchmarks.data is None else recipe.resolve(benchmarks.data)
        check_retention(benchmarks.benchmarks, data=data, judge=benchmarks.judge)
    check_after(recipe)
    model = model_without_weights(recipe, given=True)
    check_ranks(recipe, model)
    check_projector(recipe, model)


def missing_data(recipe: Recipe) -> list[str]:
    """What the recipe names and is not there: a sentence for all that comes from one place, with where to get it."""
    lacking: dict[str, list[str]] = {}
    for key, path in recipe.data().items():
        there = recipe.resolve(path)
        if not there.exists():
            hint = recipe.where_to_get(path) or "correct the path or put it there"
            lacking.setdefault(hint, []).append(f"{key}: {there}")
    return [f"not there: {', '.join(paths)}; {hint}" for hint, paths in lacking.items()]


def model_without_weights(recipe: Recipe, *, given: bool = False) -> nn.Module:
    """The recipe's model on the meta device: by its own configuration where it can be had, else by ``model.config``.

    Args:
        given: the model itself must be there.

    Raises:
        RecipeError: neither is to be had, transformers knows no such model, or the two differ; names what differs.
    """
    config = _own_config(recipe, given=given)
    if recipe.model.config is not None:
        told = _told_config(recipe.resolve(recipe.model.config))
        if config is not None:
            different = differences(told.to_dict(), config.to_dict())
            if different:
                raise RecipeError(
                    f"model.config: {recipe.model.path} is another model than {recipe.model.config} says: "
                    + "; ".join(different[:5])
                )
        config = config or told
    assert config is not None, "without model.config the model's own is asked for"
    return _build(config, recipe.model.path)


def _own_config(recipe: Recipe, *, given: bool) -> Any:
    from transformers import AutoConfig

    folder = Path(recipe.model_path())
    if not folder.exists() and recipe.model.config is not None and not given:
        return None  # a dry run needs no hub
    try:
        return AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        hint = recipe.where_to_get(recipe.model.path)
        raise RecipeError(
            f"model.path: no model that transformers loads at {folder} ({reason})" + (f"; {hint}" if hint else "")
        ) from None


def _told_config(file: Path) -> Any:
    from transformers import AutoConfig

    values = read_json(file)
    kind = values.pop("model_type", None) if isinstance(values, dict) else None
    values.pop("//", None)
    try:
        return AutoConfig.for_model(str(kind), **values)
    except (ValueError, TypeError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise RecipeError(f"model.config: {file}: not a model that this transformers knows ({reason:.200})") from None


def _build(config: Any, path: str) -> nn.Module:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    family = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return family.from_config(config).eval()
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise RecipeError(f"model.path: no model that transformers loads at {path} ({reason})") from None


# What a linear's shape and number follow from, in the language model or the vision tower.
_DIMENSIONS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "depth",
    "num_heads",
    "out_hidden_size",
    "patch_size",
    "spatial_merge_size",
    "image_size",
    "tie_word_embeddings",
)


def differences(told: dict[str, Any], own: dict[str, Any], where: str = "") -> list[str]:
    """What of the architecture differs between two configurations, a phrase each."""
    found = []
    for key, value in told.items():
        if key not in own or key in _ASIDE:
            continue
        place = f"{where}{key}"
        if isinstance(value, dict) and isinstance(own[key], dict):
            found += differences(value, own[key], f"{place}.")
        elif key in _DIMENSIONS and value != own[key]:
            found.append(f"{place} is {own[key]}, not {value}")
    return found


def check_ranks(recipe: Recipe, model: nn.Module) -> None:
    """Raises `ConstraintError` where a method's rank is larger than the width of a layer, or no layer is found."""
    from kore_fast.constraint import select_linears
    from kore_fast.constraint.ranks import parse_rank_choice

    for name, method in recipe.methods.items():
        layers = {one: model.get_submodule(one) for one in select_linears(model, recipe.targets_of(model, method))}
        shapes = {one: (int(layer.out_features), int(layer.in_features)) for one, layer in layers.items()}  # type: ignore[arg-type]
        narrowest = min(shapes, key=lambda one: min(shapes[one]))
        width = min(shapes[narrowest])
        lowest = None if method.rank is None else parse_rank_choice(method.rank).lowest
        if lowest is not None and lowest > width:
            raise ConstraintError(
                f"method {name!r}: rank {lowest} is larger than the width of {narrowest} "
                f"{shapes[narrowest]}; choose at most {width}"
            )
        if isinstance(method.effective_rank, int) and method.effective_rank >= width:
            raise ConstraintError(
                f"method {name!r}: effective_rank {method.effective_rank} keeps every direction of {narrowest} "
                f"{shapes[narrowest]} as it is, nothing would be trained; choose fewer, or a share below 1"
            )


def check_after(recipe: Recipe) -> None:
    """Raises `RecipeError` where a run on top of another one, as far as that is there, would lose what that has, or
    names what it has not."""
    if recipe.after is None:
        return
    trained = recipe.resolve(recipe.after.run) / "train" / recipe.after.method
    adapter = earlier_adapter(recipe)
    config = adapter / "adapter_config.json"
    if trained.is_dir() and not config.is_file():
        raise RecipeError(
            f"after.method: {trained} holds no adapter: go on from a method that trained one, or give a whole model's "
            "folder as model.path"
        )
    if config.is_file() and read_json(config).get("peft_type") != "LORA":
        raise RecipeError(
            f"after.method: {adapter} is no LoRA adapter, so that it and another cannot become one for the untouched "
            "base: go on from another method"
        )
    before = recipe.taken_over()
    own = list(recipe.covariance.sources) if recipe.covariance is not None else []
    twice = next((name for name in own if name in before), None)
    if twice is not None:
        raise RecipeError(
            f"covariance source {twice!r}: {recipe.after.run} has one of that name, whose sums are taken over. Give "
            f"this one another name, or drop it ({twice}: null) where it is the same"
        )
    named = {"after.weights": recipe.after.weights}
    named |= {f"methods.{name}.source_weights": m.source_weights or {} for name, m in recipe.methods.items()}
    for key, weights in named.items():
        unknown = sorted(set(weights) - {*before, *own})
        if unknown and before:
            raise RecipeError(f"{key} names {unknown[0]!r}, which is no source; there are {', '.join([*before, *own])}")


def check_projector(recipe: Recipe, model: nn.Module) -> None:
    """Raises `RecipeError` where a method trains the projector and the model has none of the recipe's name."""
    wanted = recipe.model.projector
    trains = [name for name, method in recipe.methods.items() if method.projector_learning_rate is not None]
    if trains and not any(f".{name}".endswith(f".{wanted}") for name, _ in model.named_modules()):
        raise RecipeError(
            f"method {trains[0]!r} trains the projector, but {type(model).__name__} has no module {wanted!r}: set "
            "model.projector to its name"
        )


def _ignore(problem: str) -> None:
    """The stage that writes samples reports it."""
