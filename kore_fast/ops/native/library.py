"""Loads what ``pip install`` compiled; says why where there is nothing to load."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import ModuleType

import torch

REBUILD = "reinstall kore_fast with a C++ compiler and torch 2.11 or later: pip install --force-reinstall kore-fast"


@cache
def _cpu() -> ModuleType | str:
    """The module, or why there is none. Its operations are registered by the import."""
    try:
        from kore_fast import _native
    except ImportError as error:
        if _built("_native.*"):
            return f"the native kernels do not load under torch {torch.__version__} ({error}); {REBUILD}"
        return f"kore_fast was installed without native kernels; {REBUILD}"
    return _native


@cache
def _cuda() -> str | None:
    """Why the CUDA library is not there; None once it is loaded."""
    if isinstance(module := _cpu(), str):
        return module
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    path = _built("_native_cuda.so")
    if path is None:
        return "kore_fast was installed without CUDA kernels; reinstall it where nvcc is, with KORE_FAST_CUDA=1"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the CUDA kernels do not load ({error})"
    return None


def _built(pattern: str) -> Path | None:
    return next(iter(sorted(Path(__file__).parents[2].glob(pattern))), None)


def unavailable(device: torch.device) -> str | None:
    """Why no native kernel runs on a device, and what to do about it; None if one does."""
    if device.type == "cpu":
        module = _cpu()
        return module if isinstance(module, str) else None
    if device.type == "cuda":
        return _cuda()
    return f"there are no native kernels for {device.type!r}"


def describe() -> str:
    """One line for ``kore-fast env``: what was built, and which instruction set runs."""
    module = _cpu()
    if isinstance(module, str):
        return module
    build = module.build
    cuda = f"CUDA {build['cuda']} for {build['cuda_architectures']}" if build["cuda"] else "no CUDA"
    return (
        f"{module.cpu_capability()}, {build['compiler']}, headers of torch {build['torch_headers']} "
        f"(stable ABI {build['torch_abi']}), {cuda}"
    )
