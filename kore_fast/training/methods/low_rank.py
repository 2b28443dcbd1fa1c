"""Methods that add B·A to the untouched base and start at B·A = 0: LoRA, LoRA-FA, MiCA, KORE."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from kore_fast.modules.adapter import (
    KorePeftModel,
    as_kore_model,
    check_lora_a,
    lora_layers,
    model_lora_a_hash,
    refuse_weight_decay,
)
from kore_fast.training.methods.interface import (
    AdapterMethod,
    StartOptions,
    WeightChange,
    open_adapter,
    remove_model_card,
)

if TYPE_CHECKING:
    from kore_fast.training.loop import TrainingOptions


class LowRankMethod(AdapterMethod):
    """What all methods share whose adapter is a LoRA."""

    needs = frozenset({"rank"})
    takes = frozenset({"alpha", "lora_dropout", "projector_learning_rate", "weight_decay"})

    def open(self, base: nn.Module, options: StartOptions, start: Path | None) -> nn.Module:
        assert start is not None
        return open_adapter(base, start, is_trainable=True)

    def check(self, model: nn.Module, options: TrainingOptions) -> None:
        # LoRA too, where its A is frozen.
        if isinstance(model, KorePeftModel):
            refuse_weight_decay(options.weight_decay)
            check_lora_a(model)

    def weight_changes(self, model: nn.Module) -> dict[str, WeightChange]:
        return {name: partial(product, layer) for name, layer in lora_layers(model).items()}


class Lora(LowRankMethod):
    """LoRA: both factors are trained, or B alone on a frozen random A."""

    kind = "lora"
    title = "LoRA"
    spreads = True
    takes = LowRankMethod.takes | {"freeze_a"}

    def make_start(self, base: nn.Module, options: StartOptions, folder: Path) -> PeftModel:
        adapted = attach(base, options)
        if options.frozen_a:
            kore = {"format": "kore_fast.adapter/1", "rank": options.rank, "train_a": False}
            adapted = as_kore_model(adapted, {**kore, "lora_a_sha256": model_lora_a_hash(adapted)})
        adapted.save_pretrained(str(folder))
        remove_model_card(folder)
        return adapted


class LoraFa(LowRankMethod):
    """LoRA-FA (arXiv 2308.03303): A stays as chance made it, and PEFT's optimiser for it steers B by A's pseudo-inverse
    so that B·A comes nearest to the step of full fine-tuning."""

    kind = "lora_fa"
    title = "LoRA-FA"

    def make_start(self, base: nn.Module, options: StartOptions, folder: Path) -> PeftModel:
        adapted = attach(base, options)
        adapted.save_pretrained(str(folder))
        remove_model_card(folder)
        return adapted

    def open(self, base: nn.Module, options: StartOptions, start: Path | None) -> nn.Module:
        return freeze_factor(super().open(base, options, start), "A")

    def optimizer(self, model: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer | None:
        from peft.optimizers import create_lorafa_optimizer

        assert isinstance(model, PeftModel)
        config = model.peft_config["default"]
        assert isinstance(config, LoraConfig)
        # Its own weight decay is the loop's, decoupled as AdamW's.
        return create_lorafa_optimizer(
            model, r=config.r, lora_alpha=config.lora_alpha, lr=options.learning_rate, weight_decay=options.weight_decay
        )


class Mica(LowRankMethod):
    """MiCA (arXiv 2604.01694): B is frozen at the left singular vectors of W0 with the smallest singular values, and A
    is trained from zero. The start is PEFT's own; what is saved is marked as an ordinary LoRA, which any PEFT loads."""

    kind = "mica"
    title = "MiCA"
    spreads = True
    lowest_peft = (0, 20)

    def make_start(self, base: nn.Module, options: StartOptions, folder: Path) -> PeftModel:
        self.check_available()
        adapted = attach(base, options, init="mica")
        return save_as_plain(adapted, folder)

    def open(self, base: nn.Module, options: StartOptions, start: Path | None) -> nn.Module:
        return freeze_factor(super().open(base, options, start), "B")


class Kore(LowRankMethod):
    """KORE: B is trained on an A that the constraint put into old knowledge's null space, where it stays."""

    kind = "kore"
    title = "KORE"
    spreads = True
    starts = "null space"
    takes = frozenset({"freeze_a", "projector_learning_rate"})
    uses_covariance = True


def attach(base: nn.Module, options: StartOptions, init: bool | str = True, **config: Any) -> PeftModel:
    """A LoRA on the layers of ``options``, its chance from their seed."""
    alpha: Any = options.alpha or options.rank
    wanted: Any = init
    torch.manual_seed(options.seed)
    adapted = get_peft_model(
        base,
        LoraConfig(
            r=options.rank,
            lora_alpha=alpha,
            lora_dropout=options.lora_dropout,
            target_modules=options.target_modules,
            modules_to_save=list(options.modules_to_save) if options.modules_to_save else None,
            init_lora_weights=wanted,
            **config,
        ),
    )
    assert isinstance(adapted, PeftModel)
    return adapted


def save_as_plain(adapted: PeftModel, folder: Path) -> PeftModel:
    """Save the factors as they are, under a configuration that does not make them anew from a base when loaded."""
    config: Any = adapted.peft_config["default"]
    config.init_lora_weights = True
    config.corda_config = None
    adapted.save_pretrained(str(folder))
    remove_model_card(folder)
    return adapted


def freeze_factor(model: nn.Module, part: Literal["A", "B"]) -> nn.Module:
    """Freeze A or B of every layer, also against PEFT's own `set_adapter` from PEFT 0.20 on."""
    for layer in lora_layers(model).values():
        getattr(layer, f"lora_{part}")["default"].weight.requires_grad_(False)
        if hasattr(layer, "frozen_peft_weight_names"):
            layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, "default": (f"lora_{part}",)}
    return model


def product(layer: LoraLayer) -> torch.Tensor:
    """s·B·A of a layer in float32."""
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return float(layer.scaling["default"]) * (B.float() @ A.float())
