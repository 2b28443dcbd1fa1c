"""95 % intervals, deterministic and without scipy: Wilson's for shares, Student's for means."""

from __future__ import annotations

import math
from collections.abc import Sequence

LEVEL = 0.95
_NORMAL_QUANTILE = 1.959963984540054
_NORMAL_FROM = 10_000


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of the share ``successes / n``.

    Unlike the textbook interval it stays inside [0, 1] and does not shrink to nothing at 0 or ``n`` successes.

    Raises:
        ValueError: ``n`` is not positive or ``successes`` is outside 0…n.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"a share needs 0 <= successes <= n and n > 0, not {successes} of {n}")
    z2 = _NORMAL_QUANTILE**2
    share = successes / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _NORMAL_QUANTILE / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's t 95 % interval of the mean of ``values``: mean ± t(n - 1) · s / √n, s with n - 1 in its denominator.

    Raises:
        ValueError: fewer than two values (one value says nothing about its spread), or one that is not finite.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval of a mean needs at least two values, not {n}")
    if not all(math.isfinite(value) for value in values):
        raise ValueError("an interval of a mean needs finite values")
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half = student_quantile(n - 1) * math.sqrt(variance / n)
    return mean - half, mean + half


def student_quantile(degrees: int) -> float:
    """The t for which Student's distribution holds 95 % between -t and t.

    Bisection on the closed form for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4); from 10,000
    degrees on the normal quantile, which is then within 3e-4.

    Raises:
        ValueError: ``degrees`` below 1.
    """
    if degrees < 1:
        raise ValueError(f"Student's distribution needs at least one degree of freedom, not {degrees}")
    if degrees >= _NORMAL_FROM:
        return _NORMAL_QUANTILE
    low, high = 0.0, 13.0
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        low, high = (middle, high) if _within(middle, degrees) < LEVEL else (low, middle)


def _within(t: float, degrees: int) -> float:
    """Probability that |T| <= t."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine = math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for power in range(2 + odd, degrees - 1, 2):
        term *= cosine * cosine * (power - 1) / power
        total += term
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
