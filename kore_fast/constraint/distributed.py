"""Work on several ranks: how they find each other, who does what, and how their results become one.

Nothing is pickled: ranks exchange tensors and JSON.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from kore_fast.constraint.inputs import Batch
from kore_fast.errors import BackendError, ConstraintError

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Sums on their way to an owner at one time.
_IN_FLIGHT = 2
# Others wait for as long as the slowest solve, or while rank 0 works alone. A rank that ends is noticed at once.
_TIMEOUT = timedelta(days=2)


@contextmanager
def process_group() -> Iterator[None]:
    """The processes that torchrun started as the ranks of `torch.distributed`; nothing where there is but one.

    Tensors on the CPU go over gloo, those on GPUs over NCCL, where each process of a machine has a GPU of its own.
    After an exception the group is still there: tell it (`first_to_speak`), then `leave_process_group`.

    Raises:
        BackendError: WORLD_SIZE asks for several processes, but they cannot find each other.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing or not dist.is_available():
        reason = f"{missing[0]} is not" if missing else "this build of torch has no torch.distributed"
        raise BackendError(f"WORLD_SIZE is set to {world}, but {reason}: start with torchrun, or unset WORLD_SIZE")
    local, beside = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    accelerated = max(beside, local + 1) <= torch.cuda.device_count() and dist.is_nccl_available()
    if accelerated:
        torch.cuda.set_device(local)
    # Where it is imported later (PEFT does), its functions' default arguments hold the group for ever: the threads that
    # destroying it would end are then there when the interpreter ends, and now and then abort the process.
    import_module("torch.distributed.nn")
    dist.init_process_group("cpu:gloo,cuda:nccl" if accelerated else "gloo", timeout=_TIMEOUT)
    yield
    leave_process_group()


def leave_process_group() -> None:
    """End this process's part in the group, if it has one; the others notice."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def first_to_speak() -> bool:
    """Whether no other rank has asked this before: one error, which all ranks come to know, is to be told once."""
    if not (dist.is_available() and dist.is_initialized()):
        return True
    try:
        return bool(dist.distributed_c10d._get_default_store().add("kore_fast/spoken", 1) == 1)
    except RuntimeError:  # the store is gone with the process that had it: better twice than never
        return True


def bin_packing(costs: Mapping[str, int], world: int) -> dict[str, int]:
    """Name → rank: the costliest first, each to the rank that has the least so far."""
    load = [0] * world
    owners = {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        owners[name] = min(range(world), key=lambda rank: load[rank])
        load[owners[name]] += costs[name]
    return owners


def forwards_together(model: nn.Module) -> bool:
    """Whether a forward pass of ``model`` waits for other ranks, so that all must run the same number of them."""
    if any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in model.parameters()):
        return True  # FSDP2 and tensor parallelism (DTensor), ZeRO-3
    wrappers = {"FullyShardedDataParallel", "DistributedDataParallel"}
    return any(type(module).__name__ in wrappers for module in model.modules())


class Ranks:
    """This process among those of `torch.distributed`; alone where that is not initialised."""

    def __init__(self, model: nn.Module | None = None, *, sharded: bool = False) -> None:
        """``model``: whose forward passes the ranks run. ``sharded``: each rank was given batches of its own; otherwise
        all were given the same."""
        running = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if running else 0
        self.world = dist.get_world_size() if running else 1
        self.together_in_forward = self.world > 1 and model is not None and forwards_together(model)
        self.sharded = sharded
        if not running and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            logger.warning(
                "WORLD_SIZE is %s, but torch.distributed is not initialised: every process does all the work. Call "
                "torch.distributed.init_process_group first to share them.",
                os.environ["WORLD_SIZE"],
            )

    @property
    def device(self) -> torch.device:
        """Where tensors must be to be sent: the CPU where the process group can, else this rank's accelerator."""
        # Such as "cpu:gloo,cuda:nccl".
        if self.world == 1 or "cpu:" in str(dist.distributed_c10d.get_backend_config()):
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def rounds(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch | None, bool]]:
        """What this rank runs, round by round, and whether it counts.

        Where forward passes wait for other ranks, a rank without a batch in a round runs another one that does not
        count; elsewhere it has None. All ranks have the same number of rounds, except where each has its own batches
        and its own pace.
        """
        if self.world == 1 or (self.sharded and not self.together_in_forward):
            yield from ((batch, True) for batch in batches)
            return
        stream = iter(batches)
        if self.sharded:
            yield from self._until_none_has_more(stream)
            return
        while chunk := list(islice(stream, self.world)):
            if self.rank < len(chunk):
                yield chunk[self.rank], True
            else:
                yield (chunk[0] if self.together_in_forward else None), False

    def _until_none_has_more(self, stream: Iterator[Batch]) -> Iterator[tuple[Batch | None, bool]]:
        last: Batch | None = None
        while True:
            batch = next(stream, None)
            last = last if batch is None else batch
            ranks = self.gather([batch is not None, last is not None])
            if not any(more for more, _ in ranks):
                return
            idle = [rank for rank, (_, had) in enumerate(ranks) if not had]
            if idle:
                raise ConstraintError(
                    f"rank {idle[0]} was given no batch, but the model's forward pass needs every rank: give each at "
                    "least one (its token_weights may be zero), or give all ranks the same batches with sharded=False"
                )
            yield last, batch is not None

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value`` (JSON), in the order of ranks."""
        if self.world == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        with _reaching_others():
            dist.all_gather(sizes, torch.tensor([len(text)], device=self.device))
        longest = int(max(sizes))
        padded = text.new_zeros(longest)
        padded[: len(text)] = text
        texts = [text.new_zeros(longest) for _ in range(self.world)]
        with _reaching_others():
            dist.all_gather(texts, padded)
        return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, sizes, strict=True)]

    def agree(self, value: Any, what: str) -> Any:
        """The ranks' common ``value``; ranks with None take that of the others.

        Raises:
            ConstraintError: they differ; on every rank.
        """
        values = self.gather(value)
        known = [(rank, v) for rank, v in enumerate(values) if v is not None]
        for rank, v in known[1:]:
            if v != known[0][1]:
                raise ConstraintError(
                    f"ranks {known[0][0]} and {rank} do not have the same {what}: load the same model with the same "
                    "options on every rank"
                )
        return known[0][1] if known else None

    @contextmanager
    def sharing_errors(self, *, forward: bool = False) -> Iterator[None]:
        """An exception of one rank ends the others too, at the end of their block, with its message.

        Around ``forward`` passes that wait for each other it cannot: the others wait there until the failed process is
        gone or the process group's timeout is over.

        Raises:
            ConstraintError: on ranks that did not fail themselves.
        """
        if self.world == 1 or (forward and self.together_in_forward):
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        messages = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise ConstraintError(f"rank {rank} failed: {message}")

    def by_first(self, work: Callable[[], T]) -> T:
        """What ``work`` returns (JSON), on every rank: when all are here, rank 0 alone does it while the others wait.

        Raises:
            ConstraintError: it failed; on the others.
        """
        if self.world == 1:
            return work()
        self.wait()
        with self.sharing_errors():
            value = work() if self.rank == 0 else None
        return self.gather(value)[0]

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's CPU tensor."""
        if self.world == 1:
            return values
        values = values.to(self.device)
        with _reaching_others():
            dist.all_reduce(values)
        return values.cpu()

    def reduce_to_owners(
        self, owners: Mapping[str, int], take: Callable[[str], torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The names that this rank owns, each with the sum of what every rank's ``take`` returns (on `device`).

        A few reductions are under way while the next tensor is taken; all ranks go through ``owners`` in its order.
        """
        pending: deque[tuple[str, torch.Tensor, Any]] = deque()

        def finished() -> Iterator[tuple[str, torch.Tensor]]:
            name, tensor, work = pending.popleft()
            if work is not None:
                with _reaching_others():
                    work.wait()
            if owners[name] == self.rank:
                yield name, tensor.cpu()

        for name, owner in owners.items():
            tensor = take(name)
            with _reaching_others():
                work = dist.reduce(tensor, dst=owner, async_op=True) if self.world > 1 else None
            pending.append((name, tensor, work))
            if len(pending) > (_IN_FLIGHT if self.world > 1 else 0):
                yield from finished()
        while pending:
            yield from finished()

    def hand_over(
        self, owners: Mapping[str, int], sizes: Mapping[str, int], held: Mapping[str, torch.Tensor], *, to_all: bool
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """What the owners hold (float64, ``sizes`` values): on rank 0, or on all ranks, name after name."""
        for name, owner in owners.items():
            if self.rank == owner:
                tensor = held[name].to(self.device)
            else:
                tensor = torch.empty(
                    sizes[name] if to_all or self.rank == 0 else 0, dtype=torch.float64, device=self.device
                )
            with _reaching_others():
                if to_all:
                    dist.broadcast(tensor, src=owner)
                elif owner != 0 and self.rank == owner:
                    dist.send(tensor, dst=0)
                elif owner != 0 and self.rank == 0:
                    dist.recv(tensor, src=owner)
            if to_all or self.rank == 0:
                yield name, tensor.cpu()

    def wait(self) -> None:
        """Until every rank is here."""
        self.gather(None)

    def first_decides(self, value: bool) -> bool:
        """Rank 0's ``value`` where ranks go in step; elsewhere one's own."""
        if not self.together_in_forward:
            return value
        decided = torch.tensor([int(value)], device=self.device)
        with _reaching_others():
            dist.broadcast(decided, src=0)
        return bool(decided.item())

    def common(self, offered: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """The latest (pass, batches) from which all ranks can continue: for this rank, among those it offers.

        Ranks that go in step continue from one place; others from one pass. All can begin anew, at (0, 0).
        """
        everyone = self.gather([[0, 0], *map(list, offered)])
        compared = 2 if self.together_in_forward else 1
        shared = set.intersection(*({tuple(place[:compared]) for place in places} for places in everyone))
        return max(place for place in [(0, 0), *offered] if place[:compared] in shared)


@contextmanager
def _reaching_others() -> Iterator[None]:
    """The backends' words for a rank that is gone, in ours."""
    try:
        yield
    except RuntimeError as error:
        # "[its file:537] Read error [host]:port: Connection reset by peer. This is typically caused by …"
        reason = re.sub(r"^\[[^]]*\] ", "", str(error).strip()).partition("\n")[0].partition(". ")[0]
        raise ConstraintError(
            f"another rank ended or cannot be reached ({reason}); what it said itself says why. With a checkpoint the "
            "same call continues from here"
        ) from error
