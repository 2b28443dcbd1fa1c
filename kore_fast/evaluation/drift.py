"""Held-out loss and drift: how far a trained model's next-token distributions moved from its base's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kore_fast.data.conversations import IGNORE, Encoded, by_length, collate, tokenizer_of
from kore_fast.progress import Progress, silent


@dataclass(frozen=True)
class Drift:
    """Of one held-out sequence, in nats a predicted token."""

    loss: float
    kl: float
    """KL(base ‖ model) of the next-token distributions, mean over the sequence's predicted tokens."""
    tokens: int


def measure_drift(
    model: nn.Module,
    base: nn.Module,
    processor: Any,
    sequences: Sequence[Encoded],
    *,
    batch_size: int = 8,
    bf16: bool = False,
    progress: Progress = silent,
    label: str = "drift",
) -> list[Drift]:
    """Loss and KL of each sequence, over the tokens of its answers (for a plain text: all tokens after the first).

    ``base`` may be ``model`` itself; the KL is then zero.
    """
    pad = tokenizer_of(processor).pad_token_id
    device = next(model.parameters()).device
    results: list[Drift | None] = [None] * len(sequences)
    batches = by_length([len(s) for s in sequences], batch_size)
    for rows in progress(batches, len(batches), label):
        inputs = collate([sequences[i] for i in rows], pad, labels=True)
        labels = inputs.pop("labels").to(device)
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(**inputs).logits
            base_logits = logits if base is model else base(**inputs).logits
        for row, i in enumerate(rows):
            kept = targets[row] != IGNORE
            log_p = logits[row][kept].float().log_softmax(-1)
            log_q = base_logits[row][kept].float().log_softmax(-1)
            loss = -log_p.gather(-1, targets[row][kept][:, None]).squeeze(-1)
            kl = (log_q.exp() * (log_q - log_p)).sum(-1)
            results[i] = Drift(float(loss.mean()), float(kl.mean()), int(kept.sum()))
    return [result for result in results if result is not None]
