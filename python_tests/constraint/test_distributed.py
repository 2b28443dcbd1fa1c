"""Collection on two gloo ranks under torchrun: what each scenario gives equals what one process gives.

This file is also what the ranks run: all scenarios in one go, since starting two processes takes longer than the work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kore_fast.constraint import CovarianceStore, collect_covariance
from kore_fast.constraint.distributed import Ranks, bin_packing, first_to_speak, process_group
from kore_fast.errors import BackendError, ConstraintError, StoreError
from python_tests.constraint.stack import PYTHONPATH, Stack, sharded

Batch = dict[str, torch.Tensor]


def make_batches(n: int) -> list[Batch]:
    """Of different lengths, with padding and weights."""
    random = torch.Generator().manual_seed(1)
    made = []
    for number in range(n):
        shape = (2, 5 + 7 * (number % 3))
        made.append(
            {
                "x": torch.randn(*shape, 12, generator=random, dtype=torch.float64),
                "attention_mask": (torch.rand(*shape, generator=random) > 0.2).long(),
                "token_weights": torch.rand(*shape, generator=random),
            }
        )
    return made


SMALL = 4 * 8 * 20 * 20
"""Bytes for three of the wide sums and their buffers: several passes."""


class Interrupted(Exception):
    pass


def interrupted_at(n: int, batches: list[Batch]) -> Callable[[], Iterator[Batch]]:
    """Passes over the batches; the n-th batch that is asked for, over all passes, is not there."""
    asked = 0

    def again() -> Iterator[Batch]:
        nonlocal asked
        for batch in batches:
            asked += 1
            if asked == n:
                raise Interrupted
            yield batch

    return again


def interrupt_and_continue(
    model: nn.Module, n: int, folder: Path, *, lose_second_pass: bool = False, **given: Any
) -> CovarianceStore:
    options = {"max_memory": SMALL, "checkpoint": folder, "checkpoint_seconds": 0, **given}
    with pytest.raises((Interrupted, ConstraintError), match=r"Interrupted|^$"):
        collect_covariance(model, interrupted_at(n, make_batches(5)), **options)
    assert folder.exists()
    slots = [path for path in folder.glob("rank-1-of-2/*/slot.json") if json.loads(path.read_text())["place"][0] == 1]
    torch.distributed.barrier()
    if lose_second_pass and torch.distributed.get_rank() == 1:
        assert len(slots) == 1
        slots[0].unlink()
    store = collect_covariance(model, make_batches(5), **options)
    torch.distributed.barrier()
    assert not folder.exists()
    return store


def run_scenarios(out: Path) -> None:
    """What the two ranks do; stores and messages go to ``out``."""
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    torch.set_num_threads(1)
    rank = dist.get_rank()
    plain, wrapped = Stack().double(), sharded(Stack().double())

    def save(store: CovarianceStore, name: str) -> None:
        store.save(out / f"{name}.{rank}.safetensors")

    for kind, model in (("plain", plain), ("fsdp", wrapped)):
        save(collect_covariance(model, make_batches(5), save_to=out / f"{kind}.saved"), f"{kind}-uneven")
        save(collect_covariance(model, make_batches(1), gather="all"), f"{kind}-one")
        save(collect_covariance(model, iter(make_batches(5)), gather="all"), f"{kind}-iterator")
        save(collect_covariance(model, make_batches(5), gather="all", max_memory=SMALL), f"{kind}-passes")
        own = make_batches(5)[:4] if rank == 0 else make_batches(5)[4:]
        collect_covariance(model, own, sharded=True, gather="none", save_to=out / f"{kind}-shares" / "part.safetensors")
        spilled = {"spill": out / "spill", "max_memory": SMALL, "gather": "all"}
        save(collect_covariance(model, make_batches(5), **spilled), f"{kind}-spilled")
        # The first pass, its end, the second pass.
        for n in (4, 6, 9):
            save(interrupt_and_continue(model, n, out / f"{kind}.checkpoint", gather="all"), f"{kind}-continued-{n}")
        # Killed when rank 1 has not kept the end of the first pass yet, but rank 0 has.
        save(
            interrupt_and_continue(model, 6, out / f"{kind}.checkpoint", lose_second_pass=True, gather="all"),
            f"{kind}-continued-lost",
        )
    # Rank 0 is through with the pass when rank 1 fails in it.
    ahead = interrupt_and_continue(plain, 4 if rank else 99, out / "ahead.checkpoint", gather="all")
    save(ahead, "plain-continued-ahead")
    own = make_batches(3) if rank == 0 else []
    save(collect_covariance(plain, own, sharded=True, gather="all"), "plain-none")

    def message(run: Callable[[], Any]) -> str:
        try:
            run()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    def broken() -> Iterator[Batch]:
        yield from make_batches(2)
        if rank == 1:
            raise OSError("the disk of rank 1 is gone")

    other = Stack().double()
    other.get_submodule(f"layers.{rank}.b").register_forward_pre_hook(lambda _, x: (x[0].clone(),))
    nan = [{"x": torch.full((1, 3, 12), float("nan") if rank else 1.0, dtype=torch.float64)}]

    def by_first(fails: bool) -> Any:
        if rank or fails:
            raise OSError(f"rank {rank} did it")
        return ["rank", 0]

    ranks = Ranks()
    messages = {
        "by first": ranks.by_first(lambda: by_first(False)),
        "by first failed": message(lambda: ranks.by_first(lambda: by_first(True))),
        "spoke": first_to_speak(),
        "broken": message(lambda: collect_covariance(plain, broken(), sharded=True)),
        "early": message(lambda: collect_covariance(plain, broken if rank else [], sharded=True, max_memory=SMALL)),
        "once": message(lambda: collect_covariance(plain, broken() if rank else [], sharded=True, max_memory=SMALL)),
        "different": message(lambda: collect_covariance(other, make_batches(4))),
        "nothing": message(lambda: collect_covariance(plain, [])),
        "nan": message(lambda: collect_covariance(plain, nan, sharded=True)),
        "no batch": message(lambda: collect_covariance(wrapped, own, sharded=True)),
    }
    (out / f"messages.{rank}.json").write_text(json.dumps(messages))
    dist.barrier()

    def fail(*_: Any) -> None:
        raise OSError("broken")

    if rank == 1:
        wrapped.get_submodule("layers.1").register_forward_pre_hook(fail)
    (out / f"waiting.{rank}").write_text(message(lambda: collect_covariance(wrapped, make_batches(3))))
    if rank == 0:
        (out / "gone").write_text(message(ranks.wait))
    os._exit(0)  # rank 1 leaves rank 0 waiting in the forward pass, as a process does that is ended by its error


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two ranks left their stores and messages."""
    out = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command = [*launcher, "--rdzv-endpoint=localhost:0", __file__, str(out)]
    # Once in a long while a rank was seen to abort in libc: then its stack is in the message.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH, "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    return out


def assert_close(found: CovarianceStore, wanted: CovarianceStore) -> None:
    assert (found.model, found.groups, found.widths) == (wanted.model, wanted.groups, wanted.widths)
    for group in wanted.groups:
        C = wanted.covariance(group)
        assert float((found.covariance(group) - C).abs().max()) <= 1e-13 * float(C.abs().max())
        # The weights' sum is a float too.
        assert torch.allclose(found.count(group), wanted.count(group), rtol=1e-14, atol=0)


def opened(ranks: Path, name: str, rank: int = 0) -> CovarianceStore:
    return CovarianceStore.load(ranks / f"{name}.{rank}.safetensors")


KINDS = pytest.mark.parametrize("kind", ["plain", "fsdp"])


@KINDS
@pytest.mark.parametrize(("name", "n"), [("one", 1), ("iterator", 5), ("passes", 5), ("spilled", 5)])
def test_two_ranks_sum_what_one_process_does(ranks: Path, kind: str, name: str, n: int) -> None:
    wanted = collect_covariance(Stack().double(), make_batches(n))
    for rank in range(2):
        assert_close(opened(ranks, f"{kind}-{name}", rank), wanted)


@KINDS
def test_the_first_rank_has_it_all(ranks: Path, kind: str) -> None:
    wanted = collect_covariance(Stack().double(), make_batches(5))
    assert_close(opened(ranks, f"{kind}-uneven"), wanted)
    assert_close(CovarianceStore.load(ranks / f"{kind}.saved"), wanted)
    share = opened(ranks, f"{kind}-uneven", 1)
    assert share.groups == wanted.groups
    missing = next(group for group in share.groups if ("calibration", group) not in share.parts)
    with pytest.raises(StoreError, match="in another rank's share"):
        share.covariance(missing)


@KINDS
def test_shares_add_up(ranks: Path, kind: str) -> None:
    folder = ranks / f"{kind}-shares"
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["part.rank-0-of-2.safetensors", "part.rank-1-of-2.safetensors"]
    one, other = (CovarianceStore.load(folder / name) for name in files)
    # Two sums of 20² on one rank; one of 20² and three of 12² on the other.
    assert (len(one.parts), len(other.parts)) == (2, 4)
    assert not set(one.parts) & set(other.parts)
    assert_close(CovarianceStore.load(folder), collect_covariance(Stack().double(), make_batches(5)))


def test_a_rank_without_batches(ranks: Path) -> None:
    wanted = collect_covariance(Stack().double(), make_batches(3))
    for rank in range(2):
        assert_close(opened(ranks, "plain-none", rank), wanted)


@pytest.mark.parametrize(
    ("kind", "at"), [("plain", "ahead"), *((kind, n) for kind in ("plain", "fsdp") for n in (4, 6, 9, "lost"))]
)
def test_continued_with_the_same_bits(ranks: Path, kind: str, at: Any) -> None:
    for rank in range(2):
        found, wanted = (opened(ranks, f"{kind}-{name}", rank) for name in (f"continued-{at}", "passes"))
        for group in wanted.groups:
            assert torch.equal(found.covariance(group), wanted.covariance(group))
            assert torch.equal(found.count(group), wanted.count(group))


def test_errors_reach_every_rank(ranks: Path) -> None:
    one, other = (json.loads((ranks / f"messages.{rank}.json").read_text()) for rank in range(2))
    for name in ("broken", "early"):
        assert one[name] == "ConstraintError: rank 1 failed: OSError: the disk of rank 1 is gone"
        assert other[name] == "OSError: the disk of rank 1 is gone"
    for messages in (one, other):
        assert "ranks 0 and 1 do not have the same layers and inputs" in messages["different"]
        assert "2 passes over the batches" in messages["once"]
        assert "no calibration batches" in messages["nothing"]
        assert "rank 1 was given no batch" in messages["no batch"]
        assert "layers.0.a: 3 of 6 tokens had NaN" in messages["nan"]


def test_a_rank_that_fails_where_others_wait_ends_them(ranks: Path) -> None:
    waited, failed = ((ranks / f"waiting.{rank}").read_text() for rank in range(2))
    assert failed == "OSError: broken"
    assert waited != "no error"
    assert (ranks / "gone").read_text().startswith("ConstraintError: another rank ended or cannot be reached (")


def test_the_first_works_alone_and_one_speaks(ranks: Path) -> None:
    one, other = (json.loads((ranks / f"messages.{rank}.json").read_text()) for rank in range(2))
    assert one["by first"] == other["by first"] == ["rank", 0]
    assert one["by first failed"] == "OSError: rank 0 did it"
    assert other["by first failed"] == "ConstraintError: rank 0 failed: OSError: rank 0 did it"
    assert sorted([one["spoke"], other["spoke"]]) == [False, True]


@pytest.mark.parametrize("lacking", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_processes_that_cannot_find_each_other_are_told(monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    given = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(lacking)
    with pytest.raises(BackendError, match=rf"WORLD_SIZE is set to 2, but {lacking} is not: start with torchrun"):
        process_group().__enter__()


def test_bin_packing_shares_evenly() -> None:
    # LLaVA-7B: 96 inputs of 4096 and 32 of 11008.
    costs = {f"{i}.narrow": 4096**2 for i in range(96)} | {f"{i}.wide": 11008**2 for i in range(32)}
    for world in (1, 3, 8):
        owners = bin_packing(costs, world)
        loads = [sum(costs[name] for name in costs if owners[name] == rank) for rank in range(world)]
        assert sum(loads) == sum(costs.values())
        assert max(loads) <= min(loads) + max(costs.values())
    assert bin_packing({"a": 1, "b": 1, "c": 1}, 2) == {"a": 0, "b": 1, "c": 0}


def test_alone_without_a_process_group(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    ranks = Ranks(Stack().double())
    assert (ranks.rank, ranks.world, ranks.together_in_forward) == (0, 1, False)
    assert not caplog.records
    monkeypatch.setenv("WORLD_SIZE", "2")
    Ranks(Stack().double())
    assert "torch.distributed is not initialised" in caplog.text


def test_gather_is_one_of_three() -> None:
    with pytest.raises(ConstraintError, match="'first', 'all' or 'none'"):
        collect_covariance(Stack().double(), make_batches(1), gather="some")  # type: ignore[arg-type]


if __name__ == "__main__":
    run_scenarios(Path(sys.argv[1]))
