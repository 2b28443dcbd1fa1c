"""The leak of a change on held-out inputs: its definition, and that an adapter and its merged weights are one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, OSFConfig, get_peft_model
from torch import nn

import kore_fast as kf
from kore_fast.data.conversations import Encoded, collate, encode, encode_texts
from kore_fast.errors import ConstraintError, KoreError
from kore_fast.evaluation.batches import BatchSize
from kore_fast.evaluation.held_out_leak import LayerChange, held_out_leak
from kore_fast.ops.factors import leak

LAYER = "model.language_model.layers.1.mlp.down_proj"


@pytest.fixture
def sequences(tiny_processor: Any, knowledge_folder: Path) -> list[Encoded]:
    texts = encode_texts(tiny_processor, ["A river is long and wide.", "Hills.", "The moss is green at dawn."], 24)
    picture = knowledge_folder / "images" / "red.png"
    shown = encode(tiny_processor, [("user", "<image>\nWhat?"), ("assistant", "It is red.")], [picture])
    return [*texts, shown]


def trained(model: nn.Module, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*_proj", **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted


def test_it_is_the_leak_of_the_change_against_the_covariance_of_the_held_out_inputs(
    tiny_model: nn.Module, tiny_processor: Any, sequences: list[Encoded]
) -> None:
    base = copy.deepcopy(tiny_model)
    store = kf.collect_covariance(base, [collate(sequences, 0)], warn_few_tokens=False)
    merged = trained(tiny_model).merge_and_unload()
    found = {row.layer: row for row in held_out_leak(merged, base, tiny_processor, sequences, batch_size=3)}
    assert set(found) == {name for names in store.groups.values() for name in names}
    for name, row in found.items():
        W = base.get_submodule(name).weight.double()
        delta, C = merged.get_submodule(name).weight.double() - W, store.covariance(name)
        assert row.tokens == store.tokens(name) == sum(len(s) for s in sequences)
        assert row.leak == pytest.approx(leak(delta, C), rel=1e-4)
        moved = float((delta @ C @ delta.mT).trace() / (W @ C @ W.mT).trace())
        assert row.moved == pytest.approx(moved**0.5, rel=1e-4)


def test_an_adapter_its_merged_weights_and_no_second_model_give_the_same(
    tiny_model: nn.Module, tiny_processor: Any, sequences: list[Encoded]
) -> None:
    base = copy.deepcopy(tiny_model)
    adapted = trained(tiny_model)
    alone = held_out_leak(adapted, None, tiny_processor, sequences)
    beside = held_out_leak(adapted, base, tiny_processor, sequences)
    merged = held_out_leak(adapted.merge_and_unload(), base, tiny_processor, sequences, batch_size=1)
    assert len(alone) == 14
    _alike(alone, beside, merged)


def test_osf_and_a_projector_trained_beside_count_as_their_merged_weights(
    tiny_model: nn.Module, tiny_processor: Any, sequences: list[Encoded]
) -> None:
    base = copy.deepcopy(tiny_model)
    whole = trained(copy.deepcopy(tiny_model), modules_to_save=["multi_modal_projector"])
    osf = get_peft_model(tiny_model, OSFConfig(effective_rank=8, target_modules=r".*language_model.*_proj"))
    with torch.no_grad():
        for name, parameter in (*whole.named_parameters(), *osf.named_parameters()):
            if "modules_to_save" in name or "osf_svd_params" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    for adapted, count in ((whole, 16), (osf, 14)):
        alone = held_out_leak(adapted, None, tiny_processor, sequences)
        beside = held_out_leak(adapted, base, tiny_processor, sequences)
        merged = held_out_leak(adapted.merge_and_unload(), base, tiny_processor, sequences)
        assert len(alone) == count
        _alike(*(sorted(rows, key=lambda row: row.layer) for rows in (alone, beside, merged)))


def _alike(alone: list[LayerChange], beside: list[LayerChange], merged: list[LayerChange]) -> None:
    for rows in zip(alone, beside, merged, strict=True):
        assert len({row.layer for row in rows}) == 1
        assert [row.leak for row in rows] == pytest.approx([rows[0].leak] * 3, rel=1e-3)
        assert [row.moved for row in rows] == pytest.approx([rows[0].moved] * 3, rel=1e-3)


@pytest.mark.parametrize("beside", ["multi_modal_projector", "lm_head"])
def test_what_was_trained_in_full_beside_an_adapter_counts_as_in_the_merged_model(
    tiny_model: nn.Module, tiny_processor: Any, sequences: list[Encoded], beside: str
) -> None:
    base = copy.deepcopy(tiny_model)
    adapted = trained(tiny_model, modules_to_save=[beside])
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if f"{beside}.modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    alone = held_out_leak(adapted, None, tiny_processor, sequences)
    given = held_out_leak(adapted, base, tiny_processor, sequences)
    merged = held_out_leak(adapted.merge_and_unload(), base, tiny_processor, sequences)
    linears = [name for name, m in base.named_modules() if isinstance(m, nn.Linear) and beside in name]
    assert linears
    assert [row.layer for row in merged if beside in row.layer] == linears
    assert len(merged) == 14 + len(linears)
    for rows in zip(alone, given, merged, strict=True):
        assert len({(row.layer, row.tokens) for row in rows}) == 1
        assert [row.leak for row in rows] == pytest.approx([rows[0].leak] * 3, rel=1e-3)
        assert [row.moved for row in rows] == pytest.approx([rows[0].moved] * 3, rel=1e-3)


def test_a_batch_that_is_too_large_is_halved_and_counts_once(
    tiny_model: nn.Module, tiny_processor: Any, sequences: list[Encoded]
) -> None:
    adapted, tried, room = trained(tiny_model), [], 2

    def too_large(module: nn.Module, given: tuple[Any, ...]) -> None:
        tried.append(len(given[0]))
        if tried[-1] > room:
            raise torch.OutOfMemoryError("CUDA out of memory")

    wanted = held_out_leak(adapted, None, tiny_processor, sequences, batch_size=1)
    # Memory runs out late in the forward pass, when the layers before have been counted.
    adapted.get_submodule(f"base_model.model.{LAYER}").register_forward_pre_hook(too_large)
    size = BatchSize(4)
    found = held_out_leak(adapted, None, tiny_processor, sequences, batch_size=size)
    assert tried == [4, 2, 2]
    assert size.size == 2
    assert [row.layer for row in found] == [row.layer for row in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.tokens == other.tokens == sum(len(s) for s in sequences)
        assert (one.leak, one.moved) == pytest.approx((other.leak, other.moved), rel=1e-5)
    room = 0
    with pytest.raises(KoreError, match=r"leak on held-out inputs, sequence \d: not enough memory"):
        held_out_leak(adapted, None, tiny_processor, sequences)


def test_a_change_in_the_null_space_leaks_nothing_and_one_along_the_inputs_much(
    tiny_model: nn.Module, tiny_processor: Any, sequences: list[Encoded]
) -> None:
    base = copy.deepcopy(tiny_model)
    C = kf.collect_covariance(base, [collate(sequences, 0)], warn_few_tokens=False).covariance(LAYER)
    space = torch.linalg.eigh(C).eigenvectors.float()
    weight = tiny_model.get_submodule(LAYER).weight
    for direction, expected in ((space[:, :1], 0.0), (space[:, -1:], 3.0)):
        with torch.no_grad():
            weight.copy_(base.get_submodule(LAYER).weight + torch.ones(len(weight), 1) @ direction.mT)
        (row,) = held_out_leak(tiny_model, base, tiny_processor, sequences)
        assert row.layer == LAYER
        assert row.leak < 1e-3 if expected == 0 else row.leak > expected


def test_layers_of_the_vision_tower_and_the_head_count_their_own_positions(
    tiny_model: nn.Module, tiny_processor: Any, sequences: list[Encoded]
) -> None:
    base = copy.deepcopy(tiny_model)
    torch.manual_seed(2)
    tower = next(n for n, m in tiny_model.named_modules() if isinstance(m, nn.Linear) and "vision" in n)
    head = next(n for n, m in tiny_model.named_modules() if n.endswith("lm_head"))
    with torch.no_grad():
        for name in (tower, head):
            weight = tiny_model.get_submodule(name).weight
            weight.copy_(weight + 0.1 * torch.randn_like(weight))
    rows = {row.layer: row for row in held_out_leak(tiny_model, base, tiny_processor, sequences)}
    assert set(rows) == {tower, head}
    assert rows[tower].tokens == 5  # one picture: four patches and the class token
    assert rows[head].tokens == sum(len(s) for s in sequences)
    assert all(row.moved > 0 for row in rows.values())


def test_nothing_changed_is_no_row(tiny_model: nn.Module, tiny_processor: Any, sequences: list[Encoded]) -> None:
    base = copy.deepcopy(tiny_model)
    assert held_out_leak(tiny_model, base, tiny_processor, sequences) == []
    fresh = get_peft_model(tiny_model, LoraConfig(r=2, target_modules=["down_proj"]))  # B = 0
    assert held_out_leak(fresh, None, tiny_processor, sequences) == []


def test_what_cannot_be_measured_is_an_error(
    tiny_model: nn.Module, tiny_processor: Any, sequences: list[Encoded]
) -> None:
    with pytest.raises(ConstraintError, match="give the base model"):
        held_out_leak(tiny_model, None, tiny_processor, sequences)
    other = copy.deepcopy(tiny_model)
    other.get_submodule("model.language_model.layers.1.mlp").down_proj = nn.Linear(3, 3)
    with pytest.raises(ConstraintError, match="not one architecture"):
        held_out_leak(other, tiny_model, tiny_processor, sequences)
    with pytest.raises(ConstraintError, match="merge it first"):
        held_out_leak(trained(tiny_model, use_dora=True), None, tiny_processor, sequences)


@pytest.mark.parametrize("merge", [False, True])
def test_a_diverged_layer_is_named(
    tiny_model: nn.Module, tiny_processor: Any, sequences: list[Encoded], merge: bool
) -> None:
    base = copy.deepcopy(tiny_model)
    adapted = trained(tiny_model)
    with torch.no_grad():
        adapted.get_submodule(f"base_model.model.{LAYER}.lora_B.default").weight[0, 0] = float("nan")
    model = adapted.merge_and_unload() if merge else adapted
    with pytest.raises(KoreError, match=rf"{LAYER}: its change is not finite.*lower learning rate"):
        held_out_leak(model, base, tiny_processor, sequences)
