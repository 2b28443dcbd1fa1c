"""``kore-fast env``: versions, devices and what was built."""

from __future__ import annotations

import argparse
from typing import Any

import kore_fast


def add_env(commands: Any) -> None:
    command = commands.add_parser("env", help="versions, devices and what was built")
    command.add_argument("--verbose", action="store_true", help=argparse.SUPPRESS)
    command.set_defaults(work=_env)


def _env(options: argparse.Namespace) -> int:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    print(f"kore-fast     {kore_fast.__version__}\nPython        {platform.python_version()} on {platform.platform()}")
    for package in ("torch", "triton", "numpy", "safetensors", "transformers", "peft", "accelerate"):
        try:
            print(f"{package:<13} {version(package)}")
        except PackageNotFoundError:
            print(f"{package:<13} not installed")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices       {', '.join(devices) or 'CPU'}, {torch.get_num_threads()} threads")
    from kore_fast.ops.backends import describe
    from kore_fast.ops.native.library import describe as native

    print(f"native build  {native()}")
    for device in ["cpu", *(["cuda"] if devices else [])]:
        for operation in ("covariance", "frozen_lora"):
            for backend, reason in describe(operation, torch.device(device)):
                print(f"{operation:<13} {backend} on {device}: {reason or 'yes'}")
    from kore_fast.ops.measured import choices_file, known_choices

    for device in ["cpu", *(["cuda"] if devices else [])]:
        known = known_choices(torch.device(device))
        for kind, way in sorted(known.items()):
            print(f"measured on {device}: {kind}: {way}")
    print(f"choices       {choices_file()}: backends that were measured to be fastest; delete it to measure again")
    print("nullspace     truncated (block Krylov, with a proof of its leak) from width 768 on; below float64 eigh")
    print("              complement (of the largest, where rank is nearly width and only the span counts), likewise")
    return 0
