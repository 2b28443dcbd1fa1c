"""`KoreLinear` on a layer that bitsandbytes has quantised (4-bit, 8-bit): what knows how that library keeps weights."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
from torch import nn

from kore_fast.errors import BackendError, ConstraintError
from kore_fast.modules.linear import KoreLinear
from kore_fast.modules.weights import LayerWeight, is_repacked
from kore_fast.ops.backends import Backend
from kore_fast.ops.frozen_lora_onto import frozen_lora_onto


class QuantizedKoreLinear(KoreLinear):
    """What `KoreLinear.from_linear` makes of a bitsandbytes layer: y = base_layer(x) + scaling·(x Aᵀ) Bᵀ.

    The layer itself, its weight shared, computes its product and that product's gradient. ``lora_A`` and ``lora_B`` are
    float32; their products are made in x's dtype, under autocast in autocast's.
    """

    base_layer: nn.Linear

    def __init__(self, layer: nn.Linear, A: torch.Tensor, *, backend: Backend = "auto") -> None:
        if backend not in ("auto", "reference"):
            raise BackendError(
                f"backend {backend!r}: on a quantised layer the adapter's products are plain PyTorch's only; choose "
                "'auto' or 'reference'"
            )
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.base_layer = layer
        self.quantization = _kind(layer)
        made = A.detach().to(layer.weight.device, torch.float32)
        self._adapt(made, made.new_zeros(layer.out_features, len(made)), 1.0, backend)
        self.training = layer.training

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base_layer, name) if name in ("weight", "bias") else super().__getattr__(name)

    def _get_name(self) -> str:
        return KoreLinear.__name__

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in_features) → (…, out_features)."""
        y: torch.Tensor = self.base_layer(x)
        return y if self.merged else frozen_lora_onto(y, x, self.lora_A, self.lora_B, scaling=self.scaling)

    @torch.no_grad()
    def merge(self) -> None:
        """As `KoreLinear.merge`."""
        if self.merged:
            return
        kept = _taken(self.base_layer)
        delta = self.delta()
        if delta.any():
            wanted = self._base_weight() + delta
            _quantise(self.base_layer, wanted)
            rounding = float((self._base_weight() - wanted).norm() / delta.norm())
            if not math.isfinite(rounding):
                _put(self.base_layer, kept)
                raise ConstraintError(f"W + B·A is not finite in {self.quantization}; the layer is not merged")
            warnings.warn(
                f"merged into {self.quantization}: the rounding of W + B·A is {rounding:.1g} times as large as B·A; "
                "to_linear() gives a plain layer without it, and an unmerged adapter has none",
                stacklevel=2,
            )
        self._unmerged = kept

    def unmerge(self) -> None:
        """Undo `merge`."""
        if self._unmerged is not None:
            _put(self.base_layer, self._unmerged)
            self._unmerged = None

    def _dtype(self) -> torch.dtype:
        layer: Any = self.base_layer
        if self.quantization == "int8":
            return torch.float16 if layer.bias is None else layer.bias.dtype
        return layer.compute_dtype or _dtype_of(layer.weight.quant_state)

    def _base_weight(self) -> torch.Tensor:
        """W in float32, also where it is merged."""
        if self._unmerged is None:
            return LayerWeight("layer", self.base_layer).read(torch.float32)
        merged = _taken(self.base_layer)
        _put(self.base_layer, self._unmerged)
        try:
            return LayerWeight("layer", self.base_layer).read(torch.float32)
        finally:
            _put(self.base_layer, merged)


def _kind(layer: Any) -> str:
    return "int8" if LayerWeight("layer", layer).kind == "8-bit" else layer.weight.quant_state.quant_type


def _dtype_of(state: Any) -> torch.dtype:
    """Of the weight that was quantised."""
    return state.original_dtype if getattr(state, "packing_format_for_cpu", False) else state.dtype


def _quantise(layer: Any, W: torch.Tensor) -> None:
    """Put W (d_out, d_in) into the layer, quantised as its weight is. What the layer had is not written to."""
    from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit
    from bitsandbytes.nn import Int8Params, Params4bit

    weight = layer.weight
    if LayerWeight("layer", layer).kind == "8-bit":
        codes, scales, _ = int8_vectorwise_quant(W.to(torch.float16))
        new = Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
        state = copy.copy(layer.state)
        state.reset_grads()
        _put(layer, (new, state))
        return
    old = weight.quant_state
    settings = {
        "blocksize": old.blocksize,
        "quant_type": old.quant_type,
        "compress_statistics": old.original_nested if is_repacked(weight) else old.nested,
        "quant_storage": layer.quant_storage,
    }
    codes, state = quantize_4bit(W, **settings)
    state.dtype = _dtype_of(old)
    _put(layer, (Params4bit(codes, quant_state=state, module=layer, bnb_quantized=True, **settings), None))


def _taken(layer: Any) -> tuple[nn.Parameter, Any]:
    """A layer's weight with what belongs to it."""
    return layer.weight, getattr(layer, "state", None)


def _put(layer: Any, kept: tuple[nn.Parameter, Any]) -> None:
    """Undo a change since `_taken`, on the device where the layer is now."""
    weight, state = kept
    device = layer.weight.device
    if weight.device != device:
        weight = weight.to(device)  # type: ignore[assignment]
        for name in () if state is None else ("CB", "SCB"):
            tensor = getattr(state, name)
            setattr(state, name, None if tensor is None else tensor.to(device))
    layer.weight = weight
    if state is None:
        layer.quant_state = weight.quant_state  # type: ignore[attr-defined]
    else:
        layer.state = state
