"""The paper's residual form of a KORE model, W0 − B0·A with B from B0, and the way back to the zero-delta form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from kore_fast.constraint.selection import select_linears
from kore_fast.errors import ConstraintError

if TYPE_CHECKING:
    from kore_fast.modules.adapter import KorePeftModel


def check_plain(model: nn.Module, target_modules: str | Sequence[str] | None) -> None:
    """Refuse layers from whose weight nothing can be taken away.

    Raises:
        ConstraintError: a weight that is quantised or sharded; names the layer.
    """
    for name in select_linears(model, target_modules):
        weight = model.get_submodule(name).weight
        if not isinstance(weight, torch.Tensor) or not weight.dtype.is_floating_point or hasattr(weight, "full_tensor"):
            raise ConstraintError(
                f"{name}: form='residual' changes the base's weight, and a {type(weight).__name__} cannot be changed; "
                "use the zero-delta form, which trains alike"
            )


@torch.no_grad()
def to_residual(model: KorePeftModel) -> KorePeftModel:
    """Turn a KORE model into the paper's residual form, in place: W0 − B0·A as base, B0 added to B.

    B0 follows from A alone: its rows are √σ_i v_iᵀ with orthonormal v_i, so W0·P = W0·A⁺·A and B0 = W0·A⁺, column i of
    which is W0·a_i / ‖a_i‖². Such a model cannot be saved before `to_zero_delta`.
    """
    from kore_fast.modules.adapter import lora_layers

    if model.kore_residual is not None:
        return model
    model.kore_residual = {}
    for name, layer in lora_layers(model).items():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        weight = layer.get_base_layer().weight
        norms = A.square().sum(dim=1)
        B0 = (weight.to(A.dtype) @ A.T) / torch.where(norms > 0, norms, torch.ones_like(norms))
        weight.sub_((B0 @ A).to(weight.dtype))
        B.add_(B0)
        model.kore_residual[name] = B0
    return model


@torch.no_grad()
def to_zero_delta(model: KorePeftModel) -> KorePeftModel:
    """Undo `to_residual`, in place, also after training: W0 back, B − B0 in B.

    The function stays the same; the adapter that is then saved fits the untouched base model.
    """
    from kore_fast.modules.adapter import lora_layers

    if model.kore_residual is None:
        return model
    for name, layer in lora_layers(model).items():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        B0 = model.kore_residual[name]
        weight = layer.get_base_layer().weight
        weight.add_((B0 @ A).to(weight.dtype))
        B.sub_(B0)
    model.kore_residual = None
    return model
