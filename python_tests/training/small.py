"""A random Llama with a KORE adapter, trained by anyone's Trainer, also in processes of their own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import kore_fast as kf
from kore_fast.modules.adapter import KorePeftModel, lora_layers

IDS = torch.arange(48).reshape(4, 12)
STEPS = 4


def base() -> LlamaForCausalLM:
    """Always the same weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=48, num_hidden_layers=2, max_position_embeddings=64, **sizes)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def make_adapter(folder: Path) -> Path:
    """An adapter to start from."""
    model = base()
    store = kf.collect_covariance(model, [{"input_ids": IDS}], warn_few_tokens=False)
    kf.get_kore_model(model, kf.KoreConfig(rank=4), store).save_pretrained(str(folder))
    return folder


def start(folder: Path) -> KorePeftModel:
    """The base with the adapter, to train on."""
    return kf.load_kore_model(base(), folder, is_trainable=True)


def samples() -> list[dict[str, torch.Tensor]]:
    rows = torch.randint(48, (16, 10), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Four steps, a checkpoint after the second."""
    chosen: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**chosen, **options})


def trainer(model: nn.Module, folder: Path, callbacks: list[TrainerCallback], **options: Any) -> Trainer:
    rows = samples()
    made = Trainer(
        model=model,
        args=arguments(folder, **options),
        train_dataset=rows,
        eval_dataset=rows[:4],
        callbacks=callbacks,
    )
    from transformers.trainer_callback import PrinterCallback

    made.remove_callback(PrinterCallback)
    return made


def losses(trained: Trainer) -> dict[int, float]:
    """By step."""
    return {row["step"]: row["loss"] for row in trained.state.log_history if "loss" in row}


def parts(model: nn.Module, part: str) -> dict[str, torch.Tensor]:
    """A or B by layer."""
    return {name: getattr(layer, f"lora_{part}")["default"].weight for name, layer in lora_layers(model).items()}


def frozen(model: nn.Module) -> bool:
    """Whether every A is frozen and every B trains."""
    return not any(A.requires_grad for A in parts(model, "A").values()) and all(
        B.requires_grad for B in parts(model, "B").values()
    )


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def read(folder: Path, part: str) -> dict[str, torch.Tensor]:
    """A or B by layer, from the adapter's file."""
    ending = f".lora_{part}.weight"
    stored = load_file(folder / "adapter_model.safetensors").items()
    return {k.removeprefix("base_model.model.").removesuffix(ending): v for k, v in stored if k.endswith(ending)}


def by_plain_peft(folder: Path) -> torch.Tensor:
    """The logits of the adapter where kore_fast is not installed; a missing key is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        return logits(PeftModel.from_pretrained(base(), str(folder)))
