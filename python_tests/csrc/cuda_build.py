"""What the tests of CUDA sources without a GPU share: compilers found, programs built and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
# Stable-ABI target, as in CMakeLists.txt.
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"


def run(*command: str | Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """A program's words and exit status."""
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=timeout)


def build_emulation(operation: str, folder: Path) -> Path:
    """csrc/<operation>/emulation_test.cpp as a program; skips the test where there is no compiler."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++, clang++ or $CXX)")
    program = folder / "emulation_test"
    # Fibers jump between stacks, which fortified longjmp refuses; a fused multiply-add would change the sums.
    flags = ("-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-ffp-contract=off")
    built = run(compiler, *flags, CSRC / operation / "emulation_test.cpp", "-o", program)
    assert built.returncode == 0, built.stderr
    return program


def nvcc() -> str:
    """The CUDA compiler; skips the test where there is none."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("no nvcc on the PATH, in $CUDA_HOME or /usr/local/cuda")
    return found


def build_library(operation: str, folder: Path, *options: str) -> tuple[str, Path]:
    """The compiler's report on csrc/<operation>/cuda.cu for sm_80 and sm_90a, and the library."""
    include = Path(torch.__file__).parent / "include"
    library = folder / "_native_cuda.so"
    built = run(
        nvcc(),
        *("-std=c++17", "-O3", "-shared", "-cudart", "static", "-Xcompiler=-fPIC", "-Xptxas=-v", TARGET, *options),
        *("-I", include, "-I", include / "torch" / "csrc" / "api" / "include"),
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        CSRC / operation / "cuda.cu",
        *("-L", include.parent / "lib", "-ltorch_cpu", "-ldl", "-o", library),
    )
    report = built.stdout + built.stderr
    assert built.returncode == 0, report
    return report, library


def entries(report: str) -> list[tuple[str, ...]]:
    """Of each kernel: name, target, bytes of stack, of spill stores, of spill loads, registers."""
    return re.findall(
        r"Compiling entry function '(\S+)' for '(sm_\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        report,
        re.S,
    )
