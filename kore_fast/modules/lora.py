"""PEFT's LoRA layer with the frozen-A operation in its forward pass; in everything else it is PEFT's."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from kore_fast.modules.shared_input import Operands, SharedInput
from kore_fast.ops import frozen_lora


class KoreLoraLinear(Linear):
    """PEFT's `lora.Linear`; where one adapter is active, its A frozen and nothing out of the ordinary asked for, the
    forward pass is `ops.frozen_lora`. With B = 0 that is the base layer's, bit for bit."""

    frozen_a: frozenset[str] = frozenset()
    """Adapters whose A stays frozen: PEFT before 0.20 trains what it switches on."""
    shared_input: SharedInput | None = None

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; what is frozen stays so."""
        super().set_adapter(*args, **kwargs)
        self._keep_frozen()

    def enable_adapters(self, enabled: bool) -> None:
        """As in PEFT; what is frozen stays so."""
        super().enable_adapters(enabled)
        self._keep_frozen()

    def set_requires_grad(self, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; what is frozen stays so."""
        super().set_requires_grad(*args, **kwargs)
        self._keep_frozen()

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT; another adapter under the name is not frozen."""
        super().delete_adapter(adapter_name)
        self.frozen_a -= {adapter_name}

    def _keep_frozen(self) -> None:
        for name in self.frozen_a & set(self.lora_A):
            self.lora_A[name].weight.requires_grad_(False)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(…, in_features) → (…, out_features)."""
        plain = not args and all(value is None for value in kwargs.values())
        if plain and self.shared_input is not None:
            y = self.shared_input.take(self, x)
            if y is not None:
                return y
        given = self.operands(x) if plain else None
        if given is None:
            return super().forward(x, *args, **kwargs)
        return frozen_lora(x, given.W, given.A, given.B, given.bias, scaling=given.scaling)

    def operands(self, x: torch.Tensor) -> Operands | None:
        """See `SharingLayer`."""
        name = self._fused(x)
        if name is None:
            return None
        base = self.get_base_layer()
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        return Operands(base.weight, A.to(x.dtype), B, base.bias, self.scaling[name])

    def _fused(self, x: torch.Tensor) -> str | None:
        """The one adapter that the operation can run; None where PEFT's own forward pass is called for."""
        if self.disable_adapters or self.merged:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or active[0] in getattr(self, "lora_variant", {}):
            return None
        (name,) = active
        # Not get_base_layer(): below it another method's layer may stand (mixed adapters), which PEFT's forward calls.
        base, A, B = self.base_layer, self.lora_A[name], self.lora_B[name]
        if type(base) is not nn.Linear:
            return None
        W = base.weight
        plain = (
            not any((base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks))
            and type(A) is type(B) is nn.Linear
            and isinstance(self.lora_dropout[name], nn.Identity)
            and B.bias is None
            # A sharded weight is gathered by the layer's own forward pass.
            and not any(
                hasattr(tensor, "device_mesh") or hasattr(tensor, "ds_id") for tensor in (W, A.weight, B.weight)
            )
        )
        if not plain or W.requires_grad or A.weight.requires_grad:
            return None
        if torch.is_autocast_enabled(x.device.type):
            return name if B.weight.dtype == torch.float32 else None
        same = x.dtype == W.dtype and W.is_floating_point()
        return name if same and torch.promote_types(B.weight.dtype, x.dtype) == B.weight.dtype else None


def use_kore_layers(config: LoraConfig) -> LoraConfig:
    """Make PEFT build `KoreLoraLinear` for plain linear layers; it does not go into the saved configuration."""
    config._register_custom_module({nn.Linear: _layer_for})
    return config


def _layer_for(target: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module | None:
    """PEFT asks also for subclasses (quantised layers) and single parameters: those are left to PEFT."""
    if kwargs.get("parameter_name") is not None:
        return None
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    return KoreLoraLinear(target, adapter_name, **kwargs) if type(base) is nn.Linear else None
