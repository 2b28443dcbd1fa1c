"""A run's parts belong to one process at a time, and to nobody once that process is gone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kore_fast.errors import RecipeError
from kore_fast.progress import Progress, silent
from kore_fast.recipe.locks import alone_in
from kore_fast.recipe.runner import Stage, run_stages

HOLDER = """
import sys, time
from pathlib import Path
from kore_fast.recipe.locks import alone_in

with alone_in(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run"), "train/kore"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_stage_is_refused_while_another_process_is_at_it(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    def work(folder: Path, progress: Progress) -> None:
        (folder / "out.txt").write_text("made")

    stages = [Stage(name, {}, [], work) for name in ("covariance", "train/kore")]
    with pytest.raises(RecipeError, match=r"train/kore: another process is at work .*train-kore\.lock.*stop it"):
        run_stages(tmp_path / "run", stages, show=silent)
    assert (tmp_path / "run" / "covariance" / "out.txt").exists()
    assert not (tmp_path / "run" / "train").exists()
    holder.kill()  # kill -9 lets go of it
    run_stages(tmp_path / "run", stages, show=silent)
    assert (tmp_path / "run" / "train" / "kore" / "out.txt").exists()


def test_what_fails_lets_go(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="inside"), alone_in(tmp_path, "init/kore"):
            raise ValueError("inside")


def test_a_place_that_cannot_hold_locks_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / ".locks").write_text("a file in the way")
    with alone_in(tmp_path, "augment"):
        pass
