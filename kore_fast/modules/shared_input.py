"""Layers that read one tensor (q, k, v; gate, up) as one call of `ops.frozen_lora_many`: one dx, not a sum of them.

Each layer is still called by itself, as every model does. The first that is called with a tensor computes all; the
others, called with the very same tensor, take what is theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from kore_fast.ops import frozen_lora_many
from kore_fast.ops.backends import Backend


class Operands(NamedTuple):
    """What `ops.frozen_lora` wants of a layer."""

    W: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    bias: torch.Tensor | None
    scaling: float
    backend: Backend = "auto"


class SharingLayer(Protocol):
    """A layer that can be called with others."""

    shared_input: SharedInput | None

    def operands(self, x: torch.Tensor) -> Operands | None:
        """What it would be computed from now, or None where it is not `ops.frozen_lora` that computes it."""
        ...


class SharedInput:
    """A set of layers that read one tensor, and what they are still to take of the last one."""

    def __init__(self, layers: Sequence[SharingLayer]) -> None:
        self.layers = tuple(layers)
        self._clear()

    def _clear(self) -> None:
        self._x: torch.Tensor | None = None
        self._version = 0
        self._waiting: dict[int, tuple[torch.Tensor, tuple[object, ...]]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"layers": self.layers}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._clear()

    def take(self, layer: SharingLayer, x: torch.Tensor) -> torch.Tensor | None:
        """The layer's y, computed now or with the layer before; None where it is to compute it itself."""
        # A graph that is being traced sees each layer as it is; transforms take plain products apart.
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or x.is_inference():
            return None
        if x is self._x and x._version == self._version and id(layer) in self._waiting:
            y, computed_from = self._waiting.pop(id(layer))
            if not self._waiting:
                self._clear()
            # Between the calls the layer may have been trained, switched off or given another adapter.
            now = layer.operands(x)
            if now is not None and _state(now) == computed_from:
                return y
            self._clear()
            return None
        given = [one.operands(x) for one in self.layers]
        alike = [one for one in given if one is not None and one.backend == given[0].backend] if given[0] else []
        if len(alike) < len(given):
            self._clear()
            return None
        W, A, B, bias, scaling, backend = zip(*alike, strict=True)
        ys = frozen_lora_many(x, W, A, B, bias, scaling=scaling, backend=backend[0])
        self._waiting = {id(one): (y, _state(used)) for one, y, used in zip(self.layers, ys, alike, strict=True)}
        self._x, self._version = x, x._version
        y, _ = self._waiting.pop(id(layer))
        return y


def _state(given: Operands) -> tuple[object, ...]:
    """What a result holds for. A is frozen, and under autocast it is another tensor each time."""
    tensors = [tensor for tensor in (given.W, given.B, given.bias) if tensor is not None]
    versions = [(id(tensor), None if tensor.is_inference() else tensor._version) for tensor in tensors]
    device = given.W.device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    needed = tuple(tensor.requires_grad for tensor in tensors)
    return (*versions, needed, given.scaling, given.backend, cast, torch.is_grad_enabled())


def share_inputs(layers: Mapping[str, object], groups: Iterable[Iterable[str]]) -> None:
    """Let layers that read one tensor be computed together.

    Args:
        layers: by name.
        groups: names of layers that read one tensor. Of a group, only layers that can share and are among ``layers``.
    """
    for names in groups:
        members = [layers[name] for name in names if hasattr(layers.get(name), "shared_input")]
        if len(members) > 1:
            together = SharedInput(members)  # type: ignore[arg-type]
            for member in members:
                member.shared_input = together  # type: ignore[attr-defined]
