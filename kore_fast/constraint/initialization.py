"""Initialisation: covariances → null-space factors → a PEFT model whose A is frozen there (KORE steps 2 and 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from kore_fast.constraint.distributed import Ranks
from kore_fast.constraint.factor_checkpoint import remove_factors
from kore_fast.constraint.factors import Solve, kore_factors, linear_of
from kore_fast.constraint.leak import LayerLeak
from kore_fast.constraint.ranks import FixedRank, choose_ranks, parse_rank_choice
from kore_fast.constraint.residual import check_plain, to_residual
from kore_fast.constraint.selection import select_linears, target_pattern
from kore_fast.constraint.spectrum import spectra
from kore_fast.constraint.store import CovarianceStore
from kore_fast.errors import ConstraintError
from kore_fast.modules.weights import LayerWeight
from kore_fast.ops.backends import Backend
from kore_fast.ops.nullspace import Method

if TYPE_CHECKING:
    from kore_fast.modules.adapter import KorePeftModel


@dataclass
class KoreConfig:
    """How to build a KORE adapter.

    Attributes:
        rank: r, the number of lowest directions kept and the LoRA rank; at most the width of every layer (d_in, d_out).
            Or a rank for each layer, by its spectrum: ``{"energy": 1e-4}`` keeps directions with at most this share of
            the old inputs' energy, ``{"parameters": 8_000_000}`` spends so many trained parameters (of B) where they
            leak least; with ``lowest`` and ``highest`` if wanted (see `ranks.choose_ranks`).
        target_modules: see `select_linears`; default every linear of the language decoder.
        source_weights: weight of each source of the store, see `CovarianceStore.covariance`; default all alike.
        method: how null spaces are solved, see `ops.nullspace`.
        form: ``"zero_delta"`` trains B from 0 on the untouched W0 and saves an ordinary adapter. ``"residual"`` is the
            paper's: W0 − B0·A with B from B0, the same function and the same training (see `to_zero_delta`).
        train_a: do not freeze A (the paper's ablation). The null space is then only a start.
        modules_to_save: modules trained in full beside the adapter, as in PEFT (the paper trains the projector).
        lora_dropout: must be 0; here to say so.
    """

    rank: int | Mapping[str, Any] = 256
    target_modules: str | Sequence[str] | None = None
    source_weights: Mapping[str, float] | None = None
    method: Method = "auto"
    form: Literal["zero_delta", "residual"] = "zero_delta"
    train_a: bool = False
    modules_to_save: Sequence[str] | None = None
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        parse_rank_choice(self.rank)
        if self.form not in ("zero_delta", "residual"):
            raise ConstraintError(f"form={self.form!r}: choose 'zero_delta' or 'residual'")


def layer_ranks(model: nn.Module, config: KoreConfig, store: CovarianceStore) -> dict[str, int]:
    """The rank of each layer that ``config`` chooses, by name. By spectrum it takes a full ``eigvalsh`` an input.

    Raises:
        StoreError, ConstraintError: see `choose_ranks`; also a store that lacks a layer.
    """
    choice = parse_rank_choice(config.rank)
    layers = select_linears(model, config.target_modules)
    shapes = {name: LayerWeight(name, linear_of(model, name)).shape for name in layers}
    fixed = isinstance(choice, FixedRank)
    device = next(model.parameters()).device
    return choose_ranks(choice, [] if fixed else spectra(store, config.source_weights, layers, device=device), shapes)


def replace_linears(
    model: nn.Module,
    store: CovarianceStore,
    rank: int | Mapping[str, Any] = 256,
    target_modules: str | Sequence[str] | None = None,
    *,
    source_weights: Mapping[str, float] | None = None,
    backend: Backend = "auto",
) -> list[LayerLeak]:
    """Swap linear layers for `KoreLinear` in place, A in the null space of old knowledge; no PEFT needed.

    The rest of the model is frozen, so that B of each layer is what trains. With B = 0 the logits are the model's own,
    bit for bit. `save_kore_adapter` writes what is trained as an ordinary adapter. Layers that bitsandbytes has
    quantised (4-bit, 8-bit) stay as they are inside theirs, alone or beside plain ones. transformers' Trainer refuses a
    quantised model that is not PEFT's: train it in another loop, or use `get_kore_model`.

    Args:
        rank, target_modules, source_weights: see `KoreConfig`.
        backend: see `ops.frozen_lora`.

    Returns:
        The leak of every layer, in the model's order.

    Raises:
        StoreError, ConstraintError: see `kore_factors`; also a layer that is neither a plain `nn.Linear` nor one of
            bitsandbytes.
        BackendError: a backend asked for by name that cannot run, see `KoreLinear.from_factor`.
    """
    from kore_fast.modules.linear import check_linear, kore_linears, swap_linears
    from kore_fast.modules.shared_input import share_inputs

    config = KoreConfig(rank=rank, target_modules=target_modules, source_weights=source_weights)
    for name in select_linears(model, target_modules):
        check_linear(name, model.get_submodule(name))
    ranks = None if isinstance(rank, int) else layer_ranks(model, config, store)
    factors, leaks = kore_factors(model, config, store, ranks=ranks, b0=False)
    swap_linears(model, {name: found.A for name, found in factors.items()}, backend=backend)
    layers = kore_linears(model)
    for found in leaks:
        layers[found.layer].leak = found.leak
    share_inputs(layers, store.shared_inputs(factors))
    return leaks


def get_kore_model(
    model: nn.Module,
    config: KoreConfig,
    store: CovarianceStore,
    *,
    checkpoint: str | Path | None = None,
    save_to: str | Path | None = None,
    progress: Callable[[Sequence[Solve]], Iterable[Solve]] | None = None,
) -> KorePeftModel:
    """A `PeftModel` whose ``lora_A`` lies in the null space of old knowledge and is frozen, ``lora_B`` zero.

    Its logits equal the base's bit for bit. ``lora_alpha = r`` (scaling 1), no dropout: plain PEFT loads what
    ``save_pretrained`` writes. ``model.kore["leaks"]`` holds a `LayerLeak` of every layer as a dictionary. Under
    torchrun the work is shared and every rank returns the model, see `kore_factors`. Shard a model (`fully_shard`)
    after this, not before: FSDP2 reduces no gradients of layers that are added to a sharded model.

    Args:
        checkpoint: a folder for finished inputs, from which the same call continues after an interruption. Deleted at
            the end.
        save_to: also save the adapter into this folder (rank 0 does), before the checkpoint is deleted.
        progress: see `kore_factors`.

    Raises:
        StoreError, ConstraintError, DataError: see `kore_factors`; also LoRA dropout above zero, and the residual form
            where it is to be saved or the weights are quantised or sharded.
    """
    from kore_fast.modules.adapter import (
        as_kore_model,
        attach_lora,
        lora_a_hash,
        lora_config_for,
        lora_layers,
        refuse_dropout,
    )

    refuse_dropout(config.lora_dropout)
    if config.form == "residual":
        check_plain(model, config.target_modules)
        if save_to is not None:
            raise ConstraintError("save_to: the residual form cannot be saved; see to_zero_delta")
    ranks = None if isinstance(config.rank, int) else layer_ranks(model, config, store)
    factors, leaks = kore_factors(
        model, config, store, ranks=ranks, b0=False, checkpoint=checkpoint, keep_checkpoint=True, progress=progress
    )
    names = [name for name, _ in model.named_modules()]
    lora_config = lora_config_for(
        {name: len(f.A) for name, f in factors.items()}, target_pattern(list(factors), names), config.modules_to_save
    )
    peft_model = attach_lora(model, lora_config, {name: f.A for name, f in factors.items()})
    layers = lora_layers(peft_model)
    kore = {
        "format": "kore_fast.adapter/1",
        "rank": dict(config.rank) if isinstance(config.rank, Mapping) else config.rank,
        "train_a": config.train_a,
        "lora_a_sha256": lora_a_hash((name, layer.lora_A["default"].weight) for name, layer in layers.items()),
        "covariance": store.fingerprint(),
        "source_weights": dict(config.source_weights) if config.source_weights else None,
        "model": store.model,
        "shared_inputs": store.shared_inputs(factors),
        "leaks": [asdict(leak) for leak in leaks],
    }
    kore_model = as_kore_model(peft_model, kore)
    if save_to is not None or checkpoint is not None:
        team = Ranks(model)
        with team.sharing_errors():
            if save_to is not None and team.rank == 0:
                kore_model.save_pretrained(str(save_to))
        if checkpoint is not None:
            remove_factors(checkpoint)
    return to_residual(kore_model) if config.form == "residual" else kore_model
