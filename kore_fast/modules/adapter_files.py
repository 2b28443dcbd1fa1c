"""An adapter as files: what is in them, whether they fit a model, and copies with padded ranks."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from kore_fast.errors import ConstraintError, DataError
from kore_fast.files import new_folder, read_json, write_json
from kore_fast.modules.adapter import METADATA, lora_a_hash

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# What vLLM accepts as --max-lora-rank; without it 16.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Kept beside LoRA's own two: DoRA's magnitudes and the bias of B.
_EXTRAS = (".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".lora_B.bias", ".bias")


@dataclass
class AdapterFiles:
    """A LoRA adapter's folder, read."""

    folder: Path
    config: dict[str, Any]
    A: dict[str, torch.Tensor]
    """Layer (PEFT's prefix taken off) → lora_A, (r, d_in)."""
    B: dict[str, torch.Tensor]
    """Layer → lora_B, (d_out, r)."""
    others: dict[str, torch.Tensor]
    """Every other tensor, by its name in the model: what ``modules_to_save`` trained in full, biases, magnitudes."""
    kore: dict[str, Any] | None
    """Content of ``kore.json``; None for an adapter that is not KORE's."""

    @property
    def ranks(self) -> dict[str, int]:
        """r by layer."""
        return {name: len(A) for name, A in self.A.items()}

    def scalings(self) -> dict[str, float]:
        """The factor of B·A by layer, as PEFT computes it: alpha/r, or alpha/√r with rsLoRA."""
        root = bool(self.config.get("use_rslora"))
        return {
            name: self._pattern("alpha_pattern", name, self.config.get("lora_alpha", 8))
            / (math.sqrt(rank) if root else rank)
            for name, rank in self.ranks.items()
        }

    def configured_rank(self, layer: str) -> int:
        """The rank that the configuration gives a layer."""
        return int(self._pattern("rank_pattern", layer, self.config.get("r", 8)))

    def _pattern(self, key: str, layer: str, default: float) -> float:
        for pattern, value in (self.config.get(key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return float(value)
        return float(default)


def read_adapter(folder: str | Path) -> AdapterFiles:
    """Read a LoRA adapter's folder.

    Raises:
        DataError: a file is missing or not whole; names it.
        ConstraintError: not a LoRA adapter, or a layer has only one of A and B; names it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give one that holds {CONFIG} and {WEIGHTS}")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise ConstraintError(f"{folder / CONFIG}: not the configuration of a LoRA adapter (peft_type)")
    path = folder / WEIGHTS
    if not path.is_file():
        old = folder / "adapter_model.bin"
        hint = f"; {old.name} is a pickle, load and save it again with PEFT" if old.is_file() else ""
        raise DataError(f"{path}: no such file{hint}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise DataError(f"{path}: not a whole safetensors file ({error}); save the adapter again") from None
    A, B, others = {}, {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if name.endswith(".lora_A.weight"):
            A[name.removesuffix(".lora_A.weight")] = tensor
        elif name.endswith(".lora_B.weight"):
            B[name.removesuffix(".lora_B.weight")] = tensor
        else:
            others[name] = tensor
    if not A and not B:
        raise ConstraintError(f"{path}: holds no lora_A and no lora_B; save the adapter again with save_pretrained")
    for have, lacks, which in ((B, A, "lora_A"), (A, B, "lora_B")):
        if missing := [name for name in have if name not in lacks]:
            raise ConstraintError(
                f"{path}: {which} is missing in {len(missing)} of {len(have)} layers, first in {missing[0]}. FSDP2 and "
                "ZeRO-3 savers leave frozen parameters out, and PEFT fills the gap with chance: save again from a "
                f"model that holds {which}, or take it from the initial adapter"
            )
    kore = read_json(folder / METADATA) if (folder / METADATA).is_file() else None
    if kore is not None and not isinstance(kore, dict):
        raise ConstraintError(f"{folder / METADATA}: not an object; take the adapter as it was saved")
    return AdapterFiles(folder, config, A, B, others, kore)


def misfits(adapter: AdapterFiles, model: nn.Module) -> list[str]:
    """What in the adapter does not fit the base model, a sentence each, the most telling first; empty if it fits.

    Looks at names and shapes alone, and reads no weight.
    """
    found = []
    modules = dict(model.named_modules())
    strangers = [name for name in adapter.A if name not in modules]
    if strangers:
        found.append(_prefix_advice(strangers, len(adapter.A), modules))
    for name, A in adapter.A.items():
        B = adapter.B[name]
        shape = _shape(modules.get(name))
        if name in modules and shape is None:
            found.append(f"{name}: is a {type(modules[name]).__name__} in this model, not a linear layer")
        elif shape is not None and (B.shape[0], A.shape[1]) != shape:
            found.append(
                f"{name}: the adapter is for a weight of shape {(B.shape[0], A.shape[1])}, the model's is {shape}; "
                "give the model that it was trained on"
            )
        if A.shape[0] != B.shape[1]:
            found.append(f"{name}: lora_A has rank {A.shape[0]}, lora_B {B.shape[1]}")
        elif A.shape[0] != adapter.configured_rank(name):
            found.append(
                f"{name}: its rank is {A.shape[0]}, but {CONFIG} says {adapter.configured_rank(name)}; mend r or "
                "rank_pattern"
            )
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key, tensor in adapter.others.items():
        layer = next((key.removesuffix(end) for end in _EXTRAS if key.endswith(end)), None)
        if layer in adapter.A:
            continue
        if key not in shapes:
            found.append(f"{key}: the adapter holds this tensor, and the model has none of that name")
        elif shapes[key] != tuple(tensor.shape):
            found.append(f"{key}: shape {tuple(tensor.shape)} in the adapter, {shapes[key]} in the model")
    for module in adapter.config.get("modules_to_save") or []:
        if not any(f".{module}." in f".{key}" for key in adapter.others):
            found.append(f"{module}: named in modules_to_save, but the adapter holds no weight of it")
    return found


def check_fits(adapter: AdapterFiles, model: nn.Module) -> None:
    """Raises `ConstraintError` with the first of `misfits`."""
    if found := misfits(adapter, model):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ConstraintError(f"{adapter.folder}: {found[0]}{more}")


def _shape(module: nn.Module | None) -> tuple[int, int] | None:
    """(d_out, d_in) of a linear layer, also a quantised one."""
    if module is None or not hasattr(module, "in_features"):
        return None
    return (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]


def _prefix_advice(strangers: Sequence[str], total: int, names: Iterable[str]) -> str:
    """Why layers are not found: most often the same layer goes by another prefix."""
    first = strangers[0]
    text = f"{len(strangers)} of {total} layers are not in this model, first {first}. "
    parts = first.split(".")
    ends = [".".join(parts[i:]) for i in range(len(parts))]
    names = list(names)
    # The longest ending that a layer of the model has; a name alone, such as q_proj, says nothing.
    for end in ends[:-1]:
        matches = [name for name in names if name == end or name.endswith(f".{end}")]
        if len(matches) == 1:
            text += (
                f"The model's prefix is {matches[0].removesuffix(end)!r} where the adapter has "
                f"{first.removesuffix(end)!r} (names of LLaVA-type models changed with transformers 4.52). "
            )
            break
    return text + (
        "Serving it would change nothing without a word: rename the adapter's keys and target_modules, or load the "
        "model with the version of transformers that it was trained with"
    )


def vllm_rank(rank: int) -> int | None:
    """The smallest ``--max-lora-rank`` that takes ``rank``; None where there is none."""
    return next((entry for entry in VLLM_RANKS if entry >= rank), None)


def pad_adapter(folder: str | Path, output: str | Path, rank: int | None = None) -> int:
    """Write a copy of the adapter with one rank for every layer: zero rows in A, zero columns in B, the same scaling.

    The function stays the same. ``kore.json`` gets the new A's hash, and the old one under ``padded_from``; a leak does
    not see zero rows.

    Args:
        rank: default the smallest of vLLM's that holds the largest layer's.

    Returns:
        The rank.

    Raises:
        ConstraintError: a rank smaller than a layer's or larger than vLLM takes, or A is not the one that was saved.
        DataError: see `read_adapter` and `new_folder`.
    """
    adapter = read_adapter(folder)
    largest = max(adapter.ranks.values())
    wanted = vllm_rank(largest) if rank is None else rank
    if wanted is None or wanted < largest:
        raise ConstraintError(
            f"{folder}: its largest rank is {largest}"
            + (f", which does not fit into {rank}" if rank else f"; vLLM takes {VLLM_RANKS[-1]} at most")
        )
    if adapter.kore is not None and not adapter.kore.get("train_a"):
        check_hash(adapter)
    scalings = adapter.scalings()
    root = math.sqrt(wanted) if adapter.config.get("use_rslora") else wanted
    alphas = {name: _whole(scaling * root) for name, scaling in scalings.items()}
    common = max(set(alphas.values()), key=lambda alpha: (list(alphas.values()).count(alpha), -alpha))
    config = {
        **adapter.config,
        "r": wanted,
        "lora_alpha": common,
        "rank_pattern": {},
        "alpha_pattern": {f"^{re.escape(name)}": alpha for name, alpha in sorted(alphas.items()) if alpha != common},
    }
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in adapter.others.items()}
    padded = {name: nn.functional.pad(A, (0, 0, 0, wanted - len(A))) for name, A in adapter.A.items()}
    for name, A in padded.items():
        B = adapter.B[name]
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = nn.functional.pad(B, (0, wanted - B.shape[1]))
    with new_folder(output) as temporary:
        write_json(temporary / CONFIG, config)
        save_tensors(tensors, temporary / WEIGHTS)
        if adapter.kore is not None:
            ranks = sorted(set(adapter.ranks.values()))
            before = {"ranks": ranks, "lora_a_sha256": adapter.kore.get("lora_a_sha256")}
            kore = {**adapter.kore, "lora_a_sha256": lora_a_hash(padded.items()), "padded_from": before}
            write_json(temporary / METADATA, kore)
        if (adapter.folder / "README.md").is_file():
            shutil.copyfile(adapter.folder / "README.md", temporary / "README.md")
    return wanted


def check_hash(adapter: AdapterFiles) -> None:
    """Law 2 on files: A is the one that ``kore.json`` names.

    Raises:
        ConstraintError: it is not, or there is no hash.
    """
    wanted = (adapter.kore or {}).get("lora_a_sha256")
    if not isinstance(wanted, str):
        raise ConstraintError(f"{adapter.folder / METADATA}: holds no hash of A; take the adapter as it was saved")
    found = lora_a_hash(adapter.A.items())
    if found != wanted:
        raise ConstraintError(
            f"{adapter.folder / WEIGHTS}: lora_A has changed: its SHA-256 is {found[:12]}…, {METADATA} has "
            f"{wanted[:12]}…. Something trained, cast or replaced it: take the adapter as it was saved"
        )


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file as PEFT and transformers read it. Raises `OSError` when that fails."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # safetensors wraps the operating system's error (a full disk) in its own.
        raise OSError(str(error)) from error


def _whole(value: float) -> float:
    """An alpha that is a whole number but for rounding, as one."""
    near = round(value)
    return near if math.isclose(value, near, rel_tol=1e-12) else value
