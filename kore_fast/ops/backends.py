"""Which backend runs an operation: asked for by name, the first of those preferred that runs here, or the fastest."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any, Literal, get_args

import torch

from kore_fast.errors import BackendError
from kore_fast.ops import measured

logger = logging.getLogger(__name__)

Backend = Literal["auto", "reference", "native", "triton"]
NAMED = tuple(name for name in get_args(Backend) if name != "auto")


def choose(operation: str, backend: str, device: torch.device, preferred: tuple[str, ...]) -> Any:
    """The module ``kore_fast.ops.<backend>.<operation>``.

    Args:
        operation: its name, as of the file.
        backend: a name, or ``"auto"`` for the first of ``preferred`` that runs on the device.
        preferred: backends, fastest first.

    Raises:
        BackendError: an unknown name, or a backend asked for that can't run here; says what to install.
    """
    if backend == "auto":
        for name in preferred:
            if _unavailable(operation, name, device) is None:
                _say_once(operation, name, device.type)
                return _module(operation, name)
        raise BackendError(f"{operation}: none of {', '.join(preferred)} runs on {device}")
    if backend not in NAMED:
        raise BackendError(f"{operation}: unknown backend {backend!r}; choose auto, {', '.join(NAMED)}")
    reason = _unavailable(operation, backend, device)
    if reason is not None:
        raise BackendError(f"{operation}: backend {backend!r} can't run on {device}: {reason}")
    return _module(operation, backend)


def fastest(
    operation: str, kind: str, device: torch.device, preferred: tuple[str, ...], run: Callable[[Any], Any]
) -> Any:
    """As `choose` with ``"auto"``, but of those that run here the one that is measured to be fastest.

    Args:
        kind: what decides the speed, see `kore_fast.ops.measured.fastest`.
        run: does the work with a backend's module.
    """
    able = [name for name in preferred if _unavailable(operation, name, device) is None]
    ways = {name: partial(run, _module(operation, name)) for name in able}
    return _module(operation, measured.fastest(f"{operation} {kind}", device, ways))


def _unavailable(operation: str, backend: str, device: torch.device) -> str | None:
    """Why a backend can't run an operation on a device; None if it can."""
    if backend == "reference":
        return None
    reason: str | None = _module(operation, backend).unavailable(device)
    return reason


@cache
def _module(operation: str, backend: str) -> Any:
    return import_module(f"kore_fast.ops.{backend}.{operation}")


@cache
def _say_once(operation: str, backend: str, device: str) -> None:
    logger.info("%s on %s: %s backend", operation, device, backend)


def describe(operation: str, device: torch.device) -> list[tuple[str, str | None]]:
    """Each backend of an operation, with why it can't run on a device (None: it can)."""
    return [(name, _unavailable(operation, name, device)) for name in NAMED]
