"""The spectra of a covariance store for the eye: a short table and the plot of the tails, from their CSV files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

from kore_fast.errors import DataError
from kore_fast.files import atomic_path
from kore_fast.report.figures import LIGHT, Theme, drawing, kind_and_number, legend, png, shortest_endings, styles
from kore_fast.report.reading import read_csv
from kore_fast.report.tables import clean, side_by_side
from kore_fast.report.words import MISSING

_COMMAND = "kore-fast spectrum STORE"
_TAIL = "tail_energy_"
# Below lies rounding.
_SMALLEST_ENERGY = 1e-16


@dataclass(frozen=True)
class SpectrumRow:
    """A line of ``spectrum.csv``: a layer and the spectrum of its input."""

    layer: str
    shares: str
    d_in: int
    tokens_per_width: float
    condition_number: float
    effective_rank: float
    tail_energy: Mapping[int, float | None]
    """By rank; None where the input is narrower."""


@dataclass(frozen=True)
class TailPoint:
    """A line of ``tails.csv``."""

    shares: str
    d_in: int
    rank: int
    energy: float


def spectrum_table(folder: str | Path) -> str:
    """``spectrum.csv`` in short: a line for each kind of distinct input, its worst values.

    Raises:
        DataError: the file is missing or broken.
    """
    rows = _rows(Path(folder) / "spectrum.csv")
    kinds = _kinds(rows)
    inputs = {row.shares: row for row in rows}
    ranks = list(rows[0].tail_energy)
    columns: list[list[str]] = [["inputs"], ["width"], ["tokens/width"], ["κ"], ["effective rank"]]
    columns += [[f"tail at {rank}"] for rank in ranks]
    labels = list(dict.fromkeys(kinds.values()))
    for label in labels:
        members = [row for group, row in inputs.items() if kinds[group] == label]
        worst = max(row.condition_number for row in members)
        widths = sorted({row.d_in for row in members})
        cells = [
            str(len(members)),
            str(widths[0]) if len(widths) == 1 else f"{widths[0]}–{widths[-1]}",
            f"{min(row.tokens_per_width for row in members):.3g}",
            f"{worst:.2g}" if math.isfinite(worst) else "∞",
            f"{median(row.effective_rank for row in members):.1f}",
        ]
        for rank in ranks:
            energies = [energy for row in members if (energy := row.tail_energy[rank]) is not None]
            cells.append(f"{max(energies):.2g}" if energies else MISSING)
        for column, cell in zip(columns, cells, strict=True):
            column.append(cell)
    table = side_by_side(["input of", *map(clean, labels)], columns)
    notes = "tokens/width: the least   κ: the largest, ∞ for a singular covariance   effective rank: the median"
    tail = "\ntail at r: share of the energy in the bottom r directions, the largest" if ranks else ""
    return f"{table}\n\n{notes}{tail}"


def draw_tails(folder: str | Path, theme: Theme = LIGHT) -> Path:
    """Draw ``tails.png`` from ``tails.csv`` and return its path: a curve for each distinct input, its colour by kind.

    Raises:
        DataError: a file is missing or broken, or the folder cannot be written.
    """
    folder = Path(folder)
    kinds = _kinds(_rows(folder / "spectrum.csv"))
    points = read_csv(folder / "tails.csv", _parse_point, _COMMAND)
    if not points or not kinds.keys() >= {point.shares for point in points}:
        raise DataError(
            f"{folder / 'tails.csv'}: missing, or not of {folder / 'spectrum.csv'}; `{_COMMAND}` makes them"
        )
    with atomic_path(folder / "tails.png") as temporary:
        temporary.write_bytes(tail_figure(points, kinds, theme))
    return folder / "tails.png"


def tail_figure(points: Sequence[TailPoint], kinds: Mapping[str, str], theme: Theme) -> bytes:
    """The PNG of `draw_tails`; ``kinds``: distinct input → the name of its kind."""
    # Kinds bear no method's name, so that each gets a colour of its own while these last.
    look = styles([(kind, "") for kind in dict.fromkeys(kinds.values())])
    curves: dict[str, list[TailPoint]] = {}
    for point in points:
        curves.setdefault(point.shares, []).append(point)
    with drawing(theme):
        figure = Figure(figsize=(7.5, 4.6), facecolor=theme.paper, layout="constrained")
        ax = figure.subplots()
        for group, curve in curves.items():
            ax.plot(
                [point.rank / point.d_in for point in curve],
                [max(point.energy, _SMALLEST_ENERGY) for point in curve],
                color=look[kinds[group]].colour,
                linewidth=1.2,
                alpha=0.7,
                label=kinds[group],
            )
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("rank r as a share of the width")
        ax.set_ylabel("energy in the bottom r directions, share of tr C")
        legend(figure, [ax])
        return png(figure)


def _rows(path: Path) -> list[SpectrumRow]:
    rows = read_csv(path, _parse_row, _COMMAND)
    if not rows:
        raise DataError(f"{path}: missing or empty; `{_COMMAND}` makes it")
    return rows


def _parse_row(row: Mapping[str, str]) -> SpectrumRow:
    tails = {
        int(name.removeprefix(_TAIL)): float(value) if value else None
        for name, value in row.items()
        if name.startswith(_TAIL)
    }
    return SpectrumRow(
        layer=row["layer"],
        shares=row["shares"],
        d_in=int(row["d_in"]),
        tokens_per_width=float(row["tokens_per_width"]),
        condition_number=float(row["condition_number"]),
        effective_rank=float(row["effective_rank"]),
        tail_energy=tails,
    )


def _parse_point(row: Mapping[str, str]) -> TailPoint:
    return TailPoint(row["shares"], int(row["d_in"]), int(row["rank"]), float(row["energy"]))


def _kinds(rows: Sequence[SpectrumRow]) -> dict[str, str]:
    """Distinct input → which kinds of layers read it, such as ``"q_proj, k_proj, v_proj"``."""
    kind = {row.layer: kind_and_number(row.layer)[0] for row in rows}
    short = shortest_endings(list(dict.fromkeys(kind.values())))
    readers: dict[str, list[str]] = {}
    for row in rows:
        readers.setdefault(row.shares, []).append(short[kind[row.layer]])
    return {group: ", ".join(dict.fromkeys(names)) for group, names in readers.items()}
