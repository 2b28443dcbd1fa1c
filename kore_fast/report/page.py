"""The report of one run: a page that needs nothing beside it, the figures as PNG, the numbers as CSV and JSON."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, StrictUndefined

from kore_fast.files import atomic_path, write_json, write_text
from kore_fast.report import figures
from kore_fast.report.findings import headline, notes
from kore_fast.report.reading import Method, Run, read_run
from kore_fast.report.tables import csv_text, delta, delta_text
from kore_fast.report.words import GLOSSARY, MISSING, MetricWords, interval, measured, number

BASE_MODEL = "path/to/the/base/model"


@dataclass(frozen=True)
class Figure:
    """A figure of the page: its pictures as data addresses, and what it means in a sentence."""

    title: str
    meaning: str
    alt: str
    light: str
    dark: str


def build_report(run: Path, *, title: str = "KORE report", base_model: str = BASE_MODEL, note: str = "") -> Path:
    """Write ``report/`` into a run folder and return the page's path.

    Files: report.html, results.csv, results.json, and adaptation_retention.png, leak.png and loss.png where there are
    numbers to draw. Equal inputs give equal files.

    Args:
        run: the run folder; read are init/*/leak.csv, train/*/loss.csv and evaluate/*/scores.json.
        title: the page's heading.
        base_model: what a reader passes to ``from_pretrained`` to get the base model; shown in the loading lines.
        note: a sentence of the recipe's own to stand under the headline, such as what the model cannot do.

    Raises:
        DataError: nothing has been evaluated or a file is broken; names the file and the command that makes it.
    """
    run = Path(run)
    data = read_run(run)
    out = run / "report"
    write_text(out / "results.csv", _results_csv(data))
    write_json(out / "results.json", _results_json(data))
    drawn = []
    remarks = []
    for name, draw, describe, missing in _FIGURES:
        light, dark = draw(data.methods, figures.LIGHT), draw(data.methods, figures.DARK)
        if light is None or dark is None:
            (out / name).unlink(missing_ok=True)
            remarks.append(missing)
            continue
        write_bytes(out / name, light)
        drawn.append(describe(data, _address(light), _address(dark)))
    page = _page(data, title=title, note=note, drawn=drawn, remarks=remarks, base_model=base_model)
    write_text(out / "report.html", page)
    return out / "report.html"


def load_lines(adapter: str | Path, base_model: str = BASE_MODEL) -> list[str]:
    """The three lines that load a trained adapter in plain PEFT, without kore_fast."""
    return [
        "import peft, transformers",
        f"base = transformers.AutoModelForImageTextToText.from_pretrained({str(base_model)!r})",
        f"model = peft.PeftModel.from_pretrained(base, {str(adapter)!r})",
    ]


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content``, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def _page(run: Run, *, title: str, note: str, drawn: Sequence[Figure], remarks: Sequence[str], base_model: str) -> str:
    metrics = measured(method.scores for method in run.methods)
    groups = [
        (group, [_row(words, run) for words in metrics if words.group == group])
        for group in dict.fromkeys(words.group for words in metrics)
    ]
    adapted = next((method for method in reversed(run.methods) if method.has_adapter), None)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = (files("kore_fast.report") / "templates" / "report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        title=title,
        headline=headline(run),
        note=note,
        notes=[*notes(run), *remarks],
        methods=run.methods,
        groups=groups,
        settings=_settings(run),
        figures=drawn,
        glossary=GLOSSARY,
        adapter=adapted,
        load=load_lines(f"train/{adapted.folder}/adapter", base_model) if adapted else [],
    )


def _row(words: MetricWords, run: Run) -> dict[str, Any]:
    cells = []
    for method in run.methods:
        metric = method.scores.metric(words.name)
        cells.append(
            {
                "value": number(words, metric.value) if metric else MISSING,
                "interval": interval(words, metric) if metric else "",
                "delta": delta_text(words, method, run.base),
                "count": metric.count if metric else None,
            }
        )
    counts = {cell["count"] for cell in cells if cell["count"] is not None}
    return {"words": words, "cells": cells, "count": f"{counts.pop():,}" if len(counts) == 1 else ""}


def _settings(run: Run) -> list[tuple[str, list[str]]]:
    """Rows of the settings' table: what every method has, then each setting in the order of its first appearance."""
    rows: list[tuple[str, list[str]]] = [
        ("kind", [method.scores.kind for method in run.methods]),
        ("trained parameters", [_setting(method.scores.trained_parameters) for method in run.methods]),
        ("seed", [_setting(method.scores.seed) for method in run.methods]),
    ]
    names = dict.fromkeys(name for method in run.methods for name in method.scores.settings if name != "seed")
    for name in names:
        values = [_setting(method.scores.settings.get(name)) for method in run.methods]
        rows.append((name.replace("_", " "), values))
    return rows


def _setting(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _results_csv(run: Run) -> str:
    header = (
        "method",
        "kind",
        "seed",
        "trained_parameters",
        "metric",
        "value",
        "low",
        "high",
        "count",
        "delta_to_base",
    )
    rows = [
        (
            method.folder,
            method.scores.kind,
            method.scores.seed,
            method.scores.trained_parameters,
            words.name,
            metric.value,
            metric.low,
            metric.high,
            metric.count,
            delta(words, method, run.base),
        )
        for method in run.methods
        for words in measured([method.scores])
        if (metric := method.scores.metric(words.name)) is not None
    ]
    return csv_text(header, rows)


def _results_json(run: Run) -> dict[str, Any]:
    return {
        "headline": headline(run),
        "notes": notes(run),
        "methods": [
            {
                "method": method.folder,
                **method.scores.model_dump(exclude={"method"}),
                "delta_to_base": {
                    words.name: delta(words, method, run.base)
                    for words in measured([method.scores])
                    if delta(words, method, run.base) is not None
                },
                "leak": _leak_summary(method),
            }
            for method in run.methods
        ],
        "glossary": dict(GLOSSARY),
        "metrics": [asdict(words) for words in measured(method.scores for method in run.methods)],
    }


def _leak_summary(method: Method) -> dict[str, Any] | None:
    if not method.leaks:
        return None
    worst = max(method.leaks, key=lambda row: row.leak)
    return {
        "layers": len(method.leaks),
        "median": median(row.leak for row in method.leaks),
        "largest": worst.leak,
        "largest_layer": worst.layer,
    }


def _address(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode("ascii")


def _describe_adaptation(run: Run, light: str, dark: str) -> Figure:
    adaptation = measured(method.scores for method in run.methods)
    panels = ", ".join(words.label for words in adaptation if words.group == "Retention")
    return Figure(
        title="Adaptation against retention",
        meaning=(
            "Further right means more new facts learned, further up means more of the old knowledge kept; the dashed "
            "line is the base model's level, bars are 95 % intervals, and the best place is the upper right corner."
        ),
        alt=f"Adaptation against {panels} for {', '.join(method.label for method in run.methods)}. {headline(run)}",
        light=light,
        dark=dark,
    )


def _describe_leak(run: Run, light: str, dark: str) -> Figure:
    parts = []
    for method in run.methods:
        summary = _leak_summary(method)
        if summary:
            parts.append(
                f"{method.label}: median {summary['median']:.2g}, "
                f"largest {summary['largest']:.2g} in {summary['largest_layer']}"
            )
    return Figure(
        title="Leak by layer",
        meaning=(
            "How strongly each layer's A reads the old knowledge's inputs, on a logarithmic scale: near 1 the adapter "
            f"sees old inputs as a random direction would, near 0 it cannot see them. {'; '.join(parts)}."
        ),
        alt=f"Heat map of the leak, layers across, modules down. {'; '.join(parts)}.",
        light=light,
        dark=dark,
    )


def _describe_loss(run: Run, light: str, dark: str) -> Figure:
    trained = [method for method in run.methods if method.losses]
    ends = ", ".join(
        f"{method.label} {figures.smoothed(method.losses)[-1]:.3f} after {method.losses[-1].step:,} steps"
        for method in trained
    )
    return Figure(
        title="Training loss",
        meaning=(
            "How fast each method fits the training samples: faint is each logged step, strong the mean over about a "
            f"twentieth of them; a lower end alone says nothing about what was kept. End: {ends}."
        ),
        alt=f"Training loss by step. End: {ends}.",
        light=light,
        dark=dark,
    )


_FIGURES: tuple[
    tuple[
        str,
        Callable[[Sequence[Method], figures.Theme], bytes | None],
        Callable[[Run, str, str], Figure],
        str,
    ],
    ...,
] = (
    (
        "adaptation_retention.png",
        figures.adaptation_retention,
        _describe_adaptation,
        "No figure of adaptation against retention: no method has both (`kore-fast evaluate RECIPE` measures them).",
    ),
    (
        "leak.png",
        figures.leak_map,
        _describe_leak,
        "No leak map: there is no init/METHOD/leak.csv (`kore-fast init RECIPE` writes it).",
    ),
    (
        "loss.png",
        figures.loss_curves,
        _describe_loss,
        "No loss curves: there is no train/METHOD/loss.csv (`kore-fast train RECIPE` writes it).",
    ),
)
