"""How benchmarks measure: variants take turns, medians with the 20 and 80 % quantiles, rows that say where they ran."""

from __future__ import annotations

import json
import platform
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kore_fast.ops.native.library import describe

Row = dict[str, Any]
Compare = Callable[..., dict[str, Row]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=Path, help="folder to which the rows of each benchmark file are written")


def where() -> Row:
    """The machine and the versions, for every row."""
    row: Row = {"device": device_name(), "threads": torch.get_num_threads()}
    for package in ("torch", "triton"):
        try:
            row[package] = version(package)
        except PackageNotFoundError:
            row[package] = None
    row["python"] = platform.python_version()
    row["native"] = describe()
    if torch.cuda.is_available():
        row["cuda"] = torch.version.cuda
        row["clock_mhz"] = _nvidia_smi("clocks.max.sm")
        row["driver"] = _nvidia_smi("driver_version")
    git = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    row["commit"] = git.stdout.strip() or None
    return row


def device_name() -> str:
    """The GPU's name, or the CPU's with its instruction set and cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = re.search(r"model name\s*: (.+)", _read("/proc/cpuinfo"))
    return f"{model.group(1).strip() if model else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""


def _nvidia_smi(what: str) -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"], capture_output=True, text=True, timeout=30
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def _timer() -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """Marks a moment, and the seconds between two: of the GPU's own clock where there is one."""
    if not torch.cuda.is_available():
        return time.perf_counter, lambda start, stop: stop - start

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    return mark, seconds


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where benchmarks run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def _written() -> dict[str, list[Row]]:
    return {}


@pytest.fixture
def record(request: pytest.FixtureRequest, _written: dict[str, list[Row]]) -> Iterator[Callable[[Row], None]]:
    """Keeps a row for ``--rows``, with what every row says; written after each benchmark, so that a run that is stopped
    leaves those that were done."""
    name, folder = request.path.stem.removeprefix("bench_"), request.config.getoption("--rows")
    machine = where()
    rows = _written.setdefault(name, [])
    yield lambda row: rows.append({**row, **machine})
    if folder is not None and rows:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _turns(
    variants: Mapping[str, Sequence[Callable[[], Any]]], rounds: int, warm: bool
) -> dict[str, list[tuple[float, ...]]]:
    """Seconds of each call of each variant, round by round.

    Each round calls every variant once, so that a slow moment of the machine strikes all; in another order each time,
    so that none always finds the caches as the same neighbour left them.
    """
    mark, seconds = _timer()
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda") if torch.cuda.is_available() else None
    taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in variants}
    for call in (call for calls in variants.values() for call in calls) if not warm else ():
        call()
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(variants), len(variants)):
            found = []
            for call in variants[name]:
                if flush is not None:
                    flush.zero_()  # so that the second-level cache serves nobody's repeat
                start = mark()
                call()
                found.append(seconds(start, mark()))
            taken[name].append(tuple(found))
    return taken


def _times(seconds: Sequence[float], ours: Sequence[float]) -> Row:
    """Median, p20 and p80 in milliseconds, and the ratio of the medians."""
    p20, median, p80 = map(float, np.quantile(seconds, [0.2, 0.5, 0.8]))
    row = {name: round(1e3 * value, 4) for name, value in (("median_ms", median), ("p20_ms", p20), ("p80_ms", p80))}
    return {**row, "ratio": round(median / float(np.median(ours)), 3)}


@pytest.fixture
def compare(record: Callable[[Row], None]) -> Compare:
    """Times variants of one piece of work in turns."""

    def run(
        variants: Mapping[str, Callable[[], Any]],
        case: Row,
        *,
        ours: str,
        rounds: int = 7,
        warm: bool = False,
        least_seconds: float | None = None,
        extra: Mapping[str, Row] | None = None,
    ) -> dict[str, Row]:
        """
        Args:
            variants: name → the call.
            case: what is the same for all of them (shapes, dtypes).
            ours: the variant that the others are compared with; ``ratio`` of a row is how many times its median ours
                fits into.
            warm: every variant has run already; otherwise each is called once before the rounds.
            least_seconds: what the work takes at the device's peaks; a row says which fraction of them it reached.
            extra: more for the row of a variant.

        Returns:
            name → its row: median, p20 and p80 in milliseconds, ratio, and what was given.
        """
        taken = _turns({name: [call] for name, call in variants.items()}, rounds, warm)
        samples = {name: [seconds for (seconds,) in found] for name, found in taken.items()}
        rows = {}
        for name, seconds in samples.items():
            median = float(np.median(seconds))
            rows[name] = {
                "variant": name,
                **case,
                **_times(seconds, samples[ours]),
                **({} if least_seconds is None else {"roofline": round(least_seconds / median, 3)}),
                **((extra or {}).get(name, {})),
            }
            record(rows[name])
        return rows

    return run


@pytest.fixture
def compare_passes(record: Callable[[Row], None]) -> Compare:
    """Times forward and backward of variants in turns: each alone, and their sum."""

    def run(
        variants: Mapping[str, tuple[Callable[[], Any], Callable[[], Any]]],
        case: Row,
        *,
        ours: str,
        base: str,
        adapter_share: float,
        rounds: int = 7,
        extra: Mapping[str, Row] | None = None,
    ) -> dict[str, Row]:
        """As `compare`, of variants that have all run before.

        Args:
            variants: name → forward and backward, which uses what forward left.
            base: the variant without an adapter; ``of_floor`` of a row is its median in multiples of the base's ×
                (1 + ``adapter_share``).
            adapter_share: operations of the adapter's forward pass, as a part of the base's.

        Returns:
            name → its row for "forward and backward".
        """
        taken = _turns(variants, rounds, warm=True)
        rows: dict[str, Row] = {}
        for what, pick in _PASSES.items():
            samples = {name: [pick(found) for found in times] for name, times in taken.items()}
            floor = float(np.median(samples[base])) * (1 + adapter_share)
            for name, seconds in samples.items():
                of_floor = round(float(np.median(seconds)) / floor, 3)
                times = {**_times(seconds, samples[ours]), "of_floor": of_floor}
                rows[name] = {"variant": name, **case, "what": what, **times, **((extra or {}).get(name, {}))}
                record(rows[name])
        return rows

    return run


_PASSES: dict[str, Callable[[tuple[float, ...]], float]] = {
    "forward": lambda times: times[0],
    "backward": lambda times: times[1],
    "forward and backward": sum,
}
