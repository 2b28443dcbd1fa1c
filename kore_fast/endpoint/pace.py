"""Requests and tokens per minute: when the next request may be sent."""

from __future__ import annotations

import asyncio
import random
import time


class Pace:
    """Spaces requests evenly: in no stretch of time do more start than its share of the minute, plus one.

    A token's limit is kept with the tokens that a request should take, and corrected by those that it took.
    """

    def __init__(self, requests_per_minute: int | None = None, tokens_per_minute: int | None = None) -> None:
        self._request_seconds = 60 / requests_per_minute if requests_per_minute else 0.0
        self._token_seconds = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._next_request = self._next_token = self._pause_end = 0.0

    async def turn(self, tokens: int) -> None:
        """Wait until a request of so many tokens may start."""
        now = time.monotonic()
        start = max(now, self._next_request, self._next_token)
        self._next_request = start + self._request_seconds
        self._next_token = start + tokens * self._token_seconds
        if start > now:
            await asyncio.sleep(start - now)
        while (left := self._pause_end - time.monotonic()) > 0:
            # Not all at once when the pause ends.
            await asyncio.sleep(left + random.uniform(0, 0.05 + 0.1 * left))

    def correct(self, foreseen: int, taken: int) -> None:
        """A request took other than the foreseen tokens."""
        self._next_token += (taken - foreseen) * self._token_seconds

    def pause(self, seconds: float) -> None:
        """The server asks for a pause: no request starts before it is over."""
        self._pause_end = max(self._pause_end, time.monotonic() + seconds)
