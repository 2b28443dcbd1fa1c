"""What the change of each weight does to old inputs that the null space was not made from.

The leak of an adapter's A against the covariance that it was made from is in the run's init stage. Here the covariance
is of held-out inputs, and the change is all of it, ΔW = B·A or W′ − W: so LoRA, full fine-tuning and KORE are measured
alike, and so is what was trained in full beside an adapter. Σ x xᵀ itself is never formed: tr(ΔW C ΔWᵀ) = Σ ‖ΔW x‖²,
and a forward pass has every x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kore_fast.data.conversations import Encoded, by_length, collate, tokenizer_of
from kore_fast.errors import ConstraintError, KoreError
from kore_fast.evaluation.batches import BatchSize, Kept
from kore_fast.evaluation.drift import base_of, digests
from kore_fast.modules.earlier import whole_weight
from kore_fast.modules.sharding import plain_name
from kore_fast.progress import Progress, silent


@dataclass(frozen=True)
class LayerChange:
    """What a layer's ΔW (d_out, d_in) does to the held-out inputs x that the base gives it."""

    layer: str
    tokens: int
    leak: float
    """Σ‖ΔW x‖²·d_in / (‖ΔW‖_F²·Σ‖x‖²): 1 for a change in a random direction, 0 for one in the inputs' null space,
    above 1 for one along the directions that they have most of. Free of the change's size."""
    moved: float
    """(Σ‖ΔW x‖² / Σ‖y‖²)½, y the layer's output in the base: how far the outputs move."""


@dataclass
class _Sums:
    tokens: int = 0
    inputs: float = 0.0
    outputs: float = 0.0
    changes: float = 0.0

    def __iadd__(self, other: _Sums) -> _Sums:
        self.tokens += other.tokens
        self.inputs += other.inputs
        self.outputs += other.outputs
        self.changes += other.changes
        return self


@dataclass(frozen=True)
class _Change:
    """ΔW of one layer, as a product of factors where it has few ranks."""

    factors: tuple[torch.Tensor, ...]
    """ΔW, or (scaled B, A)."""
    norm: float
    """‖ΔW‖_F²."""

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """ΔW x for rows of inputs (tokens, d_in)."""
        for factor in reversed(self.factors):
            x = x @ factor.mT
        return x


def held_out_leak(
    model: nn.Module,
    base: nn.Module | None,
    processor: Any,
    sequences: Sequence[Encoded],
    *,
    batch_size: int | BatchSize = 8,
    progress: Progress = silent,
    label: str = "leak on held-out inputs",
    journal: Path | None = None,
) -> list[LayerChange]:
    """The change of every linear layer that was changed, against the inputs that ``sequences`` give it in the base.

    Computed in float32 with sums in float64; padding does not count. Where memory runs out a batch is halved, and so
    are those that follow; of an attempt that failed nothing is counted.

    Args:
        model: a PEFT model with LoRA or OSF adapters, modules trained in full beside them included, or a model of the
            base's architecture (merged or trained in full).
        base: the untouched base; None for a PEFT model, whose adapters are then turned off for it.
        journal: as in `measure_drift`.

    Returns:
        One row a changed layer, in the model's order; layers whose ΔW is zero are left out.

    Raises:
        ConstraintError: no base for a model without adapters, a layer that one of the two lacks, or an adapter other
            than plain LoRA.
        DataError: the journal cannot be read or written; names it.
        KoreError: memory does not suffice for one sequence, or a layer's change is not finite; says which.
    """
    changes = _changes(model, base)
    part: dict[str, _Sums] = {}
    mask = torch.empty(0)

    def watch(name: str, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, y, found = _rows(inputs[0], mask), _rows(output, mask), part[name]
        found.tokens += len(x)
        found.inputs += _energy(x)
        found.outputs += _energy(y)
        found.changes += _energy(changes[name].of(x))

    pad = tokenizer_of(processor).pad_token_id
    device = next(model.parameters()).device
    size = batch_size if isinstance(batch_size, BatchSize) else BatchSize(batch_size)
    batches = by_length([len(s) for s in sequences], size.size)
    sums = {name: _Sums() for name in changes}
    with base_of(model, base) as untouched:
        modules: dict[str, nn.Module] = {}
        for name, module in untouched.named_modules():
            modules.setdefault(_plain(name), module)  # of a wrapper and the module in it, the wrapper
        hooks = [modules[name].register_forward_hook(partial(watch, name)) for name in changes]
        # The head's work is a fifth of a small model's.
        head = {} if _head(untouched) in [modules[name] for name in changes] else {"logits_to_keep": 1}

        def measure(rows: Sequence[int]) -> dict[str, tuple[Any, ...]]:
            nonlocal mask, part
            part = {name: _Sums() for name in changes}
            inputs = collate([sequences[i] for i in rows], pad)
            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
            mask = inputs["attention_mask"].bool()
            with torch.inference_mode():
                untouched(**inputs, **head)
            return {name: astuple(found) for name, found in part.items()}

        done = Kept(journal if changes else None, lambda: [digests(sequences), batches, list(changes)])
        try:
            for batch in progress(batches, len(batches), label) if changes else ():
                for _, found in done.run(size, batch, measure, lambda i: f"{label}, sequence {i}"):
                    for name in sums:
                        sums[name] += _Sums(*found[name])
        finally:
            for hook in hooks:
                hook.remove()
    return [_row(name, sums[name], change) for name, change in changes.items() if sums[name].tokens]


def _row(name: str, sums: _Sums, change: _Change) -> LayerChange:
    d_in = change.factors[-1].shape[1]
    scale = change.norm * sums.inputs
    return LayerChange(
        layer=name,
        tokens=sums.tokens,
        leak=sums.changes * d_in / scale if scale else 0.0,
        moved=math.sqrt(sums.changes / sums.outputs) if sums.outputs else 0.0,
    )


def _changes(model: nn.Module, base: nn.Module | None) -> dict[str, _Change]:
    find = _of_adapters(model)
    if not find:
        if base is None:
            raise ConstraintError(
                f"{type(model).__name__} has no adapted layers: give the base model that it came from"
            )
        ours, theirs = dict(model.named_modules()), dict(base.named_modules())
        for name in [name for name, module in theirs.items() if isinstance(module, nn.Linear)]:
            shapes = [getattr(getattr(side.get(name), "weight", None), "shape", None) for side in (ours, theirs)]
            if shapes[0] != shapes[1]:
                raise ConstraintError(
                    f"{name}: {shapes[1]} in the base, {shapes[0]} in the model; not one architecture"
                )
            find[name] = partial(_of_weights, whole_weight(ours[name]), whole_weight(theirs[name]))
    changes = {name: change for name, work in find.items() if (change := work()) is not None}
    for name, change in changes.items():
        if not math.isfinite(change.norm):
            raise KoreError(
                f"{name}: its change is not finite, as after a training that diverged; train again with a lower "
                "learning rate, or take an earlier checkpoint"
            )
    return changes


def _of_adapters(model: nn.Module) -> dict[str, Callable[[], _Change | None]]:
    """How to find the change of each layer that PEFT adapted, and of each linear layer that it trained in full beside
    them (``modules_to_save``)."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.osf import OSFLayer
    from peft.utils import ModulesToSaveWrapper

    find: dict[str, Callable[[], _Change | None]] = {}
    for full_name, module in model.named_modules():
        name = _plain(full_name)
        if isinstance(module, LoraLayer):
            find[name] = partial(_of_adapter, name, module)
        elif isinstance(module, OSFLayer):
            find[name] = partial(_of_delta, module)
        elif isinstance(module, ModulesToSaveWrapper):
            before = dict(module.original_module.named_modules())
            for adapter in module.active_adapters:
                trained = module.modules_to_save[adapter] if adapter in module.modules_to_save else nn.Module()
                for inner, layer in trained.named_modules():
                    if isinstance(layer, nn.Linear):
                        whose = f"{name}.{inner}" if inner else name
                        find[whose] = partial(_of_weights, layer.weight, before[inner].weight)
    return find


@torch.no_grad()
def _of_delta(layer: Any) -> _Change | None:
    delta = layer.get_delta_weight("default").float()
    norm = _energy(delta)
    return _Change((delta,), norm) if norm else None


def _of_weights(weight: torch.Tensor, before: torch.Tensor) -> _Change | None:
    delta = (weight.detach().double() - before.detach().double()).float()
    norm = _energy(delta)
    return _Change((delta,), norm) if norm else None


def _of_adapter(name: str, layer: Any) -> _Change | None:
    A, B = [], []
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        if getattr(layer, "use_dora", {}).get(adapter) or not isinstance(layer.lora_A[adapter], nn.Linear):
            raise ConstraintError(f"{name}: adapter {adapter!r} is not a plain LoRA of a linear layer; merge it first")
        A.append(layer.lora_A[adapter].weight.detach().float())
        B.append(layer.lora_B[adapter].weight.detach().float() * layer.scaling[adapter])
    if not A:
        return None
    down, up = torch.cat(A), torch.cat(B, dim=1)
    gram, cross = up.double().mT @ up.double(), down.double() @ down.double().mT
    norm = float((gram * cross).sum())
    # Rounding may bring no change below zero; NaN is told by the caller.
    return None if norm <= 0 else _Change((up, down), norm)


def _rows(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(rows, width) in float32 without padding; a vision tower's positions, which are not the text's, are all real."""
    return (values[mask] if values.shape[:2] == mask.shape else values.flatten(0, -2)).float()


def _head(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]


def _energy(values: torch.Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))


def _plain(name: str) -> str:
    """A layer's name in the base, also where PEFT wrapped a module to train a copy of it in full."""
    return plain_name(name).removeprefix("base_model.model.").replace(".original_module", "")
