"""KoreLinear on layers of bitsandbytes: their own product, the adapter beside it, merged and back, whole models.

bitsandbytes is optional, and so are these tests; they run on the CPU.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

import kore_fast as kf
from kore_fast.errors import BackendError, ConstraintError
from kore_fast.modules.linear import kore_linears, swap_linears
from kore_fast.modules.weights import LayerWeight

bnb: Any = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

# On CPUs with bfloat16 its forward pass in evaluation mode wants multiples of 32 and of its blocks of 64.
D_IN, D_OUT, RANK = 128, 64, 5
KINDS = ["nf4", "fp4", "int8"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def quantised(kind: str, compute: torch.dtype | None = torch.float32, bias: bool = True, **settings: Any) -> nn.Linear:
    torch.manual_seed(0)
    plain = nn.Linear(D_IN, D_OUT, bias=bias)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(D_IN, D_OUT, bias=bias, has_fp16_weights=False, threshold=6.0)
        layer.weight = bnb.nn.Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(D_IN, D_OUT, bias=bias, compute_dtype=compute, quant_type=kind, **settings)
        layer.weight = bnb.nn.Params4bit(
            plain.weight.data, requires_grad=False, quant_type=kind, module=layer, **settings
        )
    if bias:
        layer.bias = nn.Parameter(plain.bias.data)
    return layer.to("cpu")


def covariance() -> torch.Tensor:
    old = torch.randn(500, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    old *= torch.logspace(0, -4, D_IN, dtype=torch.float64)
    return old.T @ old


def adapted(layer: nn.Linear) -> kf.KoreLinear:
    return kf.KoreLinear.from_linear(layer, covariance(), RANK)


def trained(layer: kf.KoreLinear) -> kf.KoreLinear:
    with torch.no_grad():
        layer.lora_B.normal_(generator=torch.Generator().manual_seed(2))
    return layer


def dequantised(layer: nn.Linear) -> torch.Tensor:
    return LayerWeight("layer", layer).read(torch.float32)


def stored(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Byte for byte; codes in floating storage may read as NaN."""
    return left.keys() == right.keys() and all(
        torch.equal(left[name].reshape(-1).view(torch.uint8), right[name].reshape(-1).view(torch.uint8))
        for name in left
    )


def quietly_merge(layer: kf.KoreLinear) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.merge()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_at_first_it_is_the_layer_bit_for_bit(kind: str, dtype: torch.dtype, bias: bool, training: bool) -> None:
    base = quantised(kind, dtype, bias)
    weight = base.weight
    made = adapted(base).train(training)
    x = torch.randn(3, 7, D_IN, dtype=dtype)
    assert torch.equal(made(x), base(x))
    assert made.weight is base.weight is weight
    assert [name for name, p in made.named_parameters() if p.requires_grad] == ["lora_B"]
    assert made.lora_A.dtype == made.lora_B.dtype == torch.float32
    assert made.leak is not None
    assert 0 < made.leak < 1e-4


def test_a_lies_where_that_of_the_same_plain_layer_lies() -> None:
    base = quantised("nf4")
    plain = nn.Linear(D_IN, D_OUT)
    plain.weight = nn.Parameter(dequantised(base))
    torch.testing.assert_close(adapted(base).lora_A.abs(), adapted(plain).lora_A.abs(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_errors_against_float64(kind: str, dtype: torch.dtype) -> None:
    """In training bitsandbytes' products on CPUs are those of the dequantised weight, as plain PyTorch's are."""
    made = trained(adapted(quantised(kind, dtype))).train()
    W, bias = dequantised(made.base_layer), made.bias.detach()
    x = torch.randn(3, 7, D_IN).to(dtype)
    dy = torch.randn(3, 7, D_OUT).to(dtype)

    def run(function: Callable[..., torch.Tensor], wide: torch.dtype) -> list[torch.Tensor]:
        given = x.to(wide).requires_grad_()
        B = made.lora_B.detach().to(torch.promote_types(wide, torch.float32)).requires_grad_()
        y = function(given, B)
        return [y.detach(), *torch.autograd.grad(y, [given, B], dy.to(wide))]

    def plainly(x: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        A = made.lora_A.to(x.dtype)
        return linear(x, W.to(x.dtype), bias.to(x.dtype)) + linear(linear(x, A), B.to(x.dtype))

    def ours(x: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(made, {"lora_B": B}, (x,))

    for found, plain, exact in zip(run(ours, dtype), run(plainly, dtype), run(plainly, torch.float64), strict=True):
        assert found.dtype == plain.dtype
        assert (found.double() - exact).norm() <= 2 * (plain.double() - exact).norm()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_added_to_the_bases_own_product(kind: str, dtype: torch.dtype) -> None:
    made = trained(adapted(quantised(kind, dtype))).eval()
    x = torch.randn(9, D_IN).to(dtype)
    with torch.no_grad():
        base, found = made.base_layer(x), made(x)
    A, B = made.lora_A, made.lora_B.detach()
    exact = base.double() + x.double() @ A.double().T @ B.double().T
    plain = base + linear(linear(x, A.to(dtype)), B.to(dtype))
    assert (found.double() - exact).norm() <= 2 * (plain.double() - exact).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_only_b_learns(kind: str) -> None:
    made = adapted(quantised(kind)).train()
    made(torch.randn(2, D_IN))
    before = stored(made)
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(9, D_IN, requires_grad=True)
    for _ in range(3):
        made(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = stored(made)
    assert after.pop("lora_B").abs().sum() > 0
    before.pop("lora_B")
    assert same(before, after)
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_for_backward_the_adapter_keeps_z_alone(kind: str, dtype: torch.dtype) -> None:
    made = trained(adapted(quantised(kind, dtype))).train()
    kept: list[torch.Tensor] = []
    h = torch.randn(11, D_IN, dtype=dtype, requires_grad=True) * 2
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = made(h)
    theirs = {made.lora_A.data_ptr(), made.lora_B.data_ptr()}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in theirs] == [(11, RANK)]
    if kind != "int8":  # whose own backward pass keeps x, in bitsandbytes
        seen = weakref.ref(h)
        del h
        assert seen() is None
    y.sum().backward()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast(kind: str, training: bool) -> None:
    base = quantised(kind, torch.bfloat16)
    made = adapted(base).train(training)
    x = torch.randn(5, D_IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        first, wanted = made(x), base(x)
        assert first.dtype == wanted.dtype
        assert torch.equal(first, wanted)
        found = trained(made)(x)
    exact = wanted.double() + x.double() @ made.delta().double().T
    assert (found.double() - exact).norm() <= 2**-7 * exact.norm()
    found.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == made.lora_B.grad.dtype == torch.float32  # type: ignore[union-attr]


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4": ("nf4", {"compress_statistics": False}),
    "nf4, scales quantised too": ("nf4", {"compress_statistics": True}),
    "fp4 in bfloat16 storage": ("fp4", {"quant_storage": torch.bfloat16}),
    "int8": ("int8", {}),
}


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("setting", SETTINGS)
def test_merged_and_back(setting: str, used: bool) -> None:
    kind, settings = SETTINGS[setting]
    base = quantised(kind, **settings)
    made = trained(adapted(base)).train()
    x = torch.randn(11, D_IN)
    if used:  # bitsandbytes moves things at the first forward pass
        made(x)
    before, W = stored(base), dequantised(base)
    wanted = W + made.delta()
    with pytest.warns(UserWarning, match=f"merged into {kind}: the rounding of W . B·A is .* times as large") as said:
        made.merge()
    made.merge()
    assert len(said) == 1
    assert made.merged
    after = dequantised(base)
    # Half a step of the row's or the block's largest: of 1/127, or of what is between a 4-bit type's widest two values.
    blocks = wanted.reshape(-1, D_IN if kind == "int8" else 64)
    steps = blocks.abs().amax(1, keepdim=True) * (1 / 127 if kind == "int8" else 1 / 3)
    assert ((after.reshape(blocks.shape) - blocks).abs() <= 0.6 * steps).all()
    assert float(str(said[0].message).split(" is ")[1].split()[0]) == pytest.approx(
        float((after - wanted).norm() / made.delta().norm()), rel=0.5
    )
    torch.testing.assert_close(made(x), linear(x, after, made.bias), rtol=1e-5, atol=1e-5)
    assert type(made.weight) is type(quantised(kind, **settings).weight)
    merged = made.to_linear()
    torch.testing.assert_close(merged.weight, wanted.to(merged.weight.dtype), rtol=0, atol=0)
    assert torch.equal(dequantised(base), after)
    made.unmerge()
    made.unmerge()
    assert not made.merged
    assert same(stored(base), before)
    assert torch.equal(dequantised(base), W)
    if kind != "int8":
        new, old = stored(base), before
        assert [k for k in new if "quant_state" in k] == [k for k in old if "quant_state" in k]


def test_merged_weights_keep_their_settings() -> None:
    base: Any = quantised("nf4", torch.bfloat16, compress_statistics=True, quant_storage=torch.bfloat16)
    before = base.weight
    before.quant_state.dtype = torch.bfloat16
    quietly_merge(trained(adapted(base)))
    assert base.weight is not before
    for name in ("dtype", "shape", "blocksize", "quant_type", "quant_storage", "compress_statistics", "requires_grad"):
        assert getattr(base.weight, name) == getattr(before, name)
    for name in ("dtype", "shape", "blocksize", "quant_type", "nested"):
        assert getattr(base.weight.quant_state, name) == getattr(before.quant_state, name)
    assert base.quant_state is base.weight.quant_state


def test_a_merge_of_nothing_changes_nothing() -> None:
    base = quantised("nf4")
    before = stored(base)
    made = adapted(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.merge()
    assert made.merged
    assert same(stored(base), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_that_overflows_is_refused(kind: str) -> None:
    base = quantised(kind)
    before = stored(base)
    made = adapted(base)
    with torch.no_grad():
        made.lora_B.fill_(float("inf"))
    with pytest.raises(ConstraintError, match=f"not finite in {kind}; the layer is not merged"):
        made.merge()
    assert not made.merged
    assert same(stored(base), before)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_layer_of_it(kind: str, compute: torch.dtype) -> None:
    made = trained(adapted(quantised(kind, compute))).train()
    x = torch.randn(7, D_IN, dtype=compute)
    wanted = made(x)
    plain = made.to_linear()
    assert type(plain) is nn.Linear
    assert plain.weight.dtype == plain.bias.dtype == compute
    assert not plain.weight.requires_grad
    exact = dequantised(made.base_layer).double() + made.lora_B.double() @ made.lora_A.double()
    assert (plain.weight.double() - exact).norm() <= 2 * (exact.to(compute).double() - exact).norm() + 1e-6
    eps = torch.finfo(compute).eps
    torch.testing.assert_close(plain(x), wanted, rtol=8 * eps, atol=40 * eps)
    assert made.to_linear(torch.float64).weight.dtype == torch.float64


def test_a_plain_layer_of_8bit_without_bias() -> None:
    assert adapted(quantised("int8", bias=False)).to_linear().weight.dtype == torch.float16


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": lambda layer: _through_a_file(layer),
}


def _through_a_file(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("used", [True, False])
def test_copies_compute_the_same(way: str, kind: str, used: bool) -> None:
    made = trained(adapted(quantised(kind))).train()
    x = torch.randn(4, D_IN)
    if used:
        made(x)
    other = COPIES[way](made)
    assert torch.equal(other(x), made(x))
    assert other.lora_B is not made.lora_B
    with torch.no_grad():
        other.lora_B.zero_()
    assert not torch.equal(other(x), made(x))
    quietly_merge(trained(other))
    other.unmerge()
    assert torch.equal(other(x), made(x))


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapters_state_goes_round(kind: str) -> None:
    made, other = trained(adapted(quantised(kind))), adapted(quantised(kind))
    state = {name: tensor for name, tensor in made.state_dict().items() if name.startswith("lora_")}
    assert set(state) == {"lora_A", "lora_B"}
    assert {name for name in made.state_dict() if name not in state} == {
        f"base_layer.{name}" for name in made.base_layer.state_dict()
    }
    found = other.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    x = torch.randn(4, D_IN)
    assert torch.equal(other(x), made(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_dtype_is_the_adapters(kind: str) -> None:
    made = trained(adapted(quantised(kind, torch.bfloat16)))
    W = dequantised(made.base_layer)
    made.to(torch.bfloat16)
    assert made.lora_A.dtype == made.lora_B.dtype == torch.bfloat16
    assert torch.equal(dequantised(made.base_layer), W)
    assert made(torch.randn(3, D_IN, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_modes_reach_the_base() -> None:
    base = quantised("int8").eval()
    made = adapted(base)
    assert not made.training
    made.train()
    assert base.training
    made.eval()
    assert not base.training


@pytest.mark.parametrize("kind", KINDS)
def test_its_repr_tells_what_it_is(kind: str) -> None:
    made = trained(adapted(quantised(kind)))
    first = f"in_features={D_IN}, out_features={D_OUT}, bias=True, base={kind}, rank={RANK}, leak={made.leak:.3g}"
    assert made.extra_repr() == f"{first}, backend=auto"
    assert repr(made).startswith("KoreLinear(")
    quietly_merge(made)
    assert made.extra_repr().endswith("backend=auto, merged")


class Other(nn.Linear):
    """As other quantisers' layers."""


FAULTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "not quantised yet": (
        lambda: bnb.nn.Linear4bit(D_IN, D_OUT),
        "a Linear4bit is not a plain nn.Linear, and its weight is not quantised: .*when the layer is moved",
    ),
    "8-bit not quantised yet": (lambda: bnb.nn.Linear8bitLt(D_IN, D_OUT, has_fp16_weights=False), "is not quantised"),
    "trained in float16": (lambda: bnb.nn.Linear8bitLt(D_IN, D_OUT).to("cpu"), "has_fp16_weights=True"),
    "another quantiser": (lambda: Other(D_IN, D_OUT), "another library has quantised it, use the unquantised model"),
    "adapted before": (lambda: adapted(quantised("nf4")), "where it has an adapter, merge or unload that first"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_for_it_is_refused(fault: str) -> None:
    make, message = FAULTS[fault]
    layer: Any = make()
    for call in (lambda: adapted(layer), lambda: kf.KoreLinear.from_factor(layer, torch.zeros(2, D_IN))):
        with pytest.raises(ConstraintError, match=f"layer: .*{message}"):
            call()


def test_backends_without_a_kernel_for_it_are_refused() -> None:
    for backend in ("native", "triton"):
        with pytest.raises(BackendError, match=f"'{backend}': on a quantised layer"):
            kf.KoreLinear.from_linear(quantised("nf4"), covariance(), RANK, backend=backend)  # type: ignore[arg-type]
    model = nn.Sequential(nn.Linear(D_IN, D_IN), quantised("nf4"))
    with pytest.raises(BackendError):
        swap_linears(model, {"0": torch.ones(2, D_IN), "1": torch.ones(2, D_IN)}, backend="native")
    assert not kore_linears(model)


def test_a_plain_model_with_layers_that_cannot_be_taken_is_left_alone() -> None:
    model = nn.Sequential(quantised("nf4"), bnb.nn.Linear4bit(D_OUT, D_OUT))
    with pytest.raises(ConstraintError, match="1: a Linear4bit"):
        swap_linears(model, {"0": torch.ones(2, D_IN), "1": torch.ones(2, D_OUT)})
    assert not kore_linears(model)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama, saved."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def loaded(folder: Path, kind: str) -> Any:
    """As users load it: transformers quantises all linears but the head."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    settings: dict[str, Any] = {"load_in_8bit": True}
    if kind != "int8":
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.float32,
        }
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=transformers.BitsAndBytesConfig(**settings),
        device_map={"": "cpu"},
        dtype=torch.float32,
    )


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_whole_model_and_plain_peft(llama: Path, kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = loaded(llama, kind)
    batch = {"input_ids": torch.randint(0, 64, (3, 20), generator=torch.Generator().manual_seed(0))}
    store = kf.collect_covariance(model, [batch], warn_few_tokens=False, target_modules=r".*(proj|lm_head)")
    # In training mode its 8-bit layers do not round x, which would make a large difference of a tiny one.
    before, in_evaluation = logits(model.train(), batch), logits(model.eval(), batch)
    leaks = kf.replace_linears(model, store, 6, r".*(proj|lm_head)")
    layers = kore_linears(model)
    assert [found.layer for found in leaks] == list(layers)
    assert {name: layer.quantization for name, layer in layers.items()} == {
        name: None if name == "lm_head" else kind for name in layers
    }
    assert len(layers) == 15
    assert torch.equal(logits(model.eval(), batch), in_evaluation)
    assert torch.equal(logits(model.train(), batch), before)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.lora_B" for name in layers}

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(15):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    after = logits(model, batch)
    assert (after - before).norm() > 0.1 * before.norm()

    kf.save_kore_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(loaded(llama, kind), str(tmp_path / "adapter")).train()
    torch.testing.assert_close(logits(theirs, batch), after, rtol=1e-4, atol=1e-4)

    # Merged, at least as near to W + B·A as PEFT comes.
    name = "model.layers.1.mlp.down_proj"
    ours, other = layers[name], theirs.base_model.model.get_submodule(name)
    wanted = dequantised(ours.base_layer) + ours.delta()  # type: ignore[arg-type]
    quietly_merge(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.merge()
    errors = [float((dequantised(layer) - wanted).norm()) for layer in (ours.base_layer, other.get_base_layer())]  # type: ignore[arg-type]
    assert errors[0] <= errors[1] * (1 + 1e-3)
