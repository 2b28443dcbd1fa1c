"""Methods that change whole weight matrices: full fine-tuning and OSF."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from kore_fast.modules.earlier import put_into
from kore_fast.training.methods.interface import (
    AdapterMethod,
    StartOptions,
    TrainingMethod,
    WeightChange,
    is_within,
)


class Full(TrainingMethod):
    """Full fine-tuning of the linear layers that adapters would be put on; embeddings and head stay."""

    kind = "full"
    title = "full fine-tuning"
    spreads = True
    starts = "nothing"
    saves = "model"
    takes = frozenset({"projector_learning_rate", "weight_decay"})

    def open(self, base: nn.Module, options: StartOptions, start: Path | None) -> nn.Module:
        # What it saves is a whole model.
        put_into(base, torch.float32)
        for name in options.layers:
            base.get_submodule(name).requires_grad_(True)
        for name, parameter in base.named_parameters():
            if is_within(name, options.modules_to_save or ()):
                parameter.requires_grad_(True)
        return base

    def restore(self, model: nn.Module, checkpoint: Path) -> None:
        # A saved model's keys are not always its state's: Trainer would find none of LLaVA's and go on without.
        kind: Any = type(model)
        # What is trained is stored in float32 whatever the base's dtype; each tensor goes back into its own.
        saved = kind.from_pretrained(str(checkpoint), dtype=torch.float32)
        model.load_state_dict(saved.state_dict())

    def weight_changes(self, model: nn.Module) -> dict[str, WeightChange]:
        """Keeps a copy of each layer's weight."""
        return {
            name: partial(_difference, module.weight, module.weight.detach().clone())
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module.weight.requires_grad
        }

    def save(self, model: nn.Module, folder: Path, start: Path | None) -> None:
        model.save_pretrained(str(folder))  # type: ignore[operator]

    def load(self, folder: Path, load_base: Callable[[str | Path | None], nn.Module]) -> nn.Module:
        return load_base(folder)


def _difference(weight: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    return weight.float() - before.float()


class Osf(AdapterMethod):
    """OSF (arXiv 2504.07097), PEFT's own tuner: the large singular directions of each weight stay, the small ones are
    trained by gradients orthogonal to them. It saves the small ones, which are about as many parameters as the layers
    have, for PEFT alone to load."""

    kind = "osf"
    title = "OSF"
    starts = "nothing"
    takes = frozenset({"effective_rank", "weight_decay"})

    def open(self, base: nn.Module, options: StartOptions, start: Path | None) -> nn.Module:
        from peft import OSFConfig

        return get_peft_model(
            base,
            OSFConfig(
                effective_rank=options.effective_rank,
                target_modules=options.target_modules,
            ),
        )

    def load(self, folder: Path, load_base: Callable[[str | Path | None], nn.Module]) -> nn.Module:
        model = super().load(folder, load_base)
        # PEFT has its factors in the base's dtype, where they differ from their start by rounding alone.
        for name, parameter in model.named_parameters():
            if ".osf_svd_params." in name:
                parameter.data = parameter.data.float()
        self.restore(model, folder)
        return model

    def weight_changes(self, model: nn.Module) -> dict[str, WeightChange]:
        from peft.tuners.osf import OSFLayer

        return {
            name.removeprefix("base_model.model."): partial(module.get_delta_weight, "default")
            for name, module in model.named_modules()
            if isinstance(module, OSFLayer)
        }
