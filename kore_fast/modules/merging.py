"""An adapter merged into its base: one ordinary model, checked layer by layer against base plus adapter."""

from __future__ import annotations

import math
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import nn

from kore_fast.errors import ConstraintError
from kore_fast.files import check_new_folder, new_folder
from kore_fast.modules.adapter import lora_layers
from kore_fast.modules.adapter_files import check_fits, check_hash, read_adapter
from kore_fast.modules.loading import load_model
from kore_fast.modules.trial import find_processor, trial_inputs, trial_logits

# What save_pretrained of the model writes itself, and what must not come along from the base.
_OF_THE_MODEL = ("config.json", "generation_config.json", "model.safetensors.index.json")
_COPIED = (".json", ".jinja", ".txt", ".model", ".tiktoken")


@dataclass(frozen=True)
class Merged:
    """What a merge did."""

    layers: int
    dtype: str
    difference: float
    """‖logits merged − logits with the adapter‖ / ‖logits with the adapter‖ on the trial inputs, the largest."""
    allowed: float
    """What rounding explains."""


def merge_adapter(
    folder: str | Path,
    model: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: str = "cpu",
) -> Merged:
    """Merge an adapter into its base and save an ordinary model with the base's processor or tokenizer.

    Args:
        folder: the adapter.
        model: its base, a folder or a hub name, not quantised.
        output: a new or empty folder; written whole or not at all.
        dtype: to merge and to save in; default as stored.

    Raises:
        ConstraintError: the adapter does not fit the model, its A is not the one that was saved, the base is
            quantised, or the merged model does not compute what base and adapter compute, within the dtype's rounding.
        DataError: a file is missing, or ``output`` is not empty or cannot be written.
        KoreError: the model cannot be loaded.
    """
    check_new_folder(output)
    adapter = read_adapter(folder)
    if adapter.kore is not None and not adapter.kore.get("train_a"):
        check_hash(adapter)
    refuse_quantised(model)
    base = load_model(model, dtype).to(device)
    check_fits(adapter, base)
    processor = find_processor(model)
    inputs = trial_inputs(base, processor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT would warn of has been checked
        peft_model = PeftModel.from_pretrained(base, str(folder)).eval()
    layers = lora_layers(peft_model)
    if missing := sorted(set(layers) - set(adapter.A)):
        raise ConstraintError(f"{missing[0]}: target_modules matches it, but the adapter's file holds nothing of it")
    wanted = trial_logits(peft_model, inputs)
    for name, layer in layers.items():
        _merge_layer(name, layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that all layers are merged already
        merged: Any = peft_model.merge_and_unload()
    weights = next(merged.parameters()).dtype
    # Rounding of weights is checked above; that of activations grows with depth about as a random walk.
    allowed = min(4 * torch.finfo(weights).eps * math.sqrt(len(layers) + 1), 0.1)
    difference = max(
        float((logits - wanted[name]).norm() / wanted[name].norm())
        for name, logits in trial_logits(merged, inputs).items()
    )
    if not difference <= allowed:
        raise ConstraintError(
            f"{folder}: merged, the logits differ by {difference:.2g} of their size, where rounding to {weights} "
            f"explains {allowed:.2g}; try --dtype float32"
        )
    with new_folder(output) as temporary:
        try:
            merged.save_pretrained(str(temporary))
        except SafetensorError as error:
            raise OSError(str(error)) from error
        _copy_processor(model, processor, temporary)
    return Merged(len(layers), str(weights).removeprefix("torch."), difference, allowed)


def refuse_quantised(model: str | Path) -> None:
    """Raises `ConstraintError` for a base whose weights are stored quantised."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(model))
    except (OSError, ValueError):
        return  # what is wrong, loading it says better
    if getattr(config, "quantization_config", None):
        raise ConstraintError(
            f"{model}: its weights are quantised, and a merged weight would be rounded to their few values; give the "
            "model that it was quantised from (the adapter fits both), and quantise what comes out"
        )


@torch.no_grad()
def _merge_layer(name: str, layer: LoraLayer) -> None:
    """Merge one layer and hold it against W0 + s·B·A in float64.

    Raises:
        ConstraintError: it differs by more than rounding can explain.
    """
    weight = layer.get_base_layer().weight
    assert isinstance(weight, nn.Parameter)
    before = weight.detach().clone()
    layer.merge(safe_merge=False, adapter_names=["default"])
    if layer.use_dora.get("default") or layer.lora_bias.get("default") or getattr(layer, "fan_in_fan_out", False):
        return  # another formula than W0 + s·B·A; the logits still have to agree
    A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    scaling = float(layer.scaling["default"])
    delta = scaling * (B @ A)
    exact = before.double() + delta
    error = float((layer.get_base_layer().weight.double() - exact).norm())
    finfo = torch.finfo(weight.dtype)
    # Each of Δ and the sum rounded once to the weight's dtype, down to its subnormals; B·A summed in float32.
    bound = finfo.eps * float(exact.norm() + delta.norm())
    bound += finfo.smallest_normal * finfo.eps * math.sqrt(exact.numel())
    bound += torch.finfo(torch.float32).eps * len(A) * abs(scaling) * float(A.norm() * B.norm())
    if not error <= bound:
        raise ConstraintError(
            f"{name}: the merged weight is off W0 + B·A by {error:.3g} where rounding to {weight.dtype} explains "
            f"{bound:.3g}; try --dtype float32 (float16 overflows above 65504)"
        )


def _copy_processor(model: str | Path, processor: Any | None, target: Path) -> None:
    """The base's processor and tokenizer files, byte for byte where the base is a folder."""
    source = Path(model)
    if not source.is_dir():
        if processor is not None:
            processor.save_pretrained(str(target))
        return
    for file in sorted(source.iterdir()):
        wanted = file.suffix in _COPIED and file.name not in _OF_THE_MODEL and not file.name.endswith(".index.json")
        if file.is_file() and wanted and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)
