"""KORE in anyone's Trainer: what must hold of A before the first step, in every checkpoint and at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kore_fast.errors import ConstraintError
from kore_fast.modules.adapter import (
    WEIGHTS,
    KorePeftModel,
    adapter_state,
    check_lora_a,
    freeze_lora_a,
    is_kore_adapter,
    lora_layers,
    refuse_dropout,
    refuse_weight_decay,
    saved_key,
    state_key,
)
from kore_fast.modules.saving import kore_model_of, save_kore_adapter
from kore_fast.modules.sharding import first_rank, is_sharded, is_zero3, whole


class KoreCallback(TrainerCallback):
    """Give it to transformers' `Trainer` or TRL's `SFTTrainer` with a model of `get_kore_model` or `load_kore_model`.

    - Before training: weight decay and LoRA dropout are refused; A is frozen, is the A of the initialisation (also
      after resuming), and the optimizer does not have it.
    - In every checkpoint: a whole adapter with ``kore.json``, also where FSDP2 or ZeRO-3 leave frozen parameters out.
    - After training: A is still the same.

    Under ZeRO-3 rank 0 keeps A in host memory (4·Σ r·d_in bytes), so that ``trainer.save_model`` is whole too.

    Raises:
        ConstraintError: one of these does not hold; on every rank.
    """

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Refuses what can be refused before anything is loaded."""
        _refuse(kore_model_of(model), args)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Trainer has loaded its checkpoint, wrapped the model and made the optimizer."""
        kore_model = kore_model_of(model)
        _refuse(kore_model, args)
        groups = getattr(optimizer, "param_groups", [])
        _check_optimizer(kore_model, groups)
        if not kore_model.kore.get("train_a"):
            freeze_lora_a(kore_model)
            check_lora_a(kore_model)
            kore_model.kore_lora_a = _held(kore_model) if is_zero3(kore_model) else None
        if state.global_step:
            _check_resumed(kore_model, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Trainer has written its checkpoint."""
        if state.is_hyper_param_search:  # in folders that a callback is not told
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        kore_model = kore_model_of(model)
        if is_sharded(kore_model):
            # What Trainer left there depends on the state's type and stage; only all ranks together know A.
            save_kore_adapter(kore_model, folder)
        elif args.should_save and not is_whole_adapter(kore_model, folder):
            kore_model.save_pretrained(str(folder))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """A is still the one at initialisation."""
        check_lora_a(kore_model_of(model))


def is_whole_adapter(model: KorePeftModel, folder: Path) -> bool:
    """Whether the folder has ``kore.json`` and a file with A and B of every layer of the model."""
    path = folder / WEIGHTS
    if not is_kore_adapter(folder) or not path.is_file():
        return False
    with safe_open(path, framework="pt") as file:
        keys = set(file.keys())
    return all(saved_key(name, part) in keys for name in lora_layers(model) for part in "AB")


def _refuse(model: KorePeftModel, args: TrainingArguments) -> None:
    refuse_weight_decay(args.weight_decay)
    refuse_dropout(getattr(model.peft_config["default"], "lora_dropout", 0.0))


def _check_optimizer(model: KorePeftModel, groups: list[dict[str, Any]]) -> None:
    layers = lora_layers(model)
    A = {id(layer.lora_A["default"].weight): name for name, layer in layers.items()}
    B = {id(layer.lora_B["default"].weight) for layer in layers.values()}
    for group in groups:
        for parameter in group["params"]:
            name = A.get(id(parameter))
            if name is not None and not model.kore.get("train_a"):
                raise ConstraintError(
                    f"{name}: the optimizer was given lora_A, which must not change: make it from the parameters that "
                    "require gradients, after the model was made or loaded by kore_fast"
                )
            if id(parameter) in B:
                # torch's AdamW has 0.01 where nothing is said.
                refuse_weight_decay(group.get("weight_decay", 0.0))


def _check_resumed(model: KorePeftModel, checkpoint: Path) -> None:
    """Whether the B that Trainer has loaded is the checkpoint's, where that lies in the output folder.

    accelerate's sharded state leaves out layers inside an activation checkpoint: they would start anew.
    """
    state = adapter_state(model)
    if not first_rank() or not is_whole_adapter(model, checkpoint):
        return
    with safe_open(checkpoint / WEIGHTS, framework="pt") as file:
        for name in lora_layers(model):
            B = file.get_tensor(saved_key(name, "B"))
            if not torch.equal(state[state_key(name, "B")].to(B.dtype), B):
                raise ConstraintError(
                    f"{name}: lora_B is not the one in {checkpoint} after resuming from step {checkpoint.name[11:]}: "
                    f"load the model from there with kore_fast.load_kore_model(base, {str(checkpoint)!r}, "
                    "is_trainable=True) and resume again"
                )


def _held(model: nn.Module) -> dict[str, Any]:
    """A by layer, on the CPU of rank 0; empty elsewhere."""
    held = {}
    for name, layer in lora_layers(model).items():
        A = whole(layer.lora_A["default"].weight)
        if first_rank():
            held[name] = A.detach().cpu()
    return held
