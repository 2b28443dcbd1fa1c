"""Ways to train, behind one interface: what a way starts from, what of the model it trains, how it is saved and loaded.

What is added to any of them (replay, EWC, LwF) is in `training.retention`.
"""

from __future__ import annotations

from kore_fast.training.methods.interface import TrainingMethod
from kore_fast.training.methods.low_rank import Kore, Lora, LoraFa, Mica
from kore_fast.training.methods.residual import Corda, LoraNull, Pissa
from kore_fast.training.methods.whole import Full, Osf

METHODS: dict[str, TrainingMethod] = {
    method.kind: method for method in (Full(), Osf(), Lora(), LoraFa(), Pissa(), Corda(), LoraNull(), Mica(), Kore())
}
"""Every method by its kind, as a recipe names it."""

__all__ = ["METHODS", "TrainingMethod"]
