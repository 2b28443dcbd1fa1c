"""The CUDA covariance kernels without a GPU: their own source run on a host, and compiled for sm_80 and sm_90a."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
# Stable-ABI target, as in CMakeLists.txt.
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
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


def _run(*command: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++, clang++ or $CXX)")
    program = tmp_path_factory.mktemp("emulation") / "emulation_test"
    # Fibers jump between stacks, which fortified longjmp refuses; a fused multiply-add would change the sums.
    flags = ("-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-ffp-contract=off")
    built = _run(compiler, *flags, CSRC / "covariance" / "emulation_test.cpp", "-o", program)
    assert built.returncode == 0, built.stderr
    return program


def test_emulated_kernels_agree_with_float64(emulation: Path) -> None:
    ran = _run(emulation)
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout.count("ok ") >= 28
    assert " sm_80 " in ran.stdout
    assert " sm_90 " in ran.stdout


@pytest.mark.parametrize("defect", DEFECTS)
def test_emulation_notices_a_fault(emulation: Path, defect: str) -> None:
    ran = _run(emulation, "--defect", defect)
    assert ran.returncode in (1, 3), ran.stdout  # a wrong result, or an access that the hardware forbids
    assert "BAD" in ran.stdout or "emulation:" in ran.stdout


def _nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The compiler's report and the library."""
    nvcc = _nvcc()
    if nvcc is None:
        pytest.skip("no nvcc on the PATH, in $CUDA_HOME or /usr/local/cuda")
    include = Path(torch.__file__).parent / "include"
    library = tmp_path_factory.mktemp("cuda") / "_native_cuda.so"
    built = _run(
        nvcc,
        *("-std=c++17", "-O3", "-shared", "-cudart", "static", "-Xcompiler=-fPIC", "-Xptxas=-v", TARGET),
        *("-I", include, "-I", include / "torch" / "csrc" / "api" / "include"),
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        CSRC / "covariance" / "cuda.cu",
        *("-L", include.parent / "lib", "-ltorch_cpu", "-ldl", "-o", library),
    )
    report = built.stdout + built.stderr
    assert built.returncode == 0, report
    return report, library


def test_cuda_kernels_compile_without_spills(compiled: tuple[str, Path]) -> None:
    report, _ = compiled
    assert "warning" not in report.lower(), report  # ptxas warns where it serialises wgmma or ignores setmaxnreg
    entries = re.findall(
        r"Compiling entry function '(\S+)' for '(sm_\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        report,
        re.S,
    )
    products = [entry for entry in entries if "product_sm" in entry[0]]
    assert len(products) == 2 * 24, report  # two targets; path × format × load × C's dtype
    for name, target, stack, stores, loads, registers in entries:
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
    ran = _run(sys.executable, "-c", program)
    assert ran.returncode == 0, ran.stderr
