"""How fast requests go out. Slow: run with -m slow. How fast answers come back: test_pipeline_scale.py."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("openai", reason='needs openai: pip install "kore-fast[augment]"')
pytest.importorskip("json_repair", reason='needs json-repair: pip install "kore-fast[augment]"')

from kore_fast.augmentation.language import LanguageModelOptions, LanguageModelWriter
from python_tests.augmentation.language.test_writer import PER_ITEM, items

SERVE = """
import sys
from python_tests.augmentation.language.server import Server
with Server() as server:
    print(server.url, flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_200_requests_a_second_without_latency(tmp_path: Path) -> None:
    """In all, with the server beside it, on two cores."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdin
    try:
        given = LanguageModelOptions(model="m", base_url=process.stdout.readline().strip())
        writer = LanguageModelWriter(given, tmp_path / "r.sqlite")
        writer.prepare(items(10))
        start = time.perf_counter()
        totals = writer.prepare(items(210)[10:])
        seconds = time.perf_counter() - start
    finally:
        process.stdin.close()
        process.wait()
    assert totals["answers"] == 210 * PER_ITEM
    print(f"{200 * PER_ITEM / seconds:.0f} requests a second")
    assert 200 * PER_ITEM / seconds >= 200
