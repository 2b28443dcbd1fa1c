"""Initialisation: covariances → null-space factors → a PEFT model whose A is frozen there (KORE steps 2 and 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from kore_fast.constraint.fingerprint import model_fingerprint
from kore_fast.constraint.leak import LayerLeak, layer_leak
from kore_fast.constraint.selection import select_linears, target_pattern
from kore_fast.constraint.store import CovarianceStore
from kore_fast.errors import ConstraintError, StoreError
from kore_fast.ops import nullspace

if TYPE_CHECKING:
    from kore_fast.modules.adapter import KorePeftModel


@dataclass
class KoreConfig:
    """How to build a KORE adapter.

    Attributes:
        rank: r, the number of lowest directions kept and the LoRA rank; at most the width of every layer (d_in, d_out).
        target_modules: see `select_linears`; default every linear of the language decoder.
        source_weights: weight of each source of the store, see `CovarianceStore.covariance`; default all alike.
        form: ``"zero_delta"`` trains B from 0 on the untouched W0 and saves an ordinary adapter. ``"residual"`` is the
            paper's: W0 − B0·A with B from B0, the same function and the same training (see `to_zero_delta`).
        train_a: do not freeze A (the paper's ablation). The null space is then only a start.
        modules_to_save: modules trained in full beside the adapter, as in PEFT (the paper trains the projector).
        lora_dropout: must be 0; here to say so.
    """

    rank: int = 256
    target_modules: str | Sequence[str] | None = None
    source_weights: Mapping[str, float] | None = None
    form: Literal["zero_delta", "residual"] = "zero_delta"
    train_a: bool = False
    modules_to_save: Sequence[str] | None = None
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConstraintError(f"rank={self.rank}: want at least 1")
        if self.form not in ("zero_delta", "residual"):
            raise ConstraintError(f"form={self.form!r}: choose 'zero_delta' or 'residual'")


@dataclass(frozen=True)
class Factors:
    """B0·A = W0·Û·Ûᵀ, the part of a layer's weight that acts on the null space."""

    A: torch.Tensor
    """(r, d_in) float64: √Σ V*ᵀ."""
    B0: torch.Tensor
    """(d_out, r) float64: U* √Σ."""


def nullspace_factors(weight: torch.Tensor, basis: torch.Tensor) -> Factors:
    """Thin-SVD factors of W0·P, P = ÛÛᵀ, without forming P: W0·Û = U*ΣQᵀ, V* = Û·Q (KORE step 3).

    Args:
        weight: W0 (d_out, d_in), any dtype; computed in float64.
        basis: Û (d_in, r), orthonormal columns.
    """
    U, S, Qh = torch.linalg.svd(weight.detach().to(torch.float64) @ basis, full_matrices=False)
    root = S.sqrt()
    return Factors(A=root[:, None] * (Qh @ basis.mT), B0=U * root)


def kore_factors(
    model: nn.Module,
    config: KoreConfig,
    store: CovarianceStore,
    progress: Callable[[Iterable[str]], Iterable[str]] | None = None,
) -> tuple[dict[str, Factors], list[LayerLeak]]:
    """Factors and leak of every layer to constrain, by layer name; one null-space solve per distinct input.

    Raises:
        StoreError: the store is of another model or lacks a layer.
        ConstraintError: a rank larger than a layer's width; before any solve.
    """
    layers = select_linears(model, config.target_modules)
    weights = {name: _weight(model, name) for name in layers}
    for name, weight in weights.items():
        if config.rank > min(weight.shape):
            raise ConstraintError(
                f"{name}: rank {config.rank} is larger than its width (d_out {weight.shape[0]}, d_in "
                f"{weight.shape[1]}); choose at most {min(min(w.shape) for w in weights.values())}"
            )
    members: dict[str, list[str]] = {}
    for name in layers:
        members.setdefault(store.group_of(name), []).append(name)
        if store.widths[store.group_of(name)] != weights[name].shape[1]:
            raise StoreError(
                f"{name}: its input is {weights[name].shape[1]} wide, the store's covariance "
                f"{store.widths[store.group_of(name)]}; the store was made for another model"
            )
    if store.model != model_fingerprint(model, store.layers):
        raise StoreError(
            f"the store was made for another model (fingerprint {store.model[:12]}…) than this one "
            f"({model_fingerprint(model, store.layers)[:12]}…); collect covariances with this model"
        )
    factors: dict[str, Factors] = {}
    leaks: dict[str, LayerLeak] = {}
    for group in progress(members) if progress else members:
        C = store.covariance(group, config.source_weights).to(weights[members[group][0]].device)
        space = nullspace(C, config.rank)
        for name in members[group]:
            factors[name] = nullspace_factors(weights[name], space.basis)
            leaks[name] = layer_leak(name, factors[name].A, C, weights[name], store, space)
    return {name: factors[name] for name in layers}, [leaks[name] for name in layers]


def get_kore_model(
    model: nn.Module,
    config: KoreConfig,
    store: CovarianceStore,
    *,
    progress: Callable[[Iterable[str]], Iterable[str]] | None = None,
) -> KorePeftModel:
    """A `PeftModel` whose ``lora_A`` lies in the null space of old knowledge and is frozen, ``lora_B`` zero.

    Its logits equal the base's bit for bit. ``lora_alpha = r`` (scaling 1), no dropout: plain PEFT loads what
    ``save_pretrained`` writes. ``model.kore["leaks"]`` holds a `LayerLeak` of every layer as a dictionary.

    Raises:
        StoreError, ConstraintError: see `kore_factors`; also LoRA dropout above zero.
    """
    from peft import LoraConfig

    from kore_fast.modules.adapter import as_kore_model, attach_lora, lora_a_hash, lora_layers, refuse_dropout

    refuse_dropout(config.lora_dropout)
    factors, leaks = kore_factors(model, config, store, progress)
    names = [name for name, _ in model.named_modules()]
    lora_config = LoraConfig(
        r=config.rank,
        lora_alpha=config.rank,
        lora_dropout=0.0,
        target_modules=target_pattern(list(factors), names),
        modules_to_save=list(config.modules_to_save) if config.modules_to_save else None,
    )
    peft_model = attach_lora(model, lora_config, {name: f.A for name, f in factors.items()})
    layers = lora_layers(peft_model)
    kore = {
        "format": "kore_fast.adapter/1",
        "rank": config.rank,
        "train_a": config.train_a,
        "lora_a_sha256": lora_a_hash((name, layer.lora_A["default"].weight) for name, layer in layers.items()),
        "covariance": store.fingerprint(),
        "source_weights": dict(config.source_weights) if config.source_weights else None,
        "model": store.model,
        "leaks": [asdict(leak) for leak in leaks],
    }
    kore_model = as_kore_model(peft_model, kore)
    return to_residual(kore_model) if config.form == "residual" else kore_model


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


def _weight(model: nn.Module, name: str) -> torch.Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    return weight
