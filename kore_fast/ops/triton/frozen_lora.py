"""No Triton kernels of the frozen-A LoRA layer yet."""

from __future__ import annotations

import torch


def unavailable(device: torch.device) -> str | None:
    """Why it can't run on a device."""
    return "kore_fast has no Triton kernels of this operation yet; use the reference"
