"""A model's fingerprint: the same over dtypes, another for another model."""

from __future__ import annotations

import copy

import torch
from torch import nn

from kore_fast.constraint import select_linears
from kore_fast.constraint.fingerprint import model_fingerprint


def test_same_over_dtypes_and_other_for_other_weights(tiny_model: nn.Module) -> None:
    layers = select_linears(tiny_model)
    found = model_fingerprint(tiny_model, layers)
    assert model_fingerprint(copy.deepcopy(tiny_model).bfloat16(), layers) == found
    assert model_fingerprint(copy.deepcopy(tiny_model).double(), layers) == found
    assert model_fingerprint(tiny_model, layers[:-1]) != found
    for name in (layers[0], layers[-1]):
        changed = copy.deepcopy(tiny_model)
        with torch.no_grad():
            changed.get_submodule(name).weight.mul_(1.1)
        assert model_fingerprint(changed, layers) != found


def test_names_and_shapes_count() -> None:
    first, second = nn.Module(), nn.Module()
    first.a = nn.Linear(4, 6, bias=False)
    second.b = nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        second.b.weight.copy_(first.a.weight.reshape(4, 6))
    third = nn.Module()
    third.a = nn.Linear(6, 4, bias=False)
    third.a.weight = second.b.weight
    found = {
        model_fingerprint(first, ["a"]),
        model_fingerprint(second, ["b"]),
        model_fingerprint(third, ["a"]),
    }
    assert len(found) == 3
