"""Choices that depend on a seed and on names only: neither on the order of items nor on how many there are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def rank(seed: int, *names: object) -> int:
    """A whole number from 0 to 2⁶⁴ − 1, evenly spread over different ``names``."""
    text = "\x1f".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def pick(options: Sequence[T], seed: int, *names: object) -> T:
    """One of ``options``."""
    return options[rank(seed, *names) % len(options)]


def shuffled(options: Sequence[T], seed: int, *names: object) -> list[T]:
    """All ``options`` in an order given by the names."""
    places = sorted(range(len(options)), key=lambda place: rank(seed, *names, place))
    return [options[place] for place in places]
