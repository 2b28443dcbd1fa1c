"""A linear layer's weight as it computes: plain, quantised by bitsandbytes, or sharded by FSDP2; read one at a time."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from kore_fast.errors import ConstraintError

Kind = Literal["plain", "4-bit", "8-bit"]


@dataclass(frozen=True)
class LayerWeight:
    """A weight that can be read; nothing has been read yet.

    Raises:
        ConstraintError: when made for a weight that is not there (offloaded, ZeRO-3, FSDP1) or quantised in a way that
            is not known; names the layer.
    """

    name: str
    module: nn.Linear

    def __post_init__(self) -> None:
        _ = self.kind

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in), also where the weight is packed."""
        weight = self.module.weight
        if weight.dim() == 2 and _is_plain(weight):
            return weight.shape[0], weight.shape[1]
        return self.module.out_features, self.module.in_features

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.module.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What it is kept in."""
        return self.module.weight.dtype

    @property
    def sharded(self) -> bool:
        """Whether all ranks must read it together (a DTensor of FSDP2 or tensor parallelism)."""
        return hasattr(self.module.weight, "full_tensor")

    def check_loaded(self) -> None:
        """Raises `ConstraintError` for a weight on the meta device."""
        if self.module.weight.is_meta:
            raise ConstraintError(
                f"{self.name}: its weight is not loaded (offloaded to CPU or disk by a device_map?); load the model "
                "without offloading"
            )

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """(d_out, d_in), floating point. Ranks that share a weight read it together, in one order.

        Args:
            dtype: to read it in; 4-bit weights are not rounded to their own first.

        Raises:
            ConstraintError: it is offloaded; a 4-bit weight and no bitsandbytes.
        """
        found = self._read(dtype)
        return found if dtype is None else found.to(dtype)

    def _read(self, dtype: torch.dtype | None) -> torch.Tensor:
        self.check_loaded()
        weight: Any = self.module.weight
        state: Any
        kind = self.kind
        if kind == "4-bit":
            try:
                from bitsandbytes.functional import dequantize_4bit
            except ImportError:
                raise ConstraintError(f"{self.name}: a 4-bit weight; pip install bitsandbytes to read it") from None
            state = copy.copy(weight.quant_state)
            if is_repacked(weight):
                # Its layout goes back to bitsandbytes' usual one; the scales stay rounded as that CPU computes.
                state.dtype, state.packing_format_for_cpu = state.original_dtype, False
                state.absmax = state.absmax.mT.reshape(-1).to(torch.float32)
            state.dtype = state.dtype if dtype is None else dtype
            return dequantize_4bit(codes(weight), state)
        if kind == "8-bit":
            # bitsandbytes keeps int8 = W·127 / max|row|; the first forward pass moves the row's maximum to the state.
            state = getattr(self.module, "state", None)
            scale = weight.SCB if getattr(weight, "SCB", None) is not None else state.SCB
            return weight.data.to(torch.float32) * (scale.to(weight.device, torch.float32).view(-1, 1) / 127)
        if self.sharded:
            return weight.detach().full_tensor()
        return weight.detach()

    @property
    def kind(self) -> Kind:
        """How it is kept."""
        weight: Any = self.module.weight
        quantised = getattr(weight, "quant_state", None)
        if is_repacked(weight) and _inverse() is None:
            # Of this layout `dequantize_4bit` knows nothing: it would return other numbers.
            raise ConstraintError(
                f"{self.name}: a forward pass has repacked its 4-bit weight for this CPU (bitsandbytes with AVX-512), "
                "and this bitsandbytes cannot undo that: install another version, or collect and initialise on an "
                "accelerator or with the unquantised model"
            )
        if quantised is not None:
            return "4-bit"
        state = getattr(self.module, "state", None)
        if weight.dtype == torch.int8 and (
            getattr(weight, "SCB", None) is not None or getattr(state, "SCB", None) is not None
        ):
            return "8-bit"
        if not _is_plain(weight):
            raise ConstraintError(
                f"{self.name}: a {type(self.module).__name__} with a {type(weight).__name__} of {weight.dtype}; only "
                "floating-point weights and those of bitsandbytes can be read: initialise on the unquantised model"
            )
        if weight.dim() != 2:
            raise ConstraintError(
                f"{self.name}: its weight has shape {tuple(weight.shape)}, want (d_out, d_in); FSDP1 and ZeRO-3 keep "
                "pieces: initialise before wrapping the model, or use FSDP2 (fully_shard)"
            )
        return "plain"


def _is_plain(weight: torch.Tensor) -> bool:
    """Whether the numbers mean themselves; 8-bit floats come with scales of their own."""
    return weight.dtype.is_floating_point and weight.dtype.itemsize >= 2


def is_bitsandbytes(layer: nn.Module) -> bool:
    """Whether it is one of bitsandbytes' 4-bit or 8-bit linear layers; does not import the library."""
    known = sys.modules.get("bitsandbytes.nn")
    return known is not None and isinstance(layer, (known.Linear4bit, known.Linear8bitLt))


def is_repacked(weight: torch.Tensor) -> bool:
    """Whether it is a 4-bit weight in the layout that bitsandbytes' forward pass makes on CPUs with bfloat16."""
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def codes(weight: torch.Tensor) -> torch.Tensor:
    """What a weight keeps; of a repacked 4-bit one, what it was before."""
    undo = _inverse() if is_repacked(weight) else None
    if undo is None:
        return weight.detach()
    state = copy.copy(weight.quant_state)  # type: ignore[attr-defined]
    state.original_nested = False  # or it quantises the scales again, which are not wanted here
    return undo(weight.data, state)[0]


def _inverse() -> Any:
    """How bitsandbytes undoes its repacking, None where it cannot."""
    try:
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as inverse
    except ImportError:
        return None
    return inverse
