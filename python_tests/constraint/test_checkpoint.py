"""A collection that was killed continues with the same bits, wherever it was killed, and only where it belongs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kore_fast.constraint import CovarianceStore, collect_covariance
from kore_fast.constraint import checkpoint as module
from kore_fast.errors import ConstraintError, DataError
from python_tests.constraint.killing import Killed, Killer

LAYERS = ["a", "b", "c", "d"]


class Pair(nn.Module):
    """Inputs of widths 5, 300 (two panels), 7 and 5."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(5, 300), nn.Linear(300, 7)
        self.c, self.d = nn.Linear(7, 5), nn.Linear(5, 2)
        self.forwards = 0

    def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        self.forwards += 1
        return self.d(self.c(self.b(self.a(x).relu())))


def make_batches(n: int = 5) -> list[dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(1)
    made = []
    for i in range(n):
        rows = 3 + 20 * (i % 2)
        x, weights = torch.randn(rows, 5, generator=random), torch.rand(rows, generator=random)
        made.append({"x": x, "token_weights": weights})
    return made


def collect(model: nn.Module, batches: Any, folder: Path | None, **given: Any) -> CovarianceStore:
    options = {"checkpoint": folder, "checkpoint_seconds": 0, "target_modules": LAYERS, "warn_few_tokens": False}
    return collect_covariance(model, batches, **{**options, **given})


def assert_same_bits(found: CovarianceStore, wanted: CovarianceStore) -> None:
    assert (found.model, found.groups, found.widths, found.sources) == (
        wanted.model,
        wanted.groups,
        wanted.widths,
        wanted.sources,
    )
    for key, (part,) in wanted.parts.items():
        assert torch.equal(found.parts[key][0].read(), part.read())
        assert torch.equal(found.parts[key][0].count, part.count)


BUDGETS = {
    "all at once": {},
    "passes": {"max_memory": 8 * 300 * 300 + 100},
    "spilling": {"max_memory": 8 * 300 * 300 + 100_000, "spill": "folder"},
}


@pytest.mark.parametrize("budget", BUDGETS)
def test_killed_anywhere_it_continues_with_the_same_bits(
    budget: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = dict(BUDGETS[budget])
    if "spill" in options:
        options["spill"] = tmp_path / "spill"
    model, made = Pair(), make_batches()
    folder, saved = tmp_path / "checkpoint", tmp_path / "store.safetensors"
    wanted = collect(model, made, None, **options)
    whole = model.forwards
    options["save_to"] = saved
    killer = Killer(monkeypatch)
    kills = 0
    for n in range(10_000):
        model.forwards = 0
        killer.left = n
        try:
            collect(model, made, folder, **options)
        except Killed:
            kills += 1
        else:
            break
        killer.left = -1
        if not saved.exists():
            collect(model, made, folder, **options)
            # The batch whose checkpoint was killed, or with a budget the one that shows the groups, and no more.
            assert model.forwards <= whole + 2
            assert not folder.exists()
        assert_same_bits(CovarianceStore.load(saved), wanted)
        saved.unlink()
    assert kills > 20
    assert not folder.exists()


def test_a_longer_way_than_one_interruption(tmp_path: Path) -> None:
    """Interrupted after every batch; rows wait in buffers over several checkpoints."""
    model, made = Pair(), make_batches(7)
    wanted = collect(model, made, None)
    model.forwards = 0

    def until(n: int) -> Iterator[Any]:
        yield from made[:n]
        raise Killed

    for n in range(1, 8):
        with pytest.raises(Killed):
            collect(model, until(n), tmp_path / "checkpoint")
    assert_same_bits(collect(model, made, tmp_path / "checkpoint"), wanted)
    assert model.forwards == 7


def interrupted(folder: Path, model: nn.Module | None = None, **given: Any) -> None:
    """Leave a checkpoint after three batches."""

    def three() -> Iterator[Any]:
        yield from make_batches()[:3]
        raise Killed

    with pytest.raises(Killed):
        collect(model or Pair(), three(), folder, **given)
    assert folder.exists()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"model": Pair(seed=1)}, "model"),
        ({"model": Pair().double()}, "dtype"),
        ({"source": "other"}, "source"),
        ({"about": {"samples": 3}}, "about"),
        ({"target_modules": LAYERS[:3]}, "model"),
        ({"max_memory": 10**9}, "max_memory"),
        ({"sharded": True}, "sharded"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, given: dict[str, Any], named: str) -> None:
    interrupted(tmp_path / "checkpoint")
    given = {"model": Pair(), **given}
    with pytest.raises(ConstraintError, match=rf"slot.json: .* another {named} \(.*delete .*checkpoint to begin anew"):
        collect(given.pop("model"), make_batches(), tmp_path / "checkpoint", **given)
    assert (tmp_path / "checkpoint").exists()


def test_other_batches_are_refused(tmp_path: Path) -> None:
    interrupted(tmp_path / "checkpoint")
    with pytest.raises(ConstraintError, match="batch 3 is not the one that was collected before"):
        collect(Pair(), make_batches()[1:], tmp_path / "checkpoint")
    with pytest.raises(ConstraintError, match="2 batches, but 3 were collected before"):
        collect(Pair(), make_batches()[:2], tmp_path / "checkpoint")
    assert_same_bits(collect(Pair(), make_batches(), tmp_path / "checkpoint"), collect(Pair(), make_batches(), None))


@pytest.mark.parametrize("spoil", ["slot.json", "00001.safetensors"])
def test_a_slot_that_is_not_whole_is_passed_over(tmp_path: Path, spoil: str, caplog: pytest.LogCaptureFixture) -> None:
    interrupted(tmp_path / "checkpoint")
    (path,) = (tmp_path / "checkpoint").glob(f"*/{spoil}")
    path.write_bytes(path.read_bytes()[:-5])
    model = Pair()
    assert_same_bits(collect(model, make_batches(), tmp_path / "checkpoint"), collect(Pair(), make_batches(), None))
    assert model.forwards == 5
    assert "not a whole checkpoint" in caplog.text


def test_what_others_put_there_stays(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    interrupted(folder)
    (folder / "notes.txt").write_text("mine")
    collect(Pair(), make_batches(), folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_the_checkpoint_stays_until_the_store_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, path = tmp_path / "checkpoint", tmp_path / "store.safetensors"

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("kore_fast.constraint.store.save_file", full)
        with pytest.raises(DataError, match=r"store\.safetensors: could not be written"):
            collect(Pair(), make_batches(), folder, save_to=path)
    assert folder.exists()
    model = Pair()
    store = collect(model, make_batches(), folder, save_to=path)
    assert model.forwards == 0
    assert not folder.exists()
    assert_same_bits(CovarianceStore.load(path), store)


def test_a_full_disk_names_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kore_fast.constraint.checkpoint.save_file", full)
    with pytest.raises(DataError, match=r"checkpoint/a/00000\.safetensors: could not be written"):
        collect(Pair(), make_batches(), tmp_path / "checkpoint")


def test_checkpoints_keep_to_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    kept = module.Checkpoint(tmp_path, {}, 120)

    def write(seconds: float) -> None:
        real = module.write_json
        with monkeypatch.context() as patched:
            patched.setattr(module, "write_json", lambda *given: (now.__setitem__(0, now[0] + seconds), real(*given)))
            kept.write(module.Place(0, 1), {}, {}, None, None)

    assert not kept.due()
    now[0] = 120
    assert kept.due()
    write(1)
    now[0] += 119
    assert not kept.due()
    now[0] += 1
    assert kept.due()
    # One that takes long comes more seldom: a twentieth of the time at most.
    write(30)
    now[0] += 599
    assert not kept.due()
    now[0] += 1
    assert kept.due()


def test_a_quick_collection_writes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.Checkpoint, "write", lambda *_: pytest.fail("nothing was due"))
    collect(Pair(), make_batches(), tmp_path / "checkpoint", checkpoint_seconds=120)
    assert not (tmp_path / "checkpoint").exists()


def test_nothing_is_pickled(tmp_path: Path) -> None:
    interrupted(tmp_path / "checkpoint")
    files = [path for path in (tmp_path / "checkpoint").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    (slot,) = (path for path in files if path.name == "slot.json")
    assert json.loads(slot.read_text())["place"] == [0, 3]
