"""KoreLinear: the layer it replaces at first, B alone trained, merged and back, saved for plain PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kore_fast as kf
from kore_fast.constraint import select_linears
from kore_fast.errors import ConstraintError
from kore_fast.modules.linear import kore_linears, save_linears

D_IN, D_OUT, RANK = 32, 24, 5


def layer(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(D_IN, D_OUT, bias=bias, dtype=dtype)


def covariance() -> torch.Tensor:
    old = torch.randn(500, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    old *= torch.logspace(0, -4, D_IN, dtype=torch.float64)
    return old.T @ old


def trained(layer: kf.KoreLinear) -> kf.KoreLinear:
    with torch.no_grad():
        layer.lora_B.normal_(generator=torch.Generator().manual_seed(2))
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_at_first_it_is_the_layer_bit_for_bit(dtype: torch.dtype, bias: bool) -> None:
    plain = layer(dtype, bias)
    made = kf.KoreLinear.from_linear(plain, covariance(), RANK)
    x = torch.randn(3, 7, D_IN, dtype=dtype)
    assert torch.equal(made(x), plain(x))
    assert made.weight is plain.weight
    assert [name for name, p in made.named_parameters() if p.requires_grad] == ["lora_B"]
    assert made.lora_A.dtype == dtype


def test_old_inputs_hardly_notice() -> None:
    C = covariance()
    made = trained(kf.KoreLinear.from_linear(layer(torch.float64), C, RANK))
    change = made.delta()
    moved = float(((change @ C) * change).sum())
    random = torch.randn(RANK, D_IN, dtype=torch.float64)
    random *= made.lora_A.norm() / random.norm()
    other = made.lora_B.detach() @ random
    assert moved < 1e-4 * float(((other @ C) * other).sum())
    assert made.leak is not None
    assert 0 < made.leak < 1e-4


def test_only_b_learns_and_a_stays() -> None:
    made = kf.KoreLinear.from_linear(layer(), covariance(), RANK)
    before = made.lora_A.clone()
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.1)
    for _ in range(3):
        made(torch.randn(9, D_IN)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(made.lora_A, before)
    assert made.lora_B.abs().sum() > 0
    assert made.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_and_back(dtype: torch.dtype) -> None:
    plain = layer(dtype)
    made = trained(kf.KoreLinear.from_linear(plain, covariance(), RANK))
    W, x = plain.weight.detach().clone(), torch.randn(11, D_IN, dtype=dtype)
    apart = made(x)
    made.merge()
    made.merge()
    assert made.merged
    torch.testing.assert_close(made(x), apart, rtol=4 * torch.finfo(dtype).eps, atol=40 * torch.finfo(dtype).eps)
    torch.testing.assert_close(made.to_linear()(x), made(x), rtol=0, atol=0)
    made.unmerge()
    assert not made.merged
    assert torch.equal(made.weight, W)
    assert torch.equal(made(x), apart)
    merged = made.to_linear()
    assert type(merged) is nn.Linear
    assert torch.equal(made.weight, W)
    torch.testing.assert_close(merged(x), apart, rtol=4 * torch.finfo(dtype).eps, atol=40 * torch.finfo(dtype).eps)


def test_its_repr_tells_what_it_is() -> None:
    made = kf.KoreLinear.from_linear(layer(), covariance(), RANK, backend="reference")
    assert f"rank={RANK}, leak={made.leak:.3g}, backend=reference" in repr(made)
    made.merge()
    assert repr(made).endswith("merged)")


def test_state_dict_goes_round() -> None:
    made = trained(kf.KoreLinear.from_linear(layer(), covariance(), RANK))
    other = kf.KoreLinear(D_IN, D_OUT, RANK)
    other.load_state_dict(made.state_dict())
    x = torch.randn(4, D_IN)
    assert torch.equal(other(x), made(x))


FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "rank": (lambda: kf.KoreLinear.from_linear(layer(), covariance(), D_OUT + 1), f"rank {D_OUT + 1}: want 1…{D_OUT}"),
    "rank of a new one": (lambda: kf.KoreLinear(8, 4, 0), "rank 0: want 1…4"),
    "covariance": (lambda: kf.KoreLinear.from_linear(layer(), torch.eye(3), 2), "covariance has shape"),
    "A": (lambda: kf.KoreLinear.from_factor(layer(), torch.zeros(2, 3)), r"A has shape \(2, 3\)"),
    "another class": (
        lambda: kf.KoreLinear.from_factor(kf.KoreLinear(8, 4, 2), torch.zeros(2, 8)),
        "KoreLinear is not a plain",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused(fault: str) -> None:
    make, message = FAULTS[fault]
    with pytest.raises(ConstraintError, match=message):
        make()


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


@pytest.fixture
def batch(tiny_model: nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("rank", [4, {"energy": 1e-3, "highest": 6}])
def test_a_whole_model_and_plain_peft(
    tiny_model: nn.Module, tiny_model_folder: Path, batch: dict[str, torch.Tensor], rank: Any, tmp_path: Path
) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    before = logits(tiny_model, batch)
    names = select_linears(tiny_model)
    store = kf.collect_covariance(tiny_model, [batch], warn_few_tokens=False)
    leaks = kf.replace_linears(tiny_model, store, rank)
    layers = kore_linears(tiny_model)
    assert [found.layer for found in leaks] == names == list(layers)
    assert all(layers[found.layer].leak == found.leak for found in leaks)
    assert torch.equal(logits(tiny_model, batch), before)
    assert {name.rpartition(".")[2] for name, p in tiny_model.named_parameters() if p.requires_grad} == {"lora_B"}
    for made in layers.values():
        trained(made)
    after = logits(tiny_model, batch)
    assert not torch.allclose(after, before)

    kf.save_kore_adapter(tiny_model, tmp_path / "adapter")
    base = transformers.AutoModelForImageTextToText.from_pretrained(tiny_model_folder).eval()
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded, batch), after, rtol=1e-4, atol=1e-4)


def test_a_model_without_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConstraintError, match="no KoreLinear"):
        save_linears(nn.Linear(3, 3), tmp_path)


def test_none_is_swapped_where_one_cannot_be(tiny_model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    store = kf.collect_covariance(tiny_model, [batch], warn_few_tokens=False)
    name = select_linears(tiny_model)[-1]
    parent, _, child = name.rpartition(".")
    old = getattr(tiny_model.get_submodule(parent), child)

    class Other(nn.Linear):
        pass

    other = Other(old.in_features, old.out_features, old.bias is not None)
    setattr(tiny_model.get_submodule(parent), child, other)
    with pytest.raises(ConstraintError, match=f"{name}: a Other is not a plain"):
        kf.replace_linears(tiny_model, store, 4)
    assert not kore_linears(tiny_model)
