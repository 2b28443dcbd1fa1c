"""Covariances → factors: one null-space solve a distinct input, spread over ranks, kept as they are finished.

The way of the data: C of an input → Û (`ops.nullspace`) → W0·Û of each layer that reads it, a layer's weight at a time
→ its thin SVD → A = √Σ V*ᵀ and the leak of A. Nothing larger than C and one layer's weight is made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

import kore_fast
from kore_fast.constraint.distributed import Ranks, bin_packing
from kore_fast.constraint.factor_checkpoint import FactorCheckpoint, remove_factors
from kore_fast.constraint.fingerprint import model_fingerprint
from kore_fast.constraint.leak import LayerLeak, layer_leak
from kore_fast.constraint.selection import select_linears
from kore_fast.constraint.store import CovarianceStore
from kore_fast.errors import ConstraintError, StoreError
from kore_fast.modules.weights import LayerWeight
from kore_fast.ops import NullSpace, nullspace
from kore_fast.ops.dense import product
from kore_fast.ops.factors import Factors, thin_factors

if TYPE_CHECKING:
    from kore_fast.constraint.initialization import KoreConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Solve:
    """One piece of work: a distinct input and the layers that read it."""

    group: str
    number: int
    ranks: dict[str, int]
    """Layer → its rank."""
    cost: int
    """About how long it takes against others: d³ for the null space, d_out·d·r for a layer's product."""


def kore_factors(
    model: nn.Module,
    config: KoreConfig,
    store: CovarianceStore,
    *,
    ranks: Mapping[str, int] | None = None,
    b0: bool = True,
    checkpoint: str | Path | None = None,
    keep_checkpoint: bool = False,
    progress: Callable[[Sequence[Solve]], Iterable[Solve]] | None = None,
) -> tuple[dict[str, Factors], list[LayerLeak]]:
    """Factors (on the CPU) and leak of every layer to constrain, by layer name; one null-space solve a distinct input.

    **Memory**, beside the result of 8·r·d_in bytes a layer (with B0 8·r·(d_in + d_out)): C and what its solve takes,
    and one layer's weight in float64. Layers with one input and different ranks share a solve at the largest: its
    columns are in the order of their eigenvalues.

    **Several ranks.** Where `torch.distributed` is initialised with more than one rank (torchrun), each solves its
    share of the inputs, packed by cost, and all return the same, with the bits of a single process that has as many
    threads. All pass the same arguments and a whole store. Weights that FSDP2 shards are gathered one at a time. The
    ranks wait for the slowest, for about as long as one solve: the process group's timeout must be longer.

    Args:
        config: target_modules, source_weights, method, and the rank where ``ranks`` gives none.
        ranks: rank by layer name.
        b0: whether B0 is wanted.
        checkpoint: a folder for finished inputs, from which the same call continues after an interruption, with the
            same bits on the same machine. Files there that were made from something else are replaced.
        keep_checkpoint: leave it there at the end, for a caller who saves the result and then calls
            `factor_checkpoint.remove_factors`.
        progress: wraps the inputs that this rank solves, the costliest first, for a progress bar. Their ``cost`` says
            how much of the work each is.

    Raises:
        StoreError: the store is of another model or lacks a layer.
        ConstraintError: a rank larger than a layer's width, a weight that cannot be read, before any solve; a rank
            (process) that failed, or was given something else.
        DataError: a file of the checkpoint could not be written.
    """
    team = Ranks(model)
    with team.sharing_errors():
        layers = select_linears(model, config.target_modules)
        weights = {name: LayerWeight(name, linear_of(model, name)) for name in layers}
        if ranks is None and not isinstance(config.rank, int):
            raise ConstraintError(f"rank={config.rank!r}: give kore_factors the ranks that layer_ranks chooses")
        solves = _plan(weights, store, config.rank if ranks is None else ranks)
        for weight in weights.values():
            weight.check_loaded()
    found = model_fingerprint(model, store.layers)
    with team.sharing_errors():
        if store.model != found:
            raise StoreError(
                f"the store was made for another model (fingerprint {store.model[:12]}…) than this one "
                f"({found[:12]}…); collect covariances with this model"
            )
    run = _Run(weights, config, store, solves, team, b0=b0)
    if checkpoint is not None:
        run.checkpoint = FactorCheckpoint(checkpoint, run.identity)
    with torch.no_grad():
        run.solve(progress)
    factors, leaks = run.hand_over()
    if checkpoint is not None and not keep_checkpoint:
        team.wait()
        remove_factors(checkpoint)
    return {name: factors[name] for name in layers}, [leaks[name] for name in layers]


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    """A layer by its name."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _plan(weights: Mapping[str, LayerWeight], store: CovarianceStore, rank: int | Mapping[str, int]) -> list[Solve]:
    """What there is to do, in the model's order; refuses what cannot be done."""
    if not isinstance(rank, int) and set(rank) != set(weights):
        odd = sorted(set(rank) ^ set(weights))[0]
        raise ConstraintError(
            f"{odd}: {'has no rank' if odd in weights else 'has a rank, but is not among the layers'}; give ranks for "
            "the layers of target_modules"
        )
    ranks = {name: rank if isinstance(rank, int) else rank[name] for name in weights}
    members: dict[str, dict[str, int]] = {}
    for name, weight in weights.items():
        if not 1 <= ranks[name] <= min(weight.shape):
            most = f"; choose at most {min(min(w.shape) for w in weights.values())}" if isinstance(rank, int) else ""
            raise ConstraintError(
                f"{name}: rank {ranks[name]} is {'larger than' if ranks[name] > 0 else 'below 1, not within'} its "
                f"width (d_out {weight.shape[0]}, d_in {weight.shape[1]}){most}"
            )
    for name, weight in weights.items():
        group = store.group_of(name)
        members.setdefault(group, {})[name] = ranks[name]
        if store.widths[group] != weight.shape[1]:
            raise StoreError(
                f"{name}: its input is {weight.shape[1]} wide, the store's covariance {store.widths[group]}; the store "
                "was made for another model"
            )
    return [
        Solve(
            group,
            number,
            chosen,
            cost=store.widths[group] ** 3
            + sum(weights[name].shape[0] * weights[name].shape[1] * r for name, r in chosen.items()),
        )
        for number, (group, chosen) in enumerate(members.items())
    ]


class _Run:
    """One call of `kore_factors`."""

    def __init__(
        self,
        weights: Mapping[str, LayerWeight],
        config: KoreConfig,
        store: CovarianceStore,
        solves: Sequence[Solve],
        team: Ranks,
        *,
        b0: bool,
    ) -> None:
        self.weights, self.config, self.store, self.solves, self.team = weights, config, store, solves, team
        self._b0 = b0
        self.checkpoint: FactorCheckpoint | None = None
        self._owners: dict[str, int] = {}
        # Of the inputs that this rank has: flat results by "layer/A" and "layer/B0", and leaks by layer.
        self._held: dict[str, torch.Tensor] = {}
        self._leaks: dict[str, LayerLeak] = {}
        first = next(iter(weights.values()))
        self.identity = {
            "kore_fast": kore_fast.__version__,
            "model": store.model,
            "store": store.fingerprint(),
            "source_weights": dict(config.source_weights) if config.source_weights else None,
            "method": config.method,
            "b0": b0,
            "dtype": str(first.dtype),
            "device": first.device.type,
        }

    def solve(self, progress: Callable[[Sequence[Solve]], Iterable[Solve]] | None) -> None:
        """Solve this rank's share of what is not on disk."""
        team = self.team
        if team.world > 1:
            team.agree([self.identity, [s.ranks for s in self.solves]], "store, layers and options")
        # The costliest first: what does not fit into memory fails at once, and rounds are of about equal costs.
        rest = sorted(self._not_kept(), key=lambda s: -s.cost)
        owners = bin_packing({s.group: s.cost for s in rest}, team.world)
        self._owners |= owners
        shares = [[s for s in rest if owners[s.group] == rank] for rank in range(team.world)]
        mine = shares[team.rank]
        shown = progress(mine) if progress else mine
        if team.world > 1 and any(weight.sharded for weight in self.weights.values()):
            self._in_rounds(shown, shares)
            return
        with team.sharing_errors():
            for solve in shown:
                C, space = self._space(solve)
                self._finish(solve, C, space, {name: self._product(name, solve, space) for name in solve.ranks})

    def _in_rounds(self, shown: Iterable[Solve], shares: Sequence[Sequence[Solve]]) -> None:
        """As each rank gives a weight's piece, all go through the weights together: a solve each, then all weights."""
        team = self.team
        rounds = max(map(len, shares))
        idle = repeat(None, rounds - len(shares[team.rank]))
        for number, solve in enumerate(chain(shown, idle)):
            with team.sharing_errors():
                solved = None if solve is None else self._space(solve)
            products = {}
            for share in shares:
                for name in share[number].ranks if number < len(share) else ():
                    weight = self.weights[name].read()
                    with team.sharing_errors():
                        if solve is not None and solved is not None and name in solve.ranks:
                            products[name] = self._product(name, solve, solved[1], weight)
            with team.sharing_errors():
                if solve is not None and solved is not None:
                    self._finish(solve, *solved, products)

    def _not_kept(self) -> list[Solve]:
        """What is still to solve; what a rank finds in its checkpoint is there."""
        if self.checkpoint is None:
            return list(self.solves)
        with self.team.sharing_errors():
            kept = self.checkpoint.found([s.ranks for s in self.solves])
        everyone = self.team.gather(sorted(kept))
        holder = {number: rank for rank in reversed(range(self.team.world)) for number in everyone[rank]}
        with self.team.sharing_errors():
            for number, rank in holder.items():
                self._owners[self.solves[number].group] = rank
                if rank == self.team.rank:
                    tensors, leaks = self.checkpoint.read(number)
                    self._held |= tensors
                    self._leaks |= leaks
        if holder:
            logger.info("%s: %d of %d inputs are solved", self.checkpoint.folder, len(holder), len(self.solves))
        return [s for s in self.solves if s.number not in holder]

    def _space(self, solve: Solve) -> tuple[torch.Tensor, NullSpace]:
        device = self.weights[next(iter(solve.ranks))].device
        C = self.store.covariance(solve.group, self.config.source_weights).to(device)
        return C, nullspace(C, max(solve.ranks.values()), method=self.config.method)

    def _product(self, name: str, solve: Solve, space: NullSpace, weight: torch.Tensor | None = None) -> torch.Tensor:
        """W0·Û (d_out, r)."""
        weight = self.weights[name].read() if weight is None else weight
        return product(weight.to(space.basis.device, torch.float64), space.basis[:, : solve.ranks[name]])

    def _finish(self, solve: Solve, C: torch.Tensor, space: NullSpace, products: Mapping[str, torch.Tensor]) -> None:
        made = thin_factors([products[name] for name in solve.ranks], space.basis, b0=self._b0)
        tensors: dict[str, torch.Tensor] = {}
        leaks: dict[str, LayerLeak] = {}
        for (name, rank), factors in zip(solve.ranks.items(), made, strict=True):
            d_out = self.weights[name].shape[0]
            leaks[name] = layer_leak(name, factors.A, C, d_out, self.store, _first(space, rank, C))
            tensors[f"{name}/A"] = factors.A.cpu()
            if factors.B0 is not None:
                tensors[f"{name}/B0"] = factors.B0.cpu()
        if self.checkpoint is not None:
            self.checkpoint.write(solve.number, solve.ranks, tensors, leaks)
        self._held |= tensors
        self._leaks |= leaks

    def hand_over(self) -> tuple[dict[str, Factors], dict[str, LayerLeak]]:
        """Everything, on every rank."""
        shapes: dict[str, tuple[int, int]] = {}
        owners: dict[str, int] = {}
        for solve in self.solves:
            for name, rank in solve.ranks.items():
                d_out, d_in = self.weights[name].shape
                shapes[f"{name}/A"] = (rank, d_in)
                if self._b0:
                    shapes[f"{name}/B0"] = (d_out, rank)
                owners |= {key: self._owners[solve.group] for key in (f"{name}/A", f"{name}/B0") if key in shapes}
        if self.team.world > 1:
            sizes = {key: rows * columns for key, (rows, columns) in shapes.items()}
            held = {key: tensor.reshape(-1) for key, tensor in self._held.items()}
            for key, tensor in self.team.hand_over(owners, sizes, held, to_all=True):
                self._held[key] = tensor.view(shapes[key])
            for rows in self.team.gather([asdict(leak) for leak in self._leaks.values()]):
                self._leaks |= {row["layer"]: LayerLeak(**row) for row in rows}
        factors = {name: Factors(self._held[f"{name}/A"], self._held.get(f"{name}/B0")) for name in self.weights}
        return factors, self._leaks


def _first(space: NullSpace, rank: int, C: torch.Tensor) -> NullSpace:
    """The bottom-``rank`` space inside a larger one; what was proved of that says nothing of this."""
    if rank == space.basis.shape[-1]:
        return space
    values, trace = space.eigenvalues[:rank], C.diagonal().sum()
    energy = torch.where(trace > 0, values.sum() / trace, torch.zeros_like(trace))
    return replace(
        space,
        basis=space.basis[:, :rank],
        eigenvalues=values,
        leak=values.sum(),
        bound=torch.zeros_like(space.bound),
        energy=energy,
    )
