"""Packages that are needed only by whoever asks a language model."""

from __future__ import annotations

import importlib
from typing import Any

from kore_fast.errors import LanguageModelError


def needed(package: str) -> Any:
    """An optional package.

    Raises:
        LanguageModelError: it is not installed; says how to.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise LanguageModelError(
            f'asking a language model needs the package {package}: pip install "kore-fast[augment]"'
        ) from None
