"""A KORE adapter on a PEFT model: A frozen, its hash kept with the adapter and checked, the files plain PEFT's."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from kore_fast.errors import ConstraintError
from kore_fast.files import atomic_path, read_json, write_json
from kore_fast.modules.lora import KoreLoraLinear, use_kore_layers
from kore_fast.modules.sharding import first_rank, is_sharded, plain_name, whole
from kore_fast.modules.shared_input import share_inputs

METADATA = "kore.json"
WEIGHTS = "adapter_model.safetensors"


class KorePeftModel(PeftModel):
    """The `PeftModel` that `get_kore_model` and `load_kore_model` return: it checks A whenever it saves.

    Beside PEFT's files it writes ``kore.json`` (hash of A, rank, form, what A was made from), which plain PEFT ignores.
    """

    kore: dict[str, Any]
    # In the residual form: B0 by layer, for `to_zero_delta`.
    kore_residual: dict[str, torch.Tensor] | None
    # A by layer on the CPU, where a saver gives one rank a state without what is frozen (Trainer under ZeRO-3).
    kore_lora_a: dict[str, torch.Tensor] | None = None

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT, and no file lacks A.

        Where parameters are sharded and no ``state_dict`` is given, every rank must call this; rank 0 writes.

        Raises:
            ConstraintError: A has changed, the base is still the residual one, or ``state_dict`` is not whole.
        """
        if self.kore_residual is not None:
            raise ConstraintError(
                "this model is in the paper's residual form: its adapter fits only W0 − B0·A. Call "
                "kore_fast.to_zero_delta(model) first; the function stays the same and the adapter fits W0"
            )
        given = kwargs.get("state_dict")
        if given is not None:
            kwargs["state_dict"] = complete_state(self, given)
        elif is_sharded(self):
            check_lora_a(self)
            kwargs["state_dict"] = adapter_state(self)
            kwargs.setdefault("is_main_process", first_rank())
        else:
            check_lora_a(self)
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            _add_left_out(self, Path(save_directory) / WEIGHTS, kwargs.get("state_dict"))
            write_json(Path(save_directory) / METADATA, self.kore)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; A stays frozen."""
        super().set_adapter(*args, **kwargs)
        self._keep_a_frozen()

    def set_requires_grad(self, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; A stays frozen."""
        super().set_requires_grad(*args, **kwargs)
        self._keep_a_frozen()

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As in PEFT (Trainer resumes with it); A stays frozen. Raises `ConstraintError` when it is another A."""
        result = super().load_adapter(*args, **kwargs)
        self._keep_a_frozen()
        check_lora_a(self)
        return result

    def _keep_a_frozen(self) -> None:
        if not self.kore.get("train_a"):
            freeze_lora_a(self)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The model's LoRA layers by the name of the layer that they adapt (PEFT's prefix taken off)."""
    return {
        plain_name(name).removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def lora_config_for(
    ranks: Mapping[str, int],
    target_modules: str | Sequence[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> LoraConfig:
    """The LoRA configuration of a KORE adapter: a rank for each layer, scaling 1 in all, no dropout.

    ``r`` is the commonest rank (the smallest of several such); only layers with another stand in ``rank_pattern`` and
    ``alpha_pattern``, each under a regular expression that matches nothing but its whole name.

    Args:
        ranks: r by layer name.
        target_modules: a pattern for exactly these layers (`target_pattern`); default their names, which PEFT also
            matches as the ends of longer ones.
        modules_to_save: as in PEFT.

    Raises:
        ConstraintError: no layer, or a rank below 1.
    """
    for name, rank in ranks.items():
        if rank < 1:
            raise ConstraintError(f"{name}: rank {rank}, want at least 1")
    if not ranks:
        raise ConstraintError("no layers to adapt: give a rank for at least one")
    counts = Counter(ranks.values())
    common = min(counts, key=lambda rank: (-counts[rank], rank))
    # PEFT asks for ``(.*\.)?(pattern)$``: with ^ nothing can come before the name.
    others = {f"^{re.escape(name)}": rank for name, rank in sorted(ranks.items()) if rank != common}
    return LoraConfig(
        r=common,
        lora_alpha=common,
        lora_dropout=0.0,
        target_modules=target_modules if isinstance(target_modules, str) else sorted(target_modules or ranks),
        modules_to_save=list(modules_to_save) if modules_to_save else None,
        rank_pattern=others,
        alpha_pattern=dict(others),
    )


def attach_lora(model: nn.Module, config: LoraConfig, factors: Mapping[str, torch.Tensor]) -> PeftModel:
    """Put LoRA layers on ``model`` with the given A (r, d_in) by layer name, and B = 0.

    A has the dtype that PEFT gives it (float32 on a half-precision base). Ranks may differ by layer: `lora_config_for`.

    Raises:
        ConstraintError: the configuration's layers or their ranks are not those of the factors; names the layer.
    """
    peft_model = cast(PeftModel, get_peft_model(model, use_kore_layers(config)))
    layers = lora_layers(peft_model)
    if set(layers) != set(factors):
        odd = sorted(set(layers) ^ set(factors))[0]
        raise ConstraintError(
            f"{odd}: the adapter's layers are not those of the factors; name them with target_modules"
        )
    with torch.no_grad():
        for name, layer in layers.items():
            for adapter in layer.lora_A:
                A = layer.lora_A[adapter].weight
                if A.shape != factors[name].shape:
                    raise ConstraintError(
                        f"{name}: its factor A has shape {tuple(factors[name].shape)}, the adapter wants "
                        f"{tuple(A.shape)}; make the configuration with lora_config_for"
                    )
                A.copy_(factors[name])
                layer.lora_B[adapter].weight.zero_()
    return peft_model


def freeze_lora_a(model: nn.Module, adapter_name: str = "default") -> None:
    """Freeze A, also against PEFT's own `set_adapter` and `enable_adapters`; on quantised layers from PEFT 0.20 on."""
    for layer in lora_layers(model).values():
        layer.lora_A[adapter_name].weight.requires_grad_(False)
        if isinstance(layer, KoreLoraLinear):
            layer.frozen_a |= {adapter_name}
        if hasattr(layer, "frozen_peft_weight_names"):
            layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter_name: ("lora_A",)}


def lora_a_hash(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hex SHA-256 over (layer name, A in float32) pairs, sorted by name."""
    return _hash_in_order(sorted(tensors, key=lambda pair: pair[0]))


def _hash_in_order(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def model_lora_a_hash(model: nn.Module, adapter_name: str = "default") -> str:
    """`lora_a_hash` of a model's adapter. Where A is sharded, every rank must call this."""
    layers = lora_layers(model)
    # One whole A at a time.
    return _hash_in_order((name, whole(layers[name].lora_A[adapter_name].weight)) for name in sorted(layers))


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's parameters and those trained beside it, whole, by their names in the model.

    On the CPU of rank 0; other ranks get an empty one. Where parameters are sharded, every rank must call this.
    """
    state = {}
    for name, parameter in model.named_parameters():
        name = plain_name(name)
        if ".lora_" in name or ".modules_to_save." in name or parameter.requires_grad:
            tensor = whole(parameter)
            if first_rank():
                state[name] = tensor.detach().cpu()
    return state


def complete_state(model: KorePeftModel, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's state as a saver gathered it, with the A that it may have left out.

    Raises:
        ConstraintError: parameters of the adapter are missing, or A is not the one at initialisation.
    """
    state = dict(state)
    for name, A in (model.kore_lora_a or {}).items():
        state.setdefault(state_key(name, "A"), A)
    names = list(lora_layers(model))
    for name in names:
        for key in (state_key(name, "A"), state_key(name, "B")):
            # One rank alone cannot gather a sharded tensor either.
            if key not in state or hasattr(state[key], "full_tensor"):
                raise ConstraintError(
                    f"{name}: the state to save lacks a whole {key}: under ZeRO-3 and FSDP savers leave out what is "
                    "frozen, and PEFT would fill it with chance when loading. Give the Trainer "
                    "kore_fast.KoreCallback(), or save with kore_fast.save_kore_adapter(model, folder) on every rank"
                )
    _check_hash(model, lambda: lora_a_hash((name, state[state_key(name, "A")]) for name in names))
    return state


def state_key(name: str, part: str) -> str:
    """The name in a model's state of a layer's ``"A"`` or ``"B"``."""
    return f"base_model.model.{name}.lora_{part}.default.weight"


def saved_key(name: str, part: str) -> str:
    """The name in an adapter's file of a layer's ``"A"`` or ``"B"``."""
    return f"base_model.model.{name}.lora_{part}.weight"


def _add_left_out(model: KorePeftModel, path: Path, state: Mapping[str, torch.Tensor] | None) -> None:
    """Give the file the layers that PEFT passes over: those inside an activation checkpoint, whose names have changed.

    ``state`` is the model's; None takes it from the model.
    """
    if not path.is_file():
        return
    with safe_open(path, framework="pt") as file:
        found = set(file.keys())
    missing = {}
    for name, layer in lora_layers(model).items():
        for part, modules in (("A", layer.lora_A), ("B", layer.lora_B)):
            if saved_key(name, part) not in found:
                weight = modules["default"].weight if state is None else state[state_key(name, part)]
                missing[saved_key(name, part)] = weight.detach().cpu().contiguous()
    if missing:
        with atomic_path(path) as temporary:
            save_file({**load_file(path), **missing}, temporary, metadata={"format": "pt"})


def check_lora_a(model: KorePeftModel) -> None:
    """Law 2: A never changes. Where A is sharded, every rank must call this.

    Raises:
        ConstraintError: A differs from the A at initialisation.
    """
    _check_hash(model, lambda: model_lora_a_hash(model))


def _check_hash(model: KorePeftModel, hash_now: Callable[[], str]) -> None:
    if model.kore.get("train_a"):
        return
    found = hash_now()
    if found != model.kore["lora_a_sha256"]:
        raise ConstraintError(
            f"lora_A has changed: its SHA-256 is {found[:12]}…, at initialisation it was "
            f"{model.kore['lora_a_sha256'][:12]}…. Something trained or cast it (an optimizer that was given it, "
            "set_adapter on PEFT < 0.20, a checkpoint without lora_A): start again from the initial adapter"
        )


def as_kore_model(model: PeftModel, kore: dict[str, Any]) -> KorePeftModel:
    """Make a `PeftModel` keep and check the KORE invariants; freezes A unless ``kore["train_a"]``."""
    model.__class__ = KorePeftModel
    kore_model = cast(KorePeftModel, model)
    kore_model.kore = kore
    kore_model.kore_residual = None
    if not kore.get("train_a"):
        freeze_lora_a(kore_model)
    check_lora_a(kore_model)
    share_inputs(lora_layers(kore_model), kore.get("shared_inputs") or [])
    return kore_model


def is_kore_adapter(folder: str | Path) -> bool:
    """Whether the adapter folder was made by `get_kore_model`."""
    return (Path(folder) / METADATA).is_file()


def load_kore_model(model: nn.Module, folder: str | Path, *, is_trainable: bool = False) -> KorePeftModel:
    """Load a KORE adapter onto its base model: as `PeftModel.from_pretrained`, and A is checked and stays frozen.

    Raises:
        ConstraintError: no ``kore.json`` there, LoRA dropout above zero, or A is not the one that was saved.
    """
    if not is_kore_adapter(folder):
        raise ConstraintError(f"{folder}: no {METADATA}, so not an adapter of get_kore_model; load it with plain PEFT")
    config = use_kore_layers(LoraConfig.from_pretrained(str(folder)))
    peft_model = PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable, config=config)
    config = peft_model.peft_config["default"]
    refuse_dropout(getattr(config, "lora_dropout", 0.0))
    kore = read_json(Path(folder) / METADATA)
    if not isinstance(kore, dict) or not isinstance(kore.get("lora_a_sha256"), str):
        raise ConstraintError(f"{Path(folder) / METADATA}: holds no hash of A; take the adapter as it was saved")
    return as_kore_model(peft_model, kore)


def refuse_dropout(lora_dropout: float) -> None:
    """Raises `ConstraintError` for LoRA dropout above zero."""
    if lora_dropout > 0:
        raise ConstraintError(
            f"lora_dropout={lora_dropout}: KORE needs 0. Dropout on the adapter's input leaves the null space (a "
            "masked x has a part that A does not annihilate) and breaks the zero-delta form"
        )


def refuse_weight_decay(weight_decay: float) -> None:
    """Raises `ConstraintError` for weight decay above zero on a KORE adapter."""
    if weight_decay > 0:
        raise ConstraintError(
            f"weight_decay={weight_decay}: KORE needs 0. Decay pulls B to zero where the paper's form would pull it to "
            "its own start, so the two forms part; the null space already keeps the old knowledge"
        )
