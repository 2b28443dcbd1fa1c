"""The frozen-A layer's CUDA kernels without a GPU: run on a host, compiled, and asked with wrong arguments."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kore_fast.ops.backends import describe
from kore_fast.ops.native import frozen_lora as native
from python_tests.csrc.cuda_build import build_emulation, build_library, entries, run

DEFECTS = (
    "fragment",
    "transposed",
    "no_barrier",
    "no_zeros",
    "no_edges",
    "offsets",
    "no_swizzle",
    "no_wait",
    "early_free",
    "early_read",
    "own_free",
    "no_exchange",
    "no_cluster",
)
NAME = "frozen_lora_product_native_"
SCHEMA = f"{NAME}(Tensor(a!) C, Tensor P, Tensor Q, Tensor R, Tensor S, Tensor? bias, float scale, bool add) -> ()"


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_emulation("frozen_lora", tmp_path_factory.mktemp("emulation"))


def test_emulated_kernels_agree_with_float64(emulation: Path) -> None:
    ran = run(emulation)
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout.count("ok ") >= 22
    for path in (" sm_80 ", " sm_90, 128 ", " sm_90, 256 "):
        assert path in ran.stdout


@pytest.mark.slow
def test_emulated_kernels_agree_with_float64_for_long_sums(emulation: Path) -> None:
    ran = run(emulation, "--long")
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("defect", DEFECTS)
def test_emulation_notices_a_fault(emulation: Path, defect: str) -> None:
    ran = run(emulation, "--defect", defect)
    assert ran.returncode in (1, 3), ran.stdout  # a wrong result, or an access that the hardware forbids
    assert "BAD" in ran.stdout or "emulation:" in ran.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return build_library("frozen_lora", tmp_path_factory.mktemp("cuda"))


@pytest.mark.slow
def test_cuda_kernels_compile_without_spills(compiled: tuple[str, Path]) -> None:
    report, _ = compiled
    assert "warning" not in report.lower(), report  # ptxas warns where it serialises wgmma or ignores setmaxnreg
    found = entries(report)
    assert len(found) == 2 * 16, report  # two targets; format × major × (sm_80's load or sm_90's width)
    for name, target, stack, stores, loads, registers in found:
        where = f"{name} for {target}"
        assert (stack, stores, loads) == ("0", "0", "0"), where
        # Registers of a multiprocessor over the launch bound's threads.
        assert int(registers) <= (65536 // 384 if "sm90" in name else 65536 // 256), where


@pytest.mark.slow
def test_wrong_arguments_are_told_before_any_work(compiled: tuple[str, Path]) -> None:
    """Meta tensors pass the checks that CUDA tensors do; a library without a GPU registers both."""
    _, library = compiled
    program = f"""
import torch

ops = torch.library.Library("kore_fast", "FRAGMENT")
ops.define({SCHEMA!r})
torch.ops.load_library({str(library)!r})
assert torch._C._dispatch_has_kernel_for_dispatch_key("kore_fast::{NAME}", "CUDA")

def tensor(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")

def call(**other):
    given = dict(C=tensor(5, 7), P=tensor(5, 3), Q=tensor(3, 7), R=tensor(5, 2), S=tensor(2, 7), bias=tensor(7))
    torch.ops.kore_fast.{NAME}(**(given | other), scale=1.0, add=False)

call()
call(bias=None, Q=tensor(7, 3).mT, S=tensor(7, 2).mT)
for words, other in (
    ("C has shape (4, 7), want (5, 7)", dict(C=tensor(4, 7))),
    ("Q has shape (4, 7), want (3, 7)", dict(Q=tensor(4, 7))),
    ("R has shape (6, 2), want (5, 2)", dict(R=tensor(6, 2))),
    ("S has shape (2, 6), want (2, 7)", dict(S=tensor(2, 6))),
    ("want matrices", dict(P=tensor(5, 3, 1))),
    ("bias has shape (6), want (7,)", dict(bias=tensor(6))),
    ("bias has to have P's dtype", dict(bias=tensor(7, dtype=torch.float32))),
    ("S has to have P's dtype", dict(S=tensor(2, 7, dtype=torch.float32))),
    ("use backend=\\"reference\\"", dict(P=tensor(5, 3, dtype=torch.float32))),
    ("need a column at least", dict(R=tensor(5, 0), S=tensor(0, 7))),
    ("rows of P and of R have to be contiguous", dict(P=tensor(3, 5).mT)),
    ("contiguous in the same way", dict(Q=tensor(7, 3).mT)),
    ("C has to be row-major", dict(C=tensor(7, 5).mT)),
    ("C has to be row-major without overlapping rows", dict(C=tensor(1, 7).expand(5, 7))),
):
    try:
        call(**other)
    except RuntimeError as error:
        assert words in str(error), (words, error)
    else:
        raise AssertionError(words)
"""
    ran = run(sys.executable, "-c", program)
    assert ran.returncode == 0, ran.stderr


needs_schema = pytest.mark.skipif(
    dict(describe("frozen_lora", torch.device("cpu")))["native"] is not None, reason="no compiled library"
)


@pytest.fixture
def product_on_a_cpu() -> Iterator[list[bool]]:
    """The product by its formula, of what the GPU's kernel accepts; whether each call was one for the copy engine."""
    calls: list[bool] = []

    def product(
        C: torch.Tensor, P: torch.Tensor, Q: torch.Tensor, R: torch.Tensor, S: torch.Tensor,
        bias: torch.Tensor | None, scale: float, add: bool,
    ) -> None:  # fmt: skip
        assert P.stride(1) == R.stride(1) == C.stride(1) == 1
        along = 1 if Q.stride(1) == 1 else 0
        assert Q.stride(along) == S.stride(along) == 1
        assert C.dtype == P.dtype == Q.dtype == R.dtype == S.dtype
        total = P.double() @ Q.double() + scale * (R.double() @ S.double())
        total = total if bias is None else total + bias.double()
        C.copy_(total + C.double() if add else total)
        steps = (P.stride(0), R.stride(0), Q.stride(1 - along), S.stride(1 - along), C.stride(0))
        calls.append(all(step % native.CHUNK == 0 for step in steps))

    with torch.library._scoped_library("kore_fast", "IMPL") as library:
        library.impl(NAME, product, "CPU")
        yield calls


@needs_schema
@pytest.mark.parametrize("r", [16, 11, 1])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("d_in", [24, 35])
def test_products_are_put_together_as_the_formula_says(
    product_on_a_cpu: list[bool], r: int, turned: bool, d_in: int
) -> None:
    """Two layers of one x, whose tensors lie in memory in every way; what is left over 16 bytes of a rank is padded."""
    g = torch.Generator().manual_seed(r)

    def randn(*shape: int) -> torch.Tensor:
        t = torch.randn(*shape, generator=g).bfloat16()
        return t.mT.contiguous().mT if turned else t

    x, scaling, d_out = randn(12, d_in), [0.5, 2.0], (40, 16)
    W, B = ([randn(d, columns) for d in d_out] for columns in (d_in, r))
    A = [randn(r, d_in) for _ in d_out]
    bias = [randn(1, d_out[0])[0], None]
    dy = [randn(12, d) for d in d_out]

    ys, zs = native._forward_cuda(x, W, A, B, bias, scaling)
    dx, dB = native._backward_cuda(dy, zs, W, A, B, scaling, True, True)
    assert dx is not None
    wide = [[t.double() for t in part] for part in (W, A, B, dy, zs)]
    expected = torch.zeros(12, d_in, dtype=torch.float64)

    def close(mine: torch.Tensor, true: torch.Tensor) -> bool:
        return bool((mine.double() - true).norm() <= 2**-7 * true.norm())  # a few roundings to bfloat16

    for W_i, A_i, B_i, dy_i, z_i, y, s, b, dB_i in zip(*wide, ys, scaling, bias, dB, strict=True):
        true = x.double() @ W_i.mT + s * (x.double() @ A_i.mT) @ B_i.mT
        assert close(y, true if b is None else true + b.double())
        assert close(dB_i, s * dy_i.mT @ z_i)
        expected += dy_i @ W_i + s * (dy_i @ B_i) @ A_i
    assert close(dx, expected)
    if not turned and d_in % native.CHUNK == 0:
        assert product_on_a_cpu == [True] * 4


def test_what_it_does_not_take_goes_to_the_reference() -> None:
    """Dtypes other than the tensor cores', and dropout."""

    class OnCuda(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    def takes(dtype: torch.dtype, kept: bool = False, r: int = 2) -> bool:
        x = torch.zeros(2, 3, dtype=dtype).as_subclass(OnCuda)
        return native._takes(x, [torch.zeros(r, 3)], torch.ones(2, 3) if kept else None)

    assert takes(torch.bfloat16)
    assert takes(torch.float16)
    assert not takes(torch.float32)
    assert not takes(torch.float64)
    assert not takes(torch.bfloat16, kept=True)
    assert not takes(torch.bfloat16, r=0)
