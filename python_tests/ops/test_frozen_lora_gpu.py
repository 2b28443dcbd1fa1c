"""The frozen-A LoRA layer on a GPU: every backend that runs there, against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from kore_fast.ops import frozen_lora
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


def test_captured_in_a_graph() -> None:
    x = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)
    W, A, B = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((96, 128), (8, 128), (96, 8)))
    with torch.no_grad():
        for _ in range(3):
            frozen_lora(x, W, A, B)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = frozen_lora(x, W, A, B)
        x.normal_()
        graph.replay()
        torch.testing.assert_close(y, frozen_lora(x, W, A, B))
