"""Two adapters that were trained one after the other, as one ordinary adapter for the untouched base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kore_fast.errors import ConstraintError
from kore_fast.files import new_folder, write_json
from kore_fast.modules.adapter import METADATA, lora_a_hash, lora_config_for
from kore_fast.modules.adapter_files import PREFIX, WEIGHTS, AdapterFiles, check_hash, read_adapter, save_tensors


def combine_adapters(first: str | Path, second: str | Path, output: str | Path) -> dict[str, int]:
    """W0 + s₁·B₁A₁ + s₂·B₂A₂ as W0 + B·A: the rows of both A under each other, the columns of both B side by side.

    Exact: ranks add up layer by layer, scalings go into B. Of modules that both trained in full the second's count, as
    it started from the first's.

    Args:
        first, second: LoRA adapters, the second trained on base and first.
        output: a new or empty folder; written whole or not at all.

    Returns:
        The rank of each layer.

    Raises:
        ConstraintError: an adapter with more than A and B in a layer (DoRA, a bias), or whose A is not the saved one.
        DataError: see `read_adapter` and `new_folder`.
    """
    adapters = [plain_adapter(read_adapter(folder)) for folder in (first, second)]
    A: dict[str, torch.Tensor] = {}
    B: dict[str, torch.Tensor] = {}
    beside: dict[str, torch.Tensor] = {}
    whole: list[str] = []
    for adapter in adapters:
        scalings = adapter.scalings()
        for name, rows in adapter.A.items():
            columns = adapter.B[name] * scalings[name]
            A[name] = torch.cat([A[name], rows.to(A[name].dtype)]) if name in A else rows
            B[name] = torch.cat([B[name], columns.to(B[name].dtype)], dim=1) if name in B else columns
        beside |= adapter.others
        whole += [name for name in adapter.config.get("modules_to_save") or [] if name not in whole]
    ranks = {name: len(rows) for name, rows in A.items()}
    config = lora_config_for(ranks, modules_to_save=whole)
    tensors: dict[str, torch.Tensor] = {f"{PREFIX}{name}": tensor for name, tensor in beside.items()}
    for name in A:
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = A[name], B[name]
    with new_folder(output) as temporary:
        config.base_model_name_or_path = adapters[0].config.get("base_model_name_or_path")
        config.inference_mode = True
        config.task_type = adapters[0].config.get("task_type")
        config.save_pretrained(str(temporary))
        save_tensors(tensors, temporary / WEIGHTS)
        write_json(temporary / METADATA, _metadata(adapters, A))
    return ranks


def plain_adapter(adapter: AdapterFiles) -> AdapterFiles:
    """The adapter. Raises `ConstraintError` where it has more than A and B in a layer, or not its own A."""
    odd = next((name for name in adapter.others if any(name.startswith(f"{layer}.") for layer in adapter.A)), None)
    if odd is not None or adapter.config.get("use_dora"):
        raise ConstraintError(f"{adapter.folder}: has more than A and B ({odd or 'DoRA'}); merge it instead")
    if adapter.kore is not None and not adapter.kore.get("train_a"):
        check_hash(adapter)
    return adapter


def _metadata(adapters: list[AdapterFiles], A: dict[str, torch.Tensor]) -> dict[str, Any]:
    parts = [
        {"rank": (one.kore or {}).get("rank"), "lora_a_sha256": (one.kore or {}).get("lora_a_sha256")}
        for one in adapters
    ]
    return {
        "format": "kore_fast.adapter/1",
        "rank": max(map(len, A.values())),
        "train_a": False,
        "lora_a_sha256": lora_a_hash(A.items()),
        "combined_from": parts,
    }
