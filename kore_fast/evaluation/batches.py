"""Batches that become smaller when memory runs out."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from kore_fast.errors import KoreError

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
