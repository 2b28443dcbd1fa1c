"""Greedy answers from a model in memory, in batches of like length."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kore_fast.data.conversations import IMAGE, Encoded, by_length, collate, encode, tokenizer_of
from kore_fast.evaluation.batches import BatchSize
from kore_fast.progress import Progress, silent


@dataclass(frozen=True)
class Prompt:
    """A question, with a picture or without."""

    text: str
    image: Path | None = None
    name: str = ""
    """What it is called in an error; default its text."""

    def __str__(self) -> str:
        return self.name or f"the question {self.text[:80]!r}"


def encode_prompt(processor: Any, prompt: Prompt) -> Encoded:
    """Tokens up to where the answer begins."""
    images = [] if prompt.image is None else [prompt.image]
    text = prompt.text if prompt.image is None or IMAGE in prompt.text else f"{IMAGE}\n{prompt.text}"
    return encode(processor, [("user", text)], images, answer_follows=True)


def stream_answers(
    model: nn.Module,
    processor: Any,
    prompts: Sequence[Prompt | Encoded],
    *,
    wanted: Collection[int] | None = None,
    max_new_tokens: int = 128,
    batch_size: int | BatchSize = 32,
    bf16: bool = False,
    progress: Progress = silent,
    label: str = "answer",
) -> Iterator[dict[int, str]]:
    """Greedy answers by the prompts' places, as each batch is done.

    Batches hold prompts of like length and are padded on the left. They are the same whichever prompts are ``wanted``,
    and a batch with one of these is answered whole, so that a run that continues computes what an uninterrupted one
    does. Where memory runs out the batch is halved, and so are those that follow. Pictures are read batch by batch.

    Args:
        prompts: a conversation that is encoded already is taken as it is.
        wanted: the places to answer; default all.
        batch_size: give a `BatchSize` to remember it from call to call.
        bf16: compute under bfloat16 autocast.

    Raises:
        KoreError: memory does not suffice for one prompt; names it.
    """
    size = batch_size if isinstance(batch_size, BatchSize) else BatchSize(batch_size)
    batches = [rows for rows in _planned(prompts, size.size) if wanted is None or not set(rows).isdisjoint(wanted)]
    tokenizer = tokenizer_of(processor)
    device = next(model.parameters()).device

    def answer(rows: Sequence[int]) -> list[str]:
        chosen = [prompts[i] for i in rows]
        encoded = [one if isinstance(one, Encoded) else encode_prompt(processor, one) for one in chosen]
        inputs = collate(encoded, tokenizer.pad_token_id, side="left")
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = model.generate(  # type: ignore[operator]
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        answers = output[:, inputs["input_ids"].shape[1] :]
        return [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in answers]

    def named(place: int) -> str:
        prompt = prompts[place]
        return str(prompt) if isinstance(prompt, Prompt) else f"conversation {place}"

    for batch in progress(batches, len(batches), label):
        for rows, answers in size.run(batch, answer, named):
            yield dict(zip(rows, answers, strict=True))


def generate_answers(
    model: nn.Module,
    processor: Any,
    prompts: Sequence[Prompt | Encoded],
    *,
    max_new_tokens: int = 128,
    batch_size: int | BatchSize = 32,
    bf16: bool = False,
    progress: Progress = silent,
    label: str = "answer",
) -> list[str]:
    """`stream_answers` to the end: one greedy answer a prompt, in the prompts' order."""
    found: dict[int, str] = {}
    for answers in stream_answers(
        model,
        processor,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        bf16=bf16,
        progress=progress,
        label=label,
    ):
        found |= answers
    return [found[i] for i in range(len(prompts))]


def _planned(prompts: Sequence[Prompt | Encoded], size: int) -> list[list[int]]:
    """Batches of like length: of the text in bytes, as one model's pictures take about as many tokens each, or in
    tokens where they are known."""
    batches: list[list[int]] = []
    # Pictures and plain questions do not mix: a batch's pixel values belong to its rows in order.
    for plain in (False, True):
        group = [i for i, prompt in enumerate(prompts) if _is_plain(prompt) == plain]
        lengths = [_length(prompts[i]) for i in group]
        batches += [[group[i] for i in rows] for rows in by_length(lengths, size)]
    return batches


def _is_plain(prompt: Prompt | Encoded) -> bool:
    return (prompt.pixel_values if isinstance(prompt, Encoded) else prompt.image) is None


def _length(prompt: Prompt | Encoded) -> int:
    return len(prompt) if isinstance(prompt, Encoded) else len(prompt.text.encode())
