"""The Triton kernels of the frozen-A layer: compiled for every target, run in the interpreter, and on a GPU if any."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kore_fast.ops import frozen_lora
from kore_fast.ops.triton import unavailable
from kore_fast.ops.triton.frozen_lora import GROUP, MOST_RANK, SUMS, Config, by_rule, candidates, one_read

GPU = torch.device("cuda")
NO_GPU = unavailable(GPU)
needs_gpu = pytest.mark.skipif(NO_GPU is not None, reason=f"the kernels themselves: {NO_GPU}")
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def build(kernel: str, target: str, warps: int, stages: int, **arguments: Any) -> Any:
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'triton>=3.4'")
    from kore_fast.ops.triton import compile as ahead
    from kore_fast.ops.triton import frozen_lora_kernels as kernels

    try:
        return ahead.build(getattr(kernels, kernel), arguments, target, num_warps=warps, num_stages=stages)
    except Exception as error:
        if "linker" in str(error) and "lld" in str(error):
            pytest.skip(f"{target}: {error}")  # Triton 3.4 has none of its own
        raise


def build_product(
    target: str,
    dtype: torch.dtype,
    config: Config,
    what: str,
    S: torch.dtype | None = None,
    d: int = 4096,
    r: int = 240,
    bias: bool = False,
    add: bool = False,
) -> Any:
    """The kernel of y (W and B transposed) or dx, of 8191 tokens."""
    return build(
        "product_kernel",
        target,
        config.warps,
        config.stages,
        **dict.fromkeys(("C_ptr", "P_ptr", "Q_ptr", "R_ptr"), dtype),
        S_ptr=S or dtype,
        bias_ptr=dtype if bias else None,
        scale=0.5,
        M=8191,
        N=d,
        K1=d,
        K2=r,
        C_row=d,
        P_row=d,
        P_column=1,
        Q_row=1 if what == "y" else d,
        Q_column=d if what == "y" else 1,
        R_row=r,
        R_column=1,
        S_row=1 if what == "y" else d,
        S_column=r if what == "y" else 1,
        ADD=add,
        TILE_M=config.rows,
        TILE_N=config.columns,
        DEPTH=config.depth,
        SHALLOW=config.shallow,
        GROUP=GROUP,
    )


def build_sums(target: str, dtype: torch.dtype, B: torch.dtype, r: int) -> Any:
    return build(
        "sums_kernel",
        target,
        SUMS.warps,
        SUMS.stages,
        dz_ptr=torch.float32,
        dB_ptr=torch.float32,
        dy_ptr=dtype,
        z_ptr=dtype,
        B_ptr=B,
        M=8191,
        N=4096,
        K=r,
        span=512,
        dy_row=4096,
        dy_column=1,
        z_row=r,
        z_column=1,
        B_row=r,
        B_column=1,
        TOKENS=SUMS.tokens,
        COLUMNS=SUMS.columns,
        RANK=16,
    )


def kind(target: str) -> str:
    return "sm_90" if target == "sm_100" else target


def assert_fits(built: Any) -> None:
    from kore_fast.ops.triton.compile import SHARED_MEMORY

    assert built.spills == 0
    assert built.shared <= SHARED_MEMORY[built.target]


@pytest.mark.parametrize("target", TARGETS)
def test_low_precision_compiles_to_asynchronous_tensor_core_code(target: str) -> None:
    """The largest tiles of y and dx: no spills, shared memory that is there, and the products that were meant."""
    config = candidates(torch.bfloat16, kind(target))[0]
    for what in ("y", "dx"):
        built = build_product(target, torch.bfloat16, config, what, bias=what == "y")
        assert_fits(built)
        code = built.assembly
        if target == "gfx942":
            assert re.search(r"v_mfma_f32_\w*bf16", code)
            continue
        assert "cp.async.cg.shared.global" in code
        if target == "sm_80":
            assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in code
        if target == "sm_90":
            assert re.search(r"wgmma\.mma_async\S*k16\.f32\.bf16\.bf16", code)
        if target == "sm_100":
            assert "tcgen05.mma" in code


@pytest.mark.parametrize("target", TARGETS)
def test_float32_compiles_to_float32_products(target: str) -> None:
    built = build_product(target, torch.float32, candidates(torch.float32, kind(target))[0], "dx")
    assert_fits(built)
    assert "tf32" not in built.assembly
    assert "xf32" not in built.assembly


@pytest.mark.parametrize("target", TARGETS)
def test_one_read_compiles(target: str) -> None:
    assert_fits(build_sums(target, torch.bfloat16, torch.float32, MOST_RANK))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_everything_shipped_compiles(target: str, dtype: torch.dtype) -> None:
    """Every configuration: y and dx, B in the dtype and in float32, adding or not, even and odd widths."""
    for what, aligned, add in (
        ("y", True, False),
        ("y", False, False),
        ("dx", True, False),
        ("dx", True, True),
        ("dx", False, True),
    ):
        for config in candidates(dtype, kind(target), aligned, add):
            for S in {dtype, torch.float32} if what == "y" else {dtype}:
                for r in (128, 240) if aligned else (235, 1):
                    d = 4096 if aligned else 4095
                    assert_fits(build_product(target, dtype, config, what, S, d, r, bias=what == "y", add=add))
    if dtype != torch.float32:
        for B in (dtype, torch.float32):
            for r in (1, 8, 9, MOST_RANK):
                assert_fits(build_sums(target, dtype, B, r))


def test_small_products_get_small_tiles() -> None:
    options = candidates(torch.bfloat16, "sm_90")
    assert [by_rule(options, tokens, 4096, 132).columns for tokens in (1, 512, 1024, 8192)] == [64, 64, 128, 256]


def test_one_read_only_where_it_saves_bytes() -> None:
    dy = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta")
    span = one_read(dy, 16, 132)
    assert span is not None
    assert span % 64 == 0
    assert -(-4096 // span) * (8192 // SUMS.tokens) >= 132
    assert one_read(dy, 17, 132) is None
    assert one_read(dy[:, :4095], 16, 132) is None
    assert one_read(dy[:16], 16, 132) is None
    assert one_read(dy.float(), 16, 132) is None


def test_arithmetic_in_the_interpreter() -> None:
    """`interpreted_frozen_lora.py`, in a process that asks for the interpreter before it imports Triton."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'triton>=3.4'")
    here = Path(__file__)
    options = ["-q", "--noconftest", "--import-mode=importlib", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(here.with_name("interpreted_frozen_lora.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=here.parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout)
    assert "skipped" not in done.stdout


@needs_gpu
@pytest.mark.parametrize("wide_B", [False, True])
@pytest.mark.parametrize(
    ("tokens", "d_in", "d_out", "r"),
    [(1, 64, 48, 8), (777, 235, 274, 35), (2048, 1024, 1536, 16), (4096, 2048, 4096, 235), (8192, 4096, 4096, 128)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu_twice_the_error_of_plain_pytorch_at_most(
    dtype: torch.dtype, tokens: int, d_in: int, d_out: int, r: int, wide_B: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(tokens, d_in, device=GPU).to(dtype)
    W, A = (torch.randn(rows, d_in, device=GPU).div(d_in**0.5).to(dtype) for rows in (d_out, r))
    B = torch.randn(d_out, r, device=GPU).to(torch.float32 if wide_B else dtype)
    bias, dy = torch.randn(d_out, device=GPU).to(dtype), torch.randn(tokens, d_out, device=GPU).to(dtype)

    def everything(backend: str, kind: torch.dtype) -> list[torch.Tensor]:
        given = [t.to(kind) for t in (x, W, A, B.to(dtype) if backend == "plain" else B, bias)]
        if backend == "triton":
            given[3] = B.clone()
        for i in (0, 3, 4):
            given[i] = given[i].detach().requires_grad_()
        if backend == "triton":
            y = frozen_lora(*given, scaling=0.5, backend="triton")
        else:
            y = torch.nn.functional.linear(given[0], given[1], given[4])
            y = y + 0.5 * (given[0] @ given[2].mT) @ given[3].mT
        return [y.detach(), *torch.autograd.grad(y, [given[i] for i in (0, 3, 4)], dy.to(kind))]

    exact = everything("exact", torch.float64)
    for ours, theirs, best in zip(everything("triton", dtype), everything("plain", dtype), exact, strict=True):
        errors = [float((one.double() - best).norm() / best.norm()) for one in (ours, theirs)]
        assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps / 8


@needs_gpu
def test_on_a_gpu_the_same_call_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    x, dy = (torch.randn(3000, 1024, device=GPU).bfloat16() for _ in range(2))
    W, A, B = (torch.randn(*shape, device=GPU).bfloat16() for shape in ((1024, 1024), (16, 1024), (1024, 16)))
    found = []
    for _ in range(2):
        given = [x.clone().requires_grad_(), B.clone().requires_grad_()]
        y = frozen_lora(given[0], W, A, given[1], backend="triton")
        found.append([y, *torch.autograd.grad(y, given, dy)])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
