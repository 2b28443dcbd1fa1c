"""Elastic weight consolidation (arXiv 1612.00796): a change costs what it costs old knowledge, by the diagonal Fisher.

The Fisher is that of the base's weights W, and the penalty λ/2·Σ F∘(W − W0)² is on the change of W, whatever is
trained: of s·B·A as EWC-LoRA has it, not of A and B apart (at B = 0 the Fisher of A is zero, and says nothing). So one
Fisher serves every method, and a strength means the same for all. Modules trained in full beside an adapter are free.
It holds a float32 number for each weight of the layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from kore_fast.data.conversations import IGNORE
from kore_fast.files import atomic_path
from kore_fast.training.methods.interface import WeightChange, on_device_of
from kore_fast.training.retention.terms import Batch


class Ewc:
    """The penalty as a term of the loss."""

    def __init__(
        self, strength: float, fisher: Mapping[str, torch.Tensor], changes: Mapping[str, WeightChange]
    ) -> None:
        """``fisher`` (d_out, d_in) and change by layer name; what has no Fisher is free to change."""
        self.strength = strength
        self._layers = [(fisher[name], change) for name, change in changes.items() if name in fisher]

    def __call__(self, batch: Batch) -> torch.Tensor:
        device = batch.logits.device
        total = torch.zeros((), device=device)
        with torch.autocast(device.type, enabled=False):
            for fisher, change in self._layers:
                # W − W0 of all layers at once would be as large as the model: each is made again for its gradient.
                cost = checkpoint(_cost, fisher.to(device), change, use_reentrant=False, preserve_rng_state=False)
                total = total + cost
        return 0.5 * self.strength * total / batch.batches


def _cost(fisher: torch.Tensor, change: WeightChange) -> torch.Tensor:
    return (fisher * change().square()).sum()


def diagonal_fisher(
    model: nn.Module, layers: Sequence[str], samples: Iterable[Mapping[str, Any]]
) -> dict[str, torch.Tensor]:
    """Layer → mean over samples of (∂L/∂W)², L a sample's mean negative log-likelihood over its answers' tokens.

    This is the empirical Fisher: of the answers that are given, not of ones drawn from the model.

    Args:
        model: in evaluation mode; which of its parameters require gradients is as before when this returns.
        samples: keyword arguments of the model with ``labels``, one sample each, wherever they lie.
    """
    weights: list[Any] = [model.get_submodule(name).weight for name in layers]
    before = [weight.requires_grad for weight in weights]
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    count = 0
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for sample in samples:
            inputs = on_device_of(model, sample)
            labels = inputs.pop("labels")[:, 1:]
            logits = model(**inputs).logits[:, :-1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)
            for total, gradient in zip(sums, torch.autograd.grad(loss, weights), strict=True):
                total.add_(gradient.float().square())
            count += 1
    finally:
        for weight, flag in zip(weights, before, strict=True):
            weight.requires_grad_(flag)
    return {name: total / max(1, count) for name, total in zip(layers, sums, strict=True)}


def save_fisher(path: Path, fisher: Mapping[str, torch.Tensor]) -> None:
    """Write it whole or not at all, for a run that is interrupted."""
    with atomic_path(path) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in fisher.items()}, temporary)


def load_fisher(path: Path) -> dict[str, torch.Tensor]:
    """What `save_fisher` wrote."""
    return load_file(path)
