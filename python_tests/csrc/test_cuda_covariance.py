"""The CUDA covariance kernels without a GPU: their own source run on a host, and compiled for sm_80 and sm_90a."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from python_tests.csrc.cuda_build import build_emulation, build_library, entries, run

DEFECTS = (
    "fragment",
    "transposed",
    "no_fence",
    "no_barrier",
    "no_list_barrier",
    "no_zeros",
    "offsets",
    "no_swizzle",
    "no_wait",
    "early_free",
    "plain_sum",
)


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_emulation("covariance", tmp_path_factory.mktemp("emulation"))


def test_emulated_kernels_agree_with_float64(emulation: Path) -> None:
    ran = run(emulation)
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout.count("ok ") >= 28
    assert " sm_80 " in ran.stdout
    assert " sm_90 " in ran.stdout


@pytest.mark.parametrize("defect", DEFECTS)
def test_emulation_notices_a_fault(emulation: Path, defect: str) -> None:
    ran = run(emulation, "--defect", defect)
    assert ran.returncode in (1, 3), ran.stdout  # a wrong result, or an access that the hardware forbids
    assert "BAD" in ran.stdout or "emulation:" in ran.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return build_library("covariance", tmp_path_factory.mktemp("cuda"))


def test_cuda_kernels_compile_without_spills(compiled: tuple[str, Path]) -> None:
    report, _ = compiled
    assert "warning" not in report.lower(), report  # ptxas warns where it serialises wgmma or ignores setmaxnreg
    found = entries(report)
    products = [entry for entry in found if "product_sm" in entry[0]]
    assert len(products) == 2 * 24, report  # two targets; path × format × load × C's dtype
    for name, target, stack, stores, loads, registers in found:
        where = f"{name} for {target}"
        assert (stack, stores, loads) == ("0", "0", "0"), where
        # Registers of a multiprocessor over the launch bound's threads.
        limit = 65536 // (384 if "sm90" in name else 1024 if "row_lists" in name else 256)
        assert int(registers) <= limit, where


def test_cuda_library_loads_and_registers_without_a_gpu(compiled: tuple[str, Path]) -> None:
    _, library = compiled
    program = f"""
import torch
ops = torch.library.Library("kore_fast", "FRAGMENT")
ops.define(
    "covariance_update_native_(Tensor(a!) C, Tensor(b!) count, Tensor x, Tensor? mask, Tensor? scale) -> ()"
)
torch.ops.load_library({str(library)!r})
assert torch._C._dispatch_has_kernel_for_dispatch_key("kore_fast::covariance_update_native_", "CUDA")
"""
    ran = run(sys.executable, "-c", program)
    assert ran.returncode == 0, ran.stderr
