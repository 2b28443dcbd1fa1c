"""Which layers are constrained, and the pattern that names exactly them."""

from __future__ import annotations

import re

import pytest
from torch import nn

from kore_fast.constraint import decoder_linears, select_linears
from kore_fast.constraint.selection import narrow, target_pattern
from kore_fast.errors import ConstraintError

ENDINGS = [
    *(f"self_attn.{n}_proj" for n in "qkvo"),
    *(f"mlp.{n}_proj" for n in ("gate", "up", "down")),
]
WANTED = [f"model.language_model.layers.{i}.{ending}" for i in range(2) for ending in ENDINGS]


def test_every_linear_of_the_decoder_and_nothing_else(tiny_model: nn.Module) -> None:
    assert decoder_linears(tiny_model) == WANTED
    assert select_linears(tiny_model) == WANTED
    linears = {n for n, m in tiny_model.named_modules() if isinstance(m, nn.Linear)}
    assert any("vision_tower" in n for n in linears - set(WANTED))
    assert "lm_head" in linears - set(WANTED)


def test_a_model_without_get_decoder() -> None:
    model = nn.Module()
    model.short = nn.ModuleList([nn.Linear(2, 2)])
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3)])
    assert decoder_linears(model) == ["layers.0.0", "layers.1.0", "layers.2.0"]


def test_a_language_model_whose_get_decoder_answers_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    )
    wanted = [f"model.layers.{i}.{ending}" for i in range(2) for ending in ENDINGS]
    assert decoder_linears(model) == wanted
    monkeypatch.setattr(LlamaForCausalLM, "get_decoder", lambda self: None)
    assert decoder_linears(model) == wanted


def test_no_layers_to_find() -> None:
    with pytest.raises(ConstraintError, match="no list of decoder layers"):
        decoder_linears(nn.Linear(2, 2))
    model = nn.Module()
    model.layers = nn.ModuleList([nn.LayerNorm(2)])
    with pytest.raises(ConstraintError, match=r"no nn\.Linear"):
        decoder_linears(model)


def test_targets_by_expression_and_by_name(tiny_model: nn.Module) -> None:
    expression = r"model\.language_model\..*\.(q|v)_proj"
    assert select_linears(tiny_model, expression) == [n for n in WANTED if n.endswith(("q_proj", "v_proj"))]
    assert select_linears(tiny_model, ["mlp.up_proj", "layers.0.self_attn.o_proj"]) == [
        n for n in WANTED if n.endswith(("up_proj", "layers.0.self_attn.o_proj"))
    ]
    # A name's ending starts at a dot: "proj" is not the end of "q_proj".
    with pytest.raises(ConstraintError, match="matches no layer"):
        select_linears(tiny_model, ["proj"])


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (r".*no_such.*", "matches no layer of LlavaForConditionalGeneration"),
        (["no_such"], "matches no layer"),
        (r"(unclosed", "not a regular expression"),
        (r".*language_model.*layers\.0\.mlp", r"layers\.0\.mlp: target_modules matches a LlamaMLP"),
    ],
)
def test_targets_that_cannot_be_constrained(tiny_model: nn.Module, targets: str | list[str], named: str) -> None:
    with pytest.raises(ConstraintError, match=named):
        select_linears(tiny_model, targets)


@pytest.mark.parametrize(
    "chosen", [WANTED, WANTED[:7], WANTED[:1], [n for n in WANTED if "mlp" in n], [*WANTED, "lm_head"], ["lm_head"]]
)
def test_pattern_matches_exactly_the_chosen(tiny_model: nn.Module, chosen: list[str]) -> None:
    names = [name for name, _ in tiny_model.named_modules()]
    pattern = target_pattern(chosen, names)
    matched = [n for n in names if re.fullmatch(pattern, n)] if isinstance(pattern, str) else pattern
    assert sorted(matched) == sorted(chosen)
    # One expression where whole layers are meant, not a list of hundreds.
    assert isinstance(pattern, str) == (chosen == WANTED or all("mlp" in n for n in chosen))


def test_layers_are_chosen_by_depth_and_part() -> None:
    names = [f"model.layers.{n}.{part}" for n in range(32) for part in ("self_attn.q_proj", "mlp.up_proj")]
    thirds = [narrow(names, depth) for depth in ("first third", "middle third", "last third")]
    assert [name for third in thirds for name in third] == names
    assert [len(third) for third in thirds] == [20, 22, 22]
    assert narrow(names, "last third", "mlp") == [f"model.layers.{n}.mlp.up_proj" for n in range(21, 32)]
    assert {*narrow(names, part="attention"), *narrow(names, part="mlp")} == set(names)
    assert narrow(names) == names
    with pytest.raises(ConstraintError, match="head: not in a numbered block"):
        narrow([*names, "head"], "first third")
    with pytest.raises(ConstraintError, match="no layer is left"):
        narrow(["model.layers.0.self_attn.q_proj"], part="mlp")
