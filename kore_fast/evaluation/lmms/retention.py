"""Retention measured: benchmark after benchmark on one model, every answer kept, continued where it stopped."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kore_fast.errors import DataError, KoreError
from kore_fast.evaluation.batches import is_out_of_memory
from kore_fast.evaluation.lmms.benchmarks import BENCHMARKS, RETENTION, Benchmark
from kore_fast.evaluation.lmms.harness import (
    NoDataError,
    NoHubError,
    Outcome,
    cause,
    installed_version,
    place_of,
    remove,
    run_task,
    told_of,
)
from kore_fast.evaluation.lmms.identity import fingerprint as weights_fingerprint
from kore_fast.evaluation.lmms.judge import Judge, judging
from kore_fast.evaluation.lmms.local_data import as_parquet, fingerprint, local_files
from kore_fast.files import read_json, write_json, write_jsonl
from kore_fast.progress import Progress, silent

NO_JUDGE = "no judge: it needs one, name an OpenAI-compatible endpoint"
NOT_YET = "not measured yet"
PREDICTIONS, RESULT, JUDGED = "predictions.jsonl", "result.json", "judge.jsonl"
# All of them; after each benchmark anew.
SUMMARY = "retention.json"
# A benchmark's answers as they come, and what they were given under. They stay beside the result: another judge, or a
# larger limit, asks nothing twice.
_JOURNAL, _ANSWERED = "answers.jsonl", "answers.json"
# What decides which questions there are and how they are judged, but no answer.
_NOT_OF_ANSWERS = {"limit", "judge"}


@dataclass(frozen=True)
class Score:
    """One benchmark's result; either points or why there are none."""

    benchmark: str
    points: float | None = None
    """0 to 100."""
    missing: str | None = None
    metrics: dict[str, float | None] | None = None
    """All figures as the harness reports them, in its own units."""
    questions: int | None = None
    judge: dict[str, Any] | None = None
    """Its model, how many answers it gave, and how many of them could not be read."""
    again: bool = False
    """Missing because a judge or the hub did not answer: another call tries again."""


@dataclass(frozen=True)
class Retention:
    """The results of one model."""

    harness: str
    """With its version: scores of another one are no match."""
    scores: tuple[Score, ...]
    limit: int | None = None

    @property
    def measured(self) -> tuple[Score, ...]:
        """Those of the 12 that have points."""
        names = {benchmark.name for benchmark in RETENTION}
        return tuple(score for score in self.scores if score.benchmark in names and score.points is not None)

    @property
    def complete(self) -> bool:
        return len(self.measured) == len(RETENTION)

    @property
    def mean(self) -> float | None:
        """The plain mean of what was measured of the 12; K.R only where `complete`."""
        points = [score.points for score in self.measured if score.points is not None]
        return sum(points) / len(points) if points else None

    @property
    def label(self) -> str:
        """What `mean` is."""
        name = "K.R" if self.complete else f"mean of {len(self.measured)} of {len(RETENTION)}"
        return name if self.limit is None else f"{name}, first {self.limit} questions of each"

    def row(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "harness": self.harness,
            "limit": self.limit,
            "mean": self.mean,
            "label": self.label,
            "complete": self.complete,
            "scores": [asdict(score) for score in self.scores],
        }

    def table(self) -> str:
        """As Markdown."""
        lines = [f"| benchmark | points ({self.harness}) |", "|---|---|"]
        for score in self.scores:
            shown = f"missing: {score.missing}" if score.points is None else f"{score.points:.2f}"
            lines.append(f"| {BENCHMARKS[score.benchmark].title} | {shown} |")
        lines.append(f"| {self.label} | {'' if self.mean is None else f'{self.mean:.2f}'} |")
        return "\n".join(lines) + "\n"


def choose(names: Sequence[str] | None) -> tuple[Benchmark, ...]:
    """The benchmarks of these names, by default the 12.

    Raises:
        DataError: a name that is none (says the nearest), or twice; no name at all.
    """
    if names is None:
        return RETENTION
    unknown = sorted(set(names) - set(BENCHMARKS))
    if unknown:
        near = difflib.get_close_matches(unknown[0].lower(), BENCHMARKS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(BENCHMARKS)}"
        raise DataError(f"retention: no benchmark is called {unknown[0]}; {hint}")
    if not names or len(set(names)) != len(names):
        what = "a benchmark is named twice" if names else "no benchmark is named"
        raise DataError(f"retention: {what}; there are {', '.join(BENCHMARKS)}")
    return tuple(BENCHMARKS[name] for name in names)


def check_retention(
    benchmarks: Sequence[str] | None = None, *, data: str | Path | None = None, judge: Judge | None = None
) -> str:
    """What can be known to be wrong before a model is loaded; returns the harness with its version.

    Raises:
        DataError: as `evaluate_retention`, of everything but the folder of results.
    """
    chosen = choose(benchmarks)
    harness = f"lmms-eval {installed_version()}"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DataError("retention is measured in one process: start it without torchrun or accelerate launch")
    if judge is not None:
        judge.key()
    if data is not None:
        if not Path(data).is_dir():
            raise DataError(f"{data}: no such folder; it should hold one folder a benchmark: {', '.join(BENCHMARKS)}")
        for benchmark in chosen:
            local_files(benchmark, Path(data))
    return harness


def evaluate_retention(
    model: nn.Module,
    processor: Any,
    benchmarks: Sequence[str] | None = None,
    *,
    folder: str | Path,
    data: str | Path | None = None,
    hub: bool = True,
    judge: Judge | None = None,
    limit: int | None = None,
    max_new_tokens: int = 1024,
    batch_size: int = 32,
    bf16: bool = False,
    about: Mapping[str, Any] | None = None,
    replace: bool = False,
    progress: Progress = silent,
) -> Retention:
    """Measure a model in memory with lmms-eval's tasks and our own; an adapter stays as it is, nothing is merged.

    Below ``folder`` each benchmark has a folder with ``predictions.jsonl`` (every question with its answer and scores)
    and ``result.json``, written last: a second call measures only what has none, and an interrupted benchmark goes on
    after its last written answers. ``retention.json`` has all scores so far. All of a folder is of one model, told by
    its weights and by ``about``.

    Absolute scores differ between harnesses, their versions, their wordings and judges: compare only what was measured
    alike. Answers are greedy, whatever a task asks for.

    Args:
        model: a vision-language model, with a PEFT adapter or without.
        benchmarks: names from `BENCHMARKS`, by default the paper's 12.
        data: a folder with one folder of files a benchmark (see `local_data`); what is not there comes from the hub.
        hub: fetch from the Hugging Face hub what is not in ``data``; OCRVQA, MMDU and EVOKE are never fetched.
        judge: for MIA-Bench, MMDU, MathVista and HallusionBench, which are missing without one.
        limit: only the first so many questions of each; a score of that is no benchmark's score. MME needs an even one.
        max_new_tokens: no answer gets longer; some tasks ask for 16384, which no model of 4096 positions can give.
        about: what else tells the model from others, as plain JSON values: its name, its processor's files.
        replace: measure anew what was measured on another model or with other settings, instead of refusing it. A
            judge's answers stay: to the same question they are the same.

    Returns:
        One `Score` a benchmark, in the order asked for. Missing ones say why; they are not zero.

    Raises:
        DataError: lmms-eval is not there; ``folder`` holds results or answers of another model or of other settings
            (without ``replace``); local data that cannot be read, or that lmms-eval cannot measure; a judge's key that
            is not set; several processes.
    """
    harness = check_retention(benchmarks, data=data, judge=judge)
    chosen = choose(benchmarks)
    folder = Path(folder).resolve()
    data = None if data is None else Path(data).resolve()
    answerer = {**(about or {}), "bf16": bf16, "loaded_weights": weights_fingerprint(model)}
    if not replace:
        _check_same_model(folder, answerer)
    training = model.training
    model.eval()
    scores: list[Score] = []
    try:
        for number, benchmark in enumerate(chosen, start=1):
            settings: dict[str, Any] = {
                "harness": harness,
                "task": benchmark.task,
                "limit": limit,
                "max_new_tokens": max_new_tokens,
                "model": answerer,
            }
            if benchmark.judged:
                settings["judge"] = None if judge is None else judge.model
            place = folder / benchmark.name
            files = [] if data is None else local_files(benchmark, data)
            settings["data"] = fingerprint(benchmark, data) if data and files else "hub"
            if replace:
                _forget_others(place, settings)
            kept = _finished(place / RESULT, settings)
            if kept is None:
                scores.append(
                    _measure(
                        benchmark,
                        model,
                        processor,
                        place,
                        files,
                        settings,
                        hub=hub,
                        judge=judge,
                        batch_size=batch_size,
                        bf16=bf16,
                        progress=progress,
                    )
                )
            else:
                scores.append(kept)
            # After each: what was measured is told whatever becomes of the next.
            rest = (Score(later.name, missing=NOT_YET) for later in chosen[number:])
            result = Retention(harness, (*scores, *rest), limit)
            write_json(folder / SUMMARY, result.row())
    finally:
        model.train(training)
    return result


def _check_same_model(folder: Path, answerer: dict[str, Any]) -> None:
    """Refuse a folder that holds another model's results or answers, of whichever benchmark."""
    for path in sorted([*folder.glob(f"*/{RESULT}"), *folder.glob(f"*/{_ANSWERED}")]):
        kept = read_json(path)
        settings = kept.get("settings", kept) if isinstance(kept, dict) else {}
        there = settings.get("model") if isinstance(settings, dict) else None
        if there != answerer:
            there = there if isinstance(there, dict) else {}
            odd = next(key for key in {**answerer, **there} if there.get(key) != answerer.get(key))
            raise DataError(
                f"{path}: measured on another model (its {odd.replace('_', ' ')} was {there.get(odd)!s:.60}, is now "
                f"{answerer.get(odd)!s:.60}); choose another folder, or remove this one"
            )


def _forget_others(place: Path, settings: dict[str, Any]) -> None:
    """Remove a benchmark's results and answers that were given under other settings or by another model."""
    result, answered = place / RESULT, place / _ANSWERED
    if result.exists() and _changed(read_json(result).get("settings", {}), settings):
        # The results first: what a kill leaves is not taken for finished.
        (place.parent / SUMMARY).unlink(missing_ok=True)
        result.unlink()
        (place / PREDICTIONS).unlink(missing_ok=True)
    if answered.exists() and not _changed(read_json(answered), _of_answers(settings)):
        return
    for name in (_JOURNAL, _ANSWERED):
        (place / name).unlink(missing_ok=True)


def _finished(path: Path, settings: dict[str, Any]) -> Score | None:
    if not path.exists():
        return None
    kept = read_json(path)
    _check_same(path, kept["settings"], settings)
    return Score(**kept["score"])


def _changed(there: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    return sorted(key for key in settings if there.get(key) != settings[key])


def _of_answers(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in _NOT_OF_ANSWERS}


def _check_same(path: Path, there: dict[str, Any], settings: dict[str, Any]) -> None:
    if changed := _changed(there, settings):
        raise DataError(
            f"{path}: measured with other settings ({', '.join(changed)}); choose another folder, or remove this one"
        )


def bind_answers(place: Path, settings: dict[str, Any]) -> None:
    """Note what a benchmark's answers are given under; refuse answers that were given under something else."""
    given = _of_answers(settings)
    path = place / _ANSWERED
    if path.exists():
        _check_same(path, read_json(path), given)
        return
    if (place / _JOURNAL).exists():
        raise DataError(f"{place}: holds answers, but not whose ({_ANSWERED}); choose another folder, or remove it")
    write_json(path, given)


def _measure(
    benchmark: Benchmark,
    model: nn.Module,
    processor: Any,
    place: Path,
    files: list[Path],
    settings: dict[str, Any],
    *,
    hub: bool,
    judge: Judge | None,
    batch_size: int,
    bf16: bool,
    progress: Progress,
) -> Score:
    if benchmark.judged and judge is None:
        return Score(benchmark.name, missing=NO_JUDGE)
    if not files and (benchmark.own or not hub):
        wanted = benchmark.data or "the files of its data set on the hub"
        return Score(benchmark.name, missing=f"no local data: put {wanted} into DATA/{benchmark.name}")
    from kore_fast.evaluation.lmms.model import ModelInMemory

    place.mkdir(parents=True, exist_ok=True)
    bind_answers(place, settings)
    work = place / ".work"
    remove(work)  # a killed call's
    work.mkdir()

    def make_model() -> Any:
        return ModelInMemory(
            model,
            processor,
            journal=place / _JOURNAL,
            max_new_tokens=settings["max_new_tokens"],
            batch_size=batch_size,
            bf16=bf16,
            progress=progress,
            label=benchmark.title,
        )

    def run() -> Outcome:
        parquet = as_parquet(benchmark, files, work / "data") if files else None
        return run_task(benchmark, make_model, parquet, settings["limit"], work)

    told: dict[str, Any] | None = None
    try:
        if benchmark.readable is not None and judge is not None:
            with judging(judge, benchmark.readable, place / JUDGED) as record:
                outcome = run()
            if record.problem is not None:
                return Score(benchmark.name, missing=record.problem, again=record.failure is not None)
            told = {"model": judge.model, "answers": record.asked, "unreadable": record.unreadable}
        else:
            outcome = run()
    except NoDataError as error:
        return Score(benchmark.name, missing=str(error), again=isinstance(error, NoHubError))
    except KoreError:
        raise
    except Exception as error:
        found = cause(error)
        if isinstance(found, KoreError):
            raise found from error
        if is_out_of_memory(found):
            raise
        shown = ", ".join(str(file) for file in files[:3]) + (f" and {len(files) - 3} more" if files[3:] else "")
        wanted = benchmark.data or "rows with the columns of its data set on the hub"
        raise DataError(
            f"{benchmark.title}: lmms-eval cannot measure it on {shown or 'its data set on the hub'} "
            f"({told_of(found)}{place_of(found)}); expected {wanted}"
        ) from error
    finally:
        remove(work)
    score = Score(
        benchmark.name,
        points=benchmark.points(outcome.metrics),
        metrics=outcome.metrics,
        questions=len(outcome.samples),
        judge=told,
    )
    write_jsonl(place / PREDICTIONS, outcome.samples)
    write_json(place / RESULT, {"settings": settings, "score": asdict(score)})
    return score
