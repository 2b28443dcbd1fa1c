"""The Triton kernels of the frozen-A layer, on a CPU in Triton's interpreter; `test_frozen_lora.py` runs this file.

The interpreter must be asked for before Triton is imported, so this has a process of its own. Its ``tl.dot`` multiplies
the bits of bfloat16, so those products are shown with float16 here and compiled there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from kore_fast.ops import frozen_lora, frozen_lora_many
from kore_fast.ops.reference import frozen_lora as reference
from kore_fast.ops.triton import frozen_lora as backend
from kore_fast.ops.triton import frozen_lora_kernels as kernels
from kore_fast.ops.triton.frozen_lora import Config, Sums, unavailable

SHAPES = [(1, 16, 16, 1), (33, 33, 17, 5), (70, 235, 274, 35), (64, 96, 80, 16), (130, 64, 48, 33)]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that little data crosses all their edges, and several groups of them."""
    monkeypatch.setattr(backend, "candidates", lambda *_: (Config(32, 16, 32, 16, 4, 2),))
    monkeypatch.setattr(backend, "SUMS", Sums(32, 16, 4))
    monkeypatch.setattr(backend, "GROUP", 2)


def layer(
    tokens: int, d_in: int, d_out: int, r: int, dtype: torch.dtype, wide_B: bool = False, bias: bool = True
) -> dict[str, Any]:
    """What `forward` takes of one layer, and the gradient of its y."""
    torch.manual_seed(tokens + d_in + d_out + r)
    return {
        "x": torch.randn(tokens, d_in).to(dtype),
        "W": (torch.randn(d_out, d_in) / d_in**0.5).to(dtype),
        "A": (torch.randn(r, d_in) / d_in**0.5).to(dtype),
        "B": torch.randn(d_out, r).to(torch.float32 if wide_B else dtype),
        "bias": torch.randn(d_out).to(dtype) if bias else None,
        "dy": torch.randn(tokens, d_out).to(dtype),
    }


def plain(x: Any, W: Any, A: Any, B: Any, bias: Any, dy: Any, s: float) -> dict[str, torch.Tensor]:
    """The layer and its gradients, product by product as PEFT and autograd have them, all in x's dtype."""
    B = B.to(x.dtype)
    z = x @ A.mT
    dz = s * dy @ B
    return {
        "y": torch.nn.functional.linear(x, W, bias) + s * (z @ B.mT),
        "z": z,
        "dx": dy @ W + dz @ A,
        "dB": (s * dy).mT @ z,
    }


def run(given: dict[str, Any], s: float) -> dict[str, torch.Tensor]:
    W, A, B = ([given[name]] for name in ("W", "A", "B"))
    (y,), z = backend.forward(given["x"], W, A, B, [given["bias"]], [s], None)
    dx, (dB,) = backend.backward([given["dy"]], z, W, A, B, [s], None, True, True)
    assert dx is not None
    return {"y": y, "z": z[0], "dx": dx, "dB": dB}


def check(given: dict[str, Any], s: float = 0.5) -> None:
    """At most twice the error of plain PyTorch in the dtype."""
    exact = plain(**{k: None if v is None else v.double() for k, v in given.items()}, s=s)
    same, found = plain(**given, s=s), run(given, s)
    dtype = given["x"].dtype
    assert {name: part.dtype for name, part in found.items()} == {
        **dict.fromkeys(("y", "z", "dx"), dtype),
        "dB": given["B"].dtype,
    }
    for name, part in found.items():
        ours, theirs = (float((one.double() - exact[name]).norm() / exact[name].norm()) for one in (part, same[name]))
        assert ours <= 2 * theirs + torch.finfo(dtype).eps / 8, (name, ours, theirs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wide_B", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_twice_the_error_of_plain_pytorch_at_most(
    shape: tuple[int, int, int, int], dtype: torch.dtype, wide_B: bool, bias: bool
) -> None:
    check(layer(*shape, dtype, wide_B, bias))


@pytest.mark.parametrize("wide_B", [False, True])
@pytest.mark.parametrize(("tokens", "d_in", "d_out", "r"), [*SHAPES[:2], (130, 96, 80, 16), (70, 48, 274, 3)])
def test_sums_of_one_read(
    tokens: int, d_in: int, d_out: int, r: int, wide_B: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel alone, whatever the rule says of a shape: one span of columns and several."""
    given = layer(tokens, d_in, d_out, r, torch.float16, wide_B)
    for span in (32, 288):
        monkeypatch.setattr(backend, "one_read", lambda *_, span=span: span)
        check(given, s=-3.0)


def test_the_rule_takes_one_read_where_its_sums_are_fewer_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    taken: list[int] = []
    sums = backend._sums
    monkeypatch.setattr(backend, "_sums", lambda dy, z, B, span: taken.append(span) or sums(dy, z, B, span))
    check(layer(300, 32, 80, 4, torch.float16))
    assert taken == [128]
    check(layer(300, 32, 80, 17, torch.float16))  # the rank
    check(layer(300, 32, 80, 4, torch.float32))  # the dtype
    check(layer(300, 32, 79, 4, torch.float16))  # rows that are not aligned
    check(layer(30, 32, 80, 12, torch.float16))  # few tokens
    assert len(taken) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_what_is_shipped(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tiles, with ranks that are copied to be aligned."""
    monkeypatch.undo()
    check(layer(140, 160, 272, 35, dtype, wide_B=True))
    check(layer(40, 35, 70, 3, dtype))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.stack([x, x], 1)[:, 0],
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x.mT.contiguous().mT,
        lambda x: x[:1].expand(x.shape),
        lambda x: torch.cat([x, x], 1)[:, 1 : 1 + x.shape[1]],
    ],
    ids=["rows apart", "columns apart", "transposed", "expanded", "not aligned"],
)
def test_strides(view: Any) -> None:
    given = layer(40, 48, 64, 5, torch.float16)
    for name in ("x", "dy", "W", "A", "B"):
        check({**given, name: view(given[name])})
    check({**given, "bias": torch.stack([given["bias"]] * 2, 1)[:, 0]})


def test_layers_of_one_x() -> None:
    """Each adds to dx; a layer whose output is not used is left out."""
    parts = [layer(40, 48, d_out, r, torch.float32, bias=r == 5) for d_out, r in ((64, 5), (17, 16), (33, 3))]
    lists = {name: [part[name] for part in parts] for name in ("W", "A", "B", "bias")}
    x, B = parts[0]["x"].requires_grad_(), [b.requires_grad_() for b in lists["B"]]
    for used in ((0, 1, 2), (0, 2), (1,)):
        found = []
        for name in ("triton", "reference"):
            ys = frozen_lora_many(x, **lists, scaling=[1.0, 0.5, -2.0], backend=name)
            sum((ys[i] * parts[i]["dy"]).sum() for i in used).backward()
            found.append([*ys, x.grad, *(B[i].grad for i in used)])
            for tensor in (x, *B):
                tensor.grad = None
        for one, two in zip(*found, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("wants_dx", "wants_dB"), [(True, False), (False, True), (False, False)])
def test_what_is_wanted(wants_dx: bool, wants_dB: bool) -> None:
    given = layer(40, 48, 64, 5, torch.float32)
    lists = [[given[name]] for name in ("W", "A", "B")]
    z = [given["x"] @ given["A"].mT]
    dx, dB = backend.backward([given["dy"]], z, *lists, [0.5], None, wants_dx, wants_dB)
    both_dx, both_dB = backend.backward([given["dy"]], z, *lists, [0.5], None, True, True)
    assert both_dx is not None
    assert dx is None if not wants_dx else torch.equal(dx, both_dx)
    assert dB == [] if not wants_dB else torch.equal(dB[0], both_dB[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_no_tokens(dtype: torch.dtype) -> None:
    found = run(layer(0, 48, 64, 5, dtype), 0.5)
    assert {name: tuple(part.shape) for name, part in found.items()} == {
        "y": (0, 64),
        "z": (0, 5),
        "dx": (0, 48),
        "dB": (64, 5),
    }
    assert not found["dB"].any()


@pytest.mark.parametrize("case", ["dropout", "float64", "bfloat16"])
def test_what_the_reference_takes(case: str) -> None:
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(case, torch.float32)
    given = layer(40, 48, 64, 5, dtype)
    dy = given.pop("dy")
    found = []
    for name in ("triton", "reference"):
        x, B = given["x"].detach().requires_grad_(), given["B"].detach().requires_grad_()
        dropout = 0.3 if case == "dropout" else 0.0
        y = frozen_lora(**{**given, "x": x, "B": B}, dropout=dropout, seed=3, backend=name)
        y.backward(dy)
        found.append([y, x.grad, B.grad])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_b_of_zeros_adds_nothing() -> None:
    given = layer(40, 48, 64, 5, torch.float32)
    given["B"].zero_()
    base, _ = backend.forward(
        given["x"], [given["W"]], [given["A"][:0]], [given["B"][:, :0]], [given["bias"]], [1.0], None
    )
    assert torch.equal(run(given, 0.5)["y"], base[0])


def test_neighbours_keep_to_their_own_memory() -> None:
    """Outputs inside larger memory: nothing around them is written."""
    given = layer(33, 33, 17, 5, torch.float32)
    room = torch.full((35, 17), 7.0)
    z = given["x"] @ given["A"].mT
    backend._product(room[1:34], given["x"], given["W"].mT, z, given["B"].mT, 0.5, given["bias"])
    assert torch.all(room[0] == 7)
    assert torch.all(room[34] == 7)
    (expected,), _ = reference.forward(
        given["x"], [given["W"]], [given["A"]], [given["B"]], [given["bias"]], [0.5], None
    )
    torch.testing.assert_close(room[1:34], expected, rtol=1e-5, atol=1e-5)


@triton.jit
def tiles_kernel(i_ptr, j_ptr, rows, columns, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    number = tl.program_id(0)
    i, j = kernels.grouped_tile(number, rows, columns, GROUP)
    tl.store(i_ptr + number, i)
    tl.store(j_ptr + number, j)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (8, 3), (9, 2), (19, 5)])
def test_every_tile_once(rows: int, columns: int) -> None:
    i, j = torch.full((2, rows * columns), -1, dtype=torch.int32)
    tiles_kernel[(rows * columns,)](i, j, rows, columns, GROUP=8)
    found = sorted(zip(i.tolist(), j.tolist(), strict=True))
    assert found == [(a, b) for a in range(rows) for b in range(columns)]


def test_the_interpreter_is_what_runs_here() -> None:
    assert unavailable(torch.device("cpu")) is None
