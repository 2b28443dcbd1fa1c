"""Collection: run old knowledge through a model once and keep C = Σ x xᵀ of every distinct linear input."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from kore_fast.constraint.fingerprint import model_fingerprint
from kore_fast.constraint.selection import select_linears
from kore_fast.constraint.store import CovarianceStore, Part, check_finite, pack, tokens_needed
from kore_fast.errors import ConstraintError
from kore_fast.ops import covariance_update_, finalize, new_count

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]


class _Inputs:
    """Forward pre-hooks that tell distinct inputs apart by tensor identity, and accumulate a covariance of each."""

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str],
        leaders: Mapping[str, str] | None = None,
        wave: Iterable[str] = (),
    ) -> None:
        self.leaders: dict[str, str] = {}
        # Layers outside the wave are watched too: what is read between two layers decides whether they share.
        self._wave = set(wave)
        self.C: dict[str, torch.Tensor] = {}
        self.count: dict[str, torch.Tensor] = {}
        self._known = leaders
        self._rows: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        # The last input is held, not copied: while it lives, no other tensor can have its address.
        self._last: torch.Tensor | None = None
        self._last_leader = ""
        # Its version when it was read: a change in place shows on the held tensor too.
        self._last_version = -1
        self._handles = [
            model.get_submodule(name).register_forward_pre_hook(self._hook(name), with_kwargs=True) for name in layers
        ]

    def run(self, model: nn.Module, batch: Batch, device: torch.device) -> None:
        inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        self._rows = (inputs.get("attention_mask"), inputs.pop("token_weights", None))
        with torch.no_grad():  # inference mode keeps no version counters, which tell a tensor changed in place
            model(**inputs)
        self._last = None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def before_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (args[0] if args else kwargs["input"]).detach()
            shared = self._last is not None and _same(x, self._last) and x._version == self._last_version
            leader = self._last_leader if shared else name
            expected = self.leaders.setdefault(name, leader) if self._known is None else self._known[name]
            if expected != leader:
                raise ConstraintError(
                    f"{name}: read the same input as {expected} in one batch and as {leader} in another; "
                    "collect such layers apart, with target_modules"
                )
            if not shared:
                self._last, self._last_leader, self._last_version = x, name, x._version
                if name in self._wave:
                    self._update(name, x)

        return before_forward

    def _update(self, name: str, x: torch.Tensor) -> None:
        if name not in self.C:
            d = x.shape[-1]
            self.C[name] = torch.zeros(d, d, dtype=torch.float64, device=x.device)
            self.count[name] = new_count(device=x.device)
        mask, scale = (_fit(name, rows, x) for rows in self._rows)
        covariance_update_(self.C[name], self.count[name], x, mask, scale)


def _fit(name: str, rows: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    if rows is None:
        return None
    if rows.numel() != x.numel() // x.shape[-1]:
        raise ConstraintError(
            f"{name}: its input {tuple(x.shape)} does not have one row per token of the mask {tuple(rows.shape)}; "
            "leave the layer out with target_modules"
        )
    return rows.reshape(x.shape[:-1]).to(x.device)


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype


def collect_covariance(
    model: nn.Module,
    batches: Iterable[Batch] | Callable[[], Iterable[Batch]],
    *,
    source: str = "calibration",
    target_modules: str | Sequence[str] | None = None,
    about: Mapping[str, Any] | None = None,
    memory_limit: int | None = None,
    progress: Callable[[Iterable[Batch]], Iterable[Batch]] | None = None,
    warn_few_tokens: bool = True,
) -> CovarianceStore:
    """Covariances of the inputs of a model's linear layers over batches of old knowledge (KORE step 1).

    Args:
        model: any model that takes a batch as keyword arguments. It runs in evaluation mode without gradients.
        batches: mappings of keyword arguments, of any batch size. ``attention_mask`` (batch, tokens), when there,
            leaves padding out; ``token_weights`` (batch, tokens), when there, is taken off and weights each position
            (zero leaves it out). With a memory limit, a list or a function that returns them anew for each pass.
        source: a name for this kind of old knowledge.
        target_modules: see `select_linears`; default every linear of the language decoder.
        about: what the source is (JSON), kept in the store.
        memory_limit: bytes that accumulators may take. A distinct input of width d takes 8·d² bytes; what does not fit
            is collected in further passes over the batches. Without a limit, one pass and 8·Σd² bytes (0.8 GB for the
            135M model of the quickstart, 44 GB for LLaVA-7B).
        progress: wraps the batches of each pass, for a progress bar.
        warn_few_tokens: see `warn_if_few_tokens`; off when other sources will be added.

    Returns:
        A store with one source. Layers that read the same tensor (q/k/v, gate/up) share one covariance: found by
        tensor identity while the model runs, not by name.

    Raises:
        ConstraintError: no batches, an input without one row per token, a layer wider than the memory limit.
        StoreError: NaN or infinite activations, with the layer's name.
    """
    layers = select_linears(model, target_modules)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        first_pass = iter(batches() if callable(batches) else batches)
        first = next(first_pass, None)
        if first is None:
            raise ConstraintError("no calibration batches: give at least one")
        groups = _groups(model, layers, first, device)
        widths = {group: int(model.get_submodule(group).in_features) for group in groups}  # type: ignore[arg-type]
        waves = _waves(widths, memory_limit)
        if len(waves) > 1 and not callable(batches) and iter(batches) is batches:
            raise ConstraintError(
                f"memory_limit={memory_limit} takes {len(waves)} passes over the batches: give a list, or a function "
                "that returns them anew, not an iterator that one pass uses up"
            )
        parts: dict[tuple[str, str], list[Part]] = {}
        for number, wave in enumerate(waves):
            passes = chain([first], first_pass) if number == 0 else batches() if callable(batches) else batches
            C, counts = _accumulate(model, progress(passes) if progress else passes, groups, wave, device)
            for group in wave:
                check_finite(group, counts[group])
                parts[(source, group)] = [Part(pack(finalize(C.pop(group))).cpu(), counts[group])]
    finally:
        model.train(training)
    store = CovarianceStore(
        model=model_fingerprint(model, [name for members in groups.values() for name in members]),
        groups=groups,
        widths=widths,
        sources={source: dict(about or {})},
        parts=parts,
    )
    if warn_few_tokens:
        warn_if_few_tokens(store)
    return store


def _groups(model: nn.Module, layers: list[str], batch: Batch, device: torch.device) -> dict[str, tuple[str, ...]]:
    """Which layers read one tensor, seen on one batch: first reader → all its readers."""
    inputs = _Inputs(model, layers)
    try:
        inputs.run(model, batch, device)
    finally:
        inputs.remove()
    unreached = [name for name in layers if name not in inputs.leaders]
    if unreached:
        raise ConstraintError(f"{unreached[0]}: no batch reached this layer; leave it out with target_modules")
    groups: dict[str, tuple[str, ...]] = {}
    for name in layers:
        leader = inputs.leaders[name]
        groups[leader] = (*groups.get(leader, ()), name)
    return groups


def _accumulate(
    model: nn.Module,
    batches: Iterable[Batch],
    groups: Mapping[str, tuple[str, ...]],
    wave: Sequence[str],
    device: torch.device,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    leaders = {name: group for group, members in groups.items() for name in members}
    inputs = _Inputs(model, leaders, leaders, wave)
    try:
        for batch in batches:
            inputs.run(model, batch, device)
    finally:
        inputs.remove()
    return inputs.C, {group: count.cpu() for group, count in inputs.count.items()}


def _waves(widths: Mapping[str, int], memory_limit: int | None) -> list[list[str]]:
    """Split the groups, in order, into passes whose accumulators fit the limit."""
    if memory_limit is None:
        return [list(widths)]
    waves: list[list[str]] = [[]]
    used = 0
    for group, d in widths.items():
        cost = 8 * d * d
        if cost > memory_limit:
            raise ConstraintError(f"{group}: its covariance takes {cost:,} bytes; memory_limit is {memory_limit:,}")
        if used + cost > memory_limit:
            waves.append([])
            used = 0
        waves[-1].append(group)
        used += cost
    return waves


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
