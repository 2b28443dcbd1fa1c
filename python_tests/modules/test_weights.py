"""Reading weights: quantised ones as they compute, unknown ones not at all.

bitsandbytes is optional: its layers are stood in for by classes of the same names and fields. Where it is installed,
its own are tried too.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from kore_fast.constraint import KoreConfig, collect_covariance, get_kore_model, kore_factors
from kore_fast.constraint.fingerprint import model_fingerprint
from kore_fast.errors import ConstraintError
from kore_fast.modules.linear import KoreLinear
from kore_fast.modules.weights import LayerWeight, codes
from kore_fast.ops.factors import nullspace_factors

BLOCK = 8
CODE = torch.linspace(-1, 1, 16)


def weight_of(layer: nn.Linear) -> torch.Tensor:
    return LayerWeight("layer", layer).read()


@dataclass
class QuantState:
    absmax: torch.Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype


def dequantize_4bit(A: torch.Tensor, quant_state: QuantState) -> torch.Tensor:
    """Two values a byte, the first in the high half; a scale a block."""
    halves = torch.stack([A.reshape(-1) >> 4, A.reshape(-1) & 15], dim=1).reshape(-1).long()
    values = CODE[halves].reshape(-1, BLOCK) * quant_state.absmax[:, None]
    return values.reshape(quant_state.shape).to(quant_state.dtype)


class Params4bit(nn.Parameter):
    quant_state: QuantState | None

    def __new__(cls, weight: torch.Tensor) -> Params4bit:
        blocks = weight.detach().reshape(-1, BLOCK)
        absmax = blocks.abs().amax(1)
        codes = (((blocks / absmax[:, None]) + 1) * 7.5).round().clamp(0, 15).to(torch.uint8).reshape(-1, 2)
        made = torch.Tensor._make_subclass(cls, (codes[:, :1] << 4) | codes[:, 1:], False)
        made.quant_state = QuantState(absmax, tuple(weight.shape), torch.bfloat16)
        return made


class Linear4bit(nn.Linear):
    def quantize(self) -> Linear4bit:
        self.weight = Params4bit(self.weight)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self.weight
        return nn.functional.linear(x, dequantize_4bit(weight.data, weight.quant_state).to(x.dtype), self.bias)


class Int8Params(nn.Parameter):
    SCB: torch.Tensor | None

    def __new__(cls, weight: torch.Tensor) -> Int8Params:
        scale = weight.detach().abs().amax(1)
        made = torch.Tensor._make_subclass(cls, (weight.detach() * 127 / scale[:, None]).round().to(torch.int8), False)
        made.SCB = scale
        return made


class State:
    SCB: torch.Tensor | None = None


class Linear8bitLt(nn.Linear):
    def quantize(self) -> Linear8bitLt:
        self.state, self.weight = State(), Int8Params(self.weight)
        return self


class Pair(nn.Module):
    """Two layers with one input, of which the first may be quantised."""

    def __init__(self, first: type[nn.Linear]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = first(16, 12), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x).sum() + self.b(x).sum()


@pytest.fixture
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = ModuleType("bitsandbytes.functional")
    functional.dequantize_4bit = dequantize_4bit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", functional)


def test_plain_weights_are_themselves() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        linear = nn.Linear(4, 3).to(dtype)
        assert weight_of(linear).data_ptr() == linear.weight.data_ptr()
        assert not weight_of(linear).requires_grad


@pytest.mark.usefixtures("bitsandbytes")
def test_4bit_weights_as_they_compute() -> None:
    layer = Linear4bit(16, 12)
    plain = layer.weight.detach().clone()
    layer.quantize()
    assert layer.weight.dtype == torch.uint8
    weight = LayerWeight("q", layer)
    assert weight.shape == (12, 16)
    # Half a step of 16 codes, and the rounding to bfloat16.
    assert float((weight.read().float() - plain).abs().max()) <= float(plain.abs().max()) * (1 / 15 + 2**-8)
    x = torch.eye(16)
    assert torch.allclose(nn.functional.linear(x, weight.read().float(), layer.bias), layer(x))


@pytest.mark.usefixtures("bitsandbytes")
def test_factors_of_a_4bit_layer() -> None:
    model = Pair(Linear4bit)
    model.a.quantize()
    store = collect_covariance(model, [{"x": torch.randn(40, 16)}], target_modules=["a", "b"])
    factors, leaks = kore_factors(model, KoreConfig(rank=5, target_modules=["a", "b"]), store)
    _, vectors = torch.linalg.eigh(store.covariance("a"))
    basis = vectors[:, :5]
    real = {"a": dequantize_4bit(model.a.weight.data, model.a.weight.quant_state), "b": model.b.weight}
    for name, weight in real.items():
        wanted = nullspace_factors(weight, basis)
        assert torch.allclose(factors[name].B0 @ factors[name].A, wanted.B0 @ wanted.A, atol=1e-12)
    assert [(leak.d_out, leak.d_in) for leak in leaks] == [(12, 16), (8, 16)]
    with pytest.raises(ConstraintError, match=r"a: rank 13 .*d_out 12, d_in 16"):
        kore_factors(model, KoreConfig(rank=13, target_modules=["a"]), store)
    with pytest.raises(ConstraintError, match="a: form='residual' changes"):
        get_kore_model(model, KoreConfig(rank=5, target_modules=["a", "b"], form="residual"), store)


@pytest.mark.usefixtures("bitsandbytes")
def test_a_weight_repacked_for_the_cpu_is_refused() -> None:
    layer: Any = Linear4bit(16, 12).quantize()
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ConstraintError, match="q: a forward pass has repacked its 4-bit weight"):
        LayerWeight("q", layer)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "8-bit"])
def test_with_bitsandbytes_itself(kind: str) -> None:
    """The weight is what its own layer multiplies by."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = torch.randn(64, 64) / 8
    if kind == "8-bit":
        layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(plain.half(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type=kind)
        layer.weight = bnb.nn.Params4bit(plain.clone(), requires_grad=False, quant_type=kind)
    assert float((weight_of(layer).float() - plain).abs().max()) < 1e-3  # not quantised yet
    layer = layer.to("cpu").train()  # in evaluation it may be repacked
    assert LayerWeight("q", layer).shape == (64, 64)
    found = weight_of(layer)
    assert not torch.equal(found, plain)
    assert float((found - plain).abs().max()) < (0.01 if kind == "8-bit" else 0.2) * float(plain.abs().max())
    # Its 8-bit product rounds x too, but not one-hot rows.
    assert torch.allclose(layer(torch.eye(64)).T, found, atol=1e-6)
    assert torch.equal(weight_of(layer), found)


@pytest.mark.parametrize("moved", [False, True])
def test_8bit_weights_before_and_after_the_first_forward_pass(moved: bool) -> None:
    layer = Linear8bitLt(16, 12)
    plain = layer.weight.detach().clone()
    layer.quantize()
    if moved:
        weight: Any = layer.weight
        layer.state.SCB, weight.SCB = weight.SCB, None
    found = weight_of(layer)
    assert float(((found - plain).abs() / plain.abs().amax(1, keepdim=True)).max()) <= 0.5 / 127 * (1 + 1e-5)


def test_4bit_without_bitsandbytes_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ConstraintError, match="layer: a 4-bit weight; pip install bitsandbytes"):
        weight_of(Linear4bit(16, 4).quantize())


def given(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.zeros(6, 1, dtype=torch.uint8), "a Linear with a Parameter of torch.uint8"),
        (torch.zeros(3, 4, dtype=torch.int8), "of torch.int8"),
        (torch.zeros(3, 4).to(torch.float8_e4m3fn), "of torch.float8_e4m3fn"),
        (torch.zeros(12), r"shape \(12,\), want \(d_out, d_in\); FSDP1 and ZeRO-3"),
        (torch.zeros(0), "FSDP1 and ZeRO-3"),
    ],
)
def test_what_is_not_known_is_refused_before_it_is_read(weight: torch.Tensor, said: str) -> None:
    with pytest.raises(ConstraintError, match=f"layers.7.q: .*{said}"):
        LayerWeight("layers.7.q", given(weight))


def test_an_unknown_layer_is_refused_before_any_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    from kore_fast.constraint import factors

    model = Pair(nn.Linear)
    store = collect_covariance(model, [{"x": torch.randn(40, 16)}], target_modules=["a", "b"])
    monkeypatch.setattr(factors, "nullspace", lambda *_, **__: pytest.fail("solved"))
    config = KoreConfig(rank=2, target_modules=["a", "b"])
    model.b = given(torch.zeros(64, 1, dtype=torch.uint8))
    with pytest.raises(ConstraintError, match=r"b: a Linear with .*uint8.*unquantised"):
        kore_factors(model, config, store)
    model.b = nn.Linear(16, 8, device="meta")
    with pytest.raises(ConstraintError, match="b: its weight is not loaded"):
        kore_factors(model, config, store)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_weights_that_bitsandbytes_has_repacked(kind: str, nested: bool) -> None:
    """As its forward pass in evaluation mode does on CPUs with bfloat16; here by its own function, on any."""
    bnb = pytest.importorskip("bitsandbytes")
    repack = pytest.importorskip("bitsandbytes.functional")._convert_weight_packed_for_cpu
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type=kind)
    plain = torch.randn(64, 128) / 8
    layer.weight = bnb.nn.Params4bit(plain, requires_grad=False, quant_type=kind, compress_statistics=nested)
    layer = layer.to("cpu")
    before, print_before = layer.weight.data.clone(), model_fingerprint(nn.Sequential(layer), ["0"])
    scales = layer.weight.quant_state.absmax
    if nested:
        state = layer.weight.quant_state
        scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    scales = scales.repeat_interleave(64).reshape(64, 128)
    wanted = weight_of(layer) / scales * scales.bfloat16().float()  # it rounds the scales

    layer.weight.data, layer.weight.quant_state = repack(layer.weight.data, layer.weight.quant_state)
    assert layer.weight.quant_state.packing_format_for_cpu
    packed = layer.weight.data.clone()
    assert LayerWeight("q", layer).shape == (64, 128)
    torch.testing.assert_close(weight_of(layer), wanted, rtol=1e-5, atol=1e-7)
    assert torch.equal(codes(layer.weight), before)
    assert model_fingerprint(nn.Sequential(layer), ["0"]) == print_before
    assert torch.equal(layer.weight.data, packed)
    assert layer.weight.quant_state.packing_format_for_cpu

    made = KoreLinear.from_factor(layer, torch.randn(3, 128))
    nn.init.normal_(made.lora_B)
    torch.testing.assert_close(made.to_linear(torch.float32).weight, wanted + made.delta(), rtol=1e-4, atol=1e-6)
    kept = layer.weight
    with pytest.warns(UserWarning, match=f"merged into {kind}"):
        made.merge()
    assert layer.weight.quant_state.nested is nested
    made.unmerge()
    assert layer.weight is kept
