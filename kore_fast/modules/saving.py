"""Saving a KORE adapter from a loop that has wrapped or sharded its model: DDP, FSDP2, DeepSpeed, torch.compile."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from torch import nn

from kore_fast.errors import ConstraintError, DataError
from kore_fast.modules.adapter import METADATA, KorePeftModel, adapter_state, check_lora_a
from kore_fast.modules.linear import kore_linears, save_linears
from kore_fast.modules.sharding import first_rank, is_sharded, wait_for_ranks


def kore_model_of(model: nn.Module) -> KorePeftModel:
    """The KORE model inside what DDP, DeepSpeed or torch.compile have put around it.

    Raises:
        ConstraintError: there is none, or FSDP's first version has flattened its parameters.
    """
    inner: object = model
    while isinstance(inner, nn.Module) and not isinstance(inner, KorePeftModel):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
    if not isinstance(inner, KorePeftModel):
        raise ConstraintError(
            f"a {type(model).__name__} without a KORE adapter: make it with kore_fast.get_kore_model or load it with "
            "kore_fast.load_kore_model (get_peft_model and PeftModel.from_pretrained do not keep A frozen)"
        )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in [model, *inner.modules()]):
        raise ConstraintError("FSDP's first version flattens A together with what is trained: use fsdp_version=2")
    return inner


def save_kore_adapter(model: nn.Module, folder: str | Path) -> None:
    """Save what `KorePeftModel.save_pretrained` saves, from a model as ``accelerator.prepare`` or torch left it; of one
    with `KoreLinear` layers (`replace_linears`) the same ordinary adapter, by one process.

    Every rank must call this; parameters are gathered one after the other, rank 0 writes, and all return when it has.
    A file that is there already is replaced when the new one is whole, ``kore.json`` last.

    Args:
        model: a KORE model, alone or wrapped by DDP, FSDP2, DeepSpeed (ZeRO 1 to 3) or torch.compile.
        folder: where the adapter goes; made where it is missing.

    Raises:
        ConstraintError: no KORE model, or A has changed.
        DataError: the folder cannot be written.
    """
    if kore_linears(model):
        save_linears(model, folder)
        return
    kore_model = kore_model_of(model)
    check_lora_a(kore_model)
    state = adapter_state(kore_model) if is_sharded(kore_model) else None
    try:
        if first_rank():
            _write(kore_model, Path(folder), {} if state is None else {"state_dict": state})
    finally:
        wait_for_ranks()


def _write(model: KorePeftModel, folder: Path, options: dict[str, object]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".adapter-", dir=folder) as made:
            model.save_pretrained(made, **options)
            for path in sorted(Path(made).iterdir(), key=lambda path: path.name == METADATA):
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(path, folder / path.name)
    except OSError as error:
        raise DataError(
            f"{folder}: could not be written ({error.strerror or error}); free some space or choose another folder"
        ) from error
