"""Arguments that several commands take, and what their texts mean."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

AT_A_RECIPE = "change a key, as in training.steps=20"


def recipe_arguments(command: argparse.ArgumentParser) -> argparse.Action:
    """The recipe, its run's folder and changes of its keys; returns the recipe's own argument."""
    place = command.add_argument("recipe", type=Path, help="a YAML file, or a folder with recipe.yaml")
    command.add_argument(
        "--run", "--run-dir", type=Path, metavar="DIR", help="the run's folder (default: runs/<recipe's name>)"
    )
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=AT_A_RECIPE)
    verbose(command)
    return place


def verbose(command: argparse.ArgumentParser) -> None:
    command.add_argument("--verbose", action="store_true", help="say more about what is done")


def dtype_and_device(command: argparse._ActionsContainer, device: str | None, where: str) -> None:
    """Of a model that is loaded; ``where`` says in words what ``device`` is."""
    command.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="default: as stored"
    )
    command.add_argument("--device", default=device, help=f"where to compute (default: {where})")


def count(text: str) -> int:
    """A number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: want at least 1")
    return number


def overrides(texts: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE texts as key → value."""
    from kore_fast.errors import RecipeError

    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise RecipeError(f"--set {text}: want KEY=VALUE, as in training.steps=20")
        found[key] = value
    return found


def dtype_of(name: str) -> torch.dtype | Literal["auto"]:
    import torch

    return "auto" if name == "auto" else getattr(torch, name)


def device_of(name: str) -> str:
    """The device, once it has proved to be there."""
    import torch

    from kore_fast.errors import BackendError

    try:
        torch.empty(0, dtype=torch.float64, device=name)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise BackendError(f"--device {name}: {str(error).splitlines()[0]}; leave it out to use the CPU") from None
    return name
