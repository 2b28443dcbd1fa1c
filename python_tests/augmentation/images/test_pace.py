from __future__ import annotations

import asyncio
import itertools
import time

from kore_fast.augmentation.images.pace import Pace


def test_turns_are_bounded_spaced_and_held_back() -> None:
    async def run() -> tuple[int, list[float]]:
        pace, now, most, starts = Pace(2, 0.05), 0, 0, []

        async def work() -> None:
            nonlocal now, most
            async with pace.turn():
                starts.append(time.monotonic())
                now += 1
                most = max(most, now)
                await asyncio.sleep(0.12)
                now -= 1

        await asyncio.gather(*(work() for _ in range(4)))
        pace.hold(0.3)
        held = time.monotonic()
        await work()
        starts[-1] -= held
        return most, starts

    most, starts = asyncio.run(run())
    assert most == 2
    assert all(later - earlier >= 0.045 for earlier, later in itertools.pairwise(starts[:4]))
    assert starts[-1] >= 0.29
