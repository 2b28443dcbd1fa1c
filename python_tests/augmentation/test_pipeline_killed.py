"""``kill -9`` at random moments: what comes out in the end is what comes out of a run that nobody disturbed."""

from __future__ import annotations

import itertools
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason='needs openai: pip install "kore-fast[augment]"')
pytest.importorskip("json_repair", reason='needs json-repair: pip install "kore-fast[augment]"')

from python_tests.augmentation.language.server import Reply, Server
from python_tests.augmentation.world import answer, files, make_items, model

# Packages take longer to import than the runs to be killed: one process imports, and each run is a fork of it.
NURSERY = """
import itertools, json, os, signal, sys
import httpx2, json_repair, openai
import kore_fast.augmentation.pipeline, kore_fast.recipe.stages
from kore_fast.cli import main

print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        arguments, moment = json.loads(line)
        if moment is not None:
            replace, count = os.replace, itertools.count()

            def dying(*places):
                if next(count) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(*places)

            os.replace = dying
        os._exit(main(arguments))
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Nursery:
    """Runs of ``kore-fast`` in processes that start at once."""

    def __init__(self, log: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        self.log = log
        with open(log, "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", NURSERY],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
            )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().decode().strip()

    def run(self, arguments: list[str], kill_after: float | None = None, kill_before: int | None = None) -> bool:
        """Whether the run came to its end before it was killed: after so many seconds, or before it gave a file its
        name for the so-manieth time."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([arguments, kill_before]).encode() + b"\n")
        child = int(self._line())
        if kill_after is not None and not select.select([self.process.stdout], [], [], kill_after)[0]:
            os.kill(child, signal.SIGKILL)
        status = int(self._line())
        assert status in (0, signal.SIGKILL), self.log.read_text()
        return status == 0


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[Nursery]:
    made = Nursery(tmp_path / "errors.txt")
    yield made
    assert made.process.stdin
    made.process.stdin.close()
    made.process.wait()


def script(body: dict[str, Any], times: int) -> Reply:
    return Reply(answer(body), delay=0.004)


def augment(server: Server, items: Path, search: Path, run: Path) -> list[str]:
    """The arguments of ``kore-fast``."""
    plan = {
        "language_model": model(server),
        "image_search": {"folder": str(search)},
        "clip": {"unfiltered": True},
        "branches": ["dialogue", "recognition", "caption", "vqa", "links"],
        "formats": ["llama-factory", "swift"],
    }
    sets = [part for key, value in plan.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    return ["augment", "--items", str(items), "--run", str(run), *sets]


@pytest.mark.parametrize("kills", [20])
def test_killed_again_and_again_it_ends_with_the_same_files(tmp_path: Path, nursery: Nursery, kills: int) -> None:
    """Twenty kills spread over as many runs as it takes; a run that got through is compared and begun anew."""
    items = make_items(tmp_path / "data", 30, search=tmp_path / "search")
    chance = random.Random(7)
    with Server(script) as server:
        # Always the same place: files in other trainers' formats hold whole paths.
        run = tmp_path / "run"
        arguments = augment(server, items, tmp_path / "search", run)
        start = time.monotonic()
        assert nursery.run(arguments)
        whole = time.monotonic() - start
        asked = len(server.requests)
        expected = files(run / "augment")
        killed = begun = 0
        while killed < kills or begun == 0:
            run.rename(tmp_path / f"run{begun}")
            before = len(server.requests)
            here = 0
            # Early moments more often: what is left to do becomes less with each run.
            while not nursery.run(arguments, whole * chance.random() ** 2 if killed + here < kills else None):
                here += 1
            assert files(run / "augment") == expected
            # Paid twice: at most what was under way at each kill.
            assert len(server.requests) - before <= asked + 8 * here
            killed += here
            begun += 1
    assert killed >= kills


def test_killed_before_any_file_has_its_name_it_ends_with_the_same_files(tmp_path: Path, nursery: Nursery) -> None:
    items = make_items(tmp_path / "data", 1, search=tmp_path / "search")
    run = tmp_path / "run"
    with Server(lambda body, times: Reply(answer(body))) as server:
        arguments = augment(server, items, tmp_path / "search", run)
        assert nursery.run(arguments)
        expected = files(run / "augment")
        for moment in itertools.count():
            run.rename(tmp_path / f"run{moment}")
            if nursery.run(arguments, kill_before=moment):
                break
            assert nursery.run(arguments)
            assert files(run / "augment") == expected
    assert moment > 15
