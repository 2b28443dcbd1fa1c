"""``kore-fast run``, its stages one by one, and ``compare``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kore_fast.cli.arguments import overrides, recipe_arguments

_STAGES = {
    "covariance": "old knowledge → covariances of every linear input",
    "init": "covariances → adapters to start from, with their leak",
    "train": "samples → trained adapters",
    "report": "figures, tables and the HTML page",
}


def add_run(commands: Any) -> None:
    command = commands.add_parser("run", help="every stage of a recipe, in order")
    recipe_arguments(command)
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="build the model without weights, say what the run takes and what is missing, and do nothing",
    )
    command.set_defaults(work=run)


def add_stages(commands: Any, *names: str) -> None:
    """Stages that take a recipe and nothing else."""
    for name in names:
        command = commands.add_parser(name, help=_STAGES[name])
        recipe_arguments(command)
        if name in ("init", "train"):
            one_method(command)
        command.set_defaults(work=run)


def one_method(command: argparse.ArgumentParser) -> None:
    command.add_argument("--method", help="only this method of the recipe")


def add_compare(commands: Any) -> None:
    command = commands.add_parser("compare", help="a study: every method at every learning rate and seed, compared")
    recipe_arguments(command)
    command.add_argument("--jobs", type=int, default=1, metavar="N", help="runs side by side (default: 1)")
    command.add_argument(
        "--minutes", type=float, default=float("inf"), metavar="M", help="start no further run after so long"
    )
    command.add_argument("--table", action="store_true", help="run nothing, compare what is done")
    command.set_defaults(work=_compare)


def run(options: argparse.Namespace) -> int:
    """The stages that the command names, of a recipe."""
    from kore_fast.allocation import keep_freed_memory
    from kore_fast.constraint.distributed import Ranks
    from kore_fast.errors import RecipeError
    from kore_fast.modules.loading import quiet_transformers
    from kore_fast.recipe.checks import prepare
    from kore_fast.recipe.loading import load_recipe
    from kore_fast.recipe.runner import run_stages
    from kore_fast.recipe.schema import BASE
    from kore_fast.recipe.stages import build_stages

    keep_freed_memory()
    if not options.verbose:
        quiet_transformers()
    recipe = load_recipe(options.recipe, overrides(options.set))
    if getattr(options, "dry_run", False):
        from kore_fast.recipe.dry_run import dry_run

        found = dry_run(recipe)
        print(f"{recipe.title or recipe.name}\n\n{found.text()}")
        return 0 if found.passed else 1
    run = (options.run or Path("runs") / recipe.name).resolve()
    Ranks().by_first(lambda: prepare(recipe))
    stages = build_stages(recipe, run)
    if options.command != "run":
        method = getattr(options, "method", None)
        if method is not None and method not in (*recipe.methods, BASE):
            raise RecipeError(f"--method {method}: the recipe has {', '.join(recipe.methods)}")
        stages = [s for s in stages if s.kind == options.command and (method is None or s.name.endswith(f"/{method}"))]
    if not stages:
        reason = f"method {method!r} has none" if getattr(options, "method", None) else "the recipe has none"
        raise RecipeError(f"nothing to do for `kore-fast {options.command}`: {reason}")
    run_stages(run, stages)
    if stages[-1].kind == "report":
        from kore_fast.report import load_lines, terminal_table

        print(f"\n{terminal_table(run)}\n\nThe report: {run / 'report' / 'report.html'}")
        for name in [name for name, method in recipe.methods.items() if method.kind == "kore"][:1]:
            print("\nThe adapter is an ordinary one. In plain PEFT, without kore_fast:\n")
            for line in load_lines(run / "train" / name / "adapter", recipe.model_path()):
                print(f"    {line}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from functools import partial

    from kore_fast.errors import RecipeError
    from kore_fast.recipe.checks import prepare
    from kore_fast.recipe.loading import load_recipe
    from kore_fast.recipe.study import compare

    if options.jobs < 1:
        raise RecipeError(f"--jobs {options.jobs}: want at least 1")
    recipe = load_recipe(options.recipe, overrides(options.set))
    run = (options.run or Path("runs") / recipe.name).resolve()
    if not options.table:
        prepare(recipe)
    found = compare(
        options.recipe,
        recipe,
        run,
        overrides=options.set,
        width=options.jobs,
        minutes=options.minutes,
        only_table=options.table,
        say=partial(print, flush=True),
    )
    print(f"\n{found.markdown}\nThe comparison: {found.folder / 'comparison.md'}")
    return 0
