"""What can be known to be wrong before any long work starts."""

from __future__ import annotations

import subprocess
import sys

import torch

from kore_fast.errors import ConstraintError, RecipeError
from kore_fast.recipe.schema import Recipe


def prepare(recipe: Recipe) -> None:
    """Make the model's folder where the recipe says how, and find what is wrong before any long work.

    Raises:
        KoreError: an item, a picture or a text that cannot be used, a rank too large for the model.
    """
    from kore_fast.data.evoke import check_question_images, read_evoke_questions
    from kore_fast.data.items import load_items
    from kore_fast.data.old_knowledge import read_pictures, read_texts

    for method in recipe.methods.values():
        method.way.check_available()
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
    _check_ranks(recipe)


def _check_ranks(recipe: Recipe) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    from kore_fast.constraint import select_linears
    from kore_fast.constraint.ranks import parse_rank_choice

    try:
        config = AutoConfig.from_pretrained(recipe.model_path())
        family = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        with torch.device("meta"):
            model = family.from_config(config)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise RecipeError(f"model.path: no model that transformers loads at {recipe.model_path()} ({reason})") from None
    shapes = {name: model.get_submodule(name).weight.shape for name in select_linears(model, recipe.targets)}
    narrowest = min(shapes, key=lambda name: min(shapes[name]))
    for name, method in recipe.methods.items():
        lowest = None if method.rank is None else parse_rank_choice(method.rank).lowest
        if lowest is not None and lowest > min(shapes[narrowest]):
            raise ConstraintError(
                f"method {name!r}: rank {lowest} is larger than the width of {narrowest} "
                f"{tuple(shapes[narrowest])}; choose at most {min(shapes[narrowest])}"
            )

        if isinstance(method.effective_rank, int) and method.effective_rank >= min(shapes[narrowest]):
            raise ConstraintError(
                f"method {name!r}: effective_rank {method.effective_rank} keeps every direction of {narrowest} "
                f"{tuple(shapes[narrowest])} as it is, nothing would be trained; choose fewer, or a share below 1"
            )


def _ignore(problem: str) -> None:
    """The stage that writes samples reports it."""
