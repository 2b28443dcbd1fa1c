"""What the layers of a model read: forward pre-hooks that hand each distinct input to a sink, once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from kore_fast.errors import ConstraintError

Batch = Mapping[str, Any]


class Width(NamedTuple):
    """What the size of an input's sum and of its buffer follow from."""

    d: int
    itemsize: int
    """Bytes of one activation."""


class Rows:
    """Which rows of a batch count and how much: a value per token, or None where every row counts once."""

    def __init__(self, mask: torch.Tensor | None, scale: torch.Tensor | None) -> None:
        self._mask = None if mask is None else mask != 0
        self._scale = scale if scale is None or scale.is_floating_point() else scale.double()

    def of(self, name: str, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Mask and scale in the shape of the rows of ``x``, on its device.

        Raises:
            ConstraintError: ``x`` does not have one row per token; names the layer.
        """
        return _fit(name, self._mask, x), _fit(name, self._scale, x)

    @cached_property
    def kept(self) -> torch.Tensor | None:
        """Indices of the rows that count; None where all do. It waits for the device: for batches on a CPU only."""
        wanted: torch.Tensor | None = None
        for rows in (self._mask, self._scale):
            if rows is not None:
                real = rows.reshape(-1) != 0
                wanted = real if wanted is None else wanted & real
        return None if wanted is None or bool(wanted.all()) else wanted.nonzero().reshape(-1).cpu()


Sink = Callable[[str, torch.Tensor, Rows], None]


def ignore(name: str, x: torch.Tensor, rows: Rows) -> None:
    """A sink that keeps nothing, to see which layers share an input."""


class DistinctInputs:
    """Forward pre-hooks that tell distinct inputs apart by tensor identity.

    The first batch settles which layers read one tensor; later batches must agree.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str], device: torch.device) -> None:
        self.leaders: dict[str, str] = {}
        """Layer → the first reader of its input, which the group is named after."""
        self.widths: dict[str, Width] = {}
        """Group → its input."""
        self._model = model
        self._layers = list(layers)
        self._device = device
        self._sink: Sink = ignore
        self._rows = Rows(None, None)
        # The last input is held, not copied: while it lives, no other tensor can have its address.
        self._last: torch.Tensor | None = None
        self._last_leader = ""
        # Its version when it was read: a change in place shows on the held tensor too.
        self._last_version = -1
        self._handles = [
            model.get_submodule(name).register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name in self._layers
        ]

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """First reader → all readers of one tensor, in the model's order; empty before the first batch."""
        groups: dict[str, tuple[str, ...]] = {}
        for name in self._layers if self.leaders else ():
            leader = self.leaders[name]
            groups[leader] = (*groups.get(leader, ()), name)
        return groups

    def know(self, groups: Mapping[str, Iterable[str]], widths: Mapping[str, Width]) -> None:
        """Take the groups as settled, by another rank or before an interruption."""
        self.leaders = {name: group for group, members in groups.items() for name in members}
        self.widths = dict(widths)

    def run(self, batch: Batch, sink: Sink) -> None:
        """One forward pass over ``batch``; each distinct input goes to ``sink``."""
        inputs = {k: v.to(self._device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        self._rows = Rows(inputs.get("attention_mask"), inputs.pop("token_weights", None))
        self._sink = sink
        try:
            with torch.no_grad():  # inference mode keeps no version counters, which tell a tensor changed in place
                self._model(**inputs)
        finally:
            self._last, self._rows, self._sink = None, Rows(None, None), ignore
        unreached = [name for name in self._layers if name not in self.leaders]
        if unreached:
            raise ConstraintError(f"{unreached[0]}: no batch reached this layer; leave it out with target_modules")

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def before_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (args[0] if args else kwargs["input"]).detach()
            shared = self._last is not None and _same(x, self._last) and x._version == self._last_version
            leader = self._last_leader if shared else name
            expected = self.leaders.setdefault(name, leader)
            if expected != leader:
                raise ConstraintError(
                    f"{name}: read the same input as {expected} in one batch and as {leader} in another; "
                    "collect such layers apart, with target_modules"
                )
            if not shared:
                self._last, self._last_leader, self._last_version = x, name, x._version
                self.widths.setdefault(name, Width(x.shape[-1], x.element_size()))
                self._sink(name, x, self._rows)

        return before_forward


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
