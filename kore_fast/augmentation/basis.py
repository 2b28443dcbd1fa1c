"""What a kept result depends on, as one hash: the values it was made from, and the code that made it."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import unicodedata
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any


@cache
def code_mark(*modules: str) -> str:
    """A hash of modules' sources (of a package, of every module in it) and of what Python reads text by.

    The code itself, and not a number that somebody has to count up: whatever is changed in it, nothing that the code
    before has made is taken for its work.
    """
    digest = hashlib.sha256(f"{sys.version_info[:3]} {unicodedata.unidata_version}".encode())
    for name in modules:
        file = Path(str(importlib.import_module(name).__file__))
        for source in sorted(file.parent.glob("*.py")) if file.stem == "__init__" else [file]:
            digest.update(f"\n{name} {source.name}\n".encode() + source.read_bytes())
    return digest.hexdigest()


def package_mark(name: str) -> str:
    """The version of another package, or that it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


class Basis:
    """Hashes of values on common ground.

    Args:
        ground: JSON values that are the same for all.
    """

    def __init__(self, *ground: Any) -> None:
        self._ground = hashlib.sha256(json.dumps(ground, sort_keys=True).encode())

    def of(self, *values: str) -> str:
        """The basis of a result that is made from ``values``."""
        digest = self._ground.copy()
        # As JSON, in which no two lists of texts are the same.
        digest.update(json.dumps(values).encode())
        return digest.hexdigest()
