"""Initialisation on two gloo ranks under torchrun: each solves a share, all return what one process does, to the bit.

This file is also what the ranks run: all scenarios in one go, since starting two processes takes longer than the work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kore_fast.constraint import CovarianceStore, KoreConfig, collect_covariance, get_kore_model, kore_factors
from kore_fast.constraint import factors as module
from kore_fast.modules.adapter import model_lora_a_hash
from python_tests.constraint.stack import PYTHONPATH, Stack, sharded

CONFIG = KoreConfig(rank=4)
RANKS = {f"layers.{n}.{name}": 3 + n for n in range(3) for name in "abc"}


def make_store() -> CovarianceStore:
    x = torch.randn(90, 12, generator=torch.Generator().manual_seed(1))
    return collect_covariance(Stack(), [{"x": x}])


class Broken:
    """`nullspace` that counts, and fails at its n-th call."""

    def __init__(self, n: int = 0) -> None:
        self.n, self.widths = n, []

    def __call__(self, C: torch.Tensor, rank: int, **given: Any) -> Any:
        self.widths.append(C.shape[0])
        if len(self.widths) == self.n:
            raise OSError("out of memory")
        return NULLSPACE(C, rank, **given)


NULLSPACE = module.nullspace


def save(result: Any, path: Path) -> None:
    factors, leaks = result
    tensors = {f"{name}/A": f.A for name, f in factors.items()}
    tensors |= {f"{name}/B0": f.B0 for name, f in factors.items() if f.B0 is not None}
    save_file(tensors, path, metadata={"leaks": json.dumps([list(factors), [asdict(leak) for leak in leaks]])})


def run_scenarios(out: Path) -> None:
    """What the two ranks do; results and messages go to ``out``."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = CovarianceStore.load(out / "store.safetensors")
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    rank = dist.get_rank()
    plain, wrapped = Stack(), sharded(Stack())
    notes: dict[str, Any] = {}

    def message(run: Callable[[], Any]) -> str:
        try:
            run()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    for kind, model in (("plain", plain), ("fsdp", wrapped)):
        module.nullspace = counted = Broken()
        shown: list[int] = []

        def progress(solves: Any, shown: list[int] = shown) -> Any:
            shown.extend(s.cost for s in solves)
            return iter(solves)

        save(kore_factors(model, CONFIG, store, progress=progress), out / f"{kind}.{rank}")
        notes[f"{kind} widths"], notes[f"{kind} costs"] = counted.widths[:], shown
        save(kore_factors(model, CONFIG, store, ranks=RANKS, b0=False), out / f"{kind}-ranks.{rank}")
        # Rank 1 fails at its second solve; rank 0 gets through, or stops where it would wait.
        module.nullspace = Broken(2 if rank else 0)
        folder = out / f"{kind}.checkpoint"
        notes[f"{kind} broken"] = message(lambda m=model, f=folder: kore_factors(m, CONFIG, store, checkpoint=f))
        dist.barrier()
        notes[f"{kind} kept"] = len(list(folder.glob("[0-9]*")))
        dist.barrier()
        module.nullspace = counted = Broken()
        save(kore_factors(model, CONFIG, store, checkpoint=folder), out / f"{kind}-continued.{rank}")
        notes[f"{kind} rest"] = counted.widths[:]
        notes[f"{kind} left"] = folder.exists()
    # Machines that share no folder.
    module.nullspace = Broken(2)
    own = out / f"own.{rank}"
    message(lambda: kore_factors(plain, CONFIG, store, checkpoint=own))
    module.nullspace = counted = Broken()
    save(kore_factors(plain, CONFIG, store, checkpoint=own), out / f"own-continued.{rank}")
    notes["own rest"] = counted.widths[:]
    # For a single process to continue.
    message(lambda: kore_factors(plain, CONFIG, store, checkpoint=out / "shrunk", keep_checkpoint=True))
    other = store.merge(store) if rank else store
    notes["different"] = message(lambda: kore_factors(plain, CONFIG, other))
    changed = Stack()
    if rank:
        with torch.no_grad():
            changed.layers[0].a.weight.neg_()
    notes["changed"] = message(lambda: kore_factors(changed, CONFIG, store))
    config = KoreConfig(rank=4 if rank else 13)
    notes["rank"] = message(lambda: kore_factors(plain, config, store))
    module.nullspace = NULLSPACE
    (out / f"notes.{rank}.json").write_text(json.dumps(notes))
    adapted = get_kore_model(plain, CONFIG, store, save_to=out / "adapter" / str(rank), checkpoint=out / "adapter.c")
    (out / f"hash.{rank}").write_text(model_lora_a_hash(adapted))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two ranks left their results."""
    out = tmp_path_factory.mktemp("ranks")
    make_store().save(out / "store.safetensors")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command = [*launcher, "--rdzv-endpoint=localhost:0", __file__, str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    return out


@pytest.fixture(scope="module")
def notes(out: Path) -> list[dict[str, Any]]:
    return [json.loads((out / f"notes.{rank}.json").read_text()) for rank in range(2)]


def single(out: Path, **given: Any) -> Any:
    return kore_factors(Stack(), CONFIG, CovarianceStore.load(out / "store.safetensors"), **given)


def assert_same_file(path: Path, wanted: Any, again: Path) -> None:
    save(wanted, again)
    found, one = load_file(path), load_file(again)
    assert found.keys() == one.keys()
    assert [key for key in one if not torch.equal(found[key], one[key])] == []
    assert path.read_bytes() == again.read_bytes()


KINDS = pytest.mark.parametrize("kind", ["plain", "fsdp"])


@KINDS
def test_two_ranks_give_what_one_process_does(out: Path, kind: str, tmp_path: Path) -> None:
    for rank in range(2):
        assert_same_file(out / f"{kind}.{rank}", single(out), tmp_path / "one")
        assert_same_file(out / f"{kind}-ranks.{rank}", single(out, ranks=RANKS, b0=False), tmp_path / "one")


@KINDS
def test_each_solves_its_share(notes: list[dict[str, Any]], kind: str) -> None:
    one, other = (n[f"{kind} widths"] for n in notes)
    assert sorted(one + other) == [12, 12, 12, 20, 20, 20]
    # Costs 20³ + 12·20·4 and 12³ + 2·20·12·4: two wide inputs here, a wide and three narrow ones there.
    wide, narrow = 20**3 + 12 * 20 * 4, 12**3 + 2 * 20 * 12 * 4
    assert [n[f"{kind} costs"] for n in notes] == [[wide, wide], [wide, narrow, narrow, narrow]]
    assert sum(notes[0][f"{kind} costs"]) >= sum(notes[1][f"{kind} costs"]) - narrow


@KINDS
def test_a_rank_that_fails_ends_all_and_what_is_done_is_kept(
    out: Path, notes: list[dict[str, Any]], kind: str, tmp_path: Path
) -> None:
    assert [n[f"{kind} broken"] for n in notes] == [
        "ConstraintError: rank 1 failed: OSError: out of memory",
        "OSError: out of memory",
    ]
    # Rank 0 goes through its two inputs on its own, or stops with rank 1 after the first.
    kept = 3 if kind == "plain" else 2
    assert [n[f"{kind} kept"] for n in notes] == [kept, kept]
    assert len(notes[0][f"{kind} rest"] + notes[1][f"{kind} rest"]) == 6 - kept
    assert not any(n[f"{kind} left"] for n in notes)
    for rank in range(2):
        assert_same_file(out / f"{kind}-continued.{rank}", single(out), tmp_path / "one")


def test_ranks_that_share_no_folder_share_what_is_kept(out: Path, notes: list[dict[str, Any]], tmp_path: Path) -> None:
    assert len(notes[0]["own rest"] + notes[1]["own rest"]) == 4
    for rank in range(2):
        assert_same_file(out / f"own-continued.{rank}", single(out), tmp_path / "one")
        assert not (out / f"own.{rank}").exists()


def test_one_process_continues_what_two_began(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(list((out / "shrunk").iterdir())) == 6
    (out / "shrunk" / "00001.factors.safetensors").unlink()
    counted = Broken()
    wanted = single(out)
    monkeypatch.setattr(module, "nullspace", counted)
    found = single(out, checkpoint=out / "shrunk")
    assert counted.widths == [20]
    save(found, tmp_path / "found")
    assert_same_file(tmp_path / "found", wanted, tmp_path / "one")


def test_ranks_that_differ_are_told(notes: list[dict[str, Any]]) -> None:
    for n in notes:
        assert "ranks 0 and 1 do not have the same store, layers and options" in n["different"]
    assert "rank 1 failed: StoreError: the store was made for another model" in notes[0]["changed"]
    assert notes[1]["changed"].startswith("StoreError: the store was made for another model")
    assert "rank 13 is larger than its width" in notes[0]["rank"]
    assert "rank 0 failed: ConstraintError" in notes[1]["rank"]


def test_every_rank_has_the_adapter_and_the_first_saves_it(out: Path, tmp_path: Path) -> None:
    store = CovarianceStore.load(out / "store.safetensors")
    adapted = get_kore_model(Stack(), CONFIG, store, save_to=tmp_path / "adapter")
    assert {(out / f"hash.{rank}").read_text() for rank in range(2)} == {model_lora_a_hash(adapted)}
    assert [path.name for path in (out / "adapter").iterdir()] == ["0"]
    for name in ("adapter_model.safetensors", "kore.json"):
        assert (out / "adapter" / "0" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    assert not (out / "adapter.c").exists()


if __name__ == "__main__":
    run_scenarios(Path(sys.argv[1]))
