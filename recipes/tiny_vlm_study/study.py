"""The honest experiment: at equal adaptation, how much more does the null space keep?

    python recipes/tiny_vlm_study/study.py [--run DIR] [--jobs 2] [--minutes M] [--table]

Learning rates are chosen on the first seed, then every method runs on the others. It takes hours on two cores; the same
command continues where it stopped, also in another checkout: a finished run's scores are kept in results/runs/, with
what they were made from. Each job gets its share of the cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kore_fast.files import read_json, sha256_file, write_json, write_text
from kore_fast.report import build_comparison

HERE = Path(__file__).resolve().parent
KEPT = HERE / "results" / "runs"
BASE = "base"
ADAPTATION = "adaptation_cem"


@dataclass(frozen=True)
class Job:
    """One training run."""

    method: str
    learning_rate: str
    seed: int

    @property
    def name(self) -> str:
        """As a method of the expanded recipe."""
        return f"{self.method}_{self.learning_rate.replace('.', 'p').replace('-', 'm')}_s{self.seed}"


def expand(study: Mapping[str, Any], jobs: Iterable[Job]) -> dict[str, Any]:
    """The recipe in which each job is a method."""
    methods = {}
    for job in jobs:
        options = {k: v for k, v in study["methods"][job.method].items() if k != "learning_rates"}
        methods[job.name] = {**options, "learning_rate": job.learning_rate, "seed": job.seed}
    return {**study["recipe"], "methods": methods}


def grid(study: Mapping[str, Any]) -> list[Job]:
    """Every method at every learning rate, on every seed: the names that the recipe must know."""
    return [
        Job(method, str(rate), seed)
        for seed in study["seeds"]
        for method, options in study["methods"].items()
        for rate in options["learning_rates"]
    ]


def choose(scores: Mapping[Job, Mapping[str, Any]]) -> dict[str, str]:
    """Each method's learning rate, from the first seed: the one whose adaptation is nearest to LoRA's best.

    The question is what is kept at equal adaptation, so the rates are matched on adaptation and never on retention.
    """
    adaptation = {job: found["metrics"][ADAPTATION]["value"] for job, found in scores.items()}
    target = max((value for job, value in adaptation.items() if job.method == "lora"), default=max(adaptation.values()))
    chosen: dict[str, str] = {}
    for job in sorted(adaptation, key=lambda job: (abs(adaptation[job] - target), float(job.learning_rate))):
        chosen.setdefault(job.method, job.learning_rate)
    return chosen


class Runner:
    """Runs jobs of the expanded recipe side by side, each in a process of its own."""

    def __init__(self, study: Mapping[str, Any], recipe: Path, run: Path, width: int, deadline: float) -> None:
        self.study, self.recipe, self.run, self.width, self.deadline = study, recipe, run, width, deadline
        self.threads = max(1, (os.cpu_count() or 1) // width)

    def command(self, stage: str, *extra: str) -> list[str]:
        return [sys.executable, "-m", "kore_fast.cli", stage, str(self.recipe), "--run", str(self.run), *extra]

    def shared(self, starts: Iterable[str]) -> None:
        """What all jobs read: samples, covariances, the base's figures, the starts."""
        for command in (
            self.command("augment"),
            self.command("covariance"),
            self.command("evaluate", "--method", BASE),
            *(self.command("init", "--method", name) for name in starts),
        ):
            subprocess.run(command, check=True)

    def jobs(self, jobs: Iterable[Job]) -> bool:
        """Train and evaluate; False when the time ran out before all were done."""
        waiting = [job for job in jobs if not self.scores(job)]
        running: dict[Job, subprocess.Popen[bytes]] = {}
        (self.run / "logs").mkdir(parents=True, exist_ok=True)
        while waiting or running:
            while waiting and len(running) < self.width and time.monotonic() < self.deadline:
                job = waiting.pop(0)
                script = 'set -e; for stage in train evaluate; do "$0" -m kore_fast.cli $stage "$@"; done'
                arguments = [str(self.recipe), "--run", str(self.run), "--method", job.name]
                log = (self.run / "logs" / f"{job.name}.log").open("ab")
                environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
                running[job] = subprocess.Popen(
                    ["bash", "-c", script, sys.executable, *arguments], stdout=log, stderr=log, env=environment
                )
                print(f"{job.name}: started, {len(waiting)} waiting", flush=True)
            for job, process in list(running.items()):
                if process.poll() is not None:
                    del running[job]
                    if process.returncode:
                        raise SystemExit(f"{job.name} failed; see {self.run / 'logs' / job.name}.log")
                    self.keep(job)
            if waiting and not running:
                print("the time is up; the same command continues", flush=True)
                return False
            time.sleep(1)
        return True

    def scores(self, job: Job) -> dict[str, Any] | None:
        """A finished job's scores, if they were made from what the study says now."""
        path = KEPT / f"{job.name}.json"
        if not path.exists():
            return None
        kept = read_json(path)
        return kept["scores"] if kept["made_from"] == made_from(self.study, job) else None

    def keep(self, job: Job) -> None:
        """Copy a job's scores from the run's folder to where they are committed."""
        scores = {**read_json(self.run / "evaluate" / job.name / "scores.json"), "method": job.method}
        write_json(KEPT / f"{job.name}.json", {"made_from": made_from(self.study, job), "scores": scores})
        print(f"{job.name}: " + ", ".join(f"{n} {m['value']:.3f}" for n, m in scores["metrics"].items()), flush=True)


def made_from(study: Mapping[str, Any], job: Job) -> str:
    """Hex SHA-256 of what decides a job's scores: its recipe, the items and their wordings, the model's projector."""
    expanded = expand(study, [job])
    digest = hashlib.sha256(json.dumps(expanded, sort_keys=True).encode())
    items = HERE / study["recipe"]["items"]
    projector = HERE.parent / "tiny_vlm" / "projector.safetensors"
    for path in (items, items.parent / "wordings.yaml", projector):
        digest.update(sha256_file(path).encode())
    return digest.hexdigest()


def main() -> None:
    """Read the command line and take the study as far as the time allows."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/tiny_vlm_study"))
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further run after so long")
    parser.add_argument("--table", action="store_true", help="only write the results of what is done")
    options = parser.parse_args()
    study = yaml.safe_load((HERE / "study.yaml").read_text(encoding="utf-8"))
    run = options.run.resolve()
    # Beside study.yaml, because a recipe's paths are relative to it.
    recipe = HERE / "expanded.yaml"
    everything = grid(study)
    write_text(recipe, yaml.safe_dump(expand(study, everything), sort_keys=False))
    runner = Runner(study, recipe, run, options.jobs, time.monotonic() + 60 * options.minutes)
    first, *others = study["seeds"]
    on_first = [job for job in everything if job.seed == first]
    if not options.table:
        from kore_fast.recipe.schema import load_recipe

        expanded = load_recipe(recipe)
        adapted = [name for name, method in expanded.methods.items() if method.kind != "full"]
        runner.shared(dict.fromkeys(expanded.start_of(name) for name in adapted))
        write_json(KEPT / f"{BASE}.json", read_json(run / "evaluate" / BASE / "scores.json"))
        if runner.jobs(on_first):
            chosen = choose({job: scores for job in on_first if (scores := runner.scores(job)) is not None})
            print("chosen on the first seed:", chosen, flush=True)
            runner.jobs(job for job in everything if job.seed in others and job.learning_rate == chosen[job.method])
    done = {job: scores for job in everything if (scores := runner.scores(job))}
    chosen = choose({job: scores for job, scores in done.items() if job.seed == first})
    base = read_json(KEPT / f"{BASE}.json")
    results = build_comparison(
        [base, *done.values()],
        HERE / "results",
        selected={method: float(rate) for method, rate in chosen.items()},
    )
    print(results.markdown)


if __name__ == "__main__":
    main()
