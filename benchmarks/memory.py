"""What one call keeps for backward and what it needs at its peak, in bytes."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Peak:
    """A call's highest demand above what was there before it; what it returns is freed."""

    allocated: int
    """By torch's allocator, to the byte. What a library takes for itself (packed panels; oneDNN's and MKL's own) is not
    in; on a CPU what was there before counts as if it stayed."""
    resident: int | None
    """Of the whole process, by the operating system: with what libraries take for themselves, unless they kept it from
    an earlier call, and with the holes that malloc leaves. None on a GPU and where the system does not tell."""


def saved_bytes(forward: Callable[[], Any], weights: Iterable[torch.Tensor]) -> int:
    """What autograd keeps after ``forward``: each storage once and whole, those of ``weights`` left out."""
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # held, so that no later one takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    total = sum(storage.nbytes() for storage in kept.values())
    del result
    return total


def peak_bytes(call: Callable[[], Any], device: torch.device) -> Peak:
    """The peak of one call; let it run once before, so that nothing is set up in it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return Peak(torch.cuda.max_memory_allocated() - before, None)
    resident = _resident(call)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return Peak(highest, resident)


def _resident(call: Callable[[], Any]) -> int | None:
    try:
        # Freed pages go back first: they would take in what the call needs.
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5", encoding="ascii")
        before = _status("VmRSS")
    except (OSError, AttributeError):
        return None
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])
