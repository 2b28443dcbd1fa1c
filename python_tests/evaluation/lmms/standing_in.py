"""What stands in for lmms-eval where it is not installed: answers by script, everything around them as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from kore_fast.evaluation.lmms import Score, harness, retention
from kore_fast.evaluation.lmms.benchmarks import Benchmark
from kore_fast.files import write_json, write_jsonl

INSTALLED = find_spec("lmms_eval") is not None


def stand_in(monkeypatch: pytest.MonkeyPatch, points: Mapping[str, float] | None = None) -> list[str]:
    """Each benchmark that has data gets its points (default 25); the list takes what is measured."""
    measured: list[str] = []

    def measure(
        benchmark: Benchmark, model: Any, processor: Any, place: Path, files: list[Path], settings: Any, **options: Any
    ) -> Score:
        if benchmark.judged and options["judge"] is None:
            return Score(benchmark.name, missing=retention.NO_JUDGE)
        if not files:
            return Score(benchmark.name, missing="no data", again=bool(options["hub"]))
        measured.append(benchmark.name)
        score = Score(benchmark.name, points=(points or {}).get(benchmark.name, 25.0), metrics={}, questions=2)
        write_jsonl(place / retention.PREDICTIONS, [{"answer": "A"}])
        write_json(place / retention.RESULT, {"settings": settings, "score": asdict(score)})
        return score

    monkeypatch.setattr(harness, "version", lambda name: "0.7.3")
    monkeypatch.setattr(retention, "_measure", measure)
    return measured
