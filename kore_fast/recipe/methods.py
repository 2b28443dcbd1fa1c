"""A recipe's methods as the training room wants them: what decides a start, and what is added to the loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kore_fast.errors import StoreError
from kore_fast.recipe.materials import on_accelerator, processor_of
from kore_fast.recipe.schema import Method, Recipe

if TYPE_CHECKING:
    from kore_fast.data.conversations import Encoded
    from kore_fast.training.methods.interface import StartOptions
    from kore_fast.training.retention.terms import Term


def start_options(recipe: Recipe, method: Method, model: nn.Module, covariances: Path | None = None) -> StartOptions:
    """Everything but old knowledge where ``covariances``, their stage's folder, is not given."""
    from kore_fast.constraint.selection import select_linears, target_pattern
    from kore_fast.training.methods.interface import StartOptions

    layers = select_linears(model, recipe.targets_of(model, method))
    covariance: Callable[[str], torch.Tensor] | None = None
    input_of: Callable[[str], str] = str
    if covariances is not None and method.way.uses_covariance:
        covariance, input_of = _covariance(recipe, method, model, layers, covariances)
    return StartOptions(
        layers=layers,
        target_modules=target_pattern(layers, [name for name, _ in model.named_modules()]),
        rank=method.rank if isinstance(method.rank, int) else 0,
        alpha=method.alpha,
        lora_dropout=method.lora_dropout,
        frozen_a=method.frozen_a,
        modules_to_save=recipe.trained_whole(method),
        seed=recipe.seed_of(method),
        covariance=covariance,
        input_of=input_of,
        corda_mode=method.corda_mode or "kpm",
        effective_rank=method.effective_rank,
    )


def _covariance(
    recipe: Recipe, method: Method, model: nn.Module, layers: list[str], folder: Path
) -> tuple[Callable[[str], torch.Tensor], Callable[[str], str]]:
    """Layer → covariance, from the store or as LoRA-Null's code sums it; and layer → name of its input."""
    from kore_fast.constraint import CovarianceStore
    from kore_fast.constraint.fingerprint import model_fingerprint

    store = CovarianceStore.load(folder)
    if store.model != model_fingerprint(model, store.layers):
        raise StoreError(
            f"{folder}: the covariances are another model's; collect them again with `kore-fast covariance`"
        )
    if method.kind != "lora_null" or method.null_covariance == "store":
        return (lambda layer: store.covariance(layer, recipe.source_weights(method))), store.group_of
    from kore_fast.data.conversations import collate, tokenizer_of
    from kore_fast.recipe.calibration import old_samples
    from kore_fast.training.methods.residual import released_covariances

    processor = processor_of(recipe)
    pad = tokenizer_of(processor).pad_token_id
    samples = [{**collate([encoded], pad), "logits_to_keep": 1} for encoded in old_samples(recipe, processor, folder)]
    return released_covariances(model, samples, layers, store.group_of), store.group_of


def fisher(
    recipe: Recipe, method: Method, model: nn.Module, processor: Any, old: list[Encoded], folder: Path
) -> dict[str, torch.Tensor]:
    """The Fisher of EWC on the untouched ``model``; kept in ``folder``, so that a run that goes on does not take it
    again. Empty without EWC. One process takes it, on its GPU where there is one (the model stays there), while the
    others wait."""
    from kore_fast.constraint.distributed import Ranks
    from kore_fast.constraint.selection import select_linears
    from kore_fast.data.conversations import collate, tokenizer_of
    from kore_fast.data.old_knowledge import sample
    from kore_fast.training.retention.ewc import diagonal_fisher, load_fisher, save_fisher

    if method.ewc is None:
        return {}
    path, samples = folder / "fisher.safetensors", method.ewc.samples

    def take() -> None:
        if path.exists():
            return
        pad = tokenizer_of(processor).pad_token_id
        batches = (collate([encoded], pad, labels=True) for encoded in sample(old, samples, recipe.seed))
        layers = select_linears(model, recipe.targets_of(model, method))
        folder.mkdir(parents=True, exist_ok=True)
        save_fisher(path, diagonal_fisher(on_accelerator(model), layers, batches))

    Ranks().by_first(take)
    return load_fisher(path)


def loss_terms(
    method: Method, model: nn.Module, fisher: dict[str, torch.Tensor], load_base: Callable[[], nn.Module]
) -> list[Term]:
    """What a method adds to the loss of ``model``, which is as `TrainingMethod.open` returned it."""
    from kore_fast.training.retention.ewc import Ewc
    from kore_fast.training.retention.lwf import Lwf

    terms: list[Term] = []
    if method.ewc is not None:
        terms.append(Ewc(method.ewc.strength, fisher, method.way.weight_changes(model)))
    if method.lwf is not None:
        copy = None if method.way.shows_base else load_base()
        terms.append(Lwf(method.lwf.weight, method.lwf.temperature, method.way, copy))
    return terms


def told(method: Method) -> dict[str, Any]:
    """The options that tell methods of one kind apart, as plain values for a table; those not given are left out."""
    values: dict[str, Any] = {
        "alpha": method.alpha,
        "corda_mode": (method.corda_mode or "kpm") if method.kind == "corda" else None,
        "null_covariance": (method.null_covariance or "released") if method.kind == "lora_null" else None,
        "effective_rank": (method.effective_rank or 0.5) if method.kind == "osf" else None,
        "replay": method.replay,
        "ewc_strength": method.ewc.strength if method.ewc else None,
        "lwf_weight": method.lwf.weight if method.lwf else None,
        "lwf_temperature": method.lwf.temperature if method.lwf else None,
    }
    return {name: value for name, value in values.items() if value is not None}
