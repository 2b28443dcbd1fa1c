"""Being killed, without a process of one's own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Killed(BaseException):
    pass


class Killer:
    """Raises instead of the n-th file being renamed or removed, and of all later ones: a process that is gone does
    neither."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = -1
        # What a kill leaves is in the system's cache: waiting for the disk makes no difference here.
        monkeypatch.setattr(os, "fsync", lambda _: None)
        self._guard(monkeypatch, os, "replace")
        self._guard(monkeypatch, Path, "unlink")

    def _guard(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def guarded(*given: Any, **named: Any) -> Any:
            if self.left == 0:
                raise Killed
            self.left -= 1
            return real(*given, **named)

        monkeypatch.setattr(owner, name, guarded)
