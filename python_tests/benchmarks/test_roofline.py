"""The arithmetic that a fraction of the roofline rests on."""

from __future__ import annotations

import pytest

from benchmarks.roofline import DEVICES, covariance_seconds


@pytest.mark.parametrize(("d", "milliseconds"), [(4096, 0.176), (11008, 1.27), (18944, 3.77)])
def test_a_triangle_on_an_h200_is_bound_by_arithmetic(d: int, milliseconds: float) -> None:
    assert 1e3 * covariance_seconds(DEVICES["NVIDIA H200"], 8192, d) == pytest.approx(milliseconds, rel=0.01)


def test_few_tokens_are_bound_by_memory() -> None:
    h200 = DEVICES["NVIDIA H200"]
    triangle = 2 * 4 * 4096 * 4097 / 2 / h200.bandwidth
    assert covariance_seconds(h200, 1, 4096) == pytest.approx(triangle, rel=0.01)
    assert covariance_seconds(h200, 1, 4096, c_bytes=8) == pytest.approx(2 * triangle, rel=0.01)
