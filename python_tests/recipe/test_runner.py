"""The runner: what is skipped, what runs again, what a kill leaves, what a hand replaced."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kore_fast.errors import RecipeError
from kore_fast.files import write_text
from kore_fast.progress import Progress, silent
from kore_fast.recipe.runner import STATE, Stage, run_stages


class Kitchen:
    """Stages that write what they read, and a record of which ran."""

    def __init__(self, root: Path) -> None:
        self.run, self.source = root / "run", root / "source.txt"
        self.source.write_text("flour")
        self.ran: list[str] = []

    def stage(self, name: str, inputs: list[Path], **options: Any) -> Stage:
        def work(folder: Path, progress: Progress) -> None:
            self.ran.append(name)
            text = "+".join(p.read_text() if p.is_file() else (p / "out.txt").read_text() for p in inputs)
            write_text(folder / "out.txt", f"{name}({text}{options or ''})")

        return Stage(name, options, inputs, work, produces=("out.txt",))

    def stages(self, **of_b: Any) -> list[Stage]:
        a = self.stage("a", [self.source])
        b = self.stage("b/x", [self.run / "a"], **of_b)
        c = self.stage("c", [self.source])
        return [a, b, c, self.stage("d", [self.run / "b" / "x" / "out.txt", self.run / "c" / "out.txt"])]

    def cook(self, stages: list[Stage] | None = None) -> list[str]:
        self.ran.clear()
        run_stages(self.run, stages or self.stages(), show=silent)
        return list(self.ran)


@pytest.fixture
def kitchen(tmp_path: Path) -> Kitchen:
    return Kitchen(tmp_path)


def test_nothing_runs_twice(kitchen: Kitchen, capsys: pytest.CaptureFixture[str]) -> None:
    assert kitchen.cook() == ["a", "b/x", "c", "d"]
    before = {p: p.stat().st_mtime_ns for p in kitchen.run.rglob("*")}
    capsys.readouterr()
    assert kitchen.cook() == []
    assert capsys.readouterr().err.count("nothing changed") == 4
    assert {p: p.stat().st_mtime_ns for p in kitchen.run.rglob("*")} == before


def test_an_option_runs_its_stage_and_what_depends_on_it(kitchen: Kitchen) -> None:
    kitchen.cook()
    assert kitchen.cook(kitchen.stages(salt=1)) == ["b/x", "d"]
    assert kitchen.cook(kitchen.stages(salt=1)) == []
    assert "salt" in (kitchen.run / "d" / "out.txt").read_text()


def test_an_input_runs_all_that_read_it(kitchen: Kitchen) -> None:
    kitchen.cook()
    kitchen.source.write_text("rye")
    assert kitchen.cook() == ["a", "b/x", "c", "d"]
    kitchen.source.touch()
    assert kitchen.cook() == []


def test_an_output_that_comes_out_the_same_stops_there(kitchen: Kitchen) -> None:
    kitchen.cook()
    stages = kitchen.stages()
    stages[0] = replace(stages[0], options={"unused": 1})
    assert kitchen.cook(stages) == ["a"]


def test_a_run_can_be_moved_with_its_inputs(kitchen: Kitchen, tmp_path: Path) -> None:
    kitchen.cook()
    other = tmp_path / "elsewhere" / "deeper"
    other.mkdir(parents=True)
    shutil.move(kitchen.run, other / "run")
    shutil.move(kitchen.source, other / "source.txt")
    kitchen.run, kitchen.source = other / "run", other / "source.txt"
    assert kitchen.cook() == []


def test_inputs_of_one_name_are_told_apart(kitchen: Kitchen, tmp_path: Path) -> None:
    files = [tmp_path / "one" / "data.txt", tmp_path / "two" / "data.txt"]
    for file in files:
        file.parent.mkdir()
        file.write_text("x")
    stages = [kitchen.stage("a", files)]
    assert kitchen.cook(stages) == ["a"]
    for file in files:
        file.write_text("y")
        assert kitchen.cook(stages) == ["a"], file


def test_a_file_replaced_by_hand_is_kept_and_flows_on(kitchen: Kitchen, capsys: pytest.CaptureFixture[str]) -> None:
    kitchen.cook()
    (kitchen.run / "b" / "x" / "out.txt").write_text("my own bread")
    capsys.readouterr()
    assert kitchen.cook() == ["d"]
    assert "b/x: nothing changed, out.txt was replaced by hand: kept" in capsys.readouterr().err
    assert "my own bread" in (kitchen.run / "d" / "out.txt").read_text()
    assert kitchen.cook() == []


def test_a_missing_output_is_made_again(kitchen: Kitchen) -> None:
    kitchen.cook()
    (kitchen.run / "c" / "out.txt").unlink()
    assert kitchen.cook() == ["c"]


def interrupted(stage: Stage, seen: list[list[str]]) -> Stage:
    def work(folder: Path, progress: Progress) -> None:
        seen.append(sorted(p.name for p in folder.iterdir()))
        write_text(folder / "half.txt", "half")
        raise KeyboardInterrupt

    return replace(stage, work=work)


def test_a_killed_stage_finds_its_files_again(kitchen: Kitchen) -> None:
    stages = kitchen.stages()
    seen: list[list[str]] = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            kitchen.cook([stages[0], interrupted(stages[1], seen)])
    assert seen == [[STATE], ["half.txt", STATE]]
    assert kitchen.cook() == ["b/x", "c", "d"]


def killed_before_replacing(kitchen: Kitchen, moment: int) -> bool:
    """Cook in a process that is killed where it would give a file its name for the ``moment``-th time."""
    child = os.fork()
    if child == 0:
        replace_file, count = os.replace, itertools.count()

        def dying(*places: Any) -> None:
            if next(count) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            replace_file(*places)

        os.replace = dying  # type: ignore[assignment]
        try:
            kitchen.cook()
            os._exit(0)
        finally:  # never back into pytest
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


def test_a_kill_before_any_file_has_its_name_stops_nobody(kitchen: Kitchen) -> None:
    """Also one in the very first write of a new run."""

    def files() -> dict[str, str]:
        return {str(p.relative_to(kitchen.run)): p.read_text() for p in kitchen.run.rglob("*") if p.is_file()}

    kitchen.cook()
    expected = files()
    for moment in range(4 * 3):  # two states and an output in each of four stages
        shutil.rmtree(kitchen.run)
        assert killed_before_replacing(kitchen, moment)
        assert any(name.endswith(".partial") for name in files())
        kitchen.cook()
        assert files() == expected
    shutil.rmtree(kitchen.run)
    assert not killed_before_replacing(kitchen, 4 * 3)


def test_other_options_do_not_find_them(kitchen: Kitchen) -> None:
    stages = kitchen.stages()
    seen: list[list[str]] = []
    with pytest.raises(KeyboardInterrupt):
        kitchen.cook([stages[0], interrupted(stages[1], seen)])
    with pytest.raises(KeyboardInterrupt):
        kitchen.cook([stages[0], interrupted(kitchen.stages(salt=1)[1], seen)])
    assert seen == [[STATE], [STATE]]


def test_missing_upstream_names_the_command(kitchen: Kitchen) -> None:
    with pytest.raises(RecipeError, match=r"b/x: .*run/a is not there; make it with `kore-fast a`"):
        kitchen.cook(kitchen.stages()[1:2])
    kitchen.source.unlink()
    with pytest.raises(RecipeError, match=r"source\.txt is not there; check the path"):
        kitchen.cook()


def test_unfinished_upstream_names_the_command(kitchen: Kitchen) -> None:
    kitchen.cook()
    state = kitchen.run / "b" / "x" / STATE
    state.write_text(json.dumps({**json.loads(state.read_text()), "done": False}))
    with pytest.raises(RecipeError, match=r"d: .*out\.txt is not finished; make it with `kore-fast b`"):
        kitchen.cook(kitchen.stages()[3:])


def test_a_folder_of_somebody_else_is_not_emptied(kitchen: Kitchen) -> None:
    theirs = kitchen.run / "a" / "thesis.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("years of work")
    with pytest.raises(RecipeError, match=r"thesis\.txt.*--run"):
        kitchen.cook()
    assert theirs.read_text() == "years of work"


def test_somebody_else_s_output_serves_the_next_stage(kitchen: Kitchen) -> None:
    (kitchen.run / "a").mkdir(parents=True)
    (kitchen.run / "a" / "out.txt").write_text("from another tool")
    assert kitchen.cook(kitchen.stages()[1:2]) == ["b/x"]
    assert "another tool" in (kitchen.run / "b" / "x" / "out.txt").read_text()


@pytest.mark.parametrize("spoil", [lambda p: p.write_text("{"), lambda p: p.write_text("[]")])
def test_a_broken_state_is_not_trusted(kitchen: Kitchen, spoil: Callable[[Path], None]) -> None:
    kitchen.cook()
    spoil(kitchen.run / "c" / STATE)
    assert kitchen.cook() == ["c"]


def test_a_full_disk_is_said_whatever_the_library_calls_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(folder: Path, progress: Progress) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0\nmore lines")

    stage = Stage("train", options={}, inputs=[], work=work)
    with pytest.raises(RuntimeError, match="enforce fail"):
        run_stages(tmp_path, [stage], show=silent)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    with pytest.raises(RecipeError, match=r"train: the disk that holds .*train is full .*unexpected pos"):
        run_stages(tmp_path, [stage], show=silent)
