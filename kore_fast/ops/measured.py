"""Which of several ways is fastest on this machine: measured at the first call of a kind, kept in a file.

Ways differ in rounding, so that what was chosen once stays: a run that was killed continues with the same bits.
Processes that meet the same kind at the same time wait for the first one's measurement. Delete the file to measure
again; ``KORE_FAST_AUTOTUNE=0`` measures nothing and takes the first way.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

import kore_fast
from kore_fast.errors import DataError
from kore_fast.files import write_json

logger = logging.getLogger(__name__)

_ROUNDS = 3
_chosen: dict[tuple[str, str], str] = {}


def choices_file() -> Path:
    """``choices.json`` in ``$KORE_FAST_CACHE``, by default ``kore_fast`` below the user's cache folder."""
    home = os.environ.get("KORE_FAST_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(home) if home else Path(base).expanduser() / "kore_fast") / "choices.json"


def fastest(kind: str, device: torch.device, ways: Mapping[str, Callable[[], Any]]) -> str:
    """The name of the fastest way.

    Args:
        kind: what is computed, with what decides its speed (sizes, dtype).
        ways: name → a call that does it; all give the same result up to rounding. The first is taken where nothing can
            be measured: during a graph's capture, or where that is switched off.
    """
    first = next(iter(ways))
    if len(ways) == 1 or os.environ.get("KORE_FAST_AUTOTUNE") == "0":
        return first
    key = (_machine(device), kind)
    if (known := _chosen.get(key)) in ways:
        return str(known)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return first
    with _locked(choices_file()) as kept:
        name = kept.get(key[0], {}).get(kind, "")
        if name not in ways:
            seconds = _measure(device, ways)
            name = min(seconds, key=lambda way: seconds[way])
            kept.setdefault(key[0], {})[kind] = name
            told = ", ".join(f"{way} {1e3 * taken:.3g} ms" for way, taken in seconds.items())
            logger.info("%s: %s (%s)", kind, name, told)
    _chosen[key] = name
    return name


def known_choices(device: torch.device) -> dict[str, str]:
    """What was chosen on a device so far: kind → way."""
    return dict(_read(choices_file()).get(_machine(device), {}))


def _measure(device: torch.device, ways: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each way, in turns; of one that does not fit into memory, infinity."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(_ROUNDS + 1):
        for name, call in ways.items():
            try:
                _wait(device)
                start = time.perf_counter()
                call()
                _wait(device)
            except torch.OutOfMemoryError:
                taken[name].append(float("inf"))
                continue
            if number:  # the first compiles and fills caches
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in taken.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@cache
def _machine(device: torch.device) -> str:
    """What a choice holds for: the device, the threads, and the versions of what computes."""
    from kore_fast.ops.native.library import describe

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}; kore_fast {kore_fast.__version__}, {describe()}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, torch.backends.cpu.get_cpu_capability())


def _read(path: Path) -> dict[str, dict[str, str]]:
    """The file's content; nothing where it is missing or not what we wrote."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {machine: dict(kinds) for machine, kinds in found.items() if isinstance(kinds, dict)}


@contextmanager
def _locked(path: Path) -> Iterator[dict[str, dict[str, str]]]:
    """The file's content, to be changed; then it is written. Where that can't be, a choice holds for this process."""
    lock = FileLock(path.with_suffix(".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError:
        yield {}
        return
    try:
        kept = _read(path)
        yield kept
        write_json(path, kept)
    except DataError as error:
        logger.info("%s", error)
    finally:
        lock.release()
