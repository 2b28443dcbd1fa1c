"""A rank for each layer: PEFT's own patterns, exact names, scaling 1, and files that plain PEFT loads alike."""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from kore_fast.constraint.selection import select_linears, target_pattern
from kore_fast.errors import ConstraintError
from kore_fast.modules.adapter import as_kore_model, attach_lora, load_kore_model, lora_config_for, lora_layers
from kore_fast.modules.adapter import model_lora_a_hash as a_hash
from kore_fast.modules.loading import load_model

IDS = torch.arange(4, 84).reshape(4, 20)


def factors(model: nn.Module, ranks: dict[str, int]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(rank, model.get_submodule(name).weight.shape[1]) for name, rank in ranks.items()}


def pattern(model: nn.Module, ranks: dict[str, int]) -> str | list[str]:
    return target_pattern(list(ranks), [name for name, _ in model.named_modules()])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def ranks(tiny_model: nn.Module) -> dict[str, int]:
    """Of every layer another than its neighbours', 3 the commonest."""
    names = select_linears(tiny_model)
    return {name: 3 if place % 3 == 0 else 1 + place for place, name in enumerate(names)}


def test_saved_and_loaded_by_plain_peft(
    tiny_model: nn.Module, tiny_model_folder: Path, tmp_path: Path, ranks: dict[str, int]
) -> None:
    base = logits(tiny_model)
    A = factors(tiny_model, ranks)
    model = attach_lora(tiny_model, lora_config_for(ranks, pattern(tiny_model, ranks)), A)
    assert torch.equal(logits(model), base)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight.normal_(std=0.02)
    ours = logits(model)
    model.save_pretrained(str(tmp_path))

    # Scaling 1: B·A added to the weights by hand is the same function.
    by_hand = load_model(tiny_model_folder)
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            by_hand.get_submodule(name).weight += layer.lora_B["default"].weight @ A[name]
    assert float((logits(by_hand) - ours).abs().max()) < 1e-5
    assert float((base - ours).abs().max()) > 1e-3

    found = peft.PeftModel.from_pretrained(load_model(tiny_model_folder), str(tmp_path))
    assert type(found) is PeftModel
    assert torch.equal(logits(found), ours)
    layers = lora_layers(found)
    assert set(layers) == set(ranks)
    for name, layer in layers.items():
        assert layer.lora_A["default"].weight.shape[0] == layer.r["default"] == ranks[name]
        assert layer.scaling == {"default": 1.0}
        assert torch.equal(layer.lora_A["default"].weight, A[name])


def test_a_kore_model_of_many_ranks(
    tiny_model: nn.Module, tiny_model_folder: Path, tmp_path: Path, ranks: dict[str, int]
) -> None:
    model = attach_lora(
        tiny_model,
        lora_config_for(ranks, pattern(tiny_model, ranks), ["multi_modal_projector"]),
        factors(tiny_model, ranks),
    )
    kore = as_kore_model(model, {"format": "kore_fast.adapter/1", "lora_a_sha256": a_hash(model)})
    kore.save_pretrained(str(tmp_path))
    found = load_kore_model(load_model(tiny_model_folder), tmp_path, is_trainable=True)
    trained = {name: p for name, p in found.named_parameters() if p.requires_grad}
    assert all("lora_B" in name or "multi_modal_projector" in name for name in trained)
    wanted = sum(rank * tiny_model.get_submodule(name).out_features for name, rank in ranks.items())
    assert sum(p.numel() for name, p in trained.items() if "lora_B" in name) == wanted


def test_equal_ranks_need_no_pattern(tiny_model: nn.Module, tmp_path: Path) -> None:
    ranks = dict.fromkeys(select_linears(tiny_model), 5)
    config = lora_config_for(ranks, pattern(tiny_model, ranks))
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (5, 5, {}, {})
    plain = LoraConfig(r=5, lora_alpha=5, lora_dropout=0.0, target_modules=pattern(tiny_model, ranks))
    config.save_pretrained(str(tmp_path / "ours"))
    plain.save_pretrained(str(tmp_path / "plain"))
    files = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "plain")]
    assert files[0] == files[1]


def test_only_layers_of_another_rank_stand_in_the_patterns(ranks: dict[str, int]) -> None:
    config = lora_config_for(ranks)
    assert config.r == config.lora_alpha == 3
    assert config.rank_pattern == config.alpha_pattern
    assert sorted(config.rank_pattern.values()) == sorted(rank for rank in ranks.values() if rank != 3)
    assert lora_config_for({"a": 2, "b": 1}).r == 1


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.xq = nn.Linear(4, 4)


class Nested(nn.Module):
    """Names that are ends, or with a dot for any sign matches, of others."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Inner() for _ in range(2)])
        self.deep = nn.ModuleDict({"blocks": nn.ModuleList([Inner() for _ in range(2)]), "blocks_0": Inner()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_names_that_end_like_others_keep_their_own_rank() -> None:
    names = [name for name, module in Nested().named_modules() if isinstance(module, nn.Linear)]
    assert {"q", "blocks.0.q", "deep.blocks.0.q"} < set(names)
    for turn in range(len(names)):
        ranks = {name: 1 + (place + turn) % 3 for place, name in enumerate(names)}
        config = lora_config_for(ranks, "|".join(map(re.escape, names)))
        model = attach_lora(Nested(), config, factors(Nested(), ranks))
        assert {name: layer.r["default"] for name, layer in lora_layers(model).items()} == ranks
        assert all(layer.scaling["default"] == 1.0 for layer in lora_layers(model).values())


def test_a_factor_of_another_rank_is_refused(tiny_model: nn.Module) -> None:
    names = select_linears(tiny_model, r".*language_model.*q_proj")
    # A single row would otherwise be copied into every row.
    A = {names[0]: torch.ones(2, 32), names[1]: torch.ones(1, 32)}
    with pytest.raises(ConstraintError, match=r"layers\.1\.self_attn\.q_proj.*\(1, 32\).*\(2, 32\)"):
        attach_lora(tiny_model, lora_config_for(dict.fromkeys(names, 2)), A)


def test_no_ranks_or_a_rank_of_none() -> None:
    with pytest.raises(ConstraintError, match="no layers"):
        lora_config_for({})
    with pytest.raises(ConstraintError, match="b: rank 0"):
        lora_config_for({"a": 1, "b": 0})
