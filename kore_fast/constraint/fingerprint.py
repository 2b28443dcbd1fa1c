"""A model's fingerprint: a store made for one model must not constrain another."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from kore_fast.modules.earlier import earlier_factors
from kore_fast.modules.weights import codes

# Enough values of a weight to tell any two checkpoints apart, few enough to read a 13B model in seconds.
_SAMPLES = 1024


def model_fingerprint(model: nn.Module, layers: list[str]) -> str:
    """Hex SHA-256 over the names, shapes and sampled values of the weights of ``layers``.

    Values are rounded to bfloat16 first, so that one checkpoint loaded in float32 or bfloat16 has one fingerprint. The
    factors of an earlier adapter (`modules.earlier`) count: base and base with it are two models.
    """
    modules = dict(model.named_modules())
    digest = hashlib.sha256()
    for name in layers:
        for weight in (modules[name].weight, *(earlier_factors(modules[name]) or ())):
            assert isinstance(weight, torch.Tensor)
            whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # FSDP2: every rank takes part
            whole = codes(whole)  # the same before and after a CPU's forward pass
            digest.update(f"{name}:{tuple(whole.shape)}".encode())
            flat = whole.reshape(-1)
            sampled = flat[:: max(1, flat.numel() // _SAMPLES)].to(torch.bfloat16)
            digest.update(sampled.cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
