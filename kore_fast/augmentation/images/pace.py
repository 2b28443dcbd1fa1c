"""Turns towards one server: so many at once, so far apart, and none before the time that it named."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Pace:
    """Hands out turns within one event loop.

    Args:
        at_once: turns taken at a time.
        interval: seconds between the starts of two turns.
    """

    def __init__(self, at_once: int, interval: float = 0.0) -> None:
        self._places = asyncio.Semaphore(at_once)
        self._gate = asyncio.Lock()
        self._interval = interval
        self._next = 0.0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn, and hold it."""
        loop = asyncio.get_running_loop()
        async with self._places:
            async with self._gate:
                while (wait := self._next - loop.time()) > 0:
                    await asyncio.sleep(wait)
                self._next = loop.time() + self._interval
            yield

    def hold(self, seconds: float) -> None:
        """Nobody's turn for so long."""
        self._next = max(self._next, asyncio.get_running_loop().time() + seconds)
