"""The adapter's part added to a product that is there: against float64, against autograd, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from kore_fast.ops.frozen_lora_onto import frozen_lora_onto

D_IN, D_OUT, RANK, SCALING = 48, 40, 6, 0.7


def inputs(dtype: torch.dtype, adapter: torch.dtype) -> tuple[torch.Tensor, ...]:
    """y, x, A, B."""
    g = torch.Generator().manual_seed(0)
    y, x = (torch.randn(3, 7, d, generator=g).to(dtype).requires_grad_() for d in (D_OUT, D_IN))
    A, B = torch.randn(RANK, D_IN, generator=g) / D_IN**0.5, torch.randn(D_OUT, RANK, generator=g)
    return y, x, A.to(adapter), B.to(adapter).requires_grad_()


def plainly(y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return y + SCALING * linear(linear(x, A.to(x.dtype)), B.to(x.dtype))


def result_and_gradients(function: object, *given: torch.Tensor) -> list[torch.Tensor]:
    y = function(*given)  # type: ignore[operator]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [given[0], given[1], given[3]], dy)]


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_against_float64(dtype: torch.dtype, adapter: torch.dtype) -> None:
    given = inputs(dtype, adapter)
    wide = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in given]
    exact = result_and_gradients(plainly, *wide)
    plain = result_and_gradients(plainly, *given)
    ours = result_and_gradients(lambda *t: frozen_lora_onto(*t, scaling=SCALING), *given)
    for found, other, right in zip(ours, plain, exact, strict=True):
        assert found.dtype == other.dtype
        assert (found.double() - right).norm() <= 2 * (other.double() - right).norm()


def test_gradients_against_differences() -> None:
    y, x, A, B = (t[:1] if t.dim() == 3 else t for t in inputs(torch.float64, torch.float64))
    assert torch.autograd.gradcheck(
        lambda y, x, B: frozen_lora_onto(y, x, A, B, scaling=SCALING), (y, x, B), fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_z_alone_is_kept(dtype: torch.dtype) -> None:
    y, x, A, B = inputs(dtype, torch.float32)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        frozen_lora_onto(y, x, A, B)
    theirs = {A.data_ptr(), B.data_ptr()}
    others = [tensor for tensor in kept if tensor.data_ptr() not in theirs]
    assert [tuple(tensor.shape) for tensor in others] == [(21, RANK)]
    assert others[0].dtype == dtype


def test_b_of_zero_is_the_base() -> None:
    y, x, A, B = inputs(torch.bfloat16, torch.float32)
    assert torch.equal(frozen_lora_onto(y, x, A, torch.zeros_like(B)), y)


def test_what_wants_no_gradient_gets_none() -> None:
    y, x, A, B = inputs(torch.float32, torch.float32)
    found = frozen_lora_onto(y.detach(), x.detach(), A, B)
    found.sum().backward()
    assert B.grad is not None
    assert y.grad is None
    assert x.grad is None
    assert not frozen_lora_onto(y.detach(), x.detach(), A, B.detach()).requires_grad


def test_under_autocast_y_keeps_its_dtype() -> None:
    y, x, A, B = inputs(torch.float32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = frozen_lora_onto(y, x, A, B)
        assert torch.equal(frozen_lora_onto(y, x, A, torch.zeros_like(B)), y)
    assert found.dtype == torch.float32
    lower = plainly(torch.zeros_like(y).bfloat16(), x.bfloat16(), A, B).float() / SCALING
    torch.testing.assert_close(found - y, lower, rtol=2**-6, atol=2**-6)
    found.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


FAULTS = {
    "A's width": (lambda y, x, A, B: (y, x, A[:, 1:], B), r"A \(6, 47\) does not fit x \(3, 7, 48\)"),
    "B's rank": (lambda y, x, A, B: (y, x, A, B[:, 1:]), r"B \(40, 5\) does not fit y"),
    "rows": (lambda y, x, A, B: (y[:2], x, A, B), r"does not fit y \(2, 7, 40\), x \(3, 7, 48\)"),
    "A to train": (lambda y, x, A, B: (y, x, A.clone().requires_grad_(), B), "A requires a gradient.*freeze it"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused(fault: str) -> None:
    spoil, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        frozen_lora_onto(*spoil(*inputs(torch.float32, torch.float32)))
