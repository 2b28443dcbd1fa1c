"""Methods that take s·B0·A0 out of the base and train from there: PiSSA, CorDA, LoRA-Null's released form.

While they train, the base is W0 − s·B0·A0. What they save is s·(B·A − B0·A0) as an ordinary LoRA for the untouched W0,
by PEFT's own conversion: its rank is twice the one that was trained.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from kore_fast.errors import ConstraintError
from kore_fast.files import atomic_path, write_json
from kore_fast.modules.adapter import WEIGHTS, lora_layers, saved_key
from kore_fast.training.methods.interface import StartOptions, WeightChange, on_device_of, remove_model_card
from kore_fast.training.methods.low_rank import LowRankMethod, attach, freeze_factor, product, save_as_plain

START = "start.json"
# PEFT names the adapter that it subtracts after its folder.
_UNTRAINED = "untrained"


class ResidualMethod(LowRankMethod):
    """What they share. Dropout is refused: s·B0·A0 of a masked input is not what was taken out."""

    takes = frozenset({"alpha", "projector_learning_rate", "weight_decay"})
    # Without its adapter it computes W0 − s·B0·A0.
    shows_base = False

    def open(self, base: nn.Module, options: StartOptions, start: Path | None) -> nn.Module:
        model = super().open(base, options, start)
        take_out(lora_layers(model).values())
        return model

    def weight_changes(self, model: nn.Module) -> dict[str, WeightChange]:
        return {name: _since_start(layer) for name, layer in lora_layers(model).items()}

    def save(self, model: nn.Module, folder: Path, start: Path | None) -> None:
        assert isinstance(model, PeftModel)
        assert start is not None
        # PEFT writes into the folder that it subtracts, and the start is another stage's.
        copied = folder.parent / _UNTRAINED
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(start, copied)
        beside = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in get_peft_model_state_dict(model).items()
            if ".lora_" not in name
        }
        model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(copied))
        shutil.rmtree(copied)
        if beside:  # modules trained in full, which PEFT's conversion passes over
            with atomic_path(folder / WEIGHTS) as temporary:
                save_file({**load_file(folder / WEIGHTS), **beside}, temporary, metadata={"format": "pt"})
        remove_model_card(folder)


def save_start(adapted: PeftModel, folder: Path, kind: str) -> PeftModel:
    """The factors as a LoRA, and a note that they belong on the residual base."""
    save_as_plain(adapted, folder)
    write_json(folder / START, {"format": "kore_fast.start/1", "kind": kind, "base": "W0 - s*B*A of this folder"})
    return adapted


@torch.no_grad()
def take_out(layers: Iterable[LoraLayer]) -> None:
    """Subtract s·B·A from each layer's base weight, as PEFT does when it makes such a start."""
    for layer in layers:
        weight: Any = layer.get_base_layer().weight
        weight.data = (weight.data.float() - product(layer)).to(weight.dtype)


def _since_start(layer: LoraLayer) -> WeightChange:
    with torch.no_grad():
        before = product(layer)
    return lambda: product(layer) - before


class Pissa(ResidualMethod):
    """PiSSA (arXiv 2404.02948), PEFT's own: A and B start at the largest singular directions of W0."""

    kind = "pissa"
    title = "PiSSA"

    def make_start(self, base: nn.Module, options: StartOptions, folder: Path) -> PeftModel:
        return save_start(attach(base, options, init="pissa"), folder, self.kind)


class Corda(ResidualMethod):
    """CorDA (arXiv 2406.05223), PEFT's own decomposition, on the covariances of the same old knowledge as KORE's.

    PEFT sums its covariances itself and keeps them all (43 GB for a 7B model); here each layer is decomposed alone, its
    covariance handed in where PEFT would run the model. PEFT divides each batch by its largest entry, which moves the
    scale between A and B by chance; here C has a mean diagonal of 1, so that for white inputs CorDA is PiSSA.
    """

    kind = "corda"
    title = "CorDA"
    takes = ResidualMethod.takes | {"corda_mode"}
    uses_covariance = True

    def check_available(self) -> None:
        super().check_available()
        # PEFT's CorDA imports it, and PEFT does not ask for it.
        if find_spec("attr") is None:
            raise ConstraintError("PEFT's CorDA (kind 'corda') imports the package attrs: pip install attrs")

    def make_start(self, base: nn.Module, options: StartOptions, folder: Path) -> PeftModel:
        self.check_available()
        from peft import LoraConfig
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        assert options.covariance is not None
        corda = CordaConfig(corda_method=options.corda_mode)
        for name in options.layers:
            alone = LoraConfig(
                r=options.rank, target_modules=re.escape(name), init_lora_weights="corda", corda_config=corda
            )
            linear = base.get_submodule(name)
            C = options.covariance(name)
            C = (C * (len(C) / C.trace())).to(linear.weight.device, torch.float32)  # type: ignore[arg-type]
            preprocess_corda(base, alone, run_model=partial(_hand_in, linear, C))
        adapted = attach(base, options, init="corda", corda_config=corda)
        for layer in lora_layers(adapted).values():
            vars(layer.get_base_layer()).pop("eigens", None)
        return save_start(adapted, folder, self.kind)


def _hand_in(linear: nn.Module, C: torch.Tensor) -> None:
    given: Any = linear
    given.covariance_matrix, given.sample_count = C, 1


class LoraNull(ResidualMethod):
    """LoRA-Null as it was released (arXiv 2503.02659): A and B start at W0 projected onto the r lowest directions of C,
    W0·Û·Ûᵀ = B0·A0, split evenly; both are trained (version 1), or with a frozen A the B alone (version 2).

    Version 2 is KORE's constraint. What is saved has twice the rank for version 1, the rank itself for version 2.
    """

    kind = "lora_null"
    title = "LoRA-Null"
    takes = ResidualMethod.takes | {"freeze_a", "null_covariance"}
    uses_covariance = True

    def make_start(self, base: nn.Module, options: StartOptions, folder: Path) -> PeftModel:
        assert options.covariance is not None
        adapted = attach(base, options)
        basis, of = torch.empty(0), ""
        for name, layer in lora_layers(adapted).items():
            if options.input_of(name) != of:
                C = options.covariance(name).float()
                basis, of = torch.linalg.svd(C)[0][:, -options.rank :], options.input_of(name)
            with torch.no_grad():
                weight: Any = layer.get_base_layer().weight
                U, S, Q = torch.linalg.svd(weight.float() @ basis.to(weight.device), full_matrices=False)
                root = (S / float(layer.scaling["default"])).sqrt()
                layer.lora_A["default"].weight.copy_(root[:, None] * (Q @ basis.to(weight.device).mT))
                layer.lora_B["default"].weight.copy_(U * root)
        return save_start(adapted, folder, self.kind)

    def open(self, base: nn.Module, options: StartOptions, start: Path | None) -> nn.Module:
        model = super().open(base, options, start)
        return freeze_factor(model, "A") if options.frozen_a else model

    def save(self, model: nn.Module, folder: Path, start: Path | None) -> None:
        layers = lora_layers(model)
        if any(layer.lora_A["default"].weight.requires_grad for layer in layers.values()):
            super().save(model, folder, start)
            return
        # With A as it was the change is (B − B0)·A: no more rank is needed.
        assert start is not None
        before = load_file(start / WEIGHTS)
        trained = {name: layer.lora_B["default"].weight.detach().clone() for name, layer in layers.items()}
        with torch.no_grad():
            for name, layer in layers.items():
                layer.lora_B["default"].weight.sub_(before[saved_key(name, "B")].to(trained[name]))
        LowRankMethod.save(self, model, folder, start)
        with torch.no_grad():
            for name, layer in layers.items():
                layer.lora_B["default"].weight.copy_(trained[name])


@torch.no_grad()
def released_covariances(
    model: nn.Module,
    samples: Sequence[Mapping[str, Any]],
    layers: Sequence[str],
    input_of: Callable[[str], str] = str,
) -> Callable[[str], torch.Tensor]:
    """Layer → C as LoRA-Null's released code sums it, with what that costs in precision.

    Its model and everything it sums are float16: each sample's inputs are divided by their largest entry (not the
    largest magnitude), XᵀX is rounded, divided by 256 whatever the number of samples, and added up in float16.

    Args:
        samples: keyword arguments of the model, one sample each, without padding, wherever they lie.

    Raises:
        ConstraintError: a sum overflows, or an input's largest entry is 0; names the layer.
    """
    sums: dict[str, torch.Tensor] = {}
    handles = []

    def hook(name: str, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        X = inputs[0].detach().flatten(0, -2).half()
        X = X / X.max().abs()
        # A GPU sums a product of float16 in float32 and rounds it once.
        share = (X.float().mT @ X.float()).half() / 256
        sums[name] = sums[name] + share if name in sums else share
        if not torch.isfinite(sums[name]).all():
            raise ConstraintError(
                f"{name}: LoRA-Null's float16 sum of covariances is not finite; give the method "
                "null_covariance: store, the sums in float64"
            )

    for name in {input_of(layer): layer for layer in reversed(layers)}.values():
        handles.append(model.get_submodule(name).register_forward_pre_hook(partial(hook, input_of(name))))
    try:
        for sample in samples:
            model(**on_device_of(model, sample))
    finally:
        for handle in handles:
            handle.remove()
    return lambda layer: sums[input_of(layer)]
