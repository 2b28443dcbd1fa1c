"""The frozen-A LoRA layer against its formula in float64, and what torch asks of an operation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kore_fast.errors import BackendError
from kore_fast.ops import frozen_lora, frozen_lora_many
from kore_fast.ops.backends import describe

CPU = torch.device("cpu")
BACKENDS = [name for name, reason in describe("frozen_lora", CPU) if reason is None]
# What plain PyTorch's own products in the dtype err by is measured beside; see `errs`.
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(
    tokens: tuple[int, ...] = (7,), d_in: int = 40, d_out: int = 24, r: int = 5, dtype: torch.dtype = torch.float64,
    B_dtype: torch.dtype | None = None, bias: bool = True, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "x": randn(*tokens, d_in).to(dtype).requires_grad_(),
        "W": (randn(d_out, d_in) / d_in**0.5).to(dtype),
        "A": (randn(r, d_in) / d_in**0.5).to(dtype),
        "B": randn(d_out, r).to(B_dtype or dtype).requires_grad_(),
        "bias": randn(d_out).to(dtype).requires_grad_() if bias else None,
    }


def formula(x: Any, W: Any, A: Any, B: Any, bias: Any = None, scaling: float = 1.0) -> torch.Tensor:
    """As PEFT computes it."""
    y = torch.nn.functional.linear(x, W, bias)
    z = torch.nn.functional.linear(x, A)
    return y + (torch.nn.functional.linear(z.to(B.dtype), B) * scaling).to(y.dtype)


def everything(call: Callable[..., torch.Tensor], given: dict[str, Any], scaling: float, dy: torch.Tensor) -> list[Any]:
    """y and the gradients of x, B and bias."""
    inputs = {
        k: v.detach().clone().requires_grad_(v.requires_grad) if v is not None else None for k, v in given.items()
    }
    y = call(**inputs, scaling=scaling)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(inputs[k].grad for k in ("x", "B", "bias") if inputs[k] is not None)]


def errs(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [float((one.double() - two).norm() / two.norm()) for one, two in zip(found, exact, strict=True)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(backend: str, bias: bool) -> None:
    given = case(bias=bias)
    W, A = given.pop("W"), given.pop("A")
    trained = [v for v in given.values() if v is not None]

    def call(x: torch.Tensor, B: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        return frozen_lora(x, W, A, B, b, scaling=0.7, backend=backend)

    assert torch.autograd.gradcheck(call, trained)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_opcheck(backend: str, dropout: float) -> None:
    one, two = case(dtype=torch.float32), case(dtype=torch.float32, d_out=16, r=3, bias=False, seed=1)
    both = [[part[name] for part in (one, two)] for name in ("W", "A", "B")]
    both.append([one["bias"], torch.empty(0)])
    arguments = (one["x"], *both, [1.0, 0.5], dropout, 7, backend)
    torch.library.opcheck(torch.ops.kore_fast.frozen_lora_many.default, arguments)
    alone = (*(one[name] for name in ("x", "W", "A", "B", "bias")), 0.5, dropout, 7, backend)
    torch.library.opcheck(torch.ops.kore_fast.frozen_lora.default, alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide_B", [False, True])
@pytest.mark.parametrize(
    ("tokens", "d_in", "d_out", "r"),
    [((64,), 96, 80, 16), ((3, 50), 235, 274, 35), ((1,), 64, 48, 8), ((130,), 576, 1536, 64), ((2, 1, 9), 33, 17, 1)],
)
def test_twice_the_error_of_plain_pytorch_at_most(
    backend: str, dtype: torch.dtype, wide_B: bool, tokens: tuple[int, ...], d_in: int, d_out: int, r: int
) -> None:
    given = case(tokens, d_in, d_out, r, dtype, torch.float32 if wide_B else None)
    dy = torch.randn(*tokens, d_out, generator=torch.Generator().manual_seed(9)).to(dtype)
    doubled = {k: None if v is None else v.detach().double().requires_grad_(v.requires_grad) for k, v in given.items()}
    exact = everything(formula, doubled, 0.5, dy.double())
    ours = everything(lambda **kw: frozen_lora(**kw, backend=backend), given, 0.5, dy)
    plain = everything(formula, {**given, "B": given["B"].detach().to(dtype).requires_grad_()}, 0.5, dy)
    for name, mine, theirs in zip(("y", "dx", "dB", "dbias"), errs(ours, exact), errs(plain, exact), strict=True):
        assert mine <= 2 * theirs + torch.finfo(dtype).eps / 8, (name, mine, theirs)
    assert ours[2].dtype == given["B"].dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_that_read_one_x(backend: str) -> None:
    x = case((11,), 40)["x"]
    parts = [case(d_in=40, d_out=d, r=r, bias=b, seed=s) for s, (d, r, b) in enumerate([(24, 5, True), (8, 3, False)])]
    lists = {name: [part[name] for part in parts] for name in ("W", "A", "B", "bias")}
    ys = frozen_lora_many(x, **lists, scaling=[1.0, 0.5], backend=backend)
    sum(y.square().sum() for y in ys).backward()
    found = [x.grad, *(part[name].grad for part in parts for name in ("B", "bias") if part[name] is not None)]
    x.grad = None
    for part in parts:
        part["B"].grad = None
        if part["bias"] is not None:
            part["bias"].grad = None
    alone = [
        formula(x, *(part[name] for name in ("W", "A", "B", "bias")), s)
        for part, s in zip(parts, (1.0, 0.5), strict=True)
    ]
    sum(y.square().sum() for y in alone).backward()
    expected = [x.grad, *(part[name].grad for part in parts for name in ("B", "bias") if part[name] is not None)]
    for one, two in zip([*ys, *found], [*alone, *expected], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_a_layer_whose_output_is_not_used() -> None:
    one, two = case(), case(d_out=8, seed=1)
    x = one["x"]
    first, _ = frozen_lora_many(x, *([part[name] for part in (one, two)] for name in ("W", "A", "B", "bias")))
    first.sum().backward()
    assert two["B"].grad is None
    torch.testing.assert_close(x.grad, torch.autograd.grad(formula(**one).sum(), x)[0])


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_any_strides(layout: str) -> None:
    given = case((6, 4))
    x = given["x"].detach()
    x = {
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "strided": torch.stack([x, x], -1)[..., 0],
        "expanded": x[:1].expand(6, 4, -1),
    }[layout]
    for backend in BACKENDS:
        torch.testing.assert_close(frozen_lora(**{**given, "x": x}, backend=backend), formula(**{**given, "x": x}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend: str) -> None:
    given = case((0,), dtype=torch.float32)
    y = frozen_lora(**given, backend=backend)
    y.sum().backward()
    assert y.shape == (0, 24)
    assert not given["B"].grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_made_again_from_its_seed(backend: str) -> None:
    given = case((200,), d_in=64, r=8)
    y = frozen_lora(**given, dropout=0.4, seed=3, backend=backend)
    assert torch.equal(y, frozen_lora(**given, dropout=0.4, seed=3, backend=backend))
    assert not torch.equal(y, frozen_lora(**given, dropout=0.4, seed=4, backend=backend))
    kept = torch.empty(200, 64, dtype=torch.float64).bernoulli_(0.6, generator=torch.Generator().manual_seed(3)) / 0.6
    by_hand = {**given, "x": given["x"].detach().requires_grad_()}
    expected = torch.nn.functional.linear(by_hand["x"], given["W"], given["bias"])
    expected = expected + (by_hand["x"] * kept) @ given["A"].T @ given["B"].T
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    dB = torch.autograd.grad(expected.square().sum(), [by_hand["x"], given["B"]])
    torch.testing.assert_close(given["x"].grad, dB[0])
    torch.testing.assert_close(given["B"].grad, dB[1])


def test_dropout_without_a_seed_follows_the_global_one() -> None:
    given = case()
    torch.manual_seed(5)
    one, two = frozen_lora(**given, dropout=0.5), frozen_lora(**given, dropout=0.5)
    torch.manual_seed(5)
    assert torch.equal(one, frozen_lora(**given, dropout=0.5))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("backend", BACKENDS)
def test_saves_z_and_nothing_else(backend: str) -> None:
    given = case((50,), d_in=64, d_out=48, r=8, dtype=torch.float32)
    weights = {given[name].untyped_storage().data_ptr() for name in ("W", "A", "B")}
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        frozen_lora(**given, backend=backend)
    assert [(tuple(t.shape), t.untyped_storage().nbytes()) for t in saved] == [((50, 8), 50 * 8 * 4)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_given_is_written_to(backend: str) -> None:
    given = case((9,))
    before = copy.deepcopy({k: v.detach() for k, v in given.items()})
    y = frozen_lora(**given, backend=backend)
    kept = y.detach().clone()
    y.sum().backward(retain_graph=True)
    once = given["B"].grad.clone()
    y.sum().backward()
    torch.testing.assert_close(given["B"].grad, 2 * once)
    assert torch.equal(y, kept)
    assert all(torch.equal(given[k], before[k]) for k in before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_whole(backend: str) -> None:
    given = case((12,), dtype=torch.float32)
    dy = torch.randn(12, 24)

    def call(**inputs: Any) -> torch.Tensor:
        return frozen_lora(**inputs, backend=backend)  # type: ignore[arg-type]

    eager = everything(call, given, 0.5, dy)
    compiled = everything(torch.compile(call, fullgraph=True, backend="aot_eager"), given, 0.5, dy)
    for one, two in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, two)


def test_function_transforms() -> None:
    given = case((5,))

    def loss(B: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return frozen_lora(x, given["W"], given["A"], B, given["bias"]).square().sum()

    def plain(B: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return formula(x, given["W"], given["A"], B, given["bias"]).square().sum()

    B, x = given["B"].detach(), given["x"].detach()
    torch.testing.assert_close(torch.func.grad(loss)(B, x), torch.func.grad(plain)(B, x))
    for dims in ((None, 0), (0, None), (0, 0)):
        Bs = B if dims[0] is None else torch.stack([B, 2 * B, -B])
        xs = x if dims[1] is None else torch.stack([x, x + 1, x - 1])
        for ours, theirs in ((loss, plain), (torch.func.grad(loss), torch.func.grad(plain))):
            torch.testing.assert_close(torch.vmap(ours, dims)(Bs, xs), torch.vmap(theirs, dims)(Bs, xs))


def test_under_autocast() -> None:
    given = case((12,), dtype=torch.float32)
    dy = torch.randn(12, 24)

    def cast(call: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(**inputs: Any) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return call(**inputs)

        return run

    ours, plain = everything(cast(frozen_lora), given, 1.0, dy), everything(cast(formula), given, 1.0, dy)
    assert ours[0].dtype == torch.bfloat16
    assert [t.dtype for t in ours] == [t.dtype for t in plain]
    for one, two in zip(ours, plain, strict=True):
        assert float((one.double() - two.double()).norm()) <= 0.02 * float(two.double().norm())


def test_activation_checkpointing() -> None:
    given = case((12,))
    frozen_lora(**given).square().sum().backward()
    expected = given["B"].grad.clone()
    given["B"].grad = None
    y = checkpoint(
        lambda x: frozen_lora(x, *(given[k] for k in ("W", "A", "B", "bias"))), given["x"], use_reentrant=False
    )
    y.square().sum().backward()
    assert torch.equal(given["B"].grad, expected)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "W's width": ({"W": torch.zeros(24, 41, dtype=torch.float64)}, "W .* want .d_out, 40"),
    "A's width": ({"A": torch.zeros(5, 41, dtype=torch.float64)}, "A .* want .r, 40"),
    "B's shape": ({"B": torch.zeros(5, 24, dtype=torch.float64)}, r"B has shape .* \(24, 5\)"),
    "bias": ({"bias": torch.zeros(23, dtype=torch.float64)}, "bias has shape"),
    "W's dtype": ({"W": torch.zeros(24, 40)}, "W is torch.float32, x torch.float64"),
    "B narrower": ({"B": torch.zeros(24, 5)}, "narrower"),
    "integers": ({"x": torch.zeros(7, 40, dtype=torch.int64)}, "floating"),
    "dropout": ({"dropout": 1.0}, "dropout"),
    "a meta tensor": ({"W": torch.zeros(24, 40, dtype=torch.float64, device="meta")}, "W is on meta"),
    "W trained": ({"W": torch.zeros(24, 40, dtype=torch.float64, requires_grad=True)}, "W requires a gradient"),
    "A trained": ({"A": torch.zeros(5, 40, dtype=torch.float64, requires_grad=True)}, "A requires a gradient"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_does_not_fit_is_refused(fault: str) -> None:
    change, message = WRONG[fault]
    with pytest.raises(ValueError, match=message):
        frozen_lora(**{**case(), **change})


def test_unequal_lists_are_refused() -> None:
    given = case()
    with pytest.raises(ValueError, match="one of each a layer"):
        frozen_lora_many(given["x"], [given["W"]], [given["A"]], [])


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(BackendError, match="unknown backend"):
        frozen_lora(**case(), backend="cutlass")  # type: ignore[arg-type]
