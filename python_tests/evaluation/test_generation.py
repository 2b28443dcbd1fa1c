"""Greedy answers: a batch answers as each prompt alone does, in the prompts' order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kore_fast.data.conversations import IGNORE, tokenizer_of
from kore_fast.evaluation.generation import Prompt, encode_prompt, generate_answers


@pytest.fixture
def model(loud_model: nn.Module) -> nn.Module:
    return loud_model


@pytest.fixture
def prompts(knowledge_folder: Path) -> list[Prompt]:
    shown = [knowledge_folder / "images" / f"{colour}.png" for colour in ("red", "blue", "green")]
    return [
        Prompt("Who?"),
        Prompt("What is it?", shown[0]),
        Prompt("Tell me about the river and the hills."),
        Prompt("What is it?", shown[1]),
        Prompt("Say, what lives here in these hills?", shown[2]),
        Prompt("Why so?"),
    ]


def by_hand(model: nn.Module, processor: Any, prompt: Prompt, count: int) -> str:
    """One token after the other, without cache, batch or padding."""
    encoded = encode_prompt(processor, prompt)
    ids, tokenizer = encoded.input_ids[None], tokenizer_of(processor)
    start = ids.shape[1]
    pictures = {} if encoded.pixel_values is None else {"pixel_values": encoded.pixel_values}
    with torch.no_grad():
        for _ in range(count):
            token = model(input_ids=ids, **pictures).logits[0, -1].argmax()
            if int(token) == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, token.reshape(1, 1)], dim=1)
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True)).strip()


def test_batches_answer_as_each_alone(model: nn.Module, tiny_processor: Any, prompts: list[Prompt]) -> None:
    wanted = [by_hand(model, tiny_processor, prompt, 8) for prompt in prompts]
    assert len(set(wanted)) >= 4
    for size in (1, 2, 6):
        found = generate_answers(model, tiny_processor, prompts, max_new_tokens=8, batch_size=size)
        assert found == wanted, size
    encoded = [encode_prompt(tiny_processor, prompt) for prompt in prompts]
    assert generate_answers(model, tiny_processor, encoded, max_new_tokens=8, batch_size=4) == wanted


def test_order_of_prompts_is_kept(model: nn.Module, tiny_processor: Any, prompts: list[Prompt]) -> None:
    forward = generate_answers(model, tiny_processor, prompts, max_new_tokens=5, batch_size=4)
    backward = generate_answers(model, tiny_processor, prompts[::-1], max_new_tokens=5, batch_size=4)
    assert backward == forward[::-1]
    assert generate_answers(model, tiny_processor, [], max_new_tokens=5) == []


def test_length_is_bounded(model: nn.Module, tiny_processor: Any) -> None:
    answer = generate_answers(model, tiny_processor, [Prompt("Who?")], max_new_tokens=3)[0]
    assert len(tokenizer_of(tiny_processor)(answer, add_special_tokens=False)["input_ids"]) <= 3 * 3


def test_prompt_ends_where_the_answer_begins(tiny_processor: Any, prompts: list[Prompt]) -> None:
    for prompt in prompts:
        encoded = encode_prompt(tiny_processor, prompt)
        text = tokenizer_of(tiny_processor).decode(encoded.input_ids)
        assert text.endswith("<|im_start|>assistant\n")
        assert text.count("<image>") == (0 if prompt.image is None else 4)
        assert (encoded.labels == IGNORE).all()
    marked = encode_prompt(tiny_processor, Prompt("<image>\nWhat is it?", prompts[1].image))
    assert torch.equal(marked.input_ids, encode_prompt(tiny_processor, prompts[1]).input_ids)
