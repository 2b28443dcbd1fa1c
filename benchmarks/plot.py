"""Draws the rows that benchmarks left: python benchmarks/plot.py benchmarks/results/<device>

Each file of rows becomes a picture beside it: the time of every variant, as a multiple of ours, case by case.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file that have a time."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "median_ms" in row]


def draw(path: Path) -> Path | None:
    """One picture of one file; None where no row has a time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = read(path)
    if not rows:
        return None
    cases = list(dict.fromkeys(_case(row) for row in rows))
    variants = [name for name in dict.fromkeys(row["variant"] for row in rows) if name != "ours"]
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.14 * len(cases) * (len(variants) + 1)), layout="constrained")
    height = 0.8 / len(variants)
    for number, variant in enumerate(variants):
        found = {_case(row): row for row in rows if row["variant"] == variant}
        at = [cases.index(case) + (number - len(variants) / 2) * height for case in found]
        bars = axes.barh(at, [row["ratio"] - 1 for row in found.values()], height, left=1, label=variant, align="edge")
        for bar, row in zip(bars, found.values(), strict=True):
            if row.get("failed"):
                bar.set(hatch="///", alpha=0.4)
    axes.set_yticks(range(len(cases)), cases)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color="black", linewidth=0.8)
    note = "; hatched: a wrong result" if any(row.get("failed") for row in rows) else ""
    axes.set_xlabel(f"time as a multiple of ours{note}")
    axes.set_title(
        f"{path.stem} on {rows[0]['device']}, torch {rows[0]['torch']}, {rows[0]['threads']} threads", fontsize=10
    )
    figure.legend(fontsize=8, loc="outside lower center", ncols=4)
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=110, metadata={"Software": None})
    return picture


def _case(row: dict[str, Any]) -> str:
    named = [row["spectrum"]] if "spectrum" in row else []
    named += [f"{key} {row[key]}" for key in ("d", "rank") if key in row]
    named += [f"{row['tokens']} tokens"] if "tokens" in row else []
    return ", ".join([*named, *(row[key] for key in ("dtype",) if key in row)])


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        for rows_file in sorted(Path(folder).glob("*.jsonl")):
            print(draw(rows_file))
