"""What is wrong with a file of records, gathered so that one error tells all of it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError

from kore_fast.errors import DataError

SHOWN = 20


class Problems:
    """Problems found one by one in a file of any length: all are counted, the first ``SHOWN`` are kept.

    ``tell`` hears of each.
    """

    def __init__(self, tell: Callable[[str], object] | None = None) -> None:
        self.count = 0
        self._shown: list[str] = []
        self._tell = tell

    def add(self, *problems: str) -> None:
        """Take problems up."""
        for problem in problems if self._tell else ():
            self._tell(problem)  # type: ignore[misc]
        self.count += len(problems)
        self._shown += problems[: SHOWN - len(self._shown)]

    def raise_any(self, path: str | Path, kind: str) -> None:
        """Raise one DataError that lists the problems kept; nothing happens when there are none."""
        if not self.count:
            return
        lines = [f"  {problem}" for problem in self._shown]
        if self.count > SHOWN:
            lines.append(f"  … and {self.count - SHOWN} more")
        count = "1 problem" if self.count == 1 else f"{self.count} problems"
        raise DataError("\n".join([f"{path}: {count} in its {kind}:", *lines]))


def raise_problems(path: str | Path, kind: str, problems: Sequence[str]) -> None:
    """Raise one DataError that lists the first ``SHOWN`` problems of a file; nothing happens when there are none."""
    found = Problems()
    found.add(*problems)
    found.raise_any(path, kind)


def describe_validation(error: ValidationError, known: Iterable[str]) -> list[str]:
    """Say each failure of a pydantic validation in a user's words; ``known`` are the keys a record may have."""
    known = sorted(known)
    said = []
    for detail in error.errors():
        place = [str(part) for part in detail["loc"]]
        owner = f"{'.'.join(place[:-1])}: " if len(place) > 1 else ""
        if detail["type"] == "extra_forbidden":
            close = difflib.get_close_matches(place[-1], known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
            message = f"{owner}unknown key {place[-1]!r}; {hint}"
        elif detail["type"] == "missing":
            message = f"{owner}{place[-1]!r} is missing"
        elif detail["type"] == "value_error":
            # Our own validators name the key themselves, but not what it is inside of.
            message = f"{'.'.join(place)}: {detail['ctx']['error']}" if len(place) > 1 else str(detail["ctx"]["error"])
        else:
            where = repr(".".join(place)) if place else "the record"
            message = f"{where}: {detail['msg'][0].lower()}{detail['msg'][1:]}"
        if message not in said:
            said.append(message)
    return said
