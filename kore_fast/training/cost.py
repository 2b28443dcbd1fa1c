"""What a training run took: seconds and peak memory. They differ from run to run, so no stage's files hold them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Cost:
    """Set when the block of `measured` ends."""

    seconds: float = 0.0
    peak_memory: int | None = None
    """Bytes: on a GPU those that torch allocated, else those of the whole process that were resident; None where the
    system does not tell."""
    device: str = "cpu"


@contextmanager
def measured() -> Iterator[Cost]:
    """Measure the block."""
    cost = Cost()
    gpu = torch.cuda.is_available()
    if gpu:
        cost.device = torch.cuda.get_device_name()
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")  # the peak counts from here
    began = time.perf_counter()
    yield cost
    cost.seconds = time.perf_counter() - began
    if gpu:
        cost.peak_memory = torch.cuda.max_memory_allocated()
    else:
        cost.peak_memory = _resident_peak()


def _resident_peak() -> int | None:
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024
