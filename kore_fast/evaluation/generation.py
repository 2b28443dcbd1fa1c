"""Greedy answers from a model in memory, in batches of like length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kore_fast.data.conversations import IMAGE, Encoded, by_length, collate, encode, tokenizer_of
from kore_fast.progress import Progress, silent


@dataclass(frozen=True)
class Prompt:
    """A question, with a picture or without."""

    text: str
    image: Path | None = None


def encode_prompt(processor: Any, prompt: Prompt) -> Encoded:
    """Tokens up to where the answer begins."""
    images = [] if prompt.image is None else [prompt.image]
    text = prompt.text if prompt.image is None or IMAGE in prompt.text else f"{IMAGE}\n{prompt.text}"
    return encode(processor, [("user", text)], images, answer_follows=True)


def generate_answers(
    model: nn.Module,
    processor: Any,
    prompts: Sequence[Prompt | Encoded],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    bf16: bool = False,
    progress: Progress = silent,
    label: str = "answer",
) -> list[str]:
    """One greedy answer a prompt, in the prompts' order; a conversation that is encoded already is taken as it is.

    Batches hold prompts of like length and are padded on the left; ``bf16`` computes under autocast.
    """
    encoded = [p if isinstance(p, Encoded) else encode_prompt(processor, p) for p in prompts]
    # Pictures and plain questions do not mix: a batch's pixel values belong to its rows in order.
    batches: list[list[int]] = []
    for plain in (False, True):
        group = [i for i, e in enumerate(encoded) if (e.pixel_values is None) == plain]
        batches += [[group[i] for i in rows] for rows in by_length([len(encoded[i]) for i in group], batch_size)]
    tokenizer = tokenizer_of(processor)
    device = next(model.parameters()).device
    answers = [""] * len(prompts)
    for rows in progress(batches, len(batches), label):
        inputs = collate([encoded[i] for i in rows], tokenizer.pad_token_id, side="left")
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = model.generate(  # type: ignore[operator]
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        for i, tokens in zip(rows, output[:, inputs["input_ids"].shape[1] :], strict=True):
            answers[i] = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return answers
