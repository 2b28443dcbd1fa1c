"""One progress bar at a time, with the time left in the step and in the whole run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

T = TypeVar("T")


class Progress(Protocol):
    """Shows how far a piece of work is."""

    def __call__(
        self,
        items: Iterable[T],
        total: float | None = None,
        label: str = "",
        cost: Callable[[T], float] | None = None,
        note: Callable[[], str] | None = None,
    ) -> Iterator[T]:
        """Pass ``items`` on, showing how many of ``total`` are done, and what ``note`` says about it.

        With ``cost`` (any unit) it is costs that are counted, and ``total`` is their sum: the time left is then right
        also where items take very different times.
        """
        ...


def silent(
    items: Iterable[T],
    total: float | None = None,
    label: str = "",
    cost: Callable[[T], float] | None = None,
    note: Callable[[], str] | None = None,
) -> Iterator[T]:
    """A `Progress` that shows nothing."""
    yield from items


def bar(
    items: Iterable[T],
    total: float | None = None,
    label: str = "",
    cost: Callable[[T], float] | None = None,
    note: Callable[[], str] | None = None,
) -> Iterator[T]:
    """A `Progress` on standard error; where that is no terminal, a line now and then."""
    if total is None and isinstance(items, Sized):
        total = len(items) if cost is None else sum(map(cost, items))
    interval = 0.2 if sys.stderr.isatty() else 15.0
    shown: dict[str, Any] = {"desc": label, "mininterval": interval, "maxinterval": interval, "dynamic_ncols": True}
    if cost is None and note is None:
        yield from tqdm(items, total=total, **shown)
        return
    if cost is None:
        with tqdm(total=total, **shown) as line:
            for item in items:
                yield item
                line.set_postfix_str(note() if note else "", refresh=False)
                line.update()
        return
    count = len(items) if isinstance(items, Sized) else None
    said = note or (lambda: "")
    # The mean speed since the start (smoothing 0): costs are rough, and items few.
    with tqdm(total=total, smoothing=0, miniters=0, bar_format=_COSTS, **shown) as line:
        line.set_postfix_str(_place(0, count), refresh=False)
        for number, item in enumerate(items, start=1):
            yield item
            line.set_postfix_str(" ".join([_place(number, count), said()]).strip(), refresh=False)
            line.update(cost(item))


# The number of a cost says nothing to a reader.
_COSTS = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


def _place(number: int, count: int | None) -> str:
    return f"{number}/{count}" if count is not None else str(number)


class RunClock:
    """Time left in a run of several steps, from rough costs that the finished steps correct. A step whose cost is None
    is left out of it."""

    def __init__(self, costs: Mapping[str, float | None]) -> None:
        self._costs = {step: cost for step, cost in costs.items() if cost is not None}
        self._unknown = [step for step, cost in costs.items() if cost is None]
        self._spent = 0.0
        self._foreseen = 0.0

    def left(self) -> float:
        """Seconds that the steps not yet finished should take, but for `unknown` ones."""
        # The prior weighs as much as one minute of measured work.
        speed = (self._spent + 60) / (self._foreseen + 60)
        return speed * sum(self._costs.values())

    def unknown(self) -> list[str]:
        """Steps not yet finished of which nobody can say how long they take."""
        return list(self._unknown)

    def skip(self, step: str) -> None:
        """The step is done already and costs nothing."""
        self._costs.pop(step, None)
        self._unknown = [one for one in self._unknown if one != step]

    def timed(self, step: str) -> _Timed:
        """A context in which the step runs."""
        return _Timed(self, step)

    def finish(self, step: str, seconds: float) -> None:
        """The step took ``seconds``."""
        if step in self._unknown:
            self._unknown.remove(step)
            return
        self._foreseen += self._costs.pop(step, 0.0)
        self._spent += seconds


class _Timed:
    def __init__(self, clock: RunClock, step: str) -> None:
        self.clock, self.step = clock, step

    def __enter__(self) -> None:
        self.start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.clock.finish(self.step, time.monotonic() - self.start)


def minutes(seconds: float) -> str:
    """``"about 3 min"``, for people."""
    return "under a minute" if seconds < 45 else f"about {max(1, round(seconds / 60))} min"
