"""One benchmark through lmms-eval: a task that includes its own with the data that are there, and what came out."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from kore_fast.errors import DataError
from kore_fast.evaluation.lmms.benchmarks import Benchmark

TASKS = Path(__file__).parent / "tasks"
SUPPORTED = "0.7"
# What lmms-eval logs of a question beside its scores.
_LOGGED = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash", "input_media"}


class NoDataError(Exception):
    """The benchmark's data cannot be had, or hold too little; its text says why."""


class NoHubError(NoDataError):
    """The hub does not give them; another time it may."""


@dataclass(frozen=True)
class Outcome:
    """What lmms-eval made of one benchmark."""

    metrics: dict[str, float | None]
    """Every figure that the task reports, as it reports it."""
    samples: list[dict[str, Any]]
    """One row a question: what was asked, expected and answered, and how it was scored."""


def installed_version() -> str:
    """lmms-eval's version.

    Raises:
        DataError: it is not installed, or another version than the task names and figures here are known for.
    """
    try:
        found = version("lmms_eval")
    except PackageNotFoundError:
        raise DataError(
            'retention needs lmms-eval: pip install "kore-fast[lmms-eval]" torch==YOUR_TORCH (each torchvision, which '
            "it needs, fits one torch only)"
        ) from None
    if not found.startswith(f"{SUPPORTED}."):
        raise DataError(f"lmms-eval {found} is installed; {SUPPORTED}.x is known here: pip install 'lmms-eval~=0.7.3'")
    return found


def run_task(benchmark: Benchmark, make_model: Any, files: list[Path] | None, limit: int | None, work: Path) -> Outcome:
    """Evaluate one benchmark.

    Args:
        make_model: called without arguments for lmms-eval's model, once the data are there.
        files: parquet files of its split; None fetches the data set from the hub.
        limit: only the first so many questions.
        work: an empty folder for what lmms-eval writes; the caller removes it.

    Raises:
        NoHubError: the hub's data set cannot be had.
        NoDataError: no question counts for a figure that is wanted.
    """
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    task = _write_task(benchmark, files, work)
    _forget_modules(benchmark)
    with _quiet(), _random_state(), _in_folder(work):
        manager = TaskManager("ERROR", include_path=[str(work / "tasks")], include_defaults=False)
        try:
            loaded = manager.load_task_or_group(task)
        except Exception as error:  # what the hub's client raises depends on its version, and lmms-eval wraps it
            if files is None:
                raise NoHubError(
                    f"its data cannot be had from the hub ({told_of(cause(error))}); give a folder of data"
                ) from error
            raise
        loaded[task].set_config(key="num_fewshot", value=0)
        # A spreadsheet for a contest's server, which cannot be written where an answer holds a control character.
        loaded[task].aggregation().pop("submission", None)
        model = make_model()
        model.task_dict[task] = loaded[task].dataset
        # What simple_evaluate does around this it does wrongly beside filelock 4, which it patches.
        results = evaluator.evaluate(
            lm=model,
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            # In one thread what is drawn at random (MMMU, where an answer names no option) is the same every time.
            process_docs_parallel=4 if benchmark.judged else 1,
            cli_args=SimpleNamespace(output_path=str(work / "output"), process_with_media=False),
        )
    metrics = {
        key.split(",")[0]: None if value is None else float(value)
        for key, value in results["results"][task].items()
        if "," in key and "_stderr" not in key and (value is None or _is_number(value))
    }
    absent = [name for name in benchmark.metrics if name not in metrics]
    if absent:
        raise NoDataError(f"its data hold no question for {', '.join(absent)}")
    return Outcome(metrics, [_sample(row) for row in results["samples"][task]])


def _write_task(benchmark: Benchmark, files: list[Path] | None, work: Path) -> str:
    import lmms_eval.tasks
    import yaml

    original = (TASKS if benchmark.own else Path(lmms_eval.tasks.__file__).parent) / benchmark.task
    if not original.is_file():
        raise DataError(f"{original}: not there; lmms-eval {SUPPORTED}.x has it, reinstall it")
    task = f"kore_fast_{benchmark.name}"
    config: dict[str, Any] = {"include": str(original), "task": task}
    if files is not None:
        config |= {
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {benchmark.split: [str(file) for file in files]},
                "cache_dir": str(work / "cache"),
            },
        }
    else:
        config["dataset_kwargs"] = {}  # the tasks ask for a token, which public data sets do not need
    (work / "tasks").mkdir(parents=True)
    (work / "output").mkdir()
    (work / "tasks" / f"{task}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return task


def _forget_modules(benchmark: Benchmark) -> None:
    """Some tasks read a judge's address when they are imported; a later judge is another one."""
    package = "lmms_eval.tasks." + benchmark.task.split("/")[0]
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lmms-eval's messages below a warning, and without what its tasks print."""
    from contextlib import redirect_stdout

    from loguru import logger

    logger.remove()
    shown = logger.add(sys.stderr, level="ERROR")
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield
    finally:
        logger.remove(shown)
        logger.add(sys.stderr)


@contextmanager
def _random_state() -> Iterator[None]:
    """The generators seeded as lmms-eval does it; a training that goes on afterwards does not notice."""
    import numpy as np

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(0)
        np.random.seed(1234)
        torch.manual_seed(1234)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _in_folder(work: Path) -> Iterator[None]:
    """Some tasks write beside where the process stands."""
    before = Path.cwd()
    os.chdir(work)
    try:
        yield
    finally:
        os.chdir(before)


def cause(error: BaseException) -> BaseException:
    """What failed in the last attempt, where an error says that attempts were used up; else the error itself."""
    while (attempt := getattr(error, "last_attempt", None)) is not None and attempt.exception() is not None:
        error = attempt.exception()
    return error


def told_of(error: BaseException) -> str:
    """An error's type, and the first line of its text."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def place_of(error: BaseException) -> str:
    """Where it was raised: ``, utils.py line 7``."""
    frames = traceback.extract_tb(error.__traceback__)
    return f", {Path(frames[-1].filename).name} line {frames[-1].lineno}" if frames else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (hasattr(value, "item") and getattr(value, "ndim", 0) == 0)


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    """A row of lmms-eval's, without what it repeats for each figure and what is no JSON."""
    kept = {
        "doc_id": row["doc_id"],
        "asked": row["arguments"][0] if row["arguments"] else "",
        "target": row["target"],
        "answer": row["filtered_resps"][0] if len(row["filtered_resps"]) == 1 else row["filtered_resps"],
    }
    known = {
        "doc_id",
        "doc",
        "target",
        "arguments",
        "resps",
        "filtered_resps",
        "token_counts",
        "doc_hash",
        "input_media",
    }
    kept["scores"] = {name: value for name, value in row.items() if name not in known}
    return dict(json.loads(json.dumps(kept, default=str, ensure_ascii=False)))


def remove(work: Path) -> None:
    """Delete what lmms-eval and the data library wrote."""
    shutil.rmtree(work, ignore_errors=True)
