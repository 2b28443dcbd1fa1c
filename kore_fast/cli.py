"""The command line: parses, calls, prints."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import kore_fast
from kore_fast.errors import KoreError

if TYPE_CHECKING:
    import torch

    from kore_fast.evaluation.answering import Answerer

STAGES = {
    "augment": "items → samples and held-out questions",
    "covariance": "old knowledge → covariances of every linear input",
    "init": "covariances → adapters to start from, with their leak",
    "train": "samples → trained adapters",
    "evaluate": "adaptation, retention and drift of the base and of every method",
    "report": "figures, tables and the HTML page",
}
# What the processes of torchrun share; everything else would be done by each of them.
_SHARED = ("covariance", "init")
# Those of `kore-fast spectrum` when none is given.
_RANKS = (16, 64, 256)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``kore-fast``; returns the exit status (1 for an error that the user can mend)."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    try:
        if options.command == "env":
            return _env()
        from kore_fast.constraint.distributed import process_group

        with process_group():
            _refuse_several_processes(options.command)
            others = {
                "augment": _augment,
                "compare": _compare,
                "evaluate": _evaluate,
                "convert": _convert,
                "spectrum": _spectrum,
                "verify": _verify,
                "merge": _merge,
                "import-kore": _import_kore,
            }
            return others.get(options.command, _run)(options)
    except KoreError as error:
        from kore_fast.constraint.distributed import leave_process_group

        _say(f"kore-fast: {error}")
        leave_process_group()
        return 1
    except KeyboardInterrupt:
        _say("kore-fast: stopped; the same command continues from here")
        return 130


def _say(text: str) -> None:
    """Under torchrun the first process that gets here speaks for all."""
    from kore_fast.constraint.distributed import first_to_speak

    if first_to_speak():
        print(text, file=sys.stderr, flush=True)


def _refuse_several_processes(command: str) -> None:
    from kore_fast.constraint.distributed import Ranks
    from kore_fast.errors import RecipeError

    if Ranks().world > 1 and command not in _SHARED:
        raise RecipeError(
            f"{command}: run by one process here; only {' and '.join(_SHARED)} share their work over the processes of "
            f"torchrun. Give `kore-fast {command}` without torchrun"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kore-fast", description=(kore_fast.__doc__ or "").splitlines()[0])
    parser.add_argument("--version", action="version", version=f"kore-fast {kore_fast.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="every stage of a recipe, in order")
    compare = commands.add_parser("compare", help="a study: every method at every learning rate and seed, compared")
    stages = {name: commands.add_parser(name, help=text) for name, text in STAGES.items()}
    for name, command in {"run": run, "compare": compare, **stages}.items():
        place = command.add_argument("recipe", type=Path, help="a YAML file, or a folder with recipe.yaml")
        if name == "augment":
            place.nargs = "?"
            command.add_argument(
                "--items", type=Path, metavar="FILE", help="an items file, or EVOKE's, instead of a recipe"
            )
            command.add_argument(
                "--dry-run", action="store_true", help="say what would be asked, searched and paid, and do nothing"
            )
        command.add_argument(
            "--run", "--run-dir", type=Path, metavar="DIR", help="the run's folder (default: runs/<recipe's name>)"
        )
        command.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key, as in training.steps=20"
        )
        command.add_argument("--verbose", action="store_true", help="say more about what is done")
        if name in ("init", "train", "evaluate"):
            command.add_argument("--method", help="only this method of the recipe")
        if name == "evaluate":
            place.nargs = "?"
            _evoke_arguments(command)
    compare.add_argument("--jobs", type=int, default=1, metavar="N", help="runs side by side (default: 1)")
    compare.add_argument(
        "--minutes", type=float, default=float("inf"), metavar="M", help="start no further run after so long"
    )
    compare.add_argument("--table", action="store_true", help="run nothing, compare what is done")
    spectrum = commands.add_parser("spectrum", help="covariances → how much room they leave, layer by layer")
    spectrum.add_argument("store", type=Path, help="a covariance folder or file, or a run's folder")
    spectrum.add_argument(
        "--rank", type=int, nargs="+", metavar="R", help="ranks to show the tail's energy at (default: 16 64 256)"
    )
    spectrum.add_argument(
        "--weight", action="append", default=[], metavar="SOURCE=W", help="a source's weight in the mix (default: 1)"
    )
    spectrum.add_argument("--device", default="cpu", help="where to compute eigenvalues (default: cpu)")
    spectrum.add_argument("--output", type=Path, metavar="DIR", help="default: spectrum/ beside the covariance folder")
    spectrum.add_argument("--verbose", action="store_true", help="say more about what is done")
    verify = commands.add_parser("verify", help="an adapter → does it fit its model, do its hash and leak still hold")
    _adapter_and_model(verify)
    verify.add_argument(
        "--covariance",
        type=Path,
        metavar="STORE",
        help="covariances to compare with (default: those of the adapter's run)",
    )
    verify.add_argument("--pad", type=Path, metavar="OUT", help="also write a copy with the next rank that vLLM takes")
    merge = commands.add_parser("merge", help="an adapter and its base → one ordinary model")
    _adapter_and_model(merge)
    merge.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder for the model")
    imports = commands.add_parser("import-kore", help="a checkpoint of the paper's own code → an ordinary adapter")
    imports.add_argument("checkpoint", type=Path, help="the folder that its training saved, or one safetensors file")
    imports.add_argument("--model", required=True, metavar="PATH", help="the base model that it started from")
    imports.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder for the adapter")
    imports.add_argument("--verbose", action="store_true", help="say more about what is done")
    convert = commands.add_parser("convert", help="training samples from one file format to another")
    convert.add_argument("samples", type=Path, help="LLaVA, LLaMA-Factory, ms-swift or TRL JSON, or parquet")
    convert.add_argument("output", type=Path, help="the new file")
    convert.add_argument("--format", required=True, help="llava, llama-factory, swift, messages or parquet")
    convert.add_argument("--from", dest="source", metavar="FORMAT", help="default: as the file looks")
    convert.add_argument("--images", type=Path, metavar="DIR", help="the pictures' folder (default: the samples' own)")
    convert.add_argument("--absolute-images", action="store_true", help="write whole paths to the pictures")
    convert.add_argument("--unpack", type=Path, metavar="DIR", help="where pictures inside a parquet file go")
    convert.add_argument("--verbose", action="store_true", help="say more about what is done")
    env = commands.add_parser("env", help="versions, devices and what was built")
    env.add_argument("--verbose", action="store_true", help=argparse.SUPPRESS)
    return parser


def _evoke_arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("EVOKE, instead of a recipe")
    group.add_argument("--evoke", type=Path, metavar="FILE", help="evoke_evaluation_data.jsonl, its pictures below it")
    group.add_argument(
        "--model", metavar="MODEL", help="a folder or a hub name; with --endpoint its name at the server"
    )
    group.add_argument("--adapter", type=Path, metavar="DIR", help="an adapter of that model; it is not merged")
    group.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible server, as http://localhost:8000/v1")
    group.add_argument("--api-key-env", metavar="VAR", help="the environment variable that holds the server's key")
    group.add_argument("--limit", type=_count, metavar="N", help="only the first N questions")
    group.add_argument(
        "--batch-size", type=_count, metavar="N", help="questions (at a server: requests) at once (default: 8)"
    )
    group.add_argument("--max-new-tokens", type=_count, metavar="N", help="of an answer (default: 128, EVOKE's)")
    group.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="default: as stored"
    )
    group.add_argument("--device", help="where to compute (default: a GPU where there is one)")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: want at least 1")
    return number


def _adapter_and_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("adapter", type=Path, help="a LoRA adapter's folder")
    command.add_argument("--model", required=True, metavar="PATH", help="the base model: a folder or a hub name")
    command.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="default: as stored"
    )
    command.add_argument("--device", default="cpu", help="where to compute (default: cpu)")
    command.add_argument("--verbose", action="store_true", help="say more about what is done")


def _run(options: argparse.Namespace) -> int:
    from kore_fast.allocation import keep_freed_memory
    from kore_fast.constraint.distributed import Ranks
    from kore_fast.errors import RecipeError
    from kore_fast.modules.loading import quiet_transformers
    from kore_fast.recipe.checks import prepare
    from kore_fast.recipe.runner import run_stages
    from kore_fast.recipe.schema import BASE, load_recipe
    from kore_fast.recipe.stages import build_stages

    keep_freed_memory()
    if not options.verbose:
        quiet_transformers()
    recipe = load_recipe(options.recipe, _overrides(options.set))
    run = (options.run or Path("runs") / recipe.name).resolve()
    Ranks().by_first(lambda: prepare(recipe))
    stages = build_stages(recipe, run)
    if options.command != "run":
        method = getattr(options, "method", None)
        if method is not None and method not in (*recipe.methods, BASE):
            raise RecipeError(f"--method {method}: the recipe has {', '.join(recipe.methods)}")
        stages = [s for s in stages if s.kind == options.command and (method is None or s.name.endswith(f"/{method}"))]
    if not stages:
        reason = f"method {method!r} has none" if getattr(options, "method", None) else "the recipe has none"
        raise RecipeError(f"nothing to do for `kore-fast {options.command}`: {reason}")
    run_stages(run, stages)
    if stages[-1].kind == "report":
        from kore_fast.report import load_lines, terminal_table

        print(f"\n{terminal_table(run)}\n\nThe report: {run / 'report' / 'report.html'}")
        for name in [name for name, method in recipe.methods.items() if method.kind == "kore"][:1]:
            print("\nThe adapter is an ordinary one. In plain PEFT, without kore_fast:\n")
            for line in load_lines(run / "train" / name / "adapter", recipe.model_path()):
                print(f"    {line}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from functools import partial

    from kore_fast.errors import RecipeError
    from kore_fast.recipe.checks import prepare
    from kore_fast.recipe.schema import load_recipe
    from kore_fast.recipe.study import compare

    if options.jobs < 1:
        raise RecipeError(f"--jobs {options.jobs}: want at least 1")
    recipe = load_recipe(options.recipe, _overrides(options.set))
    run = (options.run or Path("runs") / recipe.name).resolve()
    if not options.table:
        prepare(recipe)
    found = compare(
        options.recipe,
        recipe,
        run,
        overrides=options.set,
        width=options.jobs,
        minutes=options.minutes,
        only_table=options.table,
        say=partial(print, flush=True),
    )
    print(f"\n{found.markdown}\nThe comparison: {found.folder / 'comparison.md'}")
    return 0


def _overrides(texts: Sequence[str]) -> dict[str, str]:
    from kore_fast.errors import RecipeError

    overrides = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise RecipeError(f"--set {text}: want KEY=VALUE, as in training.steps=20")
        overrides[key] = value
    return overrides


def _augment(options: argparse.Namespace) -> int:
    """A recipe's stage, or an items file by itself."""
    from kore_fast.augmentation.pipeline import describe_cost, image_root
    from kore_fast.errors import RecipeError
    from kore_fast.recipe.runner import run_stages
    from kore_fast.recipe.schema import load_plan, load_recipe
    from kore_fast.recipe.stages import augment_stage
    from kore_fast.recipe.work import AUGMENT_CACHE

    if (options.recipe is None) == (options.items is None):
        raise RecipeError("augment: give a recipe or --items FILE, one of them")
    overrides = _overrides(options.set)
    if options.recipe is not None:
        recipe = load_recipe(options.recipe, overrides)
        items, plan, name, resolve = recipe.resolve(recipe.items), recipe.augmentation, recipe.name, recipe.resolve
    else:
        items = options.items.resolve()
        plan, name = load_plan(items, overrides), items.stem

        def resolve(path: Path | str) -> Path:
            return Path(path).resolve()

    run = (options.run or Path("runs") / name).resolve()
    if options.dry_run:
        print(describe_cost(items, plan.resolved(resolve), run / AUGMENT_CACHE))
        return 0
    run_stages(run, [augment_stage(items, plan, resolve, run, name)])
    print(_told(run / "augment", image_root(items, plan, run / "augment")))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    """A recipe's stages, or EVOKE's questions to one model."""
    from kore_fast.errors import RecipeError

    if (options.recipe is None) == (options.evoke is None):
        raise RecipeError("evaluate: give a recipe or --evoke FILE, one of them")
    if options.recipe is not None:
        names = ("model", "adapter", "endpoint", "api_key_env", "limit", "batch_size", "max_new_tokens", "device")
        given = [name for name in names if getattr(options, name) is not None]
        if given:
            raise RecipeError(f"evaluate: --{given[0].replace('_', '-')} goes with --evoke; a recipe says it itself")
        return _run(options)
    if options.model is None:
        raise RecipeError(
            "evaluate --evoke: name the model with --model: a folder, a hub name, or its name at --endpoint"
        )
    if options.method is not None or options.set:
        raise RecipeError("evaluate --evoke: --method and --set are a recipe's")
    return _evoke(options)


def _evoke(options: argparse.Namespace) -> int:
    from kore_fast.data.evoke import check_question_images, read_evoke_questions
    from kore_fast.evaluation.answering import MAX_NEW_TOKENS
    from kore_fast.evaluation.evoke import PREDICTIONS, evaluate_evoke, scores_markdown
    from kore_fast.modules.loading import quiet_transformers
    from kore_fast.progress import bar

    if not options.verbose:
        quiet_transformers()
    questions = read_evoke_questions(options.evoke, check_images=False)
    check_question_images(options.evoke, questions[: options.limit])
    answerer = _answerer(options, options.max_new_tokens or MAX_NEW_TOKENS, options.batch_size or 8)
    name = Path(options.model).resolve().name
    if options.adapter is not None:  # most are called "adapter"; the folder above says whose
        name += "-" + "-".join(options.adapter.resolve().parts[-2:])
    folder = (options.run or Path("runs") / f"evoke-{name}").resolve()
    scores = evaluate_evoke(
        questions, options.evoke.resolve().parent, answerer, folder, limit=options.limit, progress=bar
    )
    # Types are many; they are in the files.
    print(scores_markdown({**scores, "by_type": {}}))
    print(f"Every prediction: {folder / PREDICTIONS}\nBy type as well: {folder / 'scores.md'}, {folder / 'scores.csv'}")
    if scores["missing"]:
        print(f"{scores['missing']:,} questions have no answer: give the same command again to ask them once more")
    return 0


def _answerer(options: argparse.Namespace, max_new_tokens: int, batch_size: int) -> Answerer:
    import torch
    from pydantic import ValidationError

    from kore_fast.errors import RecipeError
    from kore_fast.evaluation.answering import EndpointAnswerer, load_answerer

    if options.endpoint is None:
        if options.api_key_env is not None:
            raise RecipeError("evaluate: --api-key-env goes with --endpoint")
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return load_answerer(
            options.model,
            options.adapter,
            dtype=_dtype(options.dtype),
            device=_device(device),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
    given = {"adapter": options.adapter, "device": options.device, "dtype": options.dtype != "auto" or None}
    if what := next((name for name, value in given.items() if value is not None), None):
        raise RecipeError(f"evaluate: --{what} is for the server to know; --model is the name that it serves it under")
    try:
        return EndpointAnswerer.greedy(
            options.model,
            options.endpoint,
            api_key_env=options.api_key_env,
            max_tokens=max_new_tokens,
            concurrency=batch_size,
        )
    except ValidationError as error:
        reasons = "; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors())
        raise RecipeError(f"evaluate --endpoint: {reasons}") from None


def _told(folder: Path, root: Path) -> str:
    """What an augmentation came to, and where it is."""
    from kore_fast.augmentation.pipeline import unanswered
    from kore_fast.files import read_json

    summary = read_json(folder / "summary.json")
    counts = ", ".join(f"{name} {sizes['samples']:,}" for name, sizes in summary["branches"].items())
    lines = [f"{summary['items']:,} items, {summary['samples']:,} samples: {counts}"]
    if left_out := len((folder / "rejects.jsonl").read_text(encoding="utf-8").splitlines()):
        lines.append(f"{left_out:,} left out, each with its reason in {folder / 'rejects.jsonl'}")
    writer = summary["writer"]
    if "cost" in writer:
        tokens = writer["prompt_tokens"] + writer["completion_tokens"]
        lines.append(f"{writer['model']}: {writer['requests']:,} requests, {tokens:,} tokens, cost {writer['cost']}")
    if lacking := unanswered(summary):
        lines.append(f"{lacking}: give the same command again to try once more")
    lines += [f"Samples: {folder / 'samples.json'}", f"Their pictures: {root}"]
    lines += [f"To look at: {folder / 'contact_sheet.html'}"]
    return "\n".join(lines)


def _convert(options: argparse.Namespace) -> int:
    from kore_fast.data.formats import convert

    made = convert(
        options.samples,
        options.output,
        options.format,
        source_format=options.source,
        image_root=options.images,
        absolute_images=options.absolute_images,
        unpack_to=options.unpack,
    )
    unpacked = f", {made.unpacked:,} pictures unpacked" if made.unpacked else ""
    print(f"{made.samples:,} samples from {made.source_format} to {made.format}{unpacked}: {options.output}")
    return 0


def _spectrum(options: argparse.Namespace) -> int:
    from kore_fast.constraint.spectrum import check_ranks, spectra, write_spectra
    from kore_fast.constraint.store import CovarianceStore
    from kore_fast.progress import bar
    from kore_fast.report.spectrum import draw_tails, spectrum_table

    path = (options.store / "covariance" if (options.store / "covariance").is_dir() else options.store).resolve()
    store = CovarianceStore.load(path)
    widest = max(store.widths.values())
    ranks = options.rank or [rank for rank in _RANKS if rank < widest]
    check_ranks(ranks, widest)
    found = spectra(
        store,
        _weights(options.weight),
        device=_device(options.device),
        progress=lambda groups: bar(groups, len(store.groups), "spectra"),
    )
    output = options.output or _beside(path) / "spectrum"
    write_spectra(found, output, ranks)
    picture = draw_tails(output)
    print(f"{spectrum_table(output)}\n\nThe table by layer: {output / 'spectrum.csv'}\nThe plot: {picture}")
    return 0


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
        options.adapter, options.model, store, dtype=_dtype(options.dtype), device=_device(options.device)
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
        options.adapter, options.model, options.output, dtype=_dtype(options.dtype), device=_device(options.device)
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


def _dtype(name: str) -> torch.dtype | Literal["auto"]:
    import torch

    return "auto" if name == "auto" else getattr(torch, name)


def _weights(texts: Sequence[str]) -> dict[str, float] | None:
    from kore_fast.errors import StoreError

    weights = {}
    for text in texts:
        source, _, number = text.rpartition("=")
        try:
            weights[source] = float(number)
        except ValueError:
            source = ""
        if not source:
            raise StoreError(f"--weight {text}: want SOURCE=NUMBER, as in text=2")
    return weights or None


def _device(name: str) -> str:
    import torch

    from kore_fast.errors import BackendError

    try:
        torch.empty(0, dtype=torch.float64, device=name)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise BackendError(f"--device {name}: {str(error).splitlines()[0]}; leave it out to use the CPU") from None
    return name


def _beside(store: Path) -> Path:
    """The folder that holds the store: outside a stage's own folder, the content of which later stages depend on."""
    folder = store.parent
    return folder.parent if (folder / "stage.json").is_file() else folder


def _env() -> int:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    print(f"kore-fast     {kore_fast.__version__}\nPython        {platform.python_version()} on {platform.platform()}")
    for package in ("torch", "triton", "numpy", "safetensors", "transformers", "peft", "accelerate"):
        try:
            print(f"{package:<13} {version(package)}")
        except PackageNotFoundError:
            print(f"{package:<13} not installed")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices       {', '.join(devices) or 'CPU'}, {torch.get_num_threads()} threads")
    from kore_fast.ops.backends import describe
    from kore_fast.ops.native.library import describe as native

    print(f"native build  {native()}")
    for device in ["cpu", *(["cuda"] if devices else [])]:
        for operation in ("covariance", "frozen_lora"):
            for backend, reason in describe(operation, torch.device(device)):
                print(f"{operation:<13} {backend} on {device}: {reason or 'yes'}")
    from kore_fast.ops.measured import choices_file, known_choices

    for device in ["cpu", *(["cuda"] if devices else [])]:
        known = known_choices(torch.device(device))
        for kind, way in sorted(known.items()):
            print(f"measured on {device}: {kind}: {way}")
    print(f"choices       {choices_file()}: backends that were measured to be fastest; delete it to measure again")
    print("nullspace     truncated (block Krylov, with a proof of its leak) from width 768 on; below float64 eigh")
    print("              complement (of the largest, where rank is nearly width and only the span counts), likewise")
    return 0


if __name__ == "__main__":
    sys.exit(main())
