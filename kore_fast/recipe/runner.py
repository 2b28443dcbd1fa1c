"""The runner: stages that read and write files, each with a fingerprint of what it was made from.

Where several processes run the same stages, rank 0 alone decides, empties folders and writes states; all do the work.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import kore_fast
from kore_fast.constraint.distributed import Ranks
from kore_fast.errors import KoreError, RecipeError
from kore_fast.files import partial_path, quick_digest, read_json, write_json
from kore_fast.progress import Progress, RunClock, bar, minutes, silent
from kore_fast.recipe.locks import alone_in

STATE = "stage.json"
_SCARCE = 16 << 20


@dataclass(frozen=True)
class Stage:
    """A step of a run: a folder that is made from files and options.

    ``work`` gets the folder and a progress bar. It may be called on a folder that an earlier, killed call left
    unfinished with the same fingerprint: what is whole there can be used. Under torchrun every process calls it.
    """

    name: str
    """Also the folder below the run's, such as ``"train/kore"``."""
    options: Mapping[str, Any]
    inputs: Sequence[Path]
    """Files and folders that it reads."""
    work: Callable[[Path, Progress], None]
    seconds: float | None = 10.0
    """Rough cost on two cores, for the time left; None where nobody can know it."""
    produces: Sequence[str] = field(default=())
    """Files (relative to its folder) that must be there when it is done."""
    open_ends: Callable[[Path], str] | None = None
    """What a finished stage would try again in its folder, though nothing has changed: in words, or empty."""

    @property
    def kind(self) -> str:
        """``"train"`` of ``"train/kore"``."""
        return self.name.partition("/")[0]


def run_stages(run: Path, stages: Sequence[Stage], *, show: Progress = bar) -> None:
    """Run stages in order. One whose inputs and options have not changed since it was done is skipped.

    Under torchrun every process calls this, with stages that they share and a run's folder that all can see.

    Raises:
        RecipeError: an input is not there or not finished; says which stage makes it. A stage's folder holds files that
            no stage wrote: they would be lost. Another process is at work on a stage of this run.
        ConstraintError: another process failed.
    """
    team = Ranks()
    clock = RunClock({stage.name: stage.seconds for stage in stages})
    for number, stage in enumerate(stages, start=1):
        folder = run / stage.name
        head = f"[{number}/{len(stages)}] {stage.name}"
        with ExitStack() as held:
            fingerprint = team.by_first(partial(_begin, run, stage, head, clock, held))
            if fingerprint is None:
                continue
            with clock.timed(stage.name), _telling_a_full_disk(folder, stage.name):
                stage.work(folder, show if team.rank == 0 else silent)
            team.by_first(partial(_finish, folder, stage, fingerprint))


def _begin(run: Path, stage: Stage, head: str, clock: RunClock, held: ExitStack) -> str | None:
    """Make a stage's folder ready, and ours until ``held`` is left; its fingerprint, or None where nothing has
    changed."""
    fingerprint = _fingerprint(run, stage)
    held.enter_context(alone_in(run, stage.name))
    folder = run / stage.name
    state = _state(folder)
    if state.get("fingerprint") == fingerprint and state.get("done"):
        clock.skip(stage.name)
        changed = [name for name, digest in state["files"].items() if quick_digest(folder / name) != digest]
        missing = [name for name in changed if not (folder / name).exists()]
        unanswered = stage.open_ends(folder) if stage.open_ends is not None and not missing else ""
        if unanswered:
            _say(f"{head}: again, as {unanswered}")
        elif not missing:
            note = f", {changed[0]} was replaced by hand: kept" if changed else ""
            _say(f"{head}: nothing changed{note}")
            return None
    if state.get("fingerprint") != fingerprint:
        if state.get("done") is False:
            _say(f"{head}: its options or inputs have changed since it was interrupted: it starts anew")
        _empty(folder)
    write_json(folder / STATE, {"stage": stage.name, "fingerprint": fingerprint, "done": False})
    _say(f"{head}: {_time_left(clock)}")
    return fingerprint


def _time_left(clock: RunClock) -> str:
    unknown = " and ".join(clock.unknown())
    if unknown and not clock.left():
        return "how long it takes is not known"
    return f"{minutes(clock.left())} left in all" + (f", beside {unknown}: not known" if unknown else "")


def _finish(folder: Path, stage: Stage, fingerprint: str) -> None:
    """Mark a stage as done, with the files that it wrote."""
    lacking = [name for name in stage.produces if not (folder / name).exists()]
    assert not lacking, f"{stage.name} did not write {lacking}"
    files = {str(p.relative_to(folder)): quick_digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    files.pop(STATE)
    write_json(folder / STATE, {"stage": stage.name, "fingerprint": fingerprint, "done": True, "files": files})


@contextmanager
def _telling_a_full_disk(folder: Path, name: str) -> Iterator[None]:
    """Libraries report a full disk each in their own words (a RuntimeError of torch.save, a SafetensorError)."""
    try:
        yield
    except KoreError:
        raise
    except Exception as error:
        if shutil.disk_usage(folder).free >= _SCARCE:
            raise
        reason = str(error).partition("\n")[0]
        raise RecipeError(
            f"{name}: the disk that holds {folder} is full ({reason}); free some space, then give the same command "
            "again: finished work is kept"
        ) from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _state(folder: Path) -> dict[str, Any]:
    try:
        state = read_json(folder / STATE)
    except Exception:
        return {}
    return state if isinstance(state, dict) else {}


def _empty(folder: Path) -> None:
    """Remove what an earlier run of a stage left; the state file last: a kill leaves the folder known as ours."""
    found = list(folder.iterdir()) if folder.is_dir() else []
    # A kill in the very first write leaves a state file under its partial name alone.
    foreign = [path.name for path in found if path != partial_path(folder / STATE)]
    if foreign and not (folder / STATE).is_file():
        raise RecipeError(
            f"{folder} holds files that kore-fast did not write ({foreign[0]}): move them away or choose another "
            "folder with --run"
        )
    for path in sorted(found, key=lambda path: path.name == STATE):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _fingerprint(run: Path, stage: Stage) -> str:
    inputs = []
    for path in stage.inputs:
        inside = path.is_relative_to(run)
        hint = f"make it with `kore-fast {path.relative_to(run).parts[0]}`" if inside else "check the path"
        if not path.exists():
            raise RecipeError(f"{stage.name}: {path} is not there; {hint}")
        if inside and not _state(path if path.is_dir() else path.parent).get("done", True):
            raise RecipeError(f"{stage.name}: {path} is not finished; {hint}")
        # The path of an input outside the run is where this machine has it, not what it is.
        name = str(path.relative_to(run)) if inside else path.name
        inputs.append([name, _folder_digest(path) if path.is_dir() else quick_digest(path)])
    content = {
        "stage": stage.name,
        "kore_fast": kore_fast.__version__,
        "options": stage.options,
        "inputs": inputs,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _folder_digest(folder: Path) -> str:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != STATE)
    return hashlib.sha256("".join(f"{p.relative_to(folder)}:{quick_digest(p)}\n" for p in files).encode()).hexdigest()
