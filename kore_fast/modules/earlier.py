"""An adapter that was trained earlier as part of the model: its B·A beside each weight, not in it.

Folded into bfloat16 weights, a small B·A would be lost in their rounding: where it is 0.3 % of W about half of it, and
with it the null space that it lies in. In float32 weights it would be lost as soon as autocast rounds them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn


@torch.no_grad()
def put_beside(model: nn.Module, folder: str | Path) -> nn.Module:
    """Let each layer of the adapter compute W·x + s·B·(A·x), its factors frozen parameters of the layer.

    Names, types and weights of the layers stay as they are, so that covariances are collected, adapters attached and
    parameters spread as on the model alone. Modules that were trained in full take their place in the model.

    Args:
        model: the adapter's untouched base; changed in place.
        folder: a LoRA adapter.

    Returns:
        The model.

    Raises:
        ConstraintError: more than A and B in a layer, an A that is not the saved one, or another model's adapter.
        DataError: see `read_adapter`.
    """
    # A covariance can be collected where PEFT is not.
    from kore_fast.modules.adapter_files import check_fits, read_adapter
    from kore_fast.modules.combining import plain_adapter

    adapter = plain_adapter(read_adapter(folder))
    check_fits(adapter, model)
    scalings, state = adapter.scalings(), model.state_dict()
    for name, A in adapter.A.items():
        layer: Any = model.get_submodule(name)
        device = layer.weight.device
        layer.earlier_A = nn.Parameter(A.to(device, torch.float32), requires_grad=False)
        layer.earlier_B = nn.Parameter(adapter.B[name].to(device, torch.float32) * scalings[name], requires_grad=False)
        # Under this name `put_into` finds it again.
        layer.earlier_hook = layer.register_forward_hook(_add_earlier)
    for name, tensor in adapter.others.items():
        state[name].copy_(tensor)
    return model


def earlier_factors(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A (r, d_in) and s·B (d_out, r) that `put_beside` gave the layer, in float32; None of a layer without."""
    if "earlier_A" not in layer._parameters:
        return None
    return cast(torch.Tensor, layer.earlier_A), cast(torch.Tensor, layer.earlier_B)


def whole_weight(layer: nn.Module) -> torch.Tensor:
    """W, or W + s·B·A in float32 of a layer with earlier factors."""
    weight, factors = cast(torch.Tensor, layer.weight).detach(), earlier_factors(layer)
    if factors is None:
        return weight
    A, B = (factor.detach() for factor in factors)
    return weight.float() + B @ A


def put_into(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Make W + s·B·A the weight of every layer that has earlier factors, and take those off; in place.

    Args:
        dtype: of these weights; default the one that they have.
    """
    for layer in model.modules():
        if earlier_factors(layer) is None:
            continue
        given: Any = layer
        given.weight.data = whole_weight(layer).to(dtype or given.weight.dtype)
        given.earlier_hook.remove()
        del given.earlier_A, given.earlier_B, given.earlier_hook
    return model


def _add_earlier(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    x, factors = inputs[0], earlier_factors(layer)
    assert factors is not None
    A, B = (factor.to(x.dtype) for factor in factors)
    added = nn.functional.linear(nn.functional.linear(x, A), B)
    return output + added.to(output.dtype)
