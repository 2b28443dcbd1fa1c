"""Learning without forgetting (arXiv 1606.09282): on new inputs the model should go on saying what the base says."""

from __future__ import annotations

import torch
from torch import nn

from kore_fast.training.methods.interface import TrainingMethod
from kore_fast.training.retention.terms import Batch


class Lwf:
    """w·T²·KL(base ‖ model) of distributions softened by T, the mean over answers' tokens.

    It differs from the paper's cross-entropy by the base's entropy, which has no gradient; T² keeps its size against
    the loss as T grows. The base answers from the trained model itself where its adapter can be switched off.
    """

    def __init__(
        self, weight: float, temperature: float, method: TrainingMethod, base: nn.Module | None = None
    ) -> None:
        """``base``: a copy of the untouched base, where the method cannot show it (`TrainingMethod.as_base`)."""
        self.weight, self.temperature = weight, temperature
        self._method, self._base = method, base

    def __call__(self, batch: Batch) -> torch.Tensor:
        wanted = torch.log_softmax(self._base_logits(batch)[batch.answers] / self.temperature, dim=-1)
        found = torch.log_softmax(batch.logits[batch.answers] / self.temperature, dim=-1)
        divergence = nn.functional.kl_div(found, wanted, reduction="sum", log_target=True)
        return self.weight * self.temperature**2 * divergence / batch.count

    def _base_logits(self, batch: Batch) -> torch.Tensor:
        if self._base is not None:
            self._base.to(batch.logits.device)
            return _logits(self._base, batch)
        # Switching an adapter back on, PEFT before 0.20 would also train what is frozen.
        trains = [(parameter, parameter.requires_grad) for parameter in batch.model.parameters()]
        modes = [(module, module.training) for module in batch.model.modules()]
        with self._method.as_base(batch.model):
            logits = _logits(batch.model.eval(), batch)
        for parameter, flag in trains:
            parameter.requires_grad_(flag)
        for module, training in modes:
            module.training = training
        return logits


@torch.no_grad()
def _logits(base: nn.Module, batch: Batch) -> torch.Tensor:
    return base(**batch.inputs).logits.flatten(0, 1).float()
