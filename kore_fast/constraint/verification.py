"""Is this adapter what it should be, and does it fit the model that will serve it? Checks one by one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from kore_fast.constraint.fingerprint import model_fingerprint
from kore_fast.constraint.leak import leak
from kore_fast.constraint.store import CovarianceStore
from kore_fast.errors import KoreError

if TYPE_CHECKING:
    from kore_fast.modules.adapter_files import AdapterFiles

Status = Literal["ok", "FAILED", "skipped"]


@dataclass(frozen=True)
class Check:
    """One question about an adapter and its answer."""

    name: str
    status: Status
    detail: str


def verify_adapter(
    folder: str | Path,
    model: str | Path,
    store: CovarianceStore | None = None,
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: str = "cpu",
) -> list[Check]:
    """Check an adapter against the base model that will serve it; never stops at the first fault.

    The checks are *files* (there, whole, A and B of each layer, all finite), *layers* (every key matches a layer of the
    model and fits its shape), *function* (plain PEFT loads it; logits are finite and differ with and without it), *A*
    (SHA-256 as in ``kore.json``), *base* (the model that the adapter was made for), *leak* (as in ``kore.json``) and
    *rank* (what vLLM takes).

    Args:
        folder: the adapter.
        model: its base, a folder or a hub name.
        store: the covariances that A was made from, to compute leaks against.
        dtype: to load the model in; default as stored.

    Raises:
        KoreError: the base model cannot be loaded.
    """
    from kore_fast.modules.adapter_files import read_adapter
    from kore_fast.modules.loading import load_model
    from kore_fast.modules.trial import find_processor

    try:
        adapter = read_adapter(folder)
    except KoreError as error:
        rest = ("layers", "function", "A", "base", "leak", "rank")
        return [
            Check("files", "FAILED", str(error)),
            *(Check(name, "skipped", "the files have a fault") for name in rest),
        ]
    base = load_model(model, dtype).to(device)
    checks = [_files(adapter), _layers(adapter, base)]
    failed = [check.name for check in checks if check.status == "FAILED"]
    # PEFT changes the model's layers, and the fingerprint is of the plain ones.
    origin = _base(adapter, base, store)
    if "layers" in failed:
        checks.append(Check("function", "skipped", "the layers do not fit"))
    else:
        checks.append(_function(adapter, base, find_processor(model)))
    return [*checks, _lora_a(adapter), origin, _leak(adapter, store), _rank(adapter)]


def _files(adapter: AdapterFiles) -> Check:
    groups = {"lora_A": adapter.A, "lora_B": adapter.B, "": adapter.others}
    for kind, tensors in groups.items():
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                bad = int((~tensor.isfinite()).sum())
                return Check(
                    "files",
                    "FAILED",
                    f"{name}{'.' if kind else ''}{kind}: {bad} of {tensor.numel()} values are NaN or infinite; "
                    "training diverged, or the file is damaged: take an earlier checkpoint",
                )
    others = f", {len(adapter.others)} other tensors" if adapter.others else ""
    return Check("files", "ok", f"lora_A and lora_B of {len(adapter.A)} layers{others}")


def _layers(adapter: AdapterFiles, model: nn.Module) -> Check:
    from kore_fast.modules.adapter_files import misfits

    found = misfits(adapter, model)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        return Check("layers", "FAILED", f"{found[0]}{more}")
    return Check("layers", "ok", f"each is in {type(model).__name__}, with its shape")


def _function(adapter: AdapterFiles, model: nn.Module, processor: Any | None) -> Check:
    from peft import PeftModel

    from kore_fast.modules.adapter import lora_layers
    from kore_fast.modules.trial import trial_inputs, trial_logits

    def failed(reason: str) -> Check:
        return Check("function", "FAILED", reason)

    inputs = trial_inputs(model, processor)
    before = trial_logits(model, inputs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT would warn of is checked here
            loaded = PeftModel.from_pretrained(model, str(adapter.folder)).eval()
    except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
        return failed(f"PEFT cannot load it ({str(error).strip().splitlines()[0]})")
    missing = sorted(set(lora_layers(loaded)) - set(adapter.A))
    if missing:
        return failed(
            f"{missing[0]}: target_modules matches {len(missing)} layer(s) of which the file holds nothing; PEFT fills "
            "their A with chance and training would start there: mend target_modules"
        )
    after = trial_logits(loaded, inputs)
    for name, logits in {**before, **after}.items():
        if not bool(logits.isfinite().all()):
            whose = "with" if before[name].isfinite().all() else "even without"
            return failed(f"logits on the trial {name} are NaN or infinite {whose} the adapter; try --dtype float32")
    if not any(bool(B.any()) for B in adapter.B.values()) and not adapter.others:
        return failed("B is zero: not trained. The adapter computes what the base computes")
    if unmoved := [name for name in inputs if torch.equal(before[name], after[name])]:
        return failed(f"logits on the trial {unmoved[0]} are the same with and without the adapter: it has no effect")
    moved = ", ".join(f"{float((after[name] - before[name]).abs().max()):.3g} on a {name}" for name in inputs)
    still = sum(not bool(B.any()) for B in adapter.B.values())
    untrained = f"; B is zero in {still} of {len(adapter.B)} layers" if still else ""
    return Check("function", "ok", f"logits move by up to {moved}, all finite{untrained}")


def _lora_a(adapter: AdapterFiles) -> Check:
    from kore_fast.modules.adapter_files import check_hash

    if adapter.kore is None:
        return Check("A", "skipped", "no kore.json: not an adapter of KORE's")
    if adapter.kore.get("train_a"):
        return Check("A", "skipped", "A was trained (train_a), so it has no hash to keep")
    try:
        check_hash(adapter)
    except KoreError as error:
        return Check("A", "FAILED", str(error))
    padded = ", padded with zero rows" if adapter.kore.get("padded_from") else ""
    return Check("A", "ok", f"SHA-256 {adapter.kore['lora_a_sha256'][:12]}… as in kore.json{padded}")


def _base(adapter: AdapterFiles, model: nn.Module, store: CovarianceStore | None) -> Check:
    wanted = (adapter.kore or {}).get("model")
    if adapter.kore is None or not isinstance(wanted, str):
        return Check("base", "skipped", "no kore.json that names the model that the adapter was made for")
    groups: dict[str, list[str]] = {}
    for row in adapter.kore.get("leaks") or []:
        groups.setdefault(row["shares"], []).append(row["layer"])
    layers = [name for members in groups.values() for name in members]
    if store is not None and store.model == wanted:
        layers = store.layers
    modules = dict(model.named_modules())
    fits = layers and all(name in modules for name in layers)
    if fits and model_fingerprint(model, layers) == wanted:
        return Check("base", "ok", f"its weights have the fingerprint {wanted[:12]}… that kore.json names")
    if fits and store is not None and store.model == wanted:
        return Check(
            "base", "FAILED", "its weights are not those of the model that the adapter was made for; give that one"
        )
    return Check("base", "skipped", "the adapter does not cover all of the store's layers; give the store to compare")


def _leak(adapter: AdapterFiles, store: CovarianceStore | None) -> Check:
    if store is None:
        return Check("leak", "skipped", "give the covariances with --covariance STORE")
    weights = (adapter.kore or {}).get("source_weights")
    known = set(store.layers)
    if missing := [name for name in adapter.A if name not in known]:
        return Check("leak", "skipped", f"{missing[0]}: the store has no such layer, so it is not the adapter's")
    found: dict[str, float] = {}
    # A group at a time: a covariance may be 3 GB.
    for group, members in store.groups.items():
        chosen = [name for name in members if name in adapter.A]
        if chosen:
            C = store.covariance(group, _mix(weights, store))
            found |= {name: leak(adapter.A[name], C) for name in chosen}
    worst = max(found, key=lambda name: found[name])
    text = f"worst {found[worst]:.3g} in {worst} (1 is a random direction)"
    if adapter.kore is None or "covariance" not in adapter.kore:
        return Check("leak", "ok", f"{text}; no leak in a kore.json to compare with")
    if adapter.kore.get("covariance") != store.fingerprint():
        return Check("leak", "skipped", f"{text}, but A was made from another store than this one")
    if adapter.kore.get("train_a"):
        return Check("leak", "skipped", f"{text}; A was trained, so it need not be the one at the start")
    wanted = {row["layer"]: float(row["leak"]) for row in adapter.kore.get("leaks") or []}
    for name, value in found.items():
        if name not in wanted:
            return Check("leak", "FAILED", f"{name}: kore.json has no leak of it; take the adapter as it was saved")
        if not _same_leak(value, wanted[name], store.widths[store.group_of(name)]):
            return Check(
                "leak",
                "FAILED",
                f"{name}: {value:.6g}, kore.json has {wanted[name]:.6g}; A is not the one that was made from this "
                "store: take the adapter as it was saved",
            )
    return Check("leak", "ok", f"{text}, as in kore.json")


def _mix(weights: Any, store: CovarianceStore) -> Mapping[str, float] | None:
    """The mix that the adapter was made with, where the store has its sources."""
    return weights if isinstance(weights, Mapping) and set(weights) <= set(store.sources) else None


def _same_leak(found: float, wanted: float, d: int) -> bool:
    """Whether two leaks differ by no more than rounding A to float32 can make: √leak is a seminorm of A/‖A‖, at most
    √d for a matrix of norm 1."""
    rounding = torch.finfo(torch.float32).eps
    slack = rounding * math.sqrt(d) + 8 * rounding * math.sqrt(max(wanted, 0.0))
    return abs(math.sqrt(max(found, 0.0)) - math.sqrt(max(wanted, 0.0))) <= slack


def _rank(adapter: AdapterFiles) -> Check:
    from kore_fast.modules.adapter_files import VLLM_RANKS, vllm_rank

    config = adapter.config
    if config.get("modules_to_save") or config.get("use_dora"):
        what = "modules_to_save" if config.get("modules_to_save") else "DoRA"
        return Check("rank", "skipped", f"vLLM takes no adapter with {what}; `kore-fast merge` makes a model for it")
    ranks = sorted(set(adapter.ranks.values()))
    entry = vllm_rank(ranks[-1])
    if entry is None:
        return Check("rank", "FAILED", f"{ranks[-1]}: vLLM takes {VLLM_RANKS[-1]} at most; `kore-fast merge` instead")
    shown = f"{ranks[0]}…{ranks[-1]} by layer (rank_pattern)" if len(ranks) > 1 else str(ranks[0])
    scalings = adapter.scalings()
    # vLLM reads one r and one lora_alpha for all layers.
    r = int(config.get("r", 8))
    common = config.get("lora_alpha", 8) / (math.sqrt(r) if config.get("use_rslora") else r)
    odd = [name for name, scaling in scalings.items() if not math.isclose(scaling, common, rel_tol=1e-6)]
    if odd:
        return Check(
            "rank",
            "FAILED",
            f"{odd[0]}: scaling {scalings[odd[0]]:g} where lora_alpha and r give {common:g}; vLLM reads those two "
            "alone and would serve another function: `kore-fast merge` instead",
        )
    need = "" if entry <= 16 else ", as its default is 16"
    fits = "" if ranks == [entry] else "; --pad OUT writes a copy of just that rank"
    return Check("rank", "ok", f"{shown}: serve with vLLM's --max-lora-rank {entry}{need}{fits}")


def find_store(adapter: str | Path) -> Path | None:
    """The covariance folder of the run that the adapter is in, if it is in one."""
    for parent in list(Path(adapter).resolve().parents)[:3]:
        folder = parent / "covariance"
        if folder.is_dir() and any(folder.glob("*.safetensors")):
            return folder
    return None
