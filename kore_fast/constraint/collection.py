"""Collection: run old knowledge through a model and keep C = Σ x xᵀ of every distinct linear input.

The way of the data: a hook sees an input (`inputs`) → its rows wait in a buffer (`sums`) → the buffer is added to a
sum, on the device or elsewhere (`sums`, planned by `budget`) → the ranks' sums become one (`distributed`) → `store`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from kore_fast.constraint.budget import Pass, plan_passes, plan_spill, sum_bytes
from kore_fast.constraint.checkpoint import Checkpoint, Found, Place
from kore_fast.constraint.distributed import Ranks, bin_packing
from kore_fast.constraint.fingerprint import model_fingerprint
from kore_fast.constraint.inputs import Batch, DistinctInputs, Width, ignore
from kore_fast.constraint.selection import select_linears
from kore_fast.constraint.store import CovarianceStore, Part, check_finite, tokens_needed
from kore_fast.constraint.sums import Sums, pack_panels
from kore_fast.errors import ConstraintError

logger = logging.getLogger(__name__)

Batches = Iterable[Batch] | Callable[[], Iterable[Batch]]
Gather = Literal["first", "all", "none"]
Rounds = Iterator[tuple[Batch | None, bool]]


def collect_covariance(
    model: nn.Module,
    batches: Batches,
    *,
    source: str = "calibration",
    target_modules: str | Sequence[str] | None = None,
    about: Mapping[str, Any] | None = None,
    max_memory: int | None = None,
    spill: str | Path | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 120.0,
    sharded: bool = False,
    gather: Gather = "first",
    save_to: str | Path | None = None,
    progress: Callable[[Iterable[Batch]], Iterable[Batch]] | None = None,
    warn_few_tokens: bool = True,
) -> CovarianceStore:
    """Covariances of the inputs of a model's linear layers over batches of old knowledge (KORE step 1).

    **Memory.** On the model's device, over distinct inputs of width d: 8·Σd² bytes for sums (44 GB for LLaVA-7B, 0.8 GB
    for the 135M model of the quickstart) and for buffers a quarter of that, at most 4096 rows each; or both within
    ``max_memory``. On the host 4·Σd² bytes for the result, or in the files it was spilled to. Beside that: a batch and
    what one kernel call takes; when spilling two products on their way, 8·d² of the widest on the host; with several
    ranks three sums on their way, 12·d².

    What does not fit ``max_memory`` is collected (after one more forward pass over the first batch, to plan)

    - in further passes over the batches, where these can be gone through again. This is the default: a pass costs one
      forward pass (LLaVA-7B within 12 GB takes 5), while spilling moves 4·d² bytes for every full buffer and adds them
      up on the CPU, which by arithmetic costs an accelerator more;
    - with ``spill``, or from an iterator when the model is on an accelerator, in one pass: the products leave the
      device on a stream of their own and a thread adds them up elsewhere, while the forward pass goes on; when two are
      on their way, it waits. Where the forward pass is slow (a large model on a CPU), give a folder: the traffic costs
      less than a pass. Spilling from a GPU has not run on one yet.

    **Several ranks.** Where `torch.distributed` is initialised with more than one rank (torchrun), each runs its share
    of the batches: those whose number modulo the ranks' is its own. Sums are reduced in float64 to owners, chosen so
    that each owns about as much, and end where ``gather`` says. All ranks pass the same arguments. The model may be
    FSDP2's (`fully_shard`): then all ranks run equally many forward passes, some of which do not count.

    Args:
        model: any model that takes a batch as keyword arguments. It runs in evaluation mode without gradients.
        batches: mappings of keyword arguments, of any batch size: sums differ only by rounding in float64.
            ``attention_mask`` (batch, tokens), when there, leaves padding out; ``token_weights`` (batch, tokens), when
            there, is taken off and weights each position (zero leaves it out). A list, or a function that returns them
            anew, can be gone through several times; an iterator once.
        source: a name for this kind of old knowledge.
        target_modules: see `select_linears`; default every linear of the language decoder.
        about: what the source is (JSON), kept in the store.
        max_memory: bytes for sums and buffers on the model's device.
        spill: where sums are kept that do not fit: ``"cpu"`` for the host's memory, or a folder (a file there is gone
            with the process).
        checkpoint: a folder for sums and position, from which the same call continues after an interruption, with the
            same bits on the same machine. Deleted at the end. It takes 4·d² bytes for each input and a buffer, twice
            while it is written.
        checkpoint_seconds: least time between two checkpoints (they also keep to a twentieth of the time); 0 for one
            after every batch.
        sharded: the batches differ from rank to rank, and every rank runs all of its own.
        gather: who returns the whole store: rank 0 (others what they own), all ranks, or none, each what it owns. What
            a rank owns can be saved; a folder of all ranks' files loads as the whole.
        save_to: also save the store to this file, before the checkpoint is deleted. With ``gather="none"`` each rank
            adds its number to the name.
        progress: wraps the batches of each pass, for a progress bar.
        warn_few_tokens: see `warn_if_few_tokens`; off when other sources will be added.

    Returns:
        A store with one source. Layers that read the same tensor (q/k/v, gate/up) share one covariance: found by
        tensor identity while the model runs, not by name.

    Raises:
        ConstraintError: no batches, an input without one row per token, a layer wider than the memory allowed, a
            checkpoint of something else, ranks that do not fit each other or of which one failed.
        StoreError: NaN or infinite activations, with the layer's name.
        DataError: a file could not be written.
    """
    if gather not in ("first", "all", "none"):
        raise ConstraintError(f"gather={gather!r}: want 'first', 'all' or 'none'")
    if spill is not None and max_memory is None:
        raise ConstraintError(f"spill={str(spill)!r} without max_memory: say how many bytes may stay on the device")
    layers = select_linears(model, target_modules)
    ranks = Ranks(model, sharded=sharded)
    collection = _Collection(model, layers, batches, max_memory, spill, ranks, progress)
    training = model.training
    model.eval()
    try:
        if checkpoint is not None:
            collection.keep_checkpoint(Path(checkpoint), checkpoint_seconds, source, dict(about or {}))
        collection.collect()
        store = collection.store(source, dict(about or {}), gather)
    finally:
        collection.inputs.remove()
        model.train(training)
    collection.save(store, save_to, gather)
    if warn_few_tokens and (gather == "all" or (gather == "first" and collection.ranks.rank == 0)):
        warn_if_few_tokens(store)
    return store


class _Collection:
    """One call of `collect_covariance`."""

    def __init__(
        self,
        model: nn.Module,
        layers: list[str],
        batches: Batches,
        max_memory: int | None,
        spill: str | Path | None,
        ranks: Ranks,
        progress: Callable[[Iterable[Batch]], Iterable[Batch]] | None,
    ) -> None:
        self.model, self.layers, self.ranks = model, layers, ranks
        self.device = next(model.parameters()).device
        self._batches = batches
        # One rank's iterator decides for all: they go through the same passes.
        self._once = any(ranks.gather(not callable(batches) and iter(batches) is batches))
        self._progress = progress
        self._max_memory = max_memory
        self._spill_to = _spill_to(spill, self.device)
        self._spilling = spill is not None or (self._once and self.device.type != "cpu")
        self._checkpoint: Checkpoint | None = None
        self._rounds_done = 0
        self._last_batch: Batch | None = None
        # By group: the packed sums that this rank owns, and every count.
        self.packed: dict[str, torch.Tensor] = {}
        self.counts: dict[str, torch.Tensor] = {}
        # Last: from here on the model has hooks, which the caller takes off.
        self.inputs = DistinctInputs(model, layers, self.device)

    def keep_checkpoint(self, folder: Path, seconds: float, source: str, about: dict[str, Any]) -> None:
        """Write checkpoints into ``folder``, of a collection that is told from others by what it depends on."""
        identity = {
            "model": model_fingerprint(self.model, self.layers),
            "layers": self.layers,
            "source": source,
            "about": about,
            "max_memory": self._max_memory,
            "spill": self._spilling,
            "sharded": self.ranks.sharded,
            "device": self.device.type,
            "dtype": str(next(self.model.parameters()).dtype),
        }
        self._checkpoint = Checkpoint(folder, identity, seconds, self.ranks.rank, self.ranks.world)

    def collect(self) -> None:
        """Fill `packed` and `counts`, in as many passes as it takes."""
        start = self._interrupted()
        number = start.place.number if start else 0
        while True:
            stream = self._rounds()
            if self._max_memory is not None:
                stream = self._settle_groups(stream)
            passes = self._passes()
            last = number + 1 >= len(passes)
            with Sums(passes[number], self.inputs.widths, self._spill_to) as sums:
                with self.ranks.sharing_errors(forward=True):
                    self._sum_up(stream, sums, number, start)
                    if self._checkpoint is not None and self.ranks.world > 1 and not last:
                        # Until every rank has begun the next pass, every rank can go back to the end of this one.
                        self._write(number, self._rounds_done, sums)
                self._reduce(sums, passes[number])
            if last:
                return
            number, start = number + 1, None
            if self._checkpoint is not None:
                with self.ranks.sharing_errors():
                    self._checkpoint.keep(self.inputs.groups, self.packed, self.counts)
                    self._last_batch = None
                    self._write(number, 0, None)
                self.ranks.wait()

    def _interrupted(self) -> Found | None:
        """The checkpoint to continue from."""
        if self._checkpoint is None:
            return None
        with self.ranks.sharing_errors():
            found = self._checkpoint.found()
        place = self.ranks.common([(f.place.number, f.place.batches) for f in found])
        start = next((f for f in found if (f.place.number, f.place.batches) == place), None)
        if start is not None:
            logger.info("%s: continuing after %d batches of pass %d", start.folder.parent, place[1], place[0] + 1)
            self.inputs.know(start.groups, start.widths)
            self._checkpoint.continued(start)
            self.packed, self.counts = start.done()
        elif found:
            logger.warning("%s: not every rank has a checkpoint; beginning anew", self._checkpoint.folder)
        return start

    def _rounds(self) -> Rounds:
        batches = self._batches() if callable(self._batches) else self._batches
        return self.ranks.rounds(self._progress(batches) if self._progress else batches)

    def _settle_groups(self, stream: Rounds) -> Rounds:
        """Find out which layers share an input, with the first batch, so that memory can be planned."""
        seen = []
        with self.ranks.sharing_errors(forward=True):
            if not self.inputs.leaders:
                seen = list(islice(stream, 1))
                for batch, _ in seen:
                    if batch is not None:
                        self.inputs.run(batch, ignore)
        self._agree_on_groups()
        return chain(seen, stream)

    def _agree_on_groups(self) -> None:
        found: Any = [self.inputs.groups, self.inputs.widths] if self.inputs.leaders else None
        agreed = self.ranks.agree(found, "layers and inputs") if self.ranks.world > 1 else found
        if agreed is None:
            raise ConstraintError("no calibration batches: give at least one")
        groups, widths = agreed
        self.inputs.know(groups, {group: Width(*width) for group, width in widths.items()})

    def _passes(self) -> Sequence[Pass | None]:
        if self._max_memory is None:
            return [None]
        widths = {group: self.inputs.widths[group] for group in self.inputs.groups}
        passes = [plan_spill(widths, self._max_memory)] if self._spilling else plan_passes(widths, self._max_memory)
        if len(passes) > 1 and self._once:
            raise ConstraintError(
                f"max_memory={self._max_memory} takes {len(passes)} passes over the batches: give a list, or a "
                "function that returns them anew, not an iterator that one pass uses up; or a folder to spill to"
            )
        return passes

    def _sum_up(self, stream: Rounds, sums: Sums, number: int, start: Found | None) -> None:
        """Run the batches that are not behind the checkpoint."""
        behind = start.place.batches if start else 0
        if start is not None:
            start.restore(sums)
        self._rounds_done = 0
        for batch, counts in stream:
            self._rounds_done += 1
            self._last_batch = batch
            if self._rounds_done <= behind:
                if self._rounds_done == behind and batch is not None and start is not None:
                    start.check_batch(batch)
                continue
            if batch is not None:
                self.inputs.run(batch, sums if counts else ignore)
            if self._checkpoint is not None and self.ranks.first_decides(self._checkpoint.due()):
                self._write(number, self._rounds_done, sums)
        if self._rounds_done < behind:
            raise ConstraintError(
                f"{self._rounds_done} batches, but {behind} were collected before the interruption; give the same "
                "batches, or delete the checkpoint to begin anew"
            )
        sums.flush()

    def _write(self, number: int, rounds: int, sums: Sums | None) -> None:
        assert self._checkpoint is not None
        self._checkpoint.write(Place(number, rounds), self.inputs.groups, self.inputs.widths, sums, self._last_batch)

    def _reduce(self, sums: Sums, plan: Pass | None) -> None:
        """Make the ranks' sums of one pass one, at their owners."""
        if plan is None:
            self._agree_on_groups()
        widths = self.inputs.widths
        groups = [group for group in self.inputs.groups if plan is None or group in plan.tokens]
        self.counts |= zip(groups, self.ranks.add(sums.counts(groups)), strict=True)
        for group in groups:
            check_finite(group, self.counts[group])
        owners = self._owners()
        reduced = self.ranks.reduce_to_owners(
            {group: owners[group] for group in groups},
            lambda group: sums.take(group, widths[group].d, self.ranks.device),
        )
        self.packed |= {group: pack_panels(panels, widths[group].d) for group, panels in reduced}

    def _owners(self) -> dict[str, int]:
        """Group → the rank that has its sum in the end."""
        owners = bin_packing({g: sum_bytes(self.inputs.widths[g]) for g in self.inputs.groups}, self.ranks.world)
        return {group: owners[group] for group in self.inputs.groups}

    def store(self, source: str, about: dict[str, Any], gather: Gather) -> CovarianceStore:
        """What this rank returns."""
        groups, widths = self.inputs.groups, self.inputs.widths
        if self.ranks.world > 1 and gather != "none":
            sizes = {group: widths[group].d * (widths[group].d + 1) // 2 for group in groups}
            self.packed |= self.ranks.hand_over(self._owners(), sizes, self.packed, to_all=gather == "all")
        return CovarianceStore(
            model=model_fingerprint(self.model, [name for members in groups.values() for name in members]),
            groups=groups,
            widths={group: widths[group].d for group in groups},
            sources={source: about},
            parts={
                (source, group): [Part(self.packed[group], self.counts[group])]
                for group in groups
                if group in self.packed
            },
        )

    def save(self, store: CovarianceStore, path: str | Path | None, gather: Gather) -> None:
        """Save what is to be saved; then no checkpoint is needed any more."""
        if path is not None:
            path = Path(path)
            with self.ranks.sharing_errors():
                if gather == "none" and self.ranks.world > 1:
                    store.save(path.with_name(f"{path.stem}.rank-{self.ranks.rank}-of-{self.ranks.world}{path.suffix}"))
                elif self.ranks.rank == 0:
                    store.save(path)
        if self._checkpoint is not None:
            self.ranks.wait()
            self._checkpoint.remove()


def _spill_to(spill: str | Path | None, device: torch.device) -> Path | None:
    """The folder to spill to; None for the host's memory."""
    if spill is None or str(spill) == "cpu":
        if spill is not None and device.type == "cpu":
            raise ConstraintError("spill='cpu': the model is on the CPU already; give a folder to spill to")
        return None
    return Path(spill)


def warn_if_few_tokens(store: CovarianceStore) -> None:
    """Log one warning when covariances rest on too few tokens; says for which layer the most are missing."""
    missing = tokens_needed(store, store.layers)
    if missing:
        worst = max(missing, key=lambda name: missing[name])
        logger.warning(
            "%d of %d layers have fewer than 4 tokens per input dimension: %s has %d tokens for width %d and needs "
            "%d more. Add calibration samples, or the null space will hold directions that were merely not seen.",
            len(missing),
            len(store.layers),
            worst,
            store.tokens(worst),
            store.widths[store.group_of(worst)],
            missing[worst],
        )
