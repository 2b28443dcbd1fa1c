"""One process at a time in a part of a run's folder; a lock goes with its process, also one that is killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from kore_fast.errors import RecipeError

# Seconds: helper processes of one that was killed may outlive it by a moment.
_PATIENCE = 3.0


@contextmanager
def alone_in(run: Path, part: str) -> Iterator[None]:
    """Hold ``part`` (a stage's name, or ``"compare"``) of a run.

    Raises:
        RecipeError: another process holds it.
    """
    path = run / ".locks" / f"{part.replace('/', '-')}.lock"
    lock = FileLock(path, timeout=_PATIENCE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise RecipeError(
            f"{part}: another process is at work on it in {run} (it holds {path}); wait until it has ended, or stop "
            "it: finished work is kept"
        ) from None
    except (OSError, NotImplementedError):
        yield  # a file system without locks, or a folder that cannot be written, which the work itself will tell
        return
    try:
        yield
    finally:
        lock.release()
