"""Checkpoints of the paper's released code as ordinary adapters on the untouched base model.

In such a checkpoint each constrained linear holds ``weight_residual`` (W0 − B0·A, frozen), ``BLinear`` (r × d_in: the
paper's A) and ``ALinear`` (d_out × r: the paper's B, and the layer's bias). With W0 from the base model, what was
learned is W_res + B·A − W0: for a frozen A (B − B0)·A, for a frozen B (the Qwen loader's) B·(A − A0).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from kore_fast.constraint.selection import decoder_linears, target_pattern
from kore_fast.errors import ConstraintError, DataError
from kore_fast.files import check_new_folder, new_folder, read_json

if TYPE_CHECKING:
    from peft import PeftModel

_PARTS = {
    "BLinear.weight": "A",
    "ALinear.weight": "B",
    "weight_residual": "residual",
    "ALinear.bias": "bias",
}
_TAIL = re.compile(r"(?:^|.*\.)(layers\.\d+\..+)$")
# Their names, and transformers'.
_RENAMED = (
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower."),
    ("model.vision_tower.vision_tower.", "vision_tower."),
    ("visual.", "visual."),
)
# Computed, not learned.
_IGNORED = ("rotary_emb.inv_freq", "position_ids")
# What may be trained in full beside the adapter.
_PROJECTORS = ("multi_modal_projector", "visual.merger")


@dataclass(frozen=True)
class Imported:
    """What an import found and made."""

    ranks: dict[str, int]
    trained: dict[str, str]
    """Layer → ``"B"``, ``"A"`` or ``"A and B"``, as the weights show it."""
    dtype: str
    """Of the checkpoint's residual weights."""
    misfit: float
    """‖W_res + B·A − (W0 + the adapter's B·A)‖_F / ‖W0‖_F, the largest: the rounding of the checkpoint."""
    misfit_of_change: float
    """The same divided by what was learned, ‖W_res + B·A − W0‖_F, the largest."""
    worst: str
    """The layer of the largest misfit."""
    modules: list[str]
    """Modules that were trained in full."""
    ignored: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Solved:
    A: torch.Tensor
    B: torch.Tensor
    trained: str
    misfit: float
    change: float


def import_official(
    checkpoint: str | Path,
    model: str | Path,
    output: str | Path,
    *,
    progress: Callable[[Sequence[str]], Iterable[str]] | None = None,
) -> Imported:
    """Write a checkpoint of the paper's code as a plain LoRA adapter for the base model that it came from.

    Where A was frozen the adapter is in the zero-delta form with that A, and ``kore.json`` guards it. Where B was
    frozen it has the same rank and A − A0 as its A, and where both were trained twice the rank; neither has a null
    space left to guard, so they are written as ordinary LoRA. Biases are the base's.

    Args:
        checkpoint: a folder with safetensors files, or one such file.
        model: the base model before the paper's initialisation, a folder or a hub name.
        output: a new or empty folder.
        progress: wraps the list of layers.

    Raises:
        DataError: no safetensors there, a shard is missing, or ``output`` is not empty.
        ConstraintError: not a checkpoint of that code, or not one of this base; names the layer and the misfit.
    """
    from kore_fast.modules.loading import load_model
    from kore_fast.modules.merging import refuse_quantised

    check_new_folder(output)
    source = _Checkpoint.open(checkpoint)
    refuse_quantised(model)
    base = load_model(model, "auto")
    names = _match(source, base)
    modules, ignored = _compare_others(source, base, names)
    solved: dict[str, _Solved] = {}
    dtypes = set()
    layers = list(source.layers)
    scale: dict[str, float] = {}
    for layer in progress(layers) if progress else layers:
        name = names[layer]
        module = base.get_submodule(name)
        assert isinstance(module, nn.Linear)
        parts = {part: source.read(key) for part, key in source.layers[layer].items()}
        dtypes.add(parts["residual"].dtype)
        _check_bias(name, parts.get("bias"), module.bias)
        solved[name] = _solve(name, module.weight.detach(), parts["residual"], parts["A"], parts["B"])
        scale[name] = max(float(module.weight.detach().double().norm()), torch.finfo(torch.float64).tiny)
    order = [name for name, _ in base.named_modules() if name in solved]
    relative = {name: solved[name].misfit / scale[name] for name in order}
    worst = max(relative, key=lambda name: relative[name])
    imported = Imported(
        ranks={name: len(solved[name].A) for name in order},
        trained={name: solved[name].trained for name in order},
        dtype=", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)),
        misfit=relative[worst],
        misfit_of_change=max(s.misfit / s.change if s.change else 0.0 for s in solved.values()),
        worst=worst,
        modules=sorted(modules),
        ignored=ignored,
    )
    _write(base, {name: solved[name] for name in order}, modules, imported, output)
    return imported


@dataclass
class _Checkpoint:
    path: Path
    files: dict[str, Path]
    """Key → its file."""
    layers: dict[str, dict[str, str]]
    """Layer → part (A, B, residual, bias) → key."""

    @classmethod
    def open(cls, path: str | Path) -> _Checkpoint:
        path = Path(path)
        shards = [path] if path.is_file() and path.suffix == ".safetensors" else sorted(path.glob("*.safetensors"))
        if not shards:
            pickles = [path] if path.is_file() else sorted([*path.glob("*.bin"), *path.glob("*.pt")])
            if pickles:
                raise DataError(
                    f"{pickles[0]}: a pickle, which is not opened here because it can run code. Convert it where you "
                    "trust it: safetensors.torch.save_file(torch.load(file, weights_only=True), "
                    "'model.safetensors', metadata={'format': 'pt'}), each shard for itself"
                )
            raise DataError(f"{path}: no safetensors file here; give the folder that the training saved")
        files: dict[str, Path] = {}
        for shard in shards:
            try:
                with safe_open(str(shard), framework="pt") as file:
                    keys = list(file.keys())
            except (OSError, SafetensorError) as error:
                raise DataError(f"{shard}: not a whole safetensors file ({error}); copy it again") from None
            for key in keys:
                if files.setdefault(key, shard) is not shard:
                    raise DataError(
                        f"{shard}: {key} is in {files[key].name} too; give a folder with one checkpoint's files alone"
                    )
        index = path / "model.safetensors.index.json"
        if path.is_dir() and index.is_file():
            listed = read_json(index).get("weight_map", {})
            if missing := [key for key in listed if key not in files]:
                raise DataError(
                    f"{index}: {missing[0]} should be in {listed[missing[0]]}, which is not there or not that shard; "
                    "copy all files of the checkpoint"
                )
        layers: dict[str, dict[str, str]] = {}
        for key in files:
            if ".PALinear." in key or ".PBLinear." in key:
                raise ConstraintError(f"{key}: made with two projections, which no LoRA adapter can hold; merge it")
            for end, part in _PARTS.items():
                if key.endswith(f".{end}"):
                    layers.setdefault(key.removesuffix(f".{end}"), {})[part] = key
        if not layers:
            raise ConstraintError(
                f"{path}: no layer with weight_residual, ALinear and BLinear, so not a checkpoint of the paper's code "
                "before its merge. A merged one is an ordinary model already"
            )
        for layer, parts in layers.items():
            for part in ("A", "B", "residual"):
                if part not in parts:
                    end = next(end for end, name in _PARTS.items() if name == part)
                    raise ConstraintError(
                        f"{path}: {layer}.{end} is missing; a saver that leaves frozen parameters out makes such "
                        "files: take the whole checkpoint"
                    )
        return cls(path, files, layers)

    def read(self, key: str) -> torch.Tensor:
        with safe_open(str(self.files[key]), framework="pt") as file:
            return file.get_tensor(key)


def _match(source: _Checkpoint, base: nn.Module) -> dict[str, str]:
    """The base's name of each of the checkpoint's layers, by what follows the decoder's prefix."""
    tails = {match[1]: name for name in decoder_linears(base) if (match := _TAIL.fullmatch(name))}
    names = {}
    for layer, parts in source.layers.items():
        match = _TAIL.fullmatch(layer)
        if match is None or match[1] not in tails:
            raise ConstraintError(
                f"{layer}: {type(base).__name__} has no such decoder layer; give the base that the checkpoint came from"
            )
        names[layer] = tails[match[1]]
        module = base.get_submodule(names[layer])
        d_out, d_in = module.weight.shape  # type: ignore[misc]
        with safe_open(str(source.files[parts["A"]]), framework="pt") as file:
            rank = file.get_slice(parts["A"]).get_shape()[0]
        for part, wanted in {"residual": (d_out, d_in), "A": (rank, d_in), "B": (d_out, rank)}.items():
            with safe_open(str(source.files[parts[part]]), framework="pt") as file:
                found = tuple(file.get_slice(parts[part]).get_shape())
            if found != wanted:
                raise ConstraintError(
                    f"{parts[part]}: shape {found}, the base's {names[layer]} wants {wanted}; give the base that the "
                    "checkpoint came from"
                )
    return names


def _compare_others(
    source: _Checkpoint, base: nn.Module, names: dict[str, str]
) -> tuple[dict[str, dict[str, torch.Tensor]], list[str]]:
    """Tensors outside the constrained layers: module trained in full → its tensors by the base's names; and what was
    not compared."""
    state = base.state_dict()
    taken = {key for parts in source.layers.values() for key in parts.values()}
    layer, name = next(iter(names.items()))
    tail = _TAIL.fullmatch(layer)
    assert tail is not None
    theirs, ours = layer.removesuffix(tail[1]), name.removesuffix(tail[1])
    trained: dict[str, dict[str, torch.Tensor]] = {}
    ignored = []
    for key in sorted(set(source.files) - taken):
        if key.endswith(_IGNORED):
            ignored.append(key)
            continue
        match = _counterpart(key, state, theirs, ours)
        if match is None:
            raise ConstraintError(
                f"{source.path}: {key} has no counterpart in {type(base).__name__}, so whether it was trained cannot "
                "be told; give the base that the checkpoint came from"
            )
        name = match
        found, wanted = source.read(key), state[name]
        if key.endswith(("embed_tokens.weight", "lm_head.weight")) and found.shape[1:] == wanted.shape[1:]:
            # transformers' conversions of LLaVA have rows for tokens of their own at the end.
            rows = min(len(found), len(wanted))
            found, wanted = found[:rows], wanted[:rows]
        if found.shape != wanted.shape:
            raise ConstraintError(f"{key}: shape {tuple(found.shape)}, {name} of the base has {tuple(wanted.shape)}")
        difference = _difference(found, wanted)
        if difference == 0:
            continue
        projector = next((p for p in _PROJECTORS if f".{p}." in f".{name}"), None)
        if projector is None:
            raise ConstraintError(
                f"{key}: differs from the base's {name} by {difference:.2g} of its size; it is neither a constrained "
                "layer nor the projector. Give the base that the checkpoint came from; a model trained there in full "
                "is no adapter"
            )
        trained.setdefault(projector, {})[name] = found
    return trained, ignored


def _counterpart(key: str, state: dict[str, torch.Tensor], theirs: str, ours: str) -> str | None:
    """The base's name of a tensor of theirs."""
    candidates = [key]
    if key.startswith(theirs):
        candidates.append(ours + key.removeprefix(theirs))
    candidates += [
        f"{lead}{after}{rest}"
        for before, after in _RENAMED
        if key.startswith(before)
        for rest in [key.removeprefix(before)]
        for lead in ("model.", "")
    ]
    candidates += [f"language_model.{key}"]
    return next((name for name in candidates if name in state), None)


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖found − wanted‖/‖wanted‖, 0 where rounding to the coarser dtype explains it."""
    eps = max(torch.finfo(found.dtype).eps, torch.finfo(wanted.dtype).eps)
    a, b = found.double(), wanted.double()
    apart = (a - b).abs() > eps * torch.maximum(a.abs(), b.abs()) + max(map(_step, (found.dtype, wanted.dtype)))
    if not bool(apart.any()):
        return 0.0
    return float((a - b).norm() / b.norm()) if bool(b.any()) else float("inf")


def _step(dtype: torch.dtype) -> float:
    """The distance of subnormal numbers, which float16 has among the weights of real models."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def _check_bias(name: str, found: torch.Tensor | None, wanted: torch.Tensor | None) -> None:
    if found is None and wanted is None:
        return
    if found is None or wanted is None:
        raise ConstraintError(
            f"{name}: {'the base' if wanted is not None else 'the checkpoint'} alone has a bias there; give the base "
            "that the checkpoint came from"
        )
    if difference := _difference(found, wanted.detach()):
        raise ConstraintError(
            f"{name}: its bias differs from the base's by {difference:.2g} of its size; it was trained, and LoRA "
            "adapters that hold biases cannot be served: merge the checkpoint instead"
        )


@torch.no_grad()
def _solve(
    name: str, weight: torch.Tensor, residual: torch.Tensor, A_saved: torch.Tensor, B_saved: torch.Tensor
) -> _Solved:
    """The adapter of one layer, in float64.

    D = W0 − W_res = B0·A0 is what initialisation took out. Whichever of the factors was frozen is still there and
    spans D's rows (A) or columns (B), but for rounding.
    """
    W, W_res, A, B = (t.double() for t in (weight, residual, A_saved, B_saved))
    D = W - W_res
    learned = B @ A - D
    rank = len(A)
    unit = max(torch.finfo(residual.dtype).eps / 2, 4 * torch.finfo(torch.float32).eps)
    # W_res and the factors were rounded once each to the checkpoint's dtype; perhaps the base was, too, after that.
    tight = unit * float(W_res.norm() + D.norm()) + _step(residual.dtype) * math.sqrt(D.numel())
    loose = tight + torch.finfo(weight.dtype).eps / 2 * float(W.norm())
    in_rows = _pinv_right(D, A)
    in_columns = _pinv_right(D.T, B.T).T
    off_rows, off_columns = float((D - in_rows @ A).norm()), float((D - B @ in_columns).norm())
    made: tuple[torch.Tensor, torch.Tensor, str] | None = None
    for bound in (tight, loose):
        if off_rows <= bound:
            made = A, B - in_rows, "B"
        elif off_columns <= bound:
            made = A - in_columns, B, "A"
        if made is not None:
            break
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(D, q=min(rank + 16, *D.shape), niter=4)
        A0 = S[:rank].sqrt()[:, None] * V[:, :rank].T
        B0 = U[:, :rank] * S[:rank].sqrt()
        off = float((D - B0 @ A0).norm())
        if off > loose:
            raise ConstraintError(
                f"{name}: base − weight_residual is not of rank {rank}: {off / float(W.norm()):.2g} of the weight lie "
                f"outside, rounding explains {loose / float(W.norm()):.2g}. The checkpoint came from another base than "
                "this one"
            )
        made = torch.cat([A, A0]), torch.cat([B, -B0], dim=1), "A and B"
    A_new, B_new = made[0].float(), made[1].float()
    misfit = float((learned - B_new.double() @ A_new.double()).norm())
    return _Solved(A_new, B_new, made[2], misfit, float(learned.norm()))


def _pinv_right(D: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """D·A⁺ for D (m, d) and A (r, d)."""
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    keep = torch.finfo(torch.float32).eps * S[0] * 1e-2 < S
    U, S, Vh = U[:, keep], S[keep], Vh[keep]
    return ((D @ Vh.T) / S) @ U.T


def _write(
    base: nn.Module,
    solved: dict[str, _Solved],
    modules: dict[str, dict[str, torch.Tensor]],
    imported: Imported,
    output: str | Path,
) -> None:
    from kore_fast.modules.adapter import (
        as_kore_model,
        attach_lora,
        lora_config_for,
        lora_layers,
        model_lora_a_hash,
    )

    names = [name for name, _ in base.named_modules()]
    config = lora_config_for(imported.ranks, target_pattern(list(solved), names), sorted(modules) or None)
    peft_model = attach_lora(base, config, {name: layer.A for name, layer in solved.items()})
    with torch.no_grad():
        for name, layer in lora_layers(peft_model).items():
            layer.lora_B["default"].weight.copy_(solved[name].B)
        for tensors in modules.values():
            for name, tensor in tensors.items():
                _trained_copy(peft_model, name).copy_(tensor)
    model: Any = peft_model
    if set(imported.trained.values()) == {"B"}:
        ranks = sorted(set(imported.ranks.values()))
        kore = {
            "format": "kore_fast.adapter/1",
            "rank": ranks[0] if len(ranks) == 1 else None,
            "train_a": False,
            "lora_a_sha256": model_lora_a_hash(peft_model),
            "imported": {"misfit": imported.misfit, "dtype": imported.dtype},
        }
        model = as_kore_model(peft_model, kore)
    with new_folder(output) as temporary:
        try:
            model.save_pretrained(str(temporary))
        except SafetensorError as error:
            raise OSError(str(error)) from error


def _trained_copy(model: PeftModel, name: str) -> torch.Tensor:
    """The parameter of a ``modules_to_save`` copy, by its name in the base."""
    for found, parameter in model.named_parameters():
        plain = found.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        if plain == name and "modules_to_save" in found:
            return parameter
    raise AssertionError(name)
