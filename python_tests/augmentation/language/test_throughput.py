"""How fast requests go out, and how fast answers that are there already come back. Slow: run with -m slow."""

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
from python_tests.augmentation.language.server import Server
from python_tests.augmentation.language.test_writer import PER_ITEM, items, options

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


@pytest.mark.slow
def test_10_000_items_come_from_the_cache_in_20_seconds(tmp_path: Path) -> None:
    """Preparing again and reading all texts; the answers are put into the cache without a server."""
    from kore_fast.endpoint.cache import Reply
    from python_tests.augmentation.language.server import good_answer

    many = items(10_000)
    with Server() as server:
        writer = LanguageModelWriter(options(server), tmp_path / "r.sqlite")
        writer.cache._base.execute("pragma synchronous = off")
        for item in many:
            while missing := writer.texts(item).missing:
                for request in missing:
                    body = {"messages": request.messages}
                    writer.take(request, Reply(good_answer(body), "stop", "m", 100, 10))
    writer.cache.close()
    start = time.perf_counter()
    again = LanguageModelWriter(options(server), tmp_path / "r.sqlite")
    totals = again.prepare(many)
    prepared = time.perf_counter()
    for item in many:
        assert again.dialogue(item, 0)
        assert again.dialogue(item, 1)
        assert again.caption(item)
        assert again.vqa(item)
    seconds = time.perf_counter() - start
    assert (totals["requests"], totals["cached"]) == (0, 10_000 * PER_ITEM)
    print(f"{prepared - start:.1f} s to prepare again, {seconds:.1f} s in all")
    assert seconds < 20
