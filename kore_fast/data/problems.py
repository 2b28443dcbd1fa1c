"""What is wrong with a file of records, gathered so that one error tells all of it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError

from kore_fast.errors import DataError

SHOWN = 20


def raise_problems(path: str | Path, kind: str, problems: Sequence[str]) -> None:
    """Raise one DataError that lists the first ``SHOWN`` problems of a file; nothing happens when there are none."""
    if not problems:
        return
    lines = [f"  {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  … and {len(problems) - SHOWN} more")
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise DataError("\n".join([f"{path}: {count} in its {kind}:", *lines]))


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
