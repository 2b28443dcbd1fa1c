"""``kore-fast augment`` and ``convert``: training samples."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kore_fast.cli.arguments import overrides, recipe_arguments, verbose


def add_augment(commands: Any) -> None:
    command = commands.add_parser("augment", help="items → samples and held-out questions")
    recipe_arguments(command).nargs = "?"
    command.add_argument("--items", type=Path, metavar="FILE", help="an items file, or EVOKE's, instead of a recipe")
    command.add_argument(
        "--dry-run", action="store_true", help="say what would be asked, searched and paid, and do nothing"
    )
    command.set_defaults(work=_augment)


def add_convert(commands: Any) -> None:
    command = commands.add_parser("convert", help="training samples from one file format to another")
    command.add_argument("samples", type=Path, help="LLaVA, LLaMA-Factory, ms-swift or TRL JSON, or parquet")
    command.add_argument("output", type=Path, help="the new file")
    command.add_argument("--format", required=True, help="llava, llama-factory, swift, messages or parquet")
    command.add_argument("--from", dest="source", metavar="FORMAT", help="default: as the file looks")
    command.add_argument("--images", type=Path, metavar="DIR", help="the pictures' folder (default: the samples' own)")
    command.add_argument("--absolute-images", action="store_true", help="write whole paths to the pictures")
    command.add_argument("--unpack", type=Path, metavar="DIR", help="where pictures inside a parquet file go")
    verbose(command)
    command.set_defaults(work=_convert)


def _augment(options: argparse.Namespace) -> int:
    """A recipe's stage, or an items file by itself."""
    from kore_fast.augmentation.pipeline import describe_cost, image_root
    from kore_fast.errors import RecipeError
    from kore_fast.recipe.loading import load_plan, load_recipe
    from kore_fast.recipe.runner import run_stages
    from kore_fast.recipe.stages import augment_stage
    from kore_fast.recipe.work import AUGMENT_CACHE

    if (options.recipe is None) == (options.items is None):
        raise RecipeError("augment: give a recipe or --items FILE, one of them")
    changes = overrides(options.set)
    if options.recipe is not None:
        recipe = load_recipe(options.recipe, changes)
        items, plan, name, resolve = recipe.resolve(recipe.items), recipe.augmentation, recipe.name, recipe.resolve
    else:
        items = options.items.resolve()
        plan, name = load_plan(items, changes), items.stem

        def resolve(path: Path | str) -> Path:
            return Path(path).resolve()

    run = (options.run or Path("runs") / name).resolve()
    if options.dry_run:
        print(describe_cost(items, plan.resolved(resolve), run / AUGMENT_CACHE))
        return 0
    run_stages(run, [augment_stage(items, plan, resolve, run, name)])
    print(_told(run / "augment", image_root(items, plan, run / "augment")))
    return 0


def _told(folder: Path, root: Path) -> str:
    """What an augmentation came to, and where it is."""
    from kore_fast.augmentation.pipeline import unanswered
    from kore_fast.files import read_json

    summary = read_json(folder / "summary.json")
    counts = ", ".join(f"{name} {sizes['samples']:,}" for name, sizes in summary["branches"].items())
    lines = [f"{summary['items']:,} items, {summary['samples']:,} samples: {counts}"]
    if left_out := len((folder / "rejects.jsonl").read_text(encoding="utf-8").splitlines()):
        lines.append(f"{left_out:,} left out, each with its reason in {folder / 'rejects.jsonl'}")
    writer = summary["writer"]
    if "cost" in writer:
        tokens = writer["prompt_tokens"] + writer["completion_tokens"]
        lines.append(f"{writer['model']}: {writer['requests']:,} requests, {tokens:,} tokens, cost {writer['cost']}")
    if lacking := unanswered(summary):
        lines.append(f"{lacking}: give the same command again to try once more")
    lines += [f"Samples: {folder / 'samples.json'}", f"Their pictures: {root}"]
    lines += [f"To look at: {folder / 'contact_sheet.html'}"]
    return "\n".join(lines)


def _convert(options: argparse.Namespace) -> int:
    from kore_fast.data.formats import convert
    from kore_fast.errors import DataError

    try:
        made = convert(
            options.samples,
            options.output,
            options.format,
            source_format=options.source,
            image_root=options.images,
            absolute_images=options.absolute_images,
            unpack_to=options.unpack,
        )
    except DataError as error:
        if options.images is None and "no image" in str(error):
            raise DataError(f"{error}; if the pictures lie in another folder, name it with --images DIR") from None
        raise
    unpacked = f", {made.unpacked:,} pictures unpacked" if made.unpacked else ""
    print(f"{made.samples:,} samples from {made.source_format} to {made.format}{unpacked}: {options.output}")
    return 0
