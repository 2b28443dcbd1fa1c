"""Triton kernels compiled ahead of time, without a GPU: the code for a target, its registers and shared memory."""

from __future__ import annotations

import inspect
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

# Shared memory that one program may have, in bytes.
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Built:
    """A kernel for one target. ``spills`` counts registers (AMD) or bytes stored and loaded (NVIDIA)."""

    target: str
    shared: int
    registers: int
    spills: int
    assembly: str


def build(kernel: Any, arguments: Mapping[str, Any], target: str, *, num_warps: int = 4, num_stages: int = 2) -> Built:
    """Compile ``kernel`` for a name of TARGETS as a launch with these arguments would.

    Args:
        kernel: a function under ``triton.jit``.
        arguments: for each of its parameters a torch dtype (a pointer to it, aligned), an integer (specialised as a
            launch does: 1 is a constant, a multiple of 16 is known to be one) or, for a constexpr parameter and for
            None, the value itself. A float is a float32.

    Raises:
        whatever the compiler raises; RuntimeError with the assembler's words when it refuses.
    """
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        fixed = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not fixed):
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
            continue
        if isinstance(value, torch.dtype):
            signature[parameter.name] = POINTERS[value]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
            continue
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, torch.dtype) or (value % 16 == 0 and not fixed):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(
        source,
        target=TARGETS[target],
        options={"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True},
    )
    if target.startswith("sm_"):
        assembly = made.asm["ptx"]
        registers, spills = _assemble(assembly)
    else:
        assembly = made.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s*(\d+)", assembly)[0])
        spills = sum(int(n) for n in re.findall(r"\.[vs]gpr_spill_count:\s*(\d+)", assembly))
    return Built(target, made.metadata.shared, registers, spills, assembly)


def _assemble(ptx: str) -> tuple[int, int]:
    """Registers of a thread, and bytes of spill stores and loads, by the assembler that Triton brings."""
    architecture = re.findall(r"^\.target\s+(\w+)", ptx, re.MULTILINE)[0]
    arch = int(re.findall(r"\d+", architecture)[0])
    tool = get_ptxas(arch) if inspect.signature(get_ptxas).parameters else get_ptxas()
    with TemporaryDirectory() as scratch:
        source = Path(scratch) / "kernel.ptx"
        source.write_text(ptx)
        done = subprocess.run(
            [tool.path, "-v", f"-arch={architecture}", str(source), "-o", str(Path(scratch) / "kernel.cubin")],
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"ptxas for {architecture}: {done.stderr.strip()}")
    registers = re.findall(r"Used (\d+) registers", done.stderr)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    return int(registers[0]), sum(int(n) for n in spills)
