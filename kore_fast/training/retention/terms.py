"""A term of the loss: what it sees of a batch, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn


@dataclass(frozen=True)
class Batch:
    """One forward pass of a step that has ``batches`` of them, whose gradients add up."""

    model: nn.Module
    inputs: Mapping[str, Any]
    """The model's keyword arguments."""
    logits: torch.Tensor
    """(rows, vocabulary) float32, those from which answers are predicted among others."""
    answers: torch.Tensor
    """(rows,) bool: which are."""
    count: torch.Tensor | int
    """Answers' tokens in the whole step."""
    batches: int


class Term(Protocol):
    """Added to the loss of each batch; over a step's batches the terms add up to the step's."""

    def __call__(self, batch: Batch) -> torch.Tensor: ...
