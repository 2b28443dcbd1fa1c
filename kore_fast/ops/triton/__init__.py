"""Triton backends: one source for NVIDIA and AMD GPUs. Nothing here needs Triton until a kernel is chosen."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

OLDEST = (3, 4)
INSTALL = "pip install 'triton>=3.4' (a CUDA or ROCm build of torch brings its own)"


@cache
def triton_version() -> tuple[int, int]:
    """(major, minor) of the Triton that is installed."""
    major, minor = import_module("triton").__version__.split(".")[:2]
    return int(major), int(minor)


@cache
def device_kind(device: torch.device) -> tuple[str, int]:
    """What a device's kernels are set for, and its number of processors.

    Returns:
        "sm_80" (every NVIDIA GPU whose tensor cores read registers), "sm_90" (shared memory) or "gfx942".
    """
    if device.type == "cpu":
        return "sm_80", 1
    properties = torch.cuda.get_device_properties(device)
    architecture = "gfx942" if torch.version.hip else "sm_90" if properties.major in (9, 10) else "sm_80"
    return architecture, properties.multi_processor_count


def unavailable(device: torch.device) -> str | None:
    """Why Triton kernels can't run on ``device``, and what to install; None if they can. Triton may be missing."""
    if find_spec("triton") is None:
        return f"Triton is not installed: {INSTALL}"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "Triton needs a GPU; on a CPU only its interpreter runs (TRITON_INTERPRET=1, slow, for tests)"
    if device.type != "cuda":
        return f"no Triton kernels for {device.type}: they are for NVIDIA and AMD GPUs"
    if not torch.cuda.is_available():
        return "torch sees no GPU: install its CUDA or ROCm build"
    if triton_version() < OLDEST:
        return f"Triton {'.'.join(map(str, triton_version()))} is too old: {INSTALL}"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        architecture = properties.gcnArchName.split(":")[0]
        return None if architecture == "gfx942" else f"{architecture}: of AMD's GPUs only gfx942 is checked"
    if (properties.major, properties.minor) < (8, 0):
        return f"sm_{properties.major}{properties.minor}: bfloat16 tensor cores begin at sm_80"
    return None
