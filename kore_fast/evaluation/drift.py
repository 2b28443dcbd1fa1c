"""Held-out loss and drift: how far a trained model moved from its base, in what it says and in what it thinks.

Forgetting without a benchmark: next-token distributions (KL) and hidden states beside the base's on held-out prompts.
What the change of each weight does to held-out activations is in `held_out_leak`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kore_fast.data.conversations import IGNORE, Encoded, by_length, collate, tokenizer_of
from kore_fast.errors import ConstraintError
from kore_fast.evaluation.batches import BatchSize, Kept
from kore_fast.progress import Progress, silent


@dataclass(frozen=True)
class Drift:
    """Of one held-out sequence, a mean over its predicted tokens."""

    loss: float
    """Nats a token."""
    kl: float
    """KL(base ‖ model) of the next-token distributions, nats a token."""
    hidden: float
    """‖h′ − h‖ / ‖h‖ of the hidden states from which a token is predicted, mean over the decoder's layers. Relative
    token by token, so that the few positions with massive activations weigh no more than others."""
    tokens: int


def measure_drift(
    model: nn.Module,
    base: nn.Module | None,
    processor: Any,
    sequences: Sequence[Encoded],
    *,
    batch_size: int | BatchSize = 8,
    bf16: bool = False,
    progress: Progress = silent,
    label: str = "drift",
    journal: Path | None = None,
) -> list[Drift]:
    """Loss and drift of each sequence, over the tokens of its answers (for a plain text: all tokens after the first).

    Where memory runs out a batch is halved, and so are those that follow.

    Args:
        base: the untouched base; ``model`` itself, which is then compared with itself (drift zero); or None for a
            PEFT model, whose base is the same model with its adapters off: no second model in memory.
        journal: where what is measured is kept batch by batch, so that a killed call goes on and gives what an
            uninterrupted one does. It is bound to the sequences, not to the models: one file for each.

    Raises:
        ConstraintError: no base, and ``model`` is no PEFT model.
        DataError: the journal cannot be read or written; names it.
        KoreError: memory does not suffice for one sequence; says which. With a journal, also for what is not finite.
    """
    pad = tokenizer_of(processor).pad_token_id
    device = next(model.parameters()).device
    size = batch_size if isinstance(batch_size, BatchSize) else BatchSize(batch_size)

    def measure(rows: Sequence[int]) -> list[dict[str, Any]]:
        inputs = collate([sequences[i] for i in rows], pad, labels=True)
        labels = inputs.pop("labels").to(device)
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            found = model(**inputs, output_hidden_states=True)
            if base is model:
                before = found
            else:
                with base_of(model, base) as untouched:
                    before = untouched(**inputs, output_hidden_states=True)
        results = []
        for row in range(len(rows)):
            kept = targets[row] != IGNORE
            log_p = found.logits[row][kept].float().log_softmax(-1)
            log_q = before.logits[row][kept].float().log_softmax(-1)
            loss = -log_p.gather(-1, targets[row][kept][:, None]).squeeze(-1)
            kl = (log_q.exp() * (log_q - log_p)).sum(-1)
            # The first are the embeddings, which go into the decoder.
            layers = zip(found.hidden_states[1:], before.hidden_states[1:], strict=True)
            moved = [_relative(here[row][kept], there[row][kept]) for here, there in layers]
            one = Drift(float(loss.mean()), float(kl.mean()), sum(moved) / len(moved), int(kept.sum()))
            results.append(asdict(one))
        return results

    drifts: dict[int, Drift] = {}
    batches = by_length([len(s) for s in sequences], size.size)
    done = Kept(journal, lambda: [digests(sequences), batches, bf16])
    for batch in progress(batches, len(batches), label):
        for rows, found in done.run(size, batch, measure, lambda i: f"{label}, sequence {i}"):
            drifts |= {i: Drift(**one) for i, one in zip(rows, found, strict=True)}
    return [drifts[i] for i in range(len(sequences))]


def digests(sequences: Sequence[Encoded]) -> list[str]:
    """A digest of each sequence: tokens, what they are, pictures."""

    def one(sequence: Encoded) -> str:
        digest = hashlib.sha256()
        for tensor in (sequence.input_ids, sequence.kinds, sequence.pixel_values, sequence.image_grid_thw):
            if tensor is not None:
                digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    return [one(sequence) for sequence in sequences]


@contextmanager
def base_of(model: nn.Module, base: nn.Module | None) -> Iterator[nn.Module]:
    """``base`` or, where it is None, ``model`` with its adapters (and what was trained beside them) off for a while."""
    if base is not None:
        yield base
        return
    if not hasattr(model, "disable_adapter"):
        raise ConstraintError(
            f"{type(model).__name__} has no adapters to turn off: give the base model that drift is measured from"
        )
    with model.disable_adapter():  # type: ignore[operator]
        yield model


def _relative(here: torch.Tensor, there: torch.Tensor) -> float:
    there = there.float()
    return float(((here.float() - there).norm(dim=-1) / there.norm(dim=-1)).mean())
