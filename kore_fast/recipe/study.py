"""A study: a recipe whose methods are run at several learning rates and seeds, and compared.

In a recipe with a ``study`` section a method may give ``learning_rates`` and ``seeds`` (lists) in the place of
``learning_rate`` and ``seed``. `expand` makes one ordinary method of each combination, so that every stage works on a
study as on any recipe. `compare` then chooses, on the first seed, the learning rate of each method whose adaptation is
nearest to that of the method named by ``match`` (rates are matched on what was learned and never on what was kept),
runs the other seeds at that rate only, and compares.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kore_fast.errors import RecipeError
from kore_fast.files import read_json, write_json
from kore_fast.recipe.locks import alone_in

if TYPE_CHECKING:
    from kore_fast.recipe.schema import Recipe
    from kore_fast.report.comparison import Comparison

BASE = "base"
"""The untouched model's name among the methods."""


@dataclass(frozen=True)
class Job:
    """One training run of a study."""

    method: str
    """As the study names it; several jobs share it."""
    learning_rate: float
    seed: int
    name: str
    """As a method of the expanded recipe."""


def expand(values: dict[str, Any]) -> dict[str, Any]:
    """A study's values as a recipe's: each method at each learning rate and seed becomes one, told in ``study.jobs``.

    Values without a ``study`` section come back as they are; what is wrong in them is left for the schema to say.

    Raises:
        RecipeError: a method with both ``learning_rate`` and ``learning_rates`` (or ``seed`` and ``seeds``), an empty
            list, or two jobs of one name.
    """
    study, methods = values.get("study"), values.get("methods")
    if not isinstance(study, dict) or not isinstance(methods, dict):
        return values
    seeds = study.get("seeds", [values.get("seed", 0)])
    expanded: dict[str, Any] = {}
    jobs: dict[str, dict[str, Any]] = {}
    for method, options in methods.items():
        if not isinstance(options, dict):
            return values
        rest = {k: v for k, v in options.items() if k not in ("learning_rates", "seeds")}
        rates = _choices(method, options, "learning_rate", None)
        for seed in _choices(method, options, "seed", seeds):
            for rate in rates:
                name = _job_name(method, rate, seed)
                if name in expanded:
                    raise RecipeError(f"study: method {method!r}: two runs are called {name}; rename a method")
                expanded[name] = {**rest, "learning_rate": rate, "seed": seed}
                jobs[name] = {"method": method, "learning_rate": rate, "seed": seed}
    return {**values, "methods": expanded, "study": {**study, "jobs": jobs}}


def _choices(method: str, options: Mapping[str, Any], key: str, default: Any) -> list[Any]:
    if key in options and f"{key}s" in options:
        raise RecipeError(f"study: method {method!r}: give {key!r} or '{key}s', not both")
    chosen = options.get(f"{key}s", options.get(key, default))
    chosen = chosen if isinstance(chosen, list) else [chosen]
    if not chosen:
        raise RecipeError(f"study: method {method!r}: '{key}s' is empty")
    return chosen


def _job_name(method: str, rate: Any, seed: Any) -> str:
    rate = f"{float(rate):.0e}" if _round(rate) else str(rate)
    return f"{method}_{rate}_s{seed}".replace("e-0", "e-").replace(".", "p").replace("e-", "em").replace("+", "")


def _round(rate: Any) -> bool:
    """Whether a rate has one digit, so that 1e-3, 0.001 and "1e-3" are one name."""
    try:
        return float(f"{float(rate):.0e}") == float(rate)
    except (TypeError, ValueError):
        return False


def jobs_of(recipe: Recipe) -> list[Job]:
    """Every job of a study, the first seed's first; of a plain recipe each method is one."""
    if recipe.study is None:
        return [Job(n, m.learning_rate, recipe.seed_of(m), n) for n, m in recipe.methods.items()]
    found = [
        Job(recipe.study.jobs[name].method, method.learning_rate, recipe.seed_of(method), name)
        for name, method in recipe.methods.items()
    ]
    order = {seed: place for place, seed in enumerate(dict.fromkeys(job.seed for job in found))}
    return sorted(found, key=lambda job: order[job.seed])


def choose(scores: Mapping[Job, Mapping[str, Any]], match: str | None) -> dict[str, float]:
    """Each method's learning rate: the one whose adaptation is nearest to the best of ``match`` (of all without one).

    Adaptation is the new facts' CEM or, where there are no questions of facts, EVOKE's K.A. Only jobs of a method's
    first seed decide, so that further seeds change no choice. A method with one rate has it, whatever was measured.

    Raises:
        RecipeError: a method has several rates, and neither was measured for one of them.
    """
    from kore_fast.report.words import ADAPTATIONS

    seeds: dict[str, int] = {}
    for job in scores:
        seeds.setdefault(job.method, job.seed)
    first = {job: found["metrics"] for job, found in scores.items() if job.seed == seeds[job.method]}
    learned: dict[Job, float] = {}
    for words in ADAPTATIONS:
        values = {job: (metrics.get(words.name) or {}).get("value") for job, metrics in first.items()}
        learned = learned or {job: float(value) for job, value in values.items() if value is not None}
    rates: dict[str, list[float]] = {}
    for job in first:
        rates.setdefault(job.method, []).append(job.learning_rate)
    unknown = [job.name for job in first if job not in learned and len(rates[job.method]) > 1]
    if unknown:
        measures = " nor ".join(words.label for words in ADAPTATIONS)
        raise RecipeError(
            f"learning rates are matched on what was learned, and neither {measures} was measured for "
            f"{', '.join(unknown)}: give items with facts or evaluation.evoke, or each method one learning rate"
        )
    chosen = {method: of_method[0] for method, of_method in rates.items() if len(of_method) == 1}
    target = max(
        (value for job, value in learned.items() if job.method == match), default=max(learned.values(), default=0.0)
    )
    for job in sorted(learned, key=lambda job: (abs(learned[job] - target), job.learning_rate)):
        chosen.setdefault(job.method, job.learning_rate)
    return chosen


def compare(
    file: Path,
    recipe: Recipe,
    run: Path,
    *,
    overrides: Sequence[str] = (),
    width: int = 1,
    minutes: float = float("inf"),
    only_table: bool = False,
    say: Callable[[str], None] = print,
) -> Comparison:
    """Take a study as far as the time allows, and write the comparison of what is done.

    A finished job's scores are kept with a digest of what decides them; the same call, in another checkout too, goes on
    with what is missing or has become stale. Jobs run ``width`` side by side, each in processes of its own with its
    share of the threads, or on a GPU of its own.

    Args:
        file: the recipe's file or folder, which the jobs' processes read.
        overrides: ``KEY=VALUE``, handed to them.
        minutes: start no further job after so long.
        only_table: run nothing.

    Raises:
        RecipeError: jobs failed (others went on; names their logs), nothing is done yet, or another process is at work
            on the same run.
    """
    from kore_fast.report import build_comparison

    runner = _Runner(file, recipe, run, tuple(overrides), width, time.monotonic() + 60 * minutes, say)
    jobs, match = jobs_of(recipe), recipe.study.match if recipe.study else None
    if not only_table:
        with alone_in(run, "compare"):
            runner.prepare(jobs)
            first = {job.method: job.seed for job in reversed(jobs)}
            if runner.jobs([job for job in jobs if job.seed == first[job.method]]):
                rates = choose(runner.done(jobs), match)
                others = [job for job in jobs if job.seed != first[job.method]]
                runner.jobs([job for job in others if rates.get(job.method) == job.learning_rate])
    done = runner.done(jobs)
    if not done or not runner.base.exists():
        raise RecipeError(f"{file}: no job of the study is done yet; `kore-fast compare {file}` runs them")
    return build_comparison(
        [read_json(runner.base), *done.values()],
        runner.results,
        selected=choose(done, match),
        experiments=recipe.study.experiments if recipe.study else {},
        reference=match or "lora",
    )


def _bound_to_us(script: str, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """A shell's script in a session of its own that ends with this process, whatever ends this process.

    We hold the other end of its input and write nothing: an end of file means that we are gone.
    """
    watch = """
        exec 3<&0 </dev/null
        { read -r -u 3 || kill -TERM -- -$$; } &
        exec 3<&-
        trap "kill $! 2>/dev/null" EXIT
    """
    command = ["bash", "-c", f"set -e\n{watch}\n{script}", *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, **options)


def _stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """End jobs that still run when the study is left; they continue the next time."""
    for process in processes:
        if process.poll() is not None:
            continue
        # The shell between them and us hands no signal on.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _visible_devices() -> list[str]:
    """The GPUs of this process, each by the name that a process of a job is given it by."""
    count = torch.cuda.device_count()
    # Where the user chose some, their numbers count: CUDA numbers those that it shows from 0 again.
    chosen = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return chosen[:count] if chosen else [str(number) for number in range(count)]


@contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """SIGTERM leaves the block as Ctrl-C does: no job outlives its study and meets the next one in its folder."""
    if threading.current_thread() is not threading.main_thread():
        yield  # nobody else may say what a signal does
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class _Running:
    process: subprocess.Popen[bytes]
    stage: str
    """``"init"`` while it makes the start, then ``"train"``."""
    place: int
    log: Any


@dataclass
class _Runner:
    file: Path
    recipe: Recipe
    run: Path
    overrides: tuple[str, ...]
    width: int
    deadline: float
    say: Callable[[str], None]
    failed: list[str] = field(default_factory=list)
    files: Mapping[str, str] | None = None
    """What the recipe's files held when they were first looked at, or when the first stages had made what they make."""

    @property
    def results(self) -> Path:
        """Where the comparison goes, and the scores that are kept."""
        study = self.recipe.study
        return self.run / "compare" if study is None or study.results is None else self.recipe.resolve(study.results)

    @property
    def base(self) -> Path:
        """The base's scores."""
        return self.results / "runs" / f"{BASE}.json"

    def prepare(self, jobs: Sequence[Job]) -> None:
        """What all jobs read: samples, covariances, the base's figures."""
        waiting = [job for job in jobs if self.scores(job) is None]
        if not waiting and self.base.exists():
            return
        stages: list[tuple[str, ...]] = [("augment",)]
        if self.recipe.covariance is not None:
            stages.append(("covariance",))
        stages.append(("evaluate", "--method", BASE))
        for stage in stages:
            self._run(*stage)
        self._keep(self.run / "evaluate" / BASE / "scores.json", self.base, {"method": BASE})
        self.files = None

    def jobs(self, jobs: Iterable[Job]) -> bool:
        """Train and evaluate; False when the time ran out before all were done."""
        waiting = [job for job in jobs if self.scores(job) is None]
        running: dict[Job, _Running] = {}
        logs = self.run / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(_leaving_on_sigterm())
            stack.callback(lambda: _stop(one.process for one in running.values()))
            while waiting or running:
                while len(running) < self.width and time.monotonic() < self.deadline:
                    job = self._next(waiting, running)
                    if job is None:
                        break
                    waiting.remove(job)
                    place = min(set(range(self.width)) - {one.place for one in running.values()})
                    log = stack.enter_context((logs / f"{job.name}.log").open("ab"))
                    self.say(f"{job.name}: started, {len(waiting)} waiting")
                    first = "init" if self.recipe.has_start(job.name) else "train"
                    running[job] = _Running(self._start(job, first, place, log), first, place, log)
                for job, one in list(running.items()):
                    if one.process.poll() is None:
                        continue
                    if one.stage == "init" and one.process.returncode == 0:
                        process = self._start(job, "train", one.place, one.log)
                        running[job] = replace(one, process=process, stage="train")
                        continue
                    del running[job]
                    self._finish(job, one.process.returncode, logs / f"{job.name}.log")
                if waiting and not running and time.monotonic() >= self.deadline:
                    self.say(f"the time is up, {len(waiting)} jobs are left; the same command continues")
                    return False
                time.sleep(0.2)
        if self.failed:
            raise RecipeError(f"{self.file}: {len(self.failed)} jobs failed: {'; '.join(self.failed)}")
        return True

    def _run(self, *stage: str) -> None:
        process = _bound_to_us('"$0" "$@"', *self._command(*stage))
        with ExitStack() as stack:
            stack.enter_context(_leaving_on_sigterm())
            stack.callback(_stop, [process])
            status = process.wait()
        if status:
            raise RecipeError(f"{self.file}: `kore-fast {' '.join(stage)}` failed, see above")

    def _next(self, waiting: Iterable[Job], running: Mapping[Job, _Running]) -> Job | None:
        """The first job whose start no other job is making: jobs share starts, and one that is there is kept."""
        made = {self.recipe.start_of(job.name) for job, one in running.items() if one.stage == "init"}
        return next((job for job in waiting if self.recipe.start_of(job.name) not in made), None)

    def _start(self, job: Job, first: str, place: int, log: Any) -> subprocess.Popen[bytes]:
        """The processes of a job: ``"init"`` alone, or from ``"train"`` on."""
        # One process after the other, as each stage loads its own model.
        stages = "init" if first == "init" else "train evaluate"
        script = f'for stage in {stages}; do "$0" -m kore_fast $stage "$@"; done'
        method = self.recipe.start_of(job.name) if first == "init" else job.name
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.width))}
        if devices := _visible_devices():
            environment["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)]
        _, _, _, *arguments = self._command("", "--method", method)
        return _bound_to_us(script, sys.executable, *arguments, stdout=log, stderr=log, env=environment)

    def _finish(self, job: Job, status: int, log: Path) -> None:
        if status:
            self.failed.append(f"{job.name} (see {log})")
            self.say(f"{job.name}: failed, see {log}")
            return
        scores = self._keep(
            self.run / "evaluate" / job.name / "scores.json",
            self._kept(job),
            {"method": job.method},
            self._made_from(job),
        )
        if self.recipe.study is not None and not self.recipe.study.keep_weights:
            shutil.rmtree(self.run / "train" / job.name)
        shown = ", ".join(f"{n} {m['value']:.3f}" for n, m in scores["metrics"].items() if m["value"] is not None)
        self.say(f"{job.name}: {shown}")

    def scores(self, job: Job) -> dict[str, Any] | None:
        """A finished job's scores, if they were made from what the study says now."""
        from kore_fast.recipe.kept import still_fits

        path = self._kept(job)
        if not path.exists():
            return None
        kept = read_json(path)
        made_from = self._made_from(job)
        return kept["scores"] if still_fits(kept["made_from"], made_from["options"], made_from["files"]) else None

    def done(self, jobs: Iterable[Job]) -> dict[Job, dict[str, Any]]:
        """The scores of every job that is done."""
        return {job: scores for job in jobs if (scores := self.scores(job)) is not None}

    def _kept(self, job: Job) -> Path:
        return self.results / "runs" / f"{job.name}.json"

    def _keep(self, source: Path, target: Path, change: dict[str, Any], made_from: Any = None) -> dict[str, Any]:
        scores: dict[str, Any] = {**read_json(source), **change}
        write_json(target, {"made_from": made_from, "scores": scores} if made_from else scores)
        return scores

    def _made_from(self, job: Job) -> dict[str, Any]:
        """What decides a job's scores; see `recipe.kept`."""
        from kore_fast.recipe.kept import file_digests, options_digest

        if self.files is None:
            self.files = file_digests(self.recipe)
        return {"options": options_digest(self.recipe, self.recipe.methods[job.name]), "files": self.files}

    def _command(self, stage: str, *extra: str) -> list[str]:
        changes = [part for change in self.overrides for part in ("--set", change)]
        command = [sys.executable, "-m", "kore_fast", *([stage] if stage else []), str(self.file)]
        return [*command, "--run", str(self.run), *changes, *extra]
