"""The frozen-A LoRA layer on a GPU: every backend that runs there, against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from kore_fast.ops import frozen_lora, frozen_lora_many
from kore_fast.ops.backends import describe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
BACKENDS = ["auto"]
if torch.cuda.is_available():
    BACKENDS += [name for name, reason in describe("frozen_lora", torch.device("cuda")) if reason is None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("T", "d_in", "d_out", "r"), [(300, 256, 192, 16), (8192, 4096, 4096, 256), (1001, 274, 235, 35)]
)
def test_twice_the_error_of_plain_pytorch_at_most(
    backend: str, dtype: torch.dtype, T: int, d_in: int, d_out: int, r: int
) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    x, W, A = (
        randn(T, d_in).to(dtype),
        (randn(d_out, d_in) / d_in**0.5).to(dtype),
        (randn(r, d_in) / d_in**0.5).to(dtype),
    )
    B, bias, dy = randn(d_out, r).to(dtype), randn(d_out).to(dtype), randn(T, d_out).to(dtype)

    def everything(ours: bool, wide: torch.dtype) -> list[torch.Tensor]:
        x_, B_ = x.to(wide).requires_grad_(), B.to(wide).requires_grad_()
        W_, A_, b_ = W.to(wide), A.to(wide), bias.to(wide)
        if ours:
            y = frozen_lora(x_, W_, A_, B_, b_, scaling=0.5, backend=backend)  # type: ignore[arg-type]
        else:
            y = linear(x_, W_, b_) + 0.5 * linear(linear(x_, A_), B_)
        y.backward(dy.to(wide))
        assert x_.grad is not None
        assert B_.grad is not None
        return [y.detach(), x_.grad, B_.grad]

    exact = everything(False, torch.float64)
    for mine, theirs, true in zip(everything(True, dtype), everything(False, dtype), exact, strict=True):
        error = (mine.double() - true).norm() / true.norm()
        assert error <= 2 * (theirs.double() - true).norm() / true.norm() + torch.finfo(dtype).eps / 8


native = pytest.mark.skipif("native" not in BACKENDS, reason="no compiled kernels for CUDA")
# Hopper's path and the one before it, of which a GPU may run only one.
PATHS = ["sm80"] + (["sm90"] if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) else [])


@native
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("B_dtype", [None, torch.float32])
@pytest.mark.parametrize(
    ("T", "d_in", "d_out", "r"),
    [(8192, 4096, 4096, 256), (700, 2048, 1000, 235), (33, 72, 40, 3), (129, 274, 235, 35), (17, 8, 16, 1)],
)
def test_native_products_of_layers_that_share_x(
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    dtype: torch.dtype,
    B_dtype: torch.dtype | None,
    T: int,
    d_in: int,
    d_out: int,
    r: int,
) -> None:
    """Two layers, whose dx is one sum, against float64; x is a slice. The same bits each time."""
    monkeypatch.setenv("KORE_FAST_CUDA_PATH", path)
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    x = randn(T, d_in + 8).to(dtype)[:, 8:]
    W = [(randn(d, d_in) / d_in**0.5).to(dtype) for d in (d_out, 16)]
    A = [(randn(r, d_in) / d_in**0.5).to(dtype) for _ in W]
    B = [(randn(len(w), r) / r**0.5).to(B_dtype or dtype) for w in W]
    bias = [randn(d_out).to(dtype), None]
    dy = [randn(T, len(w)).to(dtype) for w in W]

    def everything(wide: torch.dtype | None, backend: str) -> list[torch.Tensor]:
        def of(t: torch.Tensor) -> torch.Tensor:
            return t.detach() if wide is None else t.detach().to(wide)

        x_, B_ = of(x).requires_grad_(), [of(b).requires_grad_() for b in B]
        biases = [None if b is None else of(b) for b in bias]
        ys = frozen_lora_many(
            x_,
            [of(w) for w in W],
            [of(a) for a in A],
            B_,
            biases,
            scaling=[0.5, 2.0],
            backend=backend,  # type: ignore[arg-type]
        )
        grads = torch.autograd.grad(ys, [x_, *B_], [of(d) for d in dy])
        return [*ys, *grads]

    found, again = everything(None, "native"), everything(None, "native")
    plain, exact = everything(None, "reference"), everything(torch.float64, "reference")
    for mine, second, theirs, true in zip(found, again, plain, exact, strict=True):
        assert torch.equal(mine, second)
        assert mine.dtype == theirs.dtype
        error = (mine.double() - true).norm() / true.norm()
        assert error <= 2 * (theirs.double() - true).norm() / true.norm() + torch.finfo(dtype).eps / 8


@native
def test_float32_B_gets_sums_that_were_not_rounded() -> None:
    x, W, A, B = (
        torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((4096, 64), (48, 64), (16, 64), (48, 16))
    )
    B = B.float().requires_grad_()
    dy = torch.randn(4096, 48, device="cuda", dtype=torch.bfloat16)
    frozen_lora(x, W, A, B, scaling=0.25, backend="native").backward(dy)
    assert B.grad is not None
    true = 0.25 * dy.double().mT @ (x @ A.mT).double()
    assert (B.grad.double() - true).norm() <= 2**-16 * true.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_captured_in_a_graph(backend: str) -> None:
    x = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)
    W, A, B = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((96, 128), (8, 128), (96, 8)))
    with torch.no_grad():
        for _ in range(3):
            frozen_lora(x, W, A, B, backend=backend)  # type: ignore[arg-type]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = frozen_lora(x, W, A, B, backend=backend)  # type: ignore[arg-type]
        x.normal_()
        graph.replay()
        torch.testing.assert_close(y, frozen_lora(x, W, A, B, backend=backend))  # type: ignore[arg-type]
