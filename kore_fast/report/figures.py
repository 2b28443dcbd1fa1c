"""The report's pictures, drawn without global state and equal byte for byte on equal numbers."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from statistics import median
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, StrMethodFormatter

from kore_fast.report.reading import LossRow, Method, Metric, Scores, kind_order, pretty
from kore_fast.report.words import RETENTION, MetricWords, adaptation_of

# Okabe and Ito's colours: told apart with any colour vision, readable on light and dark paper.
_COLOURS = {"base": "#8a8f98", "kore": "#0b84c6", "lora": "#e08a00", "full": "#d1495b"}
_MORE_COLOURS = ("#2a9d6f", "#b0659a", "#7a6bd1", "#a08c1e", "#4f7a8c")
_MARKS = {"base": "D", "kore": "o", "lora": "s", "full": "^"}
_MORE_MARKS = ("v", "P", "X", "<", ">")
_SMALLEST_LEAK = 1e-12
_WIDTH, _DOTS_PER_INCH = 10.5, 144
_SMOOTHING = 20


@dataclass(frozen=True)
class Theme:
    """Colours of the paper and of what is written on it."""

    paper: str
    ink: str
    faint: str


LIGHT = Theme(paper="#ffffff", ink="#22262b", faint="#d9dce1")
DARK = Theme(paper="#1b1e23", ink="#e4e6ea", faint="#3c4149")


@dataclass(frozen=True)
class Style:
    """A method's colour and mark, the same in every figure."""

    colour: str
    mark: str


def styles(methods: Sequence[tuple[str, str]]) -> dict[str, Style]:
    """A style for each (name, kind): the kind's own for the first of a kind, others in turn."""
    taken: set[str] = set()
    result: dict[str, Style] = {}
    more = 0
    for name, kind in methods:
        if kind in _COLOURS and kind not in taken:
            taken.add(kind)
            result[name] = Style(_COLOURS[kind], _MARKS[kind])
        else:
            rounds, place = divmod(more, len(_MORE_COLOURS))
            # Each round of colours with other marks: 25 that differ.
            result[name] = Style(_MORE_COLOURS[place], _MORE_MARKS[(place + rounds) % len(_MORE_MARKS)])
            more += 1
    return result


def adaptation_retention(methods: Sequence[Method], theme: Theme) -> bytes | None:
    """Adaptation against each retention metric, one panel a metric, better always up and to the right.

    None when no method has both adaptation and a retention metric.
    """
    learned = adaptation_of(method.scores for method in methods)
    panels = [
        words
        for words in RETENTION
        if any(method.scores.metric(words.name) and method.scores.metric(learned.name) for method in methods)
    ]
    if not panels:
        return None
    look = styles([(method.label, method.scores.kind) for method in methods])
    with drawing(theme):
        figure, axes = _panels(panels, theme, learned)
        for words, ax in zip(panels, axes, strict=True):
            for method in methods:
                x, y = method.scores.metric(learned.name), method.scores.metric(words.name)
                if y is not None and method.scores.kind == "base":
                    ax.axhline(y.value, color=look[method.label].colour, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
                if x is None or y is None:
                    continue
                ax.errorbar(
                    x.value,
                    y.value,
                    xerr=_error(x),
                    yerr=_error(y),
                    fmt=look[method.label].mark,
                    color=look[method.label].colour,
                    markersize=8,
                    capsize=3,
                    linewidth=1.4,
                    label=method.label,
                    zorder=3,
                )
        legend(figure, axes)
        return png(figure)


def leak_map(methods: Sequence[Method], theme: Theme) -> bytes | None:
    """Leak of every layer and module as colour, one map a method, all on one logarithmic scale.

    None when no method has a leak report.
    """
    maps = [method for method in methods if method.leaks]
    if not maps:
        return None
    grids = [_grid({row.layer: row.leak for row in method.leaks}) for method in maps]
    values = [max(value, _SMALLEST_LEAK) for grid in grids for value in grid.cells.values()]
    # A single value still needs a scale with two ends.
    scale = LogNorm(vmin=min([*values, 0.99]), vmax=max([*values, 1.0]))
    columns, rows = max(len(grid.columns) for grid in grids), sum(len(grid.rows) for grid in grids)
    with drawing(theme):
        figure = Figure(
            figsize=(max(_WIDTH, 0.3 * columns + 1.5), 0.28 * rows + 0.6 * len(maps) + 0.5),
            facecolor=theme.paper,
            layout="constrained",
        )
        axes = figure.subplots(len(maps), 1, squeeze=False, height_ratios=[len(grid.rows) + 1 for grid in grids])[:, 0]
        image: Any = None
        for method, grid, ax in zip(maps, grids, axes, strict=True):
            cells = [[_cell(grid, row, column) for column in grid.columns] for row in grid.rows]
            image = ax.imshow(cells, norm=scale, cmap="viridis", aspect="auto", interpolation="nearest")
            ax.set_yticks(range(len(grid.rows)), [plain(row) for row in grid.rows], fontsize=8)
            step = max(1, math.ceil(len(grid.columns) / 16))
            ax.set_xticks(range(0, len(grid.columns), step), grid.columns[::step], fontsize=8)
            ax.set_title(
                f"{plain(method.label)}: median leak {median(grid.cells.values()):.2g}", fontsize=10, loc="left"
            )
            ax.grid(visible=False)
            ax.tick_params(length=0)
            for side in ax.spines.values():
                side.set_visible(False)
        axes[-1].set_xlabel("layer")
        bar = figure.colorbar(image, ax=list(axes), label="leak (1 = random direction)", pad=0.015, fraction=0.05)
        bar.outline.set_visible(False)
        return png(figure)


def loss_curves(methods: Sequence[Method], theme: Theme) -> bytes | None:
    """Training loss of each method by step: raw values faint, their moving mean strong. None without any."""
    trained = [method for method in methods if any(math.isfinite(row.loss) for row in method.losses)]
    if not trained:
        return None
    look = styles([(method.label, method.scores.kind) for method in methods])
    with drawing(theme):
        figure = Figure(figsize=(_WIDTH, 3.6), facecolor=theme.paper, layout="constrained")
        ax = figure.subplots()
        for method in trained:
            steps = [row.step for row in method.losses]
            colour = look[method.label].colour
            ax.plot(steps, [row.loss for row in method.losses], color=colour, alpha=0.3, linewidth=0.8)
            ax.plot(steps, smoothed(method.losses), color=colour, linewidth=2, label=method.label)
        ax.set_xlabel("step")
        ax.set_ylabel("training loss, nats a token")
        ax.set_ylim(bottom=0)
        legend(figure, [ax])
        return png(figure)


def study_scatter(
    runs: Sequence[Scores],
    selected: Mapping[tuple[str, float | None], Mapping[str, Metric]],
    theme: Theme = LIGHT,
) -> bytes | None:
    """Every run of a study: adaptation against each retention metric; filled marks are the selected learning rates.

    A thin line joins a method's learning rates in their order. Of a selected rate with several seeds a cross of error
    bars shows the mean's interval on both axes. None when no run has both axes.

    Args:
        selected: method and learning rate → its metrics over seeds.
    """
    learned = adaptation_of(runs)
    panels = [words for words in RETENTION if any(run.metric(words.name) and run.metric(learned.name) for run in runs)]
    if not panels:
        return None
    kinds = {run.method: run.kind for run in runs}
    names = sorted(kinds, key=lambda name: (kind_order(kinds[name]), name))
    look = styles([(name, kinds[name]) for name in names])
    with drawing(theme):
        figure, axes = _panels(panels, theme, learned)
        for words, ax in zip(panels, axes, strict=True):
            for name in names:
                style = look[name]
                points = [
                    (learning_rate(run), run.value(learned.name), run.value(words.name))
                    for run in runs
                    if run.method == name and run.metric(learned.name) and run.metric(words.name)
                ]
                if kinds[name] == "base":
                    for _, _, y in points:
                        ax.axhline(y, color=style.colour, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
                line = [_centre(points, rate) for rate in sorted({rate for rate, _, _ in points if rate is not None})]
                if len(line) > 1:
                    ax.plot(*zip(*line, strict=True), color=style.colour, linewidth=1, alpha=0.6, zorder=2)
                for (method, _), metrics in selected.items():
                    across, up = metrics.get(learned.name), metrics.get(words.name)
                    if method == name and across and up and (across.count or 0) > 1 and kinds[name] != "base":
                        ax.errorbar(
                            [across.value],
                            [up.value],
                            xerr=_error(across),
                            yerr=_error(up),
                            fmt="none",
                            ecolor=style.colour,
                            elinewidth=1.2,
                            alpha=0.5,
                            zorder=2,
                        )
                for rate, x, y in points:
                    ax.plot(
                        x,
                        y,
                        style.mark,
                        color=style.colour,
                        markersize=7,
                        markerfacecolor=style.colour if (name, rate) in selected else theme.paper,
                        zorder=3,
                        label=pretty(name) if (name, rate) in selected else None,
                    )
        legend(figure, axes)
        return png(figure)


def smoothed(losses: Sequence[LossRow]) -> list[float]:
    """Centred moving mean over about a twentieth of the steps, over the finite losses in the window."""
    half = len(losses) // (2 * _SMOOTHING)
    result = []
    for place in range(len(losses)):
        window = [row.loss for row in losses[max(0, place - half) : place + half + 1] if math.isfinite(row.loss)]
        result.append(math.fsum(window) / len(window) if window and math.isfinite(losses[place].loss) else math.nan)
    return result


def learning_rate(run: Scores) -> float | None:
    """The learning rate among a run's settings; None for the base."""
    rate = run.settings.get("learning_rate")
    with suppress(TypeError, ValueError):
        return float(rate)  # type: ignore[arg-type]
    return None


@dataclass(frozen=True)
class _Grid:
    rows: list[str]
    columns: list[str]
    cells: Mapping[tuple[str, str], float]


def _grid(leaks: Mapping[str, float]) -> _Grid:
    """Layers as columns, module kinds as rows; a name without a layer's number goes into the column –."""
    places = {name: kind_and_number(name) for name in leaks}
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    short = shortest_endings(kinds)
    columns = sorted({column for _, column in places.values()}, key=lambda text: (text == "–", text.zfill(9)))
    cells = {(short[places[name][0]], places[name][1]): leak for name, leak in leaks.items()}
    return _Grid([short[kind] for kind in kinds], columns, cells)


def _cell(grid: _Grid, row: str, column: str) -> float:
    leak = grid.cells.get((row, column))
    return math.nan if leak is None else max(leak, _SMALLEST_LEAK)


def kind_and_number(name: str) -> tuple[str, str]:
    """A layer's name with * for its number, and the number; – where it has none."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return (f"{name[: found.start(1)]}*{name[found.end(1) :]}", found[1]) if found else (name, "–")


def shortest_endings(names: Sequence[str]) -> dict[str, str]:
    """The last dotted parts of each name, as few as tell all names apart."""
    for parts in range(1, 1 + max(name.count(".") + 1 for name in names)):
        endings = {name: ".".join(name.split(".")[-parts:]) for name in names}
        if len(set(endings.values())) == len(names):
            return endings
    return {name: name for name in names}


def _panels(panels: Sequence[MetricWords], theme: Theme, learned: MetricWords) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(_WIDTH, 3.7), facecolor=theme.paper, layout=ConstrainedLayoutEngine(w_pad=0.1))
    axes = list(figure.subplots(1, len(panels), squeeze=False)[0])
    for words, ax in zip(panels, axes, strict=True):
        ax.margins(0.12)
        ax.set_title(words.label, fontsize=10, loc="left")
        _percent(ax.xaxis)
        ax.set_xlabel(f"{learned.label} →")
        if words.share:
            _percent(ax.yaxis)
            ax.set_ylabel("kept →")
        else:
            ax.yaxis.set_major_formatter(StrMethodFormatter("{x:.2f}"))
            ax.invert_yaxis()
            ax.set_ylabel("loss, axis turned over: up is better →")
        ax.yaxis.set_minor_formatter(NullFormatter())
    return figure, axes


def _percent(axis: Any) -> None:
    """Ticks of shares as per cent, none rounded: whole ones where there is room, else with what digits they have."""
    axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.6g}%"))


def _centre(points: Sequence[tuple[float | None, Any, Any]], rate: float) -> tuple[float, float]:
    chosen = [(x, y) for own, x, y in points if own == rate]
    return (
        math.fsum(x for x, _ in chosen) / len(chosen),
        math.fsum(y for _, y in chosen) / len(chosen),
    )


def _error(metric: Metric) -> list[list[float]] | None:
    if metric.value is None or metric.low is None or metric.high is None:
        return None
    return [[max(0.0, metric.value - metric.low)], [max(0.0, metric.high - metric.value)]]


def legend(figure: Figure, axes: Sequence[Any]) -> None:
    entries: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            # A mark with its error bars says no more in a legend than the mark.
            entries.setdefault(label, handle[0] if isinstance(handle, ErrorbarContainer) else handle)
    if entries:
        figure.legend(
            list(entries.values()),
            [plain(label) for label in entries],
            loc="outside lower center",
            ncols=min(len(entries), 5),
            frameon=False,
        )


def plain(text: str) -> str:
    """Text that matplotlib does not read as mathematics, without control characters."""
    return "".join(sign if sign.isprintable() else "?" for sign in text).replace("\\", "/").replace("$", r"\$")


@contextmanager
def drawing(theme: Theme) -> Iterator[None]:
    """Matplotlib's own defaults with the theme's colours, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        ink, faint, paper = theme.ink, theme.faint, theme.paper
        matplotlib.rcParams.update(
            {
                "font.family": ["DejaVu Sans"],
                "font.size": 9,
                "text.color": ink,
                "axes.facecolor": paper,
                "axes.edgecolor": faint,
                "axes.labelcolor": ink,
                "axes.titlecolor": ink,
                "axes.grid": True,
                "axes.axisbelow": True,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "grid.color": faint,
                "grid.linewidth": 0.6,
                "xtick.color": faint,
                "ytick.color": faint,
                "xtick.labelcolor": ink,
                "ytick.labelcolor": ink,
            }
        )
        yield


def png(figure: Figure) -> bytes:
    # No software version in the file: equal numbers give equal files.
    stream = io.BytesIO()
    figure.set_dpi(_DOTS_PER_INCH)
    FigureCanvasAgg(figure).print_png(stream, metadata={"Software": None})
    return stream.getvalue()
