"""An initialisation that was killed continues at the next input with the same bits, and only where it belongs.

This file is also what the killed process runs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kore_fast.constraint import CovarianceStore, KoreConfig, collect_covariance, get_kore_model, kore_factors
from kore_fast.constraint import factors as module
from kore_fast.errors import DataError
from python_tests.constraint.killing import Killed, Killer
from python_tests.constraint.stack import PYTHONPATH, Stack

CONFIG = KoreConfig(rank=4, source_weights={"one": 1.0})
WIDE = [f"layers.{n}.c" for n in range(3)]


def make_store(model: nn.Module, seed: int = 1) -> CovarianceStore:
    x = torch.randn(90, 12, generator=torch.Generator().manual_seed(seed))
    return collect_covariance(model, [{"x": x}], source="one")


class Counted:
    """`nullspace`, and the widths that it was called with."""

    def __init__(self) -> None:
        self.widths: list[int] = []
        self._real = module.nullspace

    def __call__(self, C: torch.Tensor, rank: int, **given: Any) -> Any:
        self.widths.append(C.shape[0])
        return self._real(C, rank, **given)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    made = Counted()
    monkeypatch.setattr(module, "nullspace", made)
    return made


def assert_same(found: Any, wanted: Any) -> None:
    assert list(found[0]) == list(wanted[0])
    for name, factors in wanted[0].items():
        assert torch.equal(found[0][name].A, factors.A)
        assert torch.equal(found[0][name].B0, factors.B0)
    assert found[1] == wanted[1]


def test_killed_anywhere_it_goes_on_at_the_next_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Counted
) -> None:
    model = Stack()
    store, folder = make_store(model), tmp_path / "checkpoint"
    wanted = kore_factors(model, CONFIG, store)
    assert sorted(counted.widths) == [12, 12, 12, 20, 20, 20]
    killer = Killer(monkeypatch)
    for n in range(12):  # six files written, six removed
        counted.widths.clear()
        killer.left = n
        with pytest.raises(Killed):
            kore_factors(model, CONFIG, store, checkpoint=folder)
        killer.left = -1
        kept = len([path for path in folder.iterdir() if not path.name.startswith(".")])
        assert kept == (n if n <= 6 else 12 - n)
        counted.widths.clear()
        assert_same(kore_factors(model, CONFIG, store, checkpoint=folder), wanted)
        assert len(counted.widths) == 6 - kept
        assert not folder.exists()
    killer.left = 12
    assert_same(kore_factors(model, CONFIG, store, checkpoint=folder), wanted)


def test_a_real_kill_leaves_the_same_adapter(tmp_path: Path) -> None:
    """kill -9 while the third input is written; then the adapter's files are those of a whole run."""
    runs = {"killed": tmp_path / "killed", "whole": tmp_path / "whole"}

    def run(name: str, kill_at: str = "") -> Any:
        environment = {**os.environ, "KILL_AT": kill_at, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
        command = [sys.executable, __file__, str(runs[name])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == (-signal.SIGKILL if kill_at else 0), done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1]) if not kill_at else None

    # The costliest first: of 0…5 the wide inputs are 1, 3, 5.
    run("killed", kill_at="00005.factors.safetensors")
    kept = runs["killed"] / "checkpoint"
    assert [p.name for p in sorted(kept.glob("[0-9]*"))] == ["00001.factors.safetensors", "00003.factors.safetensors"]
    assert (kept / ".00005.factors.safetensors.partial").exists()
    assert run("whole") == [20, 20, 20, 12, 12, 12]
    assert run("killed") == [20, 12, 12, 12]
    found, wanted = (
        {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        for folder in (runs["killed"], runs["whole"])
    )
    assert {"adapter/adapter_model.safetensors", "adapter/kore.json"} <= wanted.keys()
    assert found == wanted


def interrupted(model: nn.Module, store: CovarianceStore, folder: Path, **given: Any) -> None:
    """All six inputs are left in ``folder``."""
    kore_factors(model, CONFIG, store, checkpoint=folder, keep_checkpoint=True, **given)
    assert len(list(folder.iterdir())) == 6


def test_all_that_is_kept_is_used(tmp_path: Path, counted: Counted, caplog: pytest.LogCaptureFixture) -> None:
    model = Stack()
    store = make_store(model)
    interrupted(model, store, tmp_path / "c")
    counted.widths.clear()
    with caplog.at_level("INFO"):
        assert_same(
            kore_factors(model, CONFIG, store, checkpoint=tmp_path / "c"),
            kore_factors(model, CONFIG, make_store(model)),
        )
    assert "6 of 6 inputs are solved" in caplog.text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("store", "another store"),
        ("model", "another model"),
        ("weights", "another source_weights"),
        ("rank", "another members"),
        ("method", "another method"),
        ("b0", "another b0"),
        ("dtype", "another dtype"),
    ],
)
def test_another_initialisation_begins_anew(
    tmp_path: Path, counted: Counted, caplog: pytest.LogCaptureFixture, changed: str, said: str
) -> None:
    model = Stack()
    store = make_store(model)
    interrupted(model, store, tmp_path / "c")
    config, given = CONFIG, {}
    if changed == "store":
        store = store.merge(make_store(model, seed=2))
    elif changed == "model":
        model = Stack(seed=5)
        store = make_store(model)
    elif changed == "weights":
        config = replace(config, source_weights=None)
    elif changed == "rank":
        config = replace(config, rank=3)
    elif changed == "method":
        config = replace(config, method="reference")
    elif changed == "b0":
        given = {"b0": False}
    elif changed == "dtype":
        model = model.double()
    counted.widths.clear()
    found, leaks = kore_factors(model, config, store, checkpoint=tmp_path / "c", **given)
    assert len(counted.widths) == 6
    assert f"6 finished inputs cannot be used ({said}); they are solved anew" in caplog.text
    wanted = kore_factors(model, config, store, **given)
    assert leaks == wanted[1]
    assert all(torch.equal(found[name].A, wanted[0][name].A) for name in wanted[0])
    assert not (tmp_path / "c").exists()


def test_another_rank_of_one_layer_solves_its_input_only(tmp_path: Path, counted: Counted) -> None:
    model = Stack()
    store = make_store(model)
    ranks = dict.fromkeys(store.layers, 4)
    interrupted(model, store, tmp_path / "c", ranks=ranks)
    counted.widths.clear()
    ranks["layers.1.c"] = 6
    found = kore_factors(model, CONFIG, store, ranks=ranks, checkpoint=tmp_path / "c")
    assert counted.widths == [20]
    assert_same(found, kore_factors(model, CONFIG, store, ranks=ranks))


def test_a_file_that_is_not_whole_is_solved_again(
    tmp_path: Path, counted: Counted, caplog: pytest.LogCaptureFixture
) -> None:
    model, folder = Stack(), tmp_path / "c"
    store = make_store(model)
    wanted = kore_factors(model, CONFIG, store)
    interrupted(model, store, folder)
    files = sorted(folder.iterdir())
    files[1].write_bytes(files[1].read_bytes()[:-8])
    files[2].write_bytes(b"")
    files[3].write_bytes(files[4].read_bytes())
    (folder / "mine.txt").write_text("not of the checkpoint")
    counted.widths.clear()
    assert_same(kore_factors(model, CONFIG, store, checkpoint=folder), wanted)
    assert sorted(counted.widths) == [12, 20, 20]
    assert "3 finished inputs cannot be used (00001.factors.safetensors is not whole" in caplog.text
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    model = Stack()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"00001\.factors\.safetensors: could not be written"):
        kore_factors(model, CONFIG, make_store(model), checkpoint=tmp_path / "file")


def whole_initialisation(folder: Path) -> None:
    """What the killed process does: an adapter in ``folder``; the widths that were solved on standard output."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and os.fspath(arguments[1]).endswith(os.environ["KILL_AT"] or "nowhere"):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    torch.set_num_threads(1)
    model, counted = Stack(), Counted()
    module.nullspace = counted
    get_kore_model(model, CONFIG, make_store(model), checkpoint=folder / "checkpoint", save_to=folder / "adapter")
    print(json.dumps(counted.widths))


if __name__ == "__main__":
    whole_initialisation(Path(sys.argv[1]))
