"""The run folder as the report sees it: scores, leaks and losses, checked while they are read."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kore_fast.errors import DataError
from kore_fast.files import read_json

Row = TypeVar("Row")
Setting = str | int | float | bool | None

# As they are told of: whole weights, low-rank ones from chance, from the weights, from old knowledge.
_KINDS = ("base", "full", "osf", "lora", "lora_fa", "pissa", "mica", "corda", "lora_null")
_KIND_ORDER = {**{kind: place for place, kind in enumerate(_KINDS)}, "kore": len(_KINDS) + 1}
_PRETTY = {
    "base": "base",
    "full": "full fine-tuning",
    "osf": "OSF",
    "lora": "LoRA",
    "lora_fa": "LoRA-FA",
    "pissa": "PiSSA",
    "mica": "MiCA",
    "corda": "CorDA",
    "lora_null": "LoRA-Null",
    "kore": "KORE",
}
_WORDS = {"ewc": "EWC", "lwf": "LwF", "vqa": "VQA"}


class Metric(BaseModel):
    """A measured value with its 95 % interval and the number of questions or passages behind it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    value: float | None = Field(allow_inf_nan=False)
    low: float | None = Field(default=None, allow_inf_nan=False)
    high: float | None = Field(default=None, allow_inf_nan=False)
    count: int | None = None


class Scores(BaseModel):
    """One ``scores.json``: what one method, trained with one seed, came to."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    method: str = Field(min_length=1)
    kind: str
    seed: int | None = None
    trained_parameters: int | None = None
    settings: dict[str, Setting] = {}
    metrics: dict[str, Metric]

    def metric(self, name: str) -> Metric | None:
        """The metric, or None where it was not measured."""
        metric = self.metrics.get(name)
        return None if metric is None or metric.value is None else metric

    def value(self, name: str) -> float | None:
        """The metric's value, or None where it was not measured."""
        metric = self.metric(name)
        return None if metric is None else metric.value


@dataclass(frozen=True)
class LeakRow:
    """The leak of one layer's A against the old knowledge's covariance: 1 for a random direction, 0 in a null space."""

    layer: str
    rank: int
    leak: float


@dataclass(frozen=True)
class LossRow:
    """The training loss of one step; nan where training diverged."""

    step: int
    loss: float


@dataclass(frozen=True)
class Method:
    """Everything known about one method of a run; ``folder`` is its name in the run folder."""

    folder: str
    label: str
    scores: Scores
    leaks: Sequence[LeakRow]
    losses: Sequence[LossRow]
    has_adapter: bool


@dataclass(frozen=True)
class Run:
    """A run folder's methods, the base first and KORE last."""

    methods: Sequence[Method]

    @property
    def base(self) -> Method | None:
        """The untouched model, if it was evaluated."""
        return next((method for method in self.methods if method.scores.kind == "base"), None)

    def of_kind(self, kind: str) -> Method | None:
        """The method that stands for a kind: the one that bears its name, or else the first."""
        found = [method for method in self.methods if method.scores.kind == kind]
        return next((method for method in found if method.folder == kind), found[0] if found else None)


def read_run(run: Path) -> Run:
    """Read every method of a run folder that has been evaluated.

    Leaks and losses may be missing (the base has neither); scores may not.

    Raises:
        DataError: no method has been evaluated, or a file is not what it should be; names the file and the command
            that makes it.
    """
    run = Path(run)
    files = sorted((run / "evaluate").glob("*/scores.json"))
    if not files:
        raise DataError(
            f"{run / 'evaluate'}: expected a folder for each method with a scores.json, found none; "
            "`kore-fast evaluate RECIPE` makes them"
        )
    found = [(path.parent.name, read_scores(path)) for path in files]
    labels = Counter(pretty(scores.method) for _, scores in found)
    methods = [
        Method(
            folder=folder,
            label=pretty(scores.method) if labels[pretty(scores.method)] == 1 else f"{scores.method} ({folder})",
            scores=scores,
            leaks=_read_leaks(run / "init" / folder / "leak.csv"),
            losses=_read_losses(run / "train" / folder / "loss.csv"),
            has_adapter=(run / "train" / folder / "adapter" / "adapter_config.json").is_file(),
        )
        for folder, scores in found
    ]
    return Run(sorted(methods, key=lambda method: (kind_order(method.scores.kind), method.folder)))


def read_scores(path: Path) -> Scores:
    """Read one ``scores.json``.

    Raises:
        DataError: not JSON, or a field is missing or of the wrong type; names the file and the field.
    """
    return parse_scores(read_json(path), str(path))


def parse_scores(value: Any, where: str) -> Scores:
    """Check a ``scores.json`` that has been read already; ``where`` names it in the error.

    Raises:
        DataError: a field is missing or of the wrong type.
    """
    try:
        return Scores.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise DataError(
            f"{where}: {field}: {first['msg']}; delete the file and let `kore-fast evaluate RECIPE` write it anew"
        ) from None


def kind_order(kind: str) -> int:
    """Place of a kind of method in tables and legends: the base first, KORE last, unknown ones before it."""
    return _KIND_ORDER.get(kind, len(_KINDS))


def pretty(method: str) -> str:
    """A method's name as it is written in prose: ``lora_frozen_a`` is LoRA (frozen A), ``first_third`` first third."""
    parts = method.split("_")
    for length in range(len(parts), 0, -1):
        known = _PRETTY.get("_".join(parts[:length]))
        if known is not None:
            # The matrix; in a name of no kind it may be the article.
            more = " ".join("A" if part == "a" else _WORDS.get(part, part) for part in parts[length:])
            return f"{known} ({more})" if more.strip() else known
    return " ".join(_WORDS.get(part, part) for part in parts if part) or method


def _read_leaks(path: Path) -> list[LeakRow]:
    def parse(row: Mapping[str, str]) -> LeakRow:
        leak = float(row["leak"])
        if not math.isfinite(leak):
            raise ValueError(f"leak is {leak}")
        return LeakRow(row["layer"], int(row["rank"]), leak)

    return read_csv(path, parse, "kore-fast init RECIPE")


def _read_losses(path: Path) -> list[LossRow]:
    def parse(row: Mapping[str, str]) -> LossRow:
        loss = float(row["loss"])
        return LossRow(int(row["step"]), loss if math.isfinite(loss) else math.nan)

    return read_csv(path, parse, "kore-fast train RECIPE")


def read_csv(path: Path, parse: Callable[[Mapping[str, str]], Row], command: str) -> list[Row]:
    """Rows of a CSV file, none where it is missing.

    Raises:
        DataError: a row that ``parse`` refuses; names the file, the row and the command that makes it.
    """
    if not path.is_file():
        return []
    rows: list[Row] = []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                rows.append(parse(row))
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        reason = f"column {error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"{path}, row {len(rows) + 1}: {reason}; delete the file and let `{command}` write it anew"
        ) from None
    return rows
