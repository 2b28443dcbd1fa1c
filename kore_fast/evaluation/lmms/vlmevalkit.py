"""Retention by VLMEvalKit on an endpoint: what it needs to run, and its result files in the same table.

VLMEvalKit takes no adapter from memory: serve the model first, for instance ``vllm serve BASE --enable-lora
--max-lora-rank 256 --lora-modules kore=ADAPTER``. It scores some benchmarks otherwise than lmms-eval does (MMBench by
its circular protocol, HallusionBench by rule, MathVision with a judge): compare its figures among themselves only.
"""

from __future__ import annotations

import csv
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kore_fast.errors import DataError
from kore_fast.evaluation.lmms.benchmarks import Benchmark, mme_points
from kore_fast.evaluation.lmms.judge import Judge
from kore_fast.evaluation.lmms.retention import Retention, Score, choose
from kore_fast.files import write_json

_JUDGED = ("mia_bench", "mmdu", "mathvista", "mathvision")
Rows = list[dict[str, str]]


@dataclass(frozen=True)
class VlmEvalKitRun:
    """What to type, in VLMEvalKit's folder."""

    commands: tuple[str, ...]
    results: Path
    """Where its result files will be; for `read_vlmevalkit`."""


def write_vlmevalkit_config(
    folder: str | Path,
    *,
    base_url: str,
    model: str,
    benchmarks: Sequence[str] | None = None,
    judge: Judge | None = None,
    api_key_env: str | None = None,
    max_new_tokens: int = 1024,
    parallel: int = 16,
) -> VlmEvalKitRun:
    """Write ``vlmevalkit.json`` below ``folder`` and say which commands run it.

    Without a judge only the benchmarks that need none are in it. No key is written: the commands take it from its
    environment variable.

    Args:
        base_url: the endpoint that serves the model, with its version: ``http://127.0.0.1:8000/v1``.
        model: the name under which it serves it (vLLM: the adapter's).
        parallel: questions at a time.

    Raises:
        DataError: EVOKE, which VLMEvalKit does not have; an unknown benchmark.
    """
    chosen = choose(benchmarks)
    foreign = [benchmark.title for benchmark in chosen if not benchmark.vlmevalkit[0]]
    if foreign:
        raise DataError(
            f"VLMEvalKit does not have {', '.join(foreign)}; `kore-fast evaluate` measures it on an endpoint"
        )
    folder = Path(folder).resolve()
    name = folder.name
    served = {
        "class": "GPT4V",
        "model": model,
        "api_base": f"{base_url.rstrip('/')}/chat/completions",
        "temperature": 0,
        "max_tokens": max_new_tokens,
        "img_size": -1,
        "img_detail": "high",
    }
    commands = []
    for judged in (False, True):
        part = [b for b in chosen if (b.name in _JUDGED) == judged]
        if not part or (judged and judge is None):
            continue
        data = {b.vlmevalkit[0]: {"class": b.vlmevalkit[1], "dataset": b.vlmevalkit[0]} for b in part}
        config = folder / ("vlmevalkit_judged.json" if judged else "vlmevalkit.json")
        write_json(config, {"model": {name: served}, "data": data})
        words = ["python", "run.py", "--config", str(config), "--work-dir", str(folder), "--api-nproc", str(parallel)]
        words += ["--judge", judge.model if judged and judge is not None else "exact_matching"]
        if judged and judge is not None:
            words += ["--judge-base-url", judge.base_url]
        command = shlex.join([*words, "--reuse"])
        if judged and judge is not None and judge.api_key_env is not None:
            command += f' --judge-key "${judge.api_key_env}"'
        key = f'"${api_key_env}"' if api_key_env is not None else "none"
        commands.append(f"OPENAI_API_KEY={key} {command}")
    return VlmEvalKitRun(tuple(commands), folder / name)


def read_vlmevalkit(folder: str | Path, benchmarks: Sequence[str] | None = None) -> Retention:
    """VLMEvalKit's result files below ``folder`` as a retention table.

    Where a benchmark has several result files (runs, judges) the newest is read. What has none is missing.

    Raises:
        DataError: no such folder; a result file without the figure that belongs there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name the one with VLMEvalKit's result files")
    return Retention("VLMEvalKit", tuple(_read(folder, benchmark) for benchmark in choose(benchmarks)))


def _read(folder: Path, benchmark: Benchmark) -> Score:
    name = benchmark.vlmevalkit[0]
    if not name:
        return Score(benchmark.name, missing="VLMEvalKit does not have it")
    ending, points = _READERS[benchmark.name]
    # MathVision's name begins another's, MathVision_MINI.
    found = [file for file in folder.rglob(f"*_{name}{ending}") if file.is_file() and f"_{name}_MINI_" not in file.name]
    if not found:
        return Score(benchmark.name, missing=f"no file *_{name}{ending} below {folder}")
    file = max(found, key=lambda one: (one.stat().st_mtime_ns, str(one)))
    with open(file, encoding="utf-8-sig", newline="") as opened:
        rows = list(csv.DictReader(opened))
    try:
        figures, value = points(rows)
    except (KeyError, ValueError, StopIteration, TypeError) as error:
        held = ", ".join(rows[0]) if rows else "nothing"
        raise DataError(
            f"{file}: not VLMEvalKit's result of {benchmark.title} ({type(error).__name__}: {error}; it holds {held})"
        ) from None
    return Score(benchmark.name, points=value, metrics=dict(figures))


Reader = Callable[[Rows], tuple[dict[str, float], float]]


def _mme(rows: Rows) -> tuple[dict[str, float], float]:
    figures = {name: float(rows[0][name]) for name in ("perception", "reasoning")}
    return figures, mme_points(figures["perception"], figures["reasoning"])


def _cell(column: str, scale: float = 1, where: tuple[str, str] | None = None) -> Reader:
    """A figure of the row where a column has a value; without ``where`` of the only row."""

    def read(rows: Rows) -> tuple[dict[str, float], float]:
        if where is None and len(rows) != 1:
            raise ValueError(f"{len(rows)} rows, expected one")
        row = next(row for row in rows if where is None or row[where[0]] == where[1])
        return {column: float(row[column])}, scale * float(row[column])

    return read


def _hallusion(rows: Rows) -> tuple[dict[str, float], float]:
    row = next(row for row in rows if row["split"] == "Overall")
    figures = {name: float(row[name]) for name in ("aAcc", "fAcc", "qAcc")}
    return figures, sum(figures.values()) / 3


# The multiple-choice files hold shares, the others percent.
_READERS: dict[str, tuple[str, Reader]] = {
    "mme": ("_score.csv", _mme),
    "mmbench": ("_acc.csv", _cell("Overall", 100, ("split", "dev"))),
    "seedbench2_plus": ("_acc.csv", _cell("Overall", 100)),
    "ocrvqa": ("_acc.csv", _cell("Overall")),
    "scienceqa": ("_acc.csv", _cell("Overall", 100, ("split", "test"))),
    "mmmu": ("_acc.csv", _cell("Overall", 100, ("split", "validation"))),
    "mia_bench": ("_*_score.csv", _cell("1", 100, ("0", "total_score"))),
    "mmdu": ("_*_score.csv", _cell("Overall Score", where=("set", "all"))),
    "mathvista": ("_*_score.csv", _cell("acc", where=("Task&Skill", "Overall"))),
    "mathvision": ("_*_score.csv", _cell("acc", where=("Subject", "Overall"))),
    "pope": ("_score.csv", _cell("Overall", where=("split", "Overall"))),
    "hallusionbench": ("_score.csv", _hallusion),
}
