"""Draws the rows that benchmarks left: python benchmarks/plot.py benchmarks/results/<device>

Each file of rows becomes a picture beside it: the time of every variant, as a multiple of ours, case by case. Rows of a
sweep become lines in a picture of their own, rows of bytes bars in another.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
OURS = "ours"


def read(path: Path) -> list[Row]:
    """Rows of a file that have a time or bytes."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "median_ms" in row or "bytes" in row]


def draw(path: Path) -> list[Path]:
    """The pictures of one file, none where no row has a time or bytes."""
    import matplotlib

    matplotlib.use("Agg")
    rows = read(path)
    swept = [row for row in rows if row.get("part") == "sweep"]
    timed = [row for row in rows if "median_ms" in row and row not in swept]
    sized = [row for row in rows if "bytes" in row]
    pictures: dict[str, Any] = {}
    if timed:
        pictures[""] = _times(timed)
    if sized:
        pictures["_memory"] = _memory(sized)
    if swept:
        pictures["_sweep"] = _sweep(swept)
    paths = []
    for ending, figure in pictures.items():
        figure.suptitle(
            f"{path.stem} on {rows[0]['device']}, torch {rows[0]['torch']}, {rows[0]['threads']} threads", fontsize=10
        )
        paths.append(path.with_name(f"{path.stem}{ending}.png"))
        figure.savefig(paths[-1], dpi=110, metadata={"Software": None})
    return paths


def _times(rows: list[Row]) -> Any:
    """Bars of ratios to ours; a panel for forward, backward and both, where rows say which."""
    from matplotlib.ticker import LogLocator, NullFormatter

    # A whole training step stands beside the two passes together.
    panels = list(dict.fromkeys("" if row.get("what") in (None, "training step") else row["what"] for row in rows))
    if len(panels) > 1 and "" in panels:
        panels.remove("")
    whole = panels[-1]
    by_panel = {
        panel: [row for row in rows if row.get("what") == panel or (panel == whole and row.get("what") not in panels)]
        for panel in panels
    }
    figure, all_axes = _bars(by_panel, lambda row: row["ratio"] - 1, left=1, but=OURS)
    note = "; hatched: a wrong result" if any(row.get("failed") for row in rows) else ""
    for panel, axes in zip(panels, all_axes, strict=True):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter("{x:g}×")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlabel(f"time as a multiple of ours{note}")
        axes.set_title(panel, fontsize=10)
    return figure


def _memory(rows: list[Row]) -> Any:
    """Bars of bytes, a panel for each kind; the figure stands at the bar, as there may be none."""
    whats = list(dict.fromkeys(row["what"] for row in rows))
    by_panel = {what: [row for row in rows if row["what"] == what] for what in whats}
    figure, all_axes = _bars(by_panel, lambda row: row["bytes"] / 1e6, left=0, labels=True)
    for what, axes in zip(whats, all_axes, strict=True):
        axes.set_xscale("log")
        least = min((row["bytes"] / 1e6 for row in by_panel[what] if row["bytes"]), default=1)
        most = max(row["bytes"] / 1e6 for row in by_panel[what])
        axes.set_xlim(least / 3, most * 6)
        axes.set_xlabel("MB")
        axes.set_title(what, fontsize=10)
    return figure


def _bars(
    by_panel: dict[str, list[Row]],
    value: Callable[[Row], float],
    *,
    left: float,
    but: str | None = None,
    labels: bool = False,
) -> tuple[Any, list[Any]]:
    """A group of bars for each case, a panel beside the other; ``labels``: with values, from the panel's edge."""
    from matplotlib import pyplot as plt

    everything = [row for rows in by_panel.values() for row in rows]
    cases = list(dict.fromkeys(_case(row) for row in everything))
    variants = [name for name in dict.fromkeys(row["variant"] for row in everything) if name != but]
    size = (5 + 4 * len(by_panel), 1.7 + 0.14 * len(cases) * (len(variants) + 1))
    figure, grid = plt.subplots(1, len(by_panel), figsize=size, layout="constrained", sharey=True, squeeze=False)
    height = 0.8 / len(variants)
    for axes, (panel, rows) in zip(grid[0], by_panel.items(), strict=True):
        for number, variant in enumerate(variants):
            found = {_case(row): row for row in rows if row["variant"] == variant}
            at = [cases.index(case) + (number - len(variants) / 2) * height for case in found]
            values = [value(row) for row in found.values()]
            # Every variant is in the legend once, though not in every panel.
            label = variant if panel == next(iter(by_panel)) else None
            bars = axes.barh(at, values, height, left=left, label=label, align="edge", color=_colour(variant, variants))
            for place, bar, row in zip(at, bars, found.values(), strict=True):
                if row.get("failed"):
                    bar.set(hatch="///", alpha=0.4)
                if labels:
                    text = f" {value(row):.3g}"
                    x, where = (value(row), axes.transData) if value(row) else (0, axes.get_yaxis_transform())
                    axes.text(x, place + height / 2, text, transform=where, va="center", fontsize=6.5)
        axes.set_yticks(range(len(cases)), cases)
        axes.set_ylim(len(cases) - 0.5, -0.5)
    figure.legend(fontsize=8, loc="outside lower center", ncols=5 if len(by_panel) > 1 else 4)
    return figure, list(grid[0])


def _sweep(rows: list[Row]) -> Any:
    """Times as multiples of the floor, over ranks and over tokens, through the values that most rows have."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter, NullLocator

    kinds = list(dict.fromkeys((row["what"], row["dtype"]) for row in rows))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    fixed = {axis: Counter(row[axis] for row in rows).most_common(1)[0][0] for axis in ("tokens", "rank")}
    size = (11, 1.5 + 2.4 * len(kinds))
    figure, grid = plt.subplots(len(kinds), 2, figsize=size, layout="constrained", squeeze=False, sharey="row")
    for line, (what, dtype) in zip(grid, kinds, strict=True):
        for axes, along, across in zip(line, ("rank", "tokens"), ("tokens", "rank"), strict=True):
            shown = [
                row
                for row in rows
                if (row["what"], row["dtype"]) == (what, dtype) and row[across] == fixed[across] and "of_floor" in row
            ]
            for variant in variants:
                points = sorted((row[along], row["of_floor"]) for row in shown if row["variant"] == variant)
                colour, width = _colour(variant, variants), 2.2 if variant == OURS else 1.2
                axes.plot(*zip(*points, strict=True), "o-", ms=3, lw=width, color=colour) if points else None
            ticks = sorted({row[along] for row in shown})
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xticks(ticks, map(str, ticks), fontsize=6, rotation=90)
            axes.axhline(1, color="black", linewidth=0.8)
            held = f"{fixed[across]} tokens" if across == "tokens" else f"rank {fixed[across]}"
            axes.set_title(f"{what}, {dtype}: {held}, d {rows[0]['d']}", fontsize=9)
            axes.grid(alpha=0.3)
        line[0].set_ylabel("time / floor", fontsize=9)
    for axes, along in zip(grid[-1], ("rank", "tokens"), strict=True):
        axes.set_xlabel(along)
    handles = [plt.Line2D([], [], color=_colour(name, variants), marker="o", ms=4, label=name) for name in variants]
    figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=4)
    return figure


def _colour(variant: str, variants: list[str]) -> Any:
    return "black" if variant == OURS else f"C{[name for name in variants if name != OURS].index(variant)}"


def _case(row: Row) -> str:
    named = [row["spectrum"]] if "spectrum" in row else []
    named += [row["part"]] if row.get("part", "layer") != "layer" else []
    named += [f"{key} {row[key]}" for key in ("d", "mlp", "rank") if key in row]
    named += [f"{row['tokens']} tokens"] if "tokens" in row else []
    return ", ".join([*named, *(row[key] for key in ("dtype",) if key in row)])


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        for rows_file in sorted(Path(folder).glob("*.jsonl")):
            print(*draw(rows_file))
