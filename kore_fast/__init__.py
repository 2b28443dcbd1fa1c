"""kore_fast: put new knowledge into large multimodal models without wiping out the old (KORE, arXiv 2510.19316).

Names load what they need when they are first used: `import kore_fast` itself imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kore_fast.torchvision_operators import watch_torchvision

__version__ = "0.1.0"

_HOME = {
    "CovarianceStore": "kore_fast.constraint",
    "KoreCallback": "kore_fast.training.callback",
    "KoreConfig": "kore_fast.constraint",
    "KoreLinear": "kore_fast.modules.linear",
    "collect_covariance": "kore_fast.constraint",
    "get_kore_model": "kore_fast.constraint",
    "load_kore_model": "kore_fast.modules.adapter",
    "replace_linears": "kore_fast.constraint",
    "save_kore_adapter": "kore_fast.modules.saving",
    "to_zero_delta": "kore_fast.constraint",
}

if TYPE_CHECKING:
    from kore_fast.constraint import (
        CovarianceStore,
        KoreConfig,
        collect_covariance,
        get_kore_model,
        replace_linears,
        to_zero_delta,
    )
    from kore_fast.modules.adapter import load_kore_model
    from kore_fast.modules.linear import KoreLinear
    from kore_fast.modules.saving import save_kore_adapter
    from kore_fast.training.callback import KoreCallback

__all__ = [
    "CovarianceStore",
    "KoreCallback",
    "KoreConfig",
    "KoreLinear",
    "collect_covariance",
    "get_kore_model",
    "load_kore_model",
    "replace_linears",
    "save_kore_adapter",
    "to_zero_delta",
]


watch_torchvision()


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'kore_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
