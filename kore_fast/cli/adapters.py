"""``kore-fast verify``, ``merge`` and ``import-kore``: adapters that are there."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kore_fast.cli.arguments import device_of, dtype_and_device, dtype_of, verbose


def add_verify(commands: Any) -> None:
    command = commands.add_parser("verify", help="an adapter → does it fit its model, do its hash and leak still hold")
    _adapter_and_model(command)
    command.add_argument(
        "--covariance",
        type=Path,
        metavar="STORE",
        help="covariances to compare with (default: those of the adapter's run)",
    )
    command.add_argument("--pad", type=Path, metavar="OUT", help="also write a copy with the next rank that vLLM takes")
    command.set_defaults(work=_verify)


def add_merge(commands: Any) -> None:
    command = commands.add_parser("merge", help="an adapter and its base → one ordinary model")
    _adapter_and_model(command)
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder for the model")
    command.set_defaults(work=_merge)


def add_import_kore(commands: Any) -> None:
    command = commands.add_parser("import-kore", help="a checkpoint of the paper's own code → an ordinary adapter")
    command.add_argument("checkpoint", type=Path, help="the folder that its training saved, or one safetensors file")
    command.add_argument("--model", required=True, metavar="PATH", help="the base model that it started from")
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder for the adapter")
    verbose(command)
    command.set_defaults(work=_import_kore)


def _adapter_and_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("adapter", type=Path, help="a LoRA adapter's folder")
    command.add_argument("--model", required=True, metavar="PATH", help="the base model: a folder or a hub name")
    dtype_and_device(command, "cpu", "cpu")
    verbose(command)


def _verify(options: argparse.Namespace) -> int:
    from kore_fast.constraint.store import CovarianceStore
    from kore_fast.constraint.verification import find_store, verify_adapter
    from kore_fast.modules.adapter_files import pad_adapter
    from kore_fast.modules.loading import quiet_transformers

    if not options.verbose:
        quiet_transformers()
    path = options.covariance or find_store(options.adapter)
    store = CovarianceStore.load(path) if path else None
    checks = verify_adapter(
        options.adapter, options.model, store, dtype=dtype_of(options.dtype), device=device_of(options.device)
    )
    for check in checks:
        print(f"{check.name:<9} {check.status:<8} {check.detail}")
    failed = [check.name for check in checks if check.status == "FAILED"]
    if options.pad and not failed:
        rank = pad_adapter(options.adapter, options.pad)
        print(f"\nThe adapter with rank {rank} in every layer: {options.pad}")
    elif options.pad:
        print(f"\nNot padded: {', '.join(failed)} failed")
    return 1 if failed else 0


def _merge(options: argparse.Namespace) -> int:
    from kore_fast.modules.loading import quiet_transformers
    from kore_fast.modules.merging import merge_adapter

    if not options.verbose:
        quiet_transformers()
    merged = merge_adapter(
        options.adapter, options.model, options.output, dtype=dtype_of(options.dtype), device=device_of(options.device)
    )
    print(
        f"{merged.layers} layers merged in {merged.dtype}; logits differ from the adapter's by {merged.difference:.2g} "
        f"of their size (at most {merged.allowed:.2g} by rounding)\n\nThe model: {options.output}"
    )
    return 0


def _import_kore(options: argparse.Namespace) -> int:
    from collections import Counter

    from kore_fast.constraint.official import import_official
    from kore_fast.modules.loading import quiet_transformers
    from kore_fast.progress import bar

    if not options.verbose:
        quiet_transformers()
    made = import_official(
        options.checkpoint,
        options.model,
        options.output,
        progress=lambda layers: bar(layers, len(layers), "layers"),
    )
    for trained, count in Counter(made.trained.values()).items():
        ranks = sorted({made.ranks[name] for name, what in made.trained.items() if what == trained})
        print(f"{count} layers of which {trained} was trained: rank {', '.join(map(str, ranks))}")
    if set(made.trained.values()) != {"B"}:
        print("A did not stay frozen, so there is no null space to guard: an ordinary LoRA adapter without kore.json")
    if made.modules:
        print(f"Trained in full, and so in modules_to_save: {', '.join(made.modules)}")
    print(
        f"Not explained: at most {made.misfit:.2g} of a weight, {made.misfit_of_change:.2g} of what a layer learned "
        f"(rounding of {made.dtype}; most in {made.worst})\n\nThe adapter: {options.output}"
    )
    return 0
