"""From rows to sums: token buffers, sums that stay on the model's device, and sums that are kept elsewhere."""

from __future__ import annotations

import os
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kore_fast.constraint.budget import Pass, buffer_tokens
from kore_fast.constraint.inputs import Rows, Width
from kore_fast.errors import DataError
from kore_fast.ops import covariance_update_, new_count

# The lower triangle travels as panels of so many rows, each cut off behind its last entry: d²/2 values and few copies.
_PANEL = 256


def _panels(d: int) -> Iterator[tuple[int, int, slice]]:
    """Panels of a lower triangle: first row, end row, and the place of the panel's (rows, end row) values."""
    start = 0
    for a in range(0, d, _PANEL):
        b = min(a + _PANEL, d)
        stop = start + (b - a) * b
        yield a, b, slice(start, stop)
        start = stop


def panel_size(d: int) -> int:
    """Values in the panels of a (d, d) lower triangle: d²/2 and at most 128·d more."""
    return sum((b - a) * b for a, b, _ in _panels(d))


def to_panels(C: torch.Tensor, out: torch.Tensor, *, non_blocking: bool = False) -> torch.Tensor:
    """The lower triangle of ``C`` (d, d) into ``out`` (`panel_size`,), which may be on another device."""
    for a, b, place in _panels(C.shape[0]):
        out[place].view(b - a, b).copy_(C[a:b, :b], non_blocking=non_blocking)
    return out


def from_panels(panels: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """Inverse of `to_panels`."""
    for a, b, place in _panels(C.shape[0]):
        C[a:b, :b].copy_(panels[place].view(b - a, b))
    return C


def pack_panels(panels: torch.Tensor, d: int) -> torch.Tensor:
    """Panels on the CPU → the store's packed triangle (d(d+1)/2,), in the same memory: ``panels`` is used up."""
    values = panels.numpy()  # copies a row in a tenth of a tensor's time, and minds that source and goal overlap
    for a, b, place in _panels(d):
        for i in range(a, b):
            start = place.start + (i - a) * b
            packed = i * (i + 1) // 2
            values[packed : packed + i + 1] = values[start : start + i + 1]
    return panels[: d * (d + 1) // 2]


class ResidentSum:
    """A sum on the device of its rows."""

    def __init__(self, d: int, device: torch.device) -> None:
        self.C = torch.zeros(d, d, dtype=torch.float64, device=device)
        self.count = new_count(device=device)

    def add(self, x: torch.Tensor, mask: torch.Tensor | None, scale: torch.Tensor | None) -> None:
        covariance_update_(self.C, self.count, x, mask, scale)

    def panels(self, device: torch.device) -> torch.Tensor:
        """A copy of the sum's panels on ``device``."""
        return to_panels(self.C, self.C.new_empty(panel_size(len(self.C)), device=device))

    def restore(self, panels: torch.Tensor, count: torch.Tensor) -> None:
        from_panels(panels, self.C)
        self.count.copy_(count)


class _Slot:
    """Room for one product on its way from the model's device to its sum."""

    def __init__(self, widest: int, device: torch.device) -> None:
        self.product = torch.empty(widest * widest, dtype=torch.float64, device=device)
        # On a CPU the thread reads the product itself.
        self.landed: torch.Tensor | None = None
        self.arrived: torch.cuda.Event | None = None
        if device.type == "cuda":
            self.landed = torch.empty(panel_size(widest), dtype=torch.float64, pin_memory=True)
            self.arrived = torch.cuda.Event()
        elif device.type != "cpu":
            self.landed = torch.empty(panel_size(widest), dtype=torch.float64)


class Spill:
    """Sums away from the model's device: products leave on a stream of their own, a thread adds them up.

    Every product needs a slot. When all are on their way, `add` waits: memory stays bounded however slow the other end
    is. One thread takes the products in order, so that the sums do not depend on its pace.
    """

    def __init__(self, device: torch.device, widest: int, slots: int, folder: Path | None) -> None:
        self._folder = folder
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free: queue.Queue[_Slot] = queue.Queue()
        for _ in range(slots):
            self._free.put(_Slot(widest, device))
        self._work: queue.Queue[tuple[_Slot, torch.Tensor, int] | None] = queue.Queue()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._add_up, name="covariance sums", daemon=True)
        self._thread.start()

    def new_sum(self, d: int) -> torch.Tensor:
        """Zeroed panels of a sum: in memory, or in a file of the spill folder.

        The file has no name there: it is gone with the process, however that ends.

        Raises:
            DataError: the folder cannot be written or its disk is full.
        """
        size = panel_size(d)
        if self._folder is None:
            return torch.zeros(size, dtype=torch.float64)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder) as file:
                # The disk's blocks are taken now: writing to a mapping on a full disk would kill the process.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, 8 * size)
                return torch.from_numpy(np.memmap(file, dtype=np.float64, mode="r+", shape=(size,)))
        except OSError as error:
            raise DataError(
                f"{self._folder}: no room for a sum of {8 * size:,} bytes ({error.strerror or error}); free some space "
                "or give another folder as spill"
            ) from error

    def add(self, total: torch.Tensor, d: int, make: Callable[[torch.Tensor], None]) -> None:
        """Let ``make`` compute a product into a zeroed (d, d) tensor, and send it to ``total``."""
        slot = self._free.get()
        try:
            self._check()
            C = slot.product[: d * d].view(d, d).zero_()
            make(C)
            self._send(slot, C)
        except BaseException:
            self._free.put(slot)
            raise
        self._work.put((slot, total, d))

    def drain(self) -> None:
        """Wait until every product has been added."""
        self._work.join()
        self._check()

    def close(self) -> None:
        """End the thread."""
        self._work.put(None)
        self._thread.join()

    def _send(self, slot: _Slot, C: torch.Tensor) -> None:
        if slot.landed is None:
            return
        if self._stream is None:
            to_panels(C, slot.landed[: panel_size(len(C))])
            return
        assert slot.arrived is not None
        self._stream.wait_stream(torch.cuda.current_stream(C.device))
        with torch.cuda.stream(self._stream):
            to_panels(C, slot.landed[: panel_size(len(C))], non_blocking=True)
            slot.arrived.record(self._stream)

    def _add_up(self) -> None:
        while (job := self._work.get()) is not None:
            slot, total, d = job
            try:
                if slot.arrived is not None:
                    slot.arrived.synchronize()
                if self._error is None:
                    _add_landed(slot, total, d)
            except Exception as error:
                self._error = error
            finally:
                self._free.put(slot)
                self._work.task_done()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error


def _add_landed(slot: _Slot, total: torch.Tensor, d: int) -> None:
    if slot.landed is not None:
        total += slot.landed[: panel_size(d)]
        return
    C = slot.product[: d * d].view(d, d)
    for a, b, place in _panels(d):
        total[place].view(b - a, b).add_(C[a:b, :b])


class SpilledSum:
    """A sum elsewhere; only its count stays on the device of its rows."""

    def __init__(self, d: int, device: torch.device, spill: Spill) -> None:
        self.count = new_count(device=device)
        self._d = d
        self._spill = spill
        self._total = spill.new_sum(d)

    def add(self, x: torch.Tensor, mask: torch.Tensor | None, scale: torch.Tensor | None) -> None:
        self._spill.add(self._total, self._d, lambda C: covariance_update_(C, self.count, x, mask, scale))

    def panels(self, device: torch.device) -> torch.Tensor:
        """The sum's panels: itself, or a copy of them on another device."""
        self._spill.drain()
        return self._total.to(device)

    def restore(self, panels: torch.Tensor, count: torch.Tensor) -> None:
        self._total.copy_(panels)
        self.count.copy_(count)


class Buffered:
    """A sum behind a buffer: rows of small batches are gathered, and added in one call when the buffer is full.

    A batch that would fill the buffer alone goes straight to the sum.
    """

    def __init__(self, total: ResidentSum | SpilledSum, tokens: int) -> None:
        self.total = total
        self._tokens = tokens
        self._x: torch.Tensor | None = None
        self._weights: torch.Tensor | None = None
        self._filled = 0
        # What the waiting rows need: a weight each, or only to be told from the rows that do not count.
        self._scaled = self._masked = False

    def add(self, name: str, x: torch.Tensor, rows: Rows) -> None:
        """Add the rows of ``x`` that count, if any. On an accelerator nothing here waits for the device."""
        mask, scale = rows.of(name, x)
        kept = rows.kept if x.device.type == "cpu" else None
        n = x.numel() // x.shape[-1] if kept is None else len(kept)
        if n == 0:
            return
        if n >= self._tokens or (self._x is not None and x.dtype != self._x.dtype):
            self.total.add(x, mask, scale)
            return
        if self._filled + n > self._tokens:
            self.flush()
        if self._x is None or self._weights is None:
            self._x = x.new_empty(self._tokens, x.shape[-1])
            self._weights = torch.empty(self._tokens, dtype=torch.float64, device=x.device)
        place = slice(self._filled, self._filled + n)
        self._filled += n
        if kept is not None:
            torch.index_select(x.reshape(-1, x.shape[-1]), 0, kept, out=self._x[place])
            self._weights[place] = 1.0 if scale is None else scale.reshape(-1)[kept].double()
        else:
            self._x[place].view(x.shape).copy_(x)
            self._weights[place].view(x.shape[:-1]).copy_(_weights(x, mask, scale))
            self._masked |= mask is not None
        self._scaled |= scale is not None

    def flush(self) -> None:
        """Add what waits in the buffer."""
        if not self._filled:
            return
        assert self._x is not None
        assert self._weights is not None
        x, weights = self._x[: self._filled], self._weights[: self._filled]
        self.total.add(
            x, weights != 0 if self._masked and not self._scaled else None, weights if self._scaled else None
        )
        self._filled = 0
        self._scaled = self._masked = False

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything that the sum's further way depends on: tensors on the CPU, and JSON."""
        tensors = {"panels": self.total.panels(torch.device("cpu")), "count": self.total.count.cpu()}
        about = {
            "device": str(self.total.count.device),
            "scaled": self._scaled,
            "masked": self._masked,
            "buffer": self._x is not None,
        }
        if self._x is not None and self._weights is not None:
            # An empty buffer still says of which dtype it is.
            tensors["rows"] = self._x[: self._filled].cpu()
            tensors["weights"] = self._weights[: self._filled].cpu()
        return tensors, about

    def restore(self, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
        """Continue from a `state`."""
        self.total.restore(tensors["panels"], tensors["count"])
        self._scaled, self._masked = about["scaled"], about["masked"]
        if about["buffer"]:
            rows, weights, device = tensors["rows"], tensors["weights"], self.total.count.device
            self._filled = len(rows)
            self._x = torch.empty(self._tokens, rows.shape[1], dtype=rows.dtype, device=device)
            self._weights = torch.empty(self._tokens, dtype=torch.float64, device=device)
            self._x[: self._filled], self._weights[: self._filled] = rows, weights


def _weights(x: torch.Tensor, mask: torch.Tensor | None, scale: torch.Tensor | None) -> torch.Tensor:
    weights = x.new_ones((), dtype=torch.float64) if scale is None else scale.double()
    return weights.expand(x.shape[:-1]) if mask is None else torch.where(mask, weights, 0.0)


class Sums:
    """The sums of one pass. It is the sink of `DistinctInputs`."""

    def __init__(self, plan: Pass | None, widths: Mapping[str, Width], folder: Path | None) -> None:
        """``plan`` None: every input that comes is summed up on the spot."""
        self._plan = plan
        self._widest = max((widths[group].d for group in plan.spilled), default=0) if plan else 0
        self._folder = folder
        self._of: dict[str, Buffered] = {}
        # A model that is spread over several devices has its products on each.
        self._spills: dict[torch.device, Spill] = {}

    def __enter__(self) -> Sums:
        return self

    def __exit__(self, *_: object) -> None:
        for spill in self._spills.values():
            spill.close()

    def __call__(self, group: str, x: torch.Tensor, rows: Rows) -> None:
        if self._plan is not None and group not in self._plan.tokens:
            return
        if group not in self._of:
            self._of[group] = self._new(group, Width(x.shape[-1], x.element_size()), x.device)
        self._of[group].add(group, x, rows)

    def _new(self, group: str, width: Width, device: torch.device) -> Buffered:
        tokens = buffer_tokens(width) if self._plan is None else self._plan.tokens[group]
        if self._plan is None or group not in self._plan.spilled:
            return Buffered(ResidentSum(width.d, device), tokens)
        if device not in self._spills:
            self._spills[device] = Spill(device, self._widest, self._plan.slots, self._folder)
        return Buffered(SpilledSum(width.d, device, self._spills[device]), tokens)

    def flush(self) -> None:
        """Add what waits in the buffers, and wait for what is on its way."""
        for buffered in self._of.values():
            buffered.flush()
        for spill in self._spills.values():
            spill.drain()

    def counts(self, groups: Sequence[str]) -> torch.Tensor:
        """(groups, 3) on the CPU; zeros where there were no rows."""
        return torch.stack([self._of[g].total.count.cpu() if g in self._of else new_count() for g in groups])

    def take(self, group: str, d: int, device: torch.device) -> torch.Tensor:
        """A group's panels on ``device``, zeros where it had no rows; the sum itself is let go."""
        if group not in self._of:
            return torch.zeros(panel_size(d), dtype=torch.float64, device=device)
        return self._of.pop(group).total.panels(device)

    def states(self) -> Iterator[tuple[str, dict[str, torch.Tensor], dict[str, Any]]]:
        """Group by group: what a checkpoint keeps."""
        for group, buffered in self._of.items():
            yield group, *buffered.state()

    def restore(self, group: str, width: Width, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
        """Continue a group from a checkpoint."""
        self._of[group] = self._new(group, width, torch.device(about["device"]))
        self._of[group].restore(tensors, about)
