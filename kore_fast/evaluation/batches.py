"""Batches that become smaller when memory runs out, and whose results are kept as they come."""

from __future__ import annotations

import gc
import hashlib
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from kore_fast.errors import DataError, KoreError
from kore_fast.files import json_line
from kore_fast.journal import Journal

ResultT = TypeVar("ResultT")
log = logging.getLogger(__name__)
# What else than torch.OutOfMemoryError says so: the CPU's allocator, cuBLAS, and devices that came later.
_SAYS_SO = re.compile("out of memory|not enough memory|can.?t allocate memory|ALLOC_FAILED", re.IGNORECASE)


class BatchSize:
    """How many go through a model at once. It is halved where memory runs out, and stays so for what follows."""

    def __init__(self, size: int) -> None:
        """Raises `KoreError` where ``size`` is below 1."""
        if size < 1:
            raise KoreError(f"a batch size of {size}: want at least 1")
        self.size = size

    def run(
        self, rows: Sequence[int], work: Callable[[Sequence[int]], ResultT], name: Callable[[int], str]
    ) -> Iterator[tuple[Sequence[int], ResultT]]:
        """Do ``work`` on all rows, at most ``size`` at a time, and yield each part with its result.

        Args:
            name: what a row is called in an error.

        Raises:
            KoreError: memory does not suffice for one row alone; names it.
        """
        start = 0
        while start < len(rows):
            part = rows[start : start + self.size]
            result, failure = _attempt(work, part)
            if failure is not None:
                _release()
                if len(part) == 1:
                    raise KoreError(
                        f"{name(part[0])}: not enough memory for it alone ({failure}); give the model a larger device, "
                        "fewer new tokens or a smaller dtype. What was done before is kept"
                    )
                self.size = len(part) // 2
                log.warning("Not enough memory for %d at once: going on with %d", len(part), self.size)
                continue
            start += len(part)
            yield part, result[0]


class Kept:
    """What came of a sequence of batches, a line a part in a journal, so that a killed call goes on after the last one.

    What is in the journal is taken in its order, at the size that parts had come to: what is left is done in the very
    parts in which an uninterrupted call does it, and the last bits are the same.
    """

    def __init__(self, path: Path | None, asked: Callable[[], Any]) -> None:
        """Read what is there.

        Args:
            path: None keeps nothing.
            asked: gives all that the results follow from, batches included, as a JSON value; a journal of something
                else is begun anew.

        Raises:
            DataError: the journal cannot be read or written; names it.
        """
        self._path = path
        self._there: list[dict[str, Any]] = []
        if path is None:
            return
        self._journal = Journal(path)
        self._asked = hashlib.sha256(json_line(asked()).encode()).hexdigest()
        rows = self._journal.rows("asked", "rows", "size", "found")
        if any(row["asked"] != self._asked for row in rows):
            path.unlink()
            rows = []
        self._there = rows[::-1]
        self._journal.append([])  # a folder that cannot be written is told before any work

    def run(
        self,
        size: BatchSize,
        rows: Sequence[int],
        work: Callable[[Sequence[int]], ResultT],
        name: Callable[[int], str],
    ) -> Iterator[tuple[Sequence[int], ResultT]]:
        """`BatchSize.run` on the rows whose results are not there yet, after those that are.

        Args:
            work: its result is a JSON value.

        Raises:
            DataError: a part in the journal does not end with a batch, or the journal cannot be written.
            KoreError: memory does not suffice for one row, or a result is not a finite number.
        """
        start = 0
        while start < len(rows) and self._there:
            kept = self._there.pop()
            part = rows[start : start + kept["rows"]]
            if len(part) != kept["rows"]:
                raise DataError(f"{self._path}: holds parts of other batches; remove the file")
            size.size = kept["size"]
            start += len(part)
            yield part, kept["found"]
        for part, result in size.run(rows[start:], work, name):
            if self._path is not None:
                check_finite(result, self._path)
                self._journal.append([{"asked": self._asked, "rows": len(part), "size": size.size, "found": result}])
            yield part, result


def check_finite(value: Any, path: Path) -> None:
    """Raises `KoreError` where a JSON value to be written to ``path`` holds NaN or an infinity."""
    if not _is_finite(value):
        raise KoreError(
            f"{path}: what was measured for it is not a finite number, so the outputs of the model (or of its base) "
            "are not either: its training diverged, or its dtype is too narrow for it. Look at the training's loss and "
            "train again with a lower learning rate, or in float32; what was measured before this is kept"
        )


def _is_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    return all(map(_is_finite, value)) if isinstance(value, list | tuple) else True


def _attempt(work: Callable[[Sequence[int]], ResultT], part: Sequence[int]) -> tuple[list[ResultT], str | None]:
    """The result, or that memory ran out; when this returns, nothing holds the tensors of the failed attempt."""
    try:
        return [work(part)], None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return [], " ".join(str(error).split())[:200] or "out of memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whichever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _SAYS_SO.search(str(error)) is not None


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
