"""Lets torchvision be imported where its compiled operators do not load: its CUDA wheel beside a CPU build of torch.

PyPI's torchvision for Linux is a CUDA build. Beside a CPU build of torch its library does not load, and its Python code
then stops at "operator torchvision::nms does not exist". With it goes every part of transformers that looks whether
torchvision is there, the parts for text alone included. The two operators that torchvision's import asks for are
declared here, without an implementation: transforms and models work, only calling ``torchvision.ops.nms`` does not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# A declaration lives as long as its library.
_declared: list[Any] = []


def declare_missing(folder: Path) -> list[str]:
    """Load the operators compiled in ``folder`` (torchvision's); declare those that are still missing.

    Returns:
        The names that had to be declared, none where the compiled library loads. A second call declares nothing.
    """
    import torch

    for compiled in sorted(folder.glob("_C.*")):
        try:
            torch.ops.load_library(str(compiled))
        except OSError:  # built for another torch: a library of CUDA's or a symbol is not there
            continue
    missing = [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            library.define(_SCHEMAS[name])
        _declared.append(library)
    return missing


class _BeforeTorchvision(MetaPathFinder):
    """Calls `declare_missing` when torchvision is imported, and costs nothing before."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None or spec.origin is None:
            return spec
        folder, run = Path(spec.origin).parent, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            declare_missing(folder)
            run(module)

        # Looking for the module (as transformers does) must not import torch; running it may.
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def watch_torchvision() -> None:
    """Have torchvision's operators declared whenever this process imports it; `import kore_fast` does so."""
    if not any(isinstance(finder, _BeforeTorchvision) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())
