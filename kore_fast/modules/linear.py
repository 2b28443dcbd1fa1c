"""`KoreLinear`: an `nn.Linear` with a LoRA whose A is frozen in the null space of old inputs; no PEFT needed.

What it is on a quantised layer stands in `modules.quantized`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import linear

from kore_fast.errors import ConstraintError
from kore_fast.files import atomic_path, write_json
from kore_fast.modules.shared_input import Operands, SharedInput
from kore_fast.modules.weights import LayerWeight, is_bitsandbytes
from kore_fast.ops import frozen_lora, nullspace
from kore_fast.ops.backends import Backend
from kore_fast.ops.factors import leak, nullspace_factors


class KoreLinear(nn.Linear):
    """y = x Wᵀ + bias + scaling·(x Aᵀ) Bᵀ, of which only B is trained.

    ``lora_A`` (r, in_features) is a buffer: no optimizer finds it among the parameters. ``lora_B`` (out_features, r) is
    zero at first, so that the layer computes what it did before, bit for bit.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        rank: r.
        scaling: of the adapter's part.
        backend: see `kore_fast.ops.frozen_lora`.
    """

    lora_A: torch.Tensor  # noqa: N815 - the name that PEFT and its files give it
    leak: float | None
    """tr(A C Aᵀ)·d / (‖A‖² tr C) on the covariance that A was made from; None for another A."""
    quantization: str | None = None
    """``"nf4"``, ``"fp4"`` or ``"int8"`` where the base is a layer of bitsandbytes."""
    shared_input: SharedInput | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        scaling: float = 1.0,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 1 <= rank <= min(in_features, out_features):
            raise ConstraintError(f"rank {rank}: want 1…{min(in_features, out_features)}, the layer's smaller width")
        super().__init__(in_features, out_features, bias, device, dtype)
        like = self.weight
        self._adapt(like.new_zeros(rank, in_features), like.new_zeros(out_features, rank), scaling, backend)

    def _adapt(self, A: torch.Tensor, B: torch.Tensor, scaling: float, backend: Backend) -> None:
        self.scaling, self.backend, self.leak = scaling, backend, None
        self.register_buffer("lora_A", A)
        self.lora_B = nn.Parameter(B)
        self._unmerged: Any = None
        self._freeze()

    @classmethod
    def from_factor(cls, layer: nn.Linear, A: torch.Tensor, *, backend: Backend = "auto") -> KoreLinear:
        """A layer that shares ``layer``'s weight and bias (not copied, frozen), with the given A (r, in_features).

        A 4-bit or 8-bit layer of bitsandbytes becomes its ``base_layer`` and computes as before; A and B beside it are
        float32, as PEFT's are there (``.to(torch.bfloat16)`` changes them alone).

        Raises:
            ConstraintError: neither a plain `nn.Linear` nor one of bitsandbytes (another quantiser's, an adapter), or
                an A of another width.
            BackendError: a backend asked for by name that is not for quantised layers.
        """
        check_linear("layer", layer)
        if A.dim() != 2 or A.shape[1] != layer.in_features:
            raise ConstraintError(f"A has shape {tuple(A.shape)}, want (r, {layer.in_features})")
        if is_bitsandbytes(layer):
            from kore_fast.modules.quantized import QuantizedKoreLinear

            return QuantizedKoreLinear(layer, A, backend=backend)
        made = cls(
            layer.in_features, layer.out_features, len(A), layer.bias is not None, backend=backend, device="meta",
            dtype=layer.weight.dtype,
        )  # fmt: skip
        made.weight, made.bias = layer.weight, layer.bias
        made.lora_A = A.detach().to(layer.weight)
        made.lora_B = nn.Parameter(layer.weight.new_zeros(layer.out_features, len(A)))
        made.training = layer.training
        made._freeze()
        return made

    @classmethod
    def from_linear(
        cls, layer: nn.Linear, covariance: torch.Tensor, rank: int, *, backend: Backend = "auto"
    ) -> KoreLinear:
        """KORE's layer: A from the bottom-``rank`` space of a covariance (in_features, in_features) of old inputs.

        Raises:
            ConstraintError, BackendError: a covariance or rank that does not fit, or see `from_factor`.
            ValueError: a covariance that is none, see `kore_fast.ops.nullspace`.
        """
        check_linear("layer", layer)
        if covariance.shape != (layer.in_features, layer.in_features):
            raise ConstraintError(
                f"the covariance has shape {tuple(covariance.shape)}, want {(layer.in_features, layer.in_features)}"
            )
        if not 1 <= rank <= min(layer.in_features, layer.out_features):
            raise ConstraintError(f"rank {rank}: want 1…{min(layer.in_features, layer.out_features)}")
        C = covariance.to(layer.weight.device)
        weight = LayerWeight("layer", layer).read()
        made = cls.from_factor(layer, nullspace_factors(weight, nullspace(C, rank).basis).A, backend=backend)
        made.leak = leak(made.lora_A, C)
        return made

    @property
    def rank(self) -> int:
        """r."""
        return len(self.lora_A)

    @property
    def merged(self) -> bool:
        """Whether ``weight`` holds B·A."""
        return self._unmerged is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in_features) → (…, out_features)."""
        if self.merged:
            return linear(x, self.weight, self.bias)
        y = None if self.shared_input is None else self.shared_input.take(self, x)
        if y is not None:
            return y
        return frozen_lora(
            x, self.weight, self.lora_A, self.lora_B, self.bias, scaling=self.scaling, backend=self.backend
        )

    def operands(self, x: torch.Tensor) -> Operands | None:
        """See `SharingLayer`."""
        if self.merged or self.quantization is not None:
            return None
        return Operands(self.weight, self.lora_A, self.lora_B, self.bias, self.scaling, self.backend)

    def delta(self) -> torch.Tensor:
        """scaling·B·A (out_features, in_features) in float32, or float64 where the weight is."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return (self.lora_B.detach().to(wide) @ self.lora_A.to(wide)).mul_(self.scaling)

    def merge(self) -> None:
        """Compute with W + s·B·A from now on. What W was is kept, so that `unmerge` gives it back bit for bit.

        On a quantised layer the sum is quantised as W was; a warning tells what that costs.

        Raises:
            ConstraintError: a quantised layer whose sum is not finite; it stays as it was.
        """
        if not self.merged:
            self._unmerged = self.weight.data
            self.weight.data = (self._unmerged + self.delta()).to(self._unmerged.dtype)

    def unmerge(self) -> None:
        """Undo `merge`."""
        if self._unmerged is not None:
            self.weight.data, self._unmerged = self._unmerged, None

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A plain layer of the same function (up to the rounding of W + s·B·A, which is never quantised).

        Args:
            dtype: of the layer; default the weight's or, of a 4-bit layer, what it computes in. An 8-bit layer takes
                any x: the bias's there, or float16.
        """
        dtype = dtype or self._dtype()
        made = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta", dtype)
        made.weight = nn.Parameter((self._base_weight() + self.delta()).to(dtype), requires_grad=False)
        if self.bias is not None:
            same = self.bias.dtype == dtype
            made.bias = self.bias if same else nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return made.train(self.training)

    def _dtype(self) -> torch.dtype:
        return self.weight.dtype

    def _base_weight(self) -> torch.Tensor:
        """W, also where it is merged."""
        return self.weight.detach() if self._unmerged is None else self._unmerged

    def extra_repr(self) -> str:
        """As of `nn.Linear`, and what is KORE's."""
        leak = "unknown" if self.leak is None else f"{self.leak:.3g}"
        base = "" if self.quantization is None else f", base={self.quantization}"
        merged = ", merged" if self.merged else ""
        return f"{super().extra_repr()}{base}, rank={self.rank}, leak={leak}, backend={self.backend}{merged}"

    def _freeze(self) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)


def check_linear(name: str, layer: nn.Module) -> None:
    """Raises `ConstraintError` for anything but an `nn.Linear` itself or a quantised layer of bitsandbytes."""
    if type(layer) is nn.Linear:
        return
    what = f"{name}: a {type(layer).__name__} is not a plain nn.Linear"
    if not is_bitsandbytes(layer):
        raise ConstraintError(
            f"{what}, nor a 4-bit or 8-bit one of bitsandbytes; where it has an adapter, merge or unload that first; "
            "where another library has quantised it, use the unquantised model: the adapter fits both"
        )
    weight = LayerWeight(name, cast(nn.Linear, layer))
    weight.check_loaded()
    if weight.kind == "plain":
        raise ConstraintError(
            f"{what}, and its weight is not quantised: bitsandbytes does that when the layer is moved "
            "(layer.to('cuda') or 'cpu'), but not where it was made with has_fp16_weights=True"
        )


def swap_linears(model: nn.Module, factors: Mapping[str, torch.Tensor], *, backend: Backend = "auto") -> None:
    """Put a `KoreLinear` in the place of each named layer; the rest of ``model`` is frozen.

    Args:
        factors: A (r, in_features) by layer name.

    Raises:
        ConstraintError, BackendError: see `KoreLinear.from_factor`; then none is swapped.
    """
    made = {}
    for name, A in factors.items():
        layer = model.get_submodule(name)
        check_linear(name, layer)
        made[name] = KoreLinear.from_factor(cast(nn.Linear, layer), A, backend=backend)
    model.requires_grad_(False)
    for name, layer in made.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        layer.lora_B.requires_grad_(True)


def kore_linears(model: nn.Module) -> dict[str, KoreLinear]:
    """The model's `KoreLinear` layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, KoreLinear)}


def save_linears(model: nn.Module, folder: str | Path) -> None:
    """Write the model's `KoreLinear` layers as an ordinary PEFT adapter: ``adapter_config.json`` and
    ``adapter_model.safetensors``.

    Raises:
        ConstraintError: no `KoreLinear` in the model.
        DataError: the folder cannot be written.
    """
    layers = kore_linears(model)
    if not layers:
        raise ConstraintError("the model has no KoreLinear: replace_linears puts them there")
    common = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: layer.rank * layer.scaling for name, layer in layers.items()}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None),
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": {_exactly(name): rank for name, rank in ranks.items() if rank != common},
        "alpha_pattern": {_exactly(name): alpha for name, alpha in alphas.items() if alpha != common},
        "target_modules": sorted(layers),
    }
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": tensor.detach().cpu().contiguous()
        for name, layer in layers.items()
        for side, tensor in (("A", layer.lora_A), ("B", layer.lora_B))
    }
    with atomic_path(Path(folder) / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(Path(folder) / "adapter_config.json", config)


def _exactly(name: str) -> str:
    """A pattern of PEFT's that matches a layer's whole name alone; see `modules.adapter.lora_config_for`."""
    return f"^{re.escape(name)}"
