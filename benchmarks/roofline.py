"""What a device can do at most, and the least time that an operation can take on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """Peaks of a device."""

    bf16: float
    """Dense bfloat16 products with float32 sums, FLOP/s."""
    bandwidth: float
    """Memory, bytes/s."""


# Sustained on random data where it was measured (H200), else the data sheet's dense figure.
DEVICES = {
    "NVIDIA H200": Device(bf16=780e12, bandwidth=4.3e12),
    "NVIDIA H100": Device(bf16=989e12, bandwidth=3.35e12),
    "NVIDIA A100": Device(bf16=312e12, bandwidth=2.0e12),
}


def device() -> Device | None:
    """The current GPU's peaks, None where they are not known (a CPU's depend on its clock)."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peaks for known, peaks in DEVICES.items() if name.startswith(known)), None)


def covariance_seconds(on: Device, tokens: int, d: int, *, x_bytes: int = 2, c_bytes: int = 4) -> float:
    """Least time of C += XᵀX on one triangle: d(d+1)/2 sums of T products; x read once, the triangle read and written.

    >>> h200 = DEVICES["NVIDIA H200"]
    >>> round(1e3 * covariance_seconds(h200, 8192, 4096), 3)
    0.176
    """
    entries = d * (d + 1) / 2
    compute = 2 * tokens * entries / on.bf16
    traffic = (tokens * d * x_bytes + 2 * entries * c_bytes) / on.bandwidth
    return max(compute, traffic)
