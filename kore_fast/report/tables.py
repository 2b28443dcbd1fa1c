"""Tables as text: for the terminal, for Markdown, and the rows of a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kore_fast.report.reading import Method, Run, read_run
from kore_fast.report.words import MISSING, MetricWords, difference, interval, measured, number

TERMINAL_WIDTH = 100
_GAP = "  "


def terminal_table(run: Path) -> str:
    """The scores of a run as a plain table of at most 100 columns, a metric a line and a method a column.

    Raises:
        DataError: as :func:`kore_fast.report.reading.read_run`.
    """
    return format_run(read_run(run))


def format_run(run: Run) -> str:
    """The scores of a run as a plain table; methods that do not fit side by side go into a further block."""
    metrics = measured(method.scores for method in run.methods)
    first = ["", *(f"{clean(words.short)} {words.arrow}".rstrip() for words in metrics), "trained parameters"]
    columns = [_column(method, metrics) for method in run.methods]
    first_width = min(max(map(len, first)), TERMINAL_WIDTH // 3)
    blocks: list[list[list[str]]] = [[]]
    room = 0
    for column in columns:
        width = max(map(len, column))
        if blocks[-1] and room + len(_GAP) + width > TERMINAL_WIDTH - first_width:
            blocks.append([])
            room = 0
        blocks[-1].append(column)
        room += len(_GAP) + width
    text = "\n\n".join(side_by_side([name[:first_width] for name in first], block) for block in blocks)
    return f"{text}\n\n[low, high]: 95 % interval   ↑ ↓: which way is better   {MISSING}: not measured"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right-aligned."""
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(_markdown_cell(cell) for cell in line) + " |" for line in lines) + "\n"


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV with newline line ends; None becomes an empty field."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return stream.getvalue()


def delta(words: MetricWords, method: Method, base: Method | None) -> float | None:
    """The metric's difference to the base; None for the base itself and where either is missing."""
    if base is None or method.scores.kind == "base":
        return None
    value, before = method.scores.value(words.name), base.scores.value(words.name)
    return None if value is None or before is None else value - before


def delta_text(words: MetricWords, method: Method, base: Method | None) -> str:
    """The difference to the base in words; empty where there is none to show."""
    change = delta(words, method, base)
    return "" if change is None else difference(words, change)


def _column(method: Method, metrics: Sequence[MetricWords]) -> list[str]:
    cells = [clean(method.label)[: TERMINAL_WIDTH // 3]]
    for words in metrics:
        metric = method.scores.metric(words.name)
        cells.append(f"{number(words, metric.value)} {interval(words, metric)}".rstrip() if metric else MISSING)
    trained = method.scores.trained_parameters
    return [*cells, MISSING if trained is None else f"{trained:,}"]


def side_by_side(first: Sequence[str], columns: Sequence[Sequence[str]]) -> str:
    """Columns under a rule, the first to the left, the others to the right; the first cell of each is its head."""
    widths = [max(map(len, column)) for column in columns]
    first_width = max(map(len, first))
    lines = []
    for place, name in enumerate(first):
        cells = (column[place].rjust(width) for column, width in zip(columns, widths, strict=True))
        lines.append(_GAP.join([name.ljust(first_width), *cells]).rstrip())
    lines.insert(1, "─" * (first_width + sum(len(_GAP) + width for width in widths)))
    return "\n".join(lines)


def clean(text: str) -> str:
    """Text without control characters, which a terminal would obey."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _markdown_cell(text: str) -> str:
    escaped = clean(text).replace("\\", "\\\\").replace("|", "\\|")
    return escaped.replace("<", "&lt;").replace(">", "&gt;")
