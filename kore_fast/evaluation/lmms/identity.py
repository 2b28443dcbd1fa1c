"""Whose answers they are: a model in memory as it computes, so that two models' answers are never mixed."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from kore_fast.modules.weights import codes

# Of each weight: enough to tell a trained factor from an untrained one, few enough for seconds at 13B.
_SAMPLES = 256


def fingerprint(model: nn.Module) -> str:
    """Hex SHA-256 over the names, types, shapes and sampled values of all weights, and which adapters are on."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = codes(parameter)
        digest.update(f"{name}:{values.dtype}:{tuple(values.shape)}".encode())
        flat = values.reshape(-1)
        sampled = flat[:: max(1, flat.numel() // _SAMPLES)].cpu().contiguous()
        digest.update(sampled.view(torch.uint8).numpy().tobytes())
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            digest.update(f"{name}:{module.disable_adapters}:{module.active_adapters}".encode())
    return digest.hexdigest()
