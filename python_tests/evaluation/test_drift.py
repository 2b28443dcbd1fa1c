"""Drift: zero against itself, never negative, the model's own loss, the same for every batch size."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kore_fast.data.conversations import ANSWER, Encoded, collate, encode, encode_texts
from kore_fast.errors import ConstraintError
from kore_fast.evaluation.batches import BatchSize
from kore_fast.evaluation.drift import measure_drift


@pytest.fixture
def sequences(tiny_processor: Any, knowledge_folder: Path) -> list[Encoded]:
    pictured = [
        encode(
            tiny_processor,
            [("user", f"<image>\n{'What? ' * n}"), ("assistant", f"It is {colour}.")],
            [knowledge_folder / "images" / f"{colour}.png"],
        )
        for n, colour in enumerate(["red", "green", "blue"])
    ]
    chat = encode(tiny_processor, [("user", "Who?"), ("assistant", "Me.")])
    texts = encode_texts(tiny_processor, ["A river is long.", "Hills."], 12)
    return [texts[0], *pictured, chat, texts[1]]


@pytest.fixture
def changed(tiny_model: nn.Module) -> nn.Module:
    model = copy.deepcopy(tiny_model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.get_submodule("model.language_model").parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_nothing_drifts_from_itself(tiny_model: nn.Module, tiny_processor: Any, sequences: list[Encoded]) -> None:
    for base in (tiny_model, copy.deepcopy(tiny_model)):
        assert [d.kl for d in measure_drift(tiny_model, base, tiny_processor, sequences)] == [0.0] * len(sequences)


def test_figures_are_the_definitions(
    tiny_model: nn.Module, changed: nn.Module, tiny_processor: Any, sequences: list[Encoded]
) -> None:
    found = measure_drift(changed, tiny_model, tiny_processor, sequences, batch_size=4)
    for sequence, drift in zip(sequences, found, strict=True):
        inputs = collate([sequence], 0, labels=True)
        with torch.no_grad():
            output, base = changed(**inputs), tiny_model(**inputs)
        assert drift.loss == pytest.approx(float(output.loss), rel=1e-5)
        wanted = inputs["labels"][0, 1:] != -100
        assert drift.tokens == int(wanted.sum())
        p, q = (o.logits[0, :-1][wanted].double().log_softmax(-1) for o in (base, output))
        assert drift.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
        assert drift.kl > 1e-4
        with torch.no_grad():
            moved, still = (m(**inputs, output_hidden_states=True).hidden_states[1:] for m in (changed, tiny_model))
        layers = [
            ((a - b)[0, :-1][wanted].norm(dim=-1) / b[0, :-1][wanted].norm(dim=-1)).mean()
            for a, b in zip(moved, still, strict=True)
        ]
        assert drift.hidden == pytest.approx(float(sum(layers) / len(layers)), rel=1e-4)


def test_a_peft_model_is_its_own_base(tiny_model: nn.Module, tiny_processor: Any, sequences: list[Encoded]) -> None:
    from peft import LoraConfig, get_peft_model

    base = copy.deepcopy(tiny_model)
    adapted = get_peft_model(tiny_model, LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
    alone = measure_drift(adapted, None, tiny_processor, sequences)
    beside = measure_drift(adapted, base, tiny_processor, sequences)
    assert all(one.kl > 0 and one.hidden > 0 for one in alone)
    for one, other in zip(alone, beside, strict=True):
        assert (one.kl, one.hidden, one.loss) == pytest.approx((other.kl, other.hidden, other.loss), rel=1e-5)
    with pytest.raises(ConstraintError, match="no adapters to turn off"):
        measure_drift(base, None, tiny_processor, sequences)


def test_direction_is_base_against_model(
    tiny_model: nn.Module, changed: nn.Module, tiny_processor: Any, sequences: list[Encoded]
) -> None:
    there = measure_drift(changed, tiny_model, tiny_processor, sequences)
    back = measure_drift(tiny_model, changed, tiny_processor, sequences)
    assert all(d.kl >= 0 for d in (*there, *back))
    assert any(abs(a.kl - b.kl) > 1e-4 * a.kl for a, b in zip(there, back, strict=True))


def test_batch_size_and_order_do_not_matter(
    tiny_model: nn.Module, changed: nn.Module, tiny_processor: Any, sequences: list[Encoded]
) -> None:
    one = measure_drift(changed, tiny_model, tiny_processor, sequences, batch_size=1)
    for other in (
        measure_drift(changed, tiny_model, tiny_processor, sequences, batch_size=6),
        measure_drift(changed, tiny_model, tiny_processor, sequences[::-1], batch_size=3)[::-1],
    ):
        for a, b in zip(one, other, strict=True):
            assert a.tokens == b.tokens
            assert a.loss == pytest.approx(b.loss, rel=1e-5)
            assert a.kl == pytest.approx(b.kl, rel=1e-3)


def test_all_tokens_of_a_text_are_predicted(tiny_processor: Any, tiny_model: nn.Module) -> None:
    encoded = encode_texts(tiny_processor, ["x" * 50, "y", "zz"], 20)
    assert [len(e) for e in encoded] == [20, 2]
    assert all((e.kinds == ANSWER).all() for e in encoded)
    assert [d.tokens for d in measure_drift(tiny_model, tiny_model, tiny_processor, encoded)] == [19, 1]


def test_a_batch_that_is_too_large_is_halved(
    tiny_model: nn.Module, changed: nn.Module, tiny_processor: Any, sequences: list[Encoded]
) -> None:
    tried: list[int] = []

    def too_large(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        tried.append(len(named["input_ids"]))
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    wanted = measure_drift(changed, tiny_model, tiny_processor, sequences, batch_size=1)
    changed.register_forward_pre_hook(too_large, with_kwargs=True)
    size = BatchSize(6)
    found = measure_drift(changed, tiny_model, tiny_processor, sequences, batch_size=size)
    assert tried == [6, 3, 1, 1, 1, 1, 1, 1]
    assert size.size == 1
    for one, other in zip(found, wanted, strict=True):
        assert (one.loss, one.kl, one.hidden, one.tokens) == pytest.approx(
            (other.loss, other.kl, other.hidden, other.tokens), rel=1e-5
        )


def test_a_journal_holds_for_the_very_sequences(
    tiny_model: nn.Module,
    changed: nn.Module,
    tiny_processor: Any,
    sequences: list[Encoded],
    tmp_path: Path,
) -> None:
    journal = tmp_path / "drift.partial.jsonl"
    first = measure_drift(changed, tiny_model, tiny_processor, sequences, batch_size=2, journal=journal)
    assert first == measure_drift(changed, tiny_model, tiny_processor, sequences, batch_size=2)
    forwards = []
    changed.register_forward_pre_hook(lambda module, given: forwards.append(1))
    assert measure_drift(changed, tiny_model, tiny_processor, sequences, batch_size=2, journal=journal) == first
    assert forwards == []
    assert all(sequences[i].pixel_values is not None for i in (1, 2))
    for other in (
        [*sequences[:2], replace(sequences[2], pixel_values=sequences[1].pixel_values), *sequences[3:]],
        [*sequences[:-1], replace(sequences[-1], input_ids=sequences[-1].input_ids.flip(0))],
        sequences[1:],
    ):
        fresh = measure_drift(changed, tiny_model, tiny_processor, other, batch_size=2)
        assert measure_drift(changed, tiny_model, tiny_processor, other, batch_size=2, journal=journal) == fresh
