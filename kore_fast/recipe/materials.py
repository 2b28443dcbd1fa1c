"""What a recipe's stages work with: its model, its processor, its samples, and what an earlier run left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from kore_fast.data.samples import Sample
from kore_fast.errors import RecipeError
from kore_fast.recipe.schema import Method, Recipe


def image_root(recipe: Recipe, run: Path, method: Method) -> Path:
    """The folder that the pictures of a method's samples are below."""
    from kore_fast.augmentation.pipeline import image_root

    items = recipe.resolve(recipe.items)
    if method.samples == "knowledge" or recipe.samples is None:
        return image_root(items, recipe.augmentation, run / "augment")
    return recipe.resolve(recipe.samples.images or recipe.samples.file.parent)


def samples_file(recipe: Recipe, run: Path, method: Method) -> Path:
    """What a method is trained on."""
    if method.samples == "knowledge":
        return run / "augment" / "knowledge.json"
    return run / "augment" / "samples.json" if recipe.samples is None else recipe.resolve(recipe.samples.file)


def chosen_samples(method: Method, data: Path, root: Path) -> list[Sample]:
    """The samples of the file that a method trains on.

    Raises:
        RecipeError: it wants branches of which there are none.
    """
    from kore_fast.data.samples import read_samples

    samples = read_samples(data, root)
    if method.branches is None:
        return samples
    chosen = [sample for sample in samples if sample.branch in method.branches]
    if not chosen:
        there = sorted({sample.branch for sample in samples if sample.branch is not None})
        raise RecipeError(
            f"{data}: no sample of {', '.join(method.branches)}; there are {', '.join(there) or 'none with a branch'}"
        )
    return chosen


def targets_key(recipe: Recipe, method: Method | None = None) -> Any:
    """What decides the adapted layers, for a fingerprint."""
    choices = [choice.model_dump(mode="json") for choice in recipe.layer_choices(method) if choice is not None]
    return [recipe.targets, *choices] if choices else recipe.targets


def base_model(recipe: Recipe, *, accelerated: bool = True) -> nn.Module:
    """The model that a run starts from, where there is a GPU on it; under a Trainer that is Trainer's to do."""
    from kore_fast.modules.loading import load_model
    from kore_fast.training.methods.interface import open_adapter

    dtype = getattr(torch, recipe.model.dtype)
    if recipe.after is None:
        model = load_model(recipe.model_path(), dtype)
    else:
        # Summed in float32 and rounded once.
        adapted: Any = open_adapter(load_model(recipe.model_path()), earlier_adapter(recipe))
        model = adapted.merge_and_unload().to(dtype).eval().requires_grad_(False)
    if accelerated and torch.cuda.is_available():
        return model.to(torch.device("cuda", torch.cuda.current_device()))
    return model


def earlier_adapter(recipe: Recipe) -> Path:
    """The adapter that an earlier run has trained, which this one starts with; with what that run itself went on
    from."""
    assert recipe.after is not None
    trained = recipe.resolve(recipe.after.run) / "train" / recipe.after.method
    return trained / "combined" if (trained / "combined").exists() else trained / "adapter"


def earlier_covariance(recipe: Recipe) -> Path:
    """The earlier run's store."""
    assert recipe.after is not None
    return recipe.resolve(recipe.after.run) / "covariance"


def earlier_questions(recipe: Recipe) -> tuple[Path | None, Path]:
    """The earlier run's held-out questions, and the folder of their pictures; None where they are not asked again."""
    if recipe.after is None or recipe.after.images is None:
        return None, Path()
    return recipe.resolve(recipe.after.run) / "augment" / "questions.jsonl", recipe.resolve(recipe.after.images)


def processor_of(recipe: Recipe) -> Any:
    """The model's processor, or tokenizer."""
    from kore_fast.modules.loading import load_processor

    return load_processor(recipe.model_path(), recipe.model.max_pixels)
