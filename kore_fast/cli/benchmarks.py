"""``kore-fast evaluate --benchmarks``: retention of one model, by lmms-eval or, at an endpoint, by VLMEvalKit."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from kore_fast.cli.arguments import device_of, dtype_of
from kore_fast.errors import DataError, RecipeError

if TYPE_CHECKING:
    from kore_fast.evaluation.lmms import Judge

# What the server or VLMEvalKit knows, and what reading results has no use for.
_IN_MEMORY = ("adapter", "device", "dtype", "limit", "data", "no_hub")
_TO_MEASURE = ("model", "endpoint", "api_key_env", "batch_size", "max_new_tokens")
_JUDGE = ("judge_url", "judge_model", "judge_key_env")


def add_arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("the retention benchmarks")
    group.add_argument("--benchmarks", nargs="*", metavar="NAME", help="measure these (none named: the paper's twelve)")
    group.add_argument(
        "--data", type=Path, metavar="DIR", help="a folder of data for each benchmark; what is not there: from the hub"
    )
    group.add_argument("--no-hub", action="store_true", help="fetch nothing from the hub")
    group.add_argument("--judge-url", metavar="URL", help="an OpenAI-compatible endpoint, for the four that are judged")
    group.add_argument("--judge-model", metavar="NAME", help="the judge's name there")
    group.add_argument("--judge-key-env", metavar="VAR", help="the environment variable that holds the judge's key")
    group.add_argument(
        "--vlmevalkit", type=Path, metavar="DIR", help="read VLMEvalKit's results below this folder into the same table"
    )


def wanted(options: argparse.Namespace) -> bool:
    return options.benchmarks is not None or options.vlmevalkit is not None


def refuse_its_options(options: argparse.Namespace, reason: str) -> None:
    """Raises `RecipeError` where options of the benchmarks are given to something else."""
    _refuse(options, ("data", "no_hub", *_JUDGE), reason)


def folder_of(options: argparse.Namespace, what: str) -> Path:
    """``--run``, or a folder that says what was measured on whom."""
    # Most folders are called "model" or "adapter"; the one above says whose.
    local = options.endpoint is None and Path(options.model).is_dir()
    name = "-".join(Path(options.model).resolve().parts[-2:]) if local else Path(options.model).name
    if options.adapter is not None:
        name += "-" + "-".join(options.adapter.resolve().parts[-2:])
    return (options.run or Path("runs") / f"{what}-{name}").resolve()


def evaluate(options: argparse.Namespace) -> int:
    if options.vlmevalkit is not None:
        return _read_results(options)
    if options.model is None:
        raise RecipeError(
            "evaluate --benchmarks: name the model with --model: a folder, a hub name, or its name at --endpoint"
        )
    return _in_memory(options) if options.endpoint is None else _at_an_endpoint(options)


def _in_memory(options: argparse.Namespace) -> int:
    import torch

    from kore_fast.evaluation.answering import load_answerer
    from kore_fast.evaluation.lmms import check_retention, evaluate_retention
    from kore_fast.modules.loading import quiet_transformers
    from kore_fast.progress import bar

    if not options.verbose:
        quiet_transformers()
    _refuse(options, ("api_key_env",), "it goes with --endpoint")
    if options.no_hub and options.data is None:
        raise RecipeError("evaluate --benchmarks: with --no-hub there is no data: name its folder with --data")
    names, judge = options.benchmarks or None, _judge(options)
    check_retention(names, data=options.data, judge=judge)
    given = load_answerer(
        options.model,
        options.adapter,
        dtype=dtype_of(options.dtype),
        device=device_of(options.device or ("cuda" if torch.cuda.is_available() else "cpu")),
    )
    if not hasattr(given.processor, "image_processor"):
        raise DataError(
            f"{options.model}: the benchmarks show pictures; give a vision-language model, and its processor"
        )
    folder = folder_of(options, "benchmarks")
    retention = evaluate_retention(
        given.model,
        given.processor,
        names,
        folder=folder,
        data=options.data,
        hub=not options.no_hub,
        judge=judge,
        limit=options.limit,
        max_new_tokens=options.max_new_tokens or 1024,
        batch_size=options.batch_size or 8,
        about={key: given.about[key] for key in given.about if key not in ("max_new_tokens", "bf16")},
        progress=bar,
    )
    print(retention.table())
    print(f"Every prediction: {folder / 'BENCHMARK' / 'predictions.jsonl'}\nAll figures: {folder / 'retention.json'}")
    if all(score.points is None for score in retention.scores):
        raise DataError("evaluate --benchmarks: nothing could be measured; the table says why")
    return 0


def _at_an_endpoint(options: argparse.Namespace) -> int:
    from kore_fast.evaluation.lmms import write_vlmevalkit_config

    _refuse(options, _IN_MEMORY, "an endpoint is measured by VLMEvalKit, whose server and own data decide that")
    if not options.endpoint.startswith(("http://", "https://")):
        raise RecipeError(f"evaluate --endpoint {options.endpoint}: want an address, as http://localhost:8000/v1")
    folder = folder_of(options, "benchmarks")
    made = write_vlmevalkit_config(
        folder,
        base_url=options.endpoint,
        model=options.model,
        benchmarks=options.benchmarks or None,
        judge=_judge(options),
        api_key_env=options.api_key_env,
        max_new_tokens=options.max_new_tokens or 1024,
        parallel=options.batch_size or 16,
    )
    print(f"VLMEvalKit's configuration: {folder}\n\nIn VLMEvalKit's folder:\n")
    for command in made.commands:
        print(f"    {command}")
    print(f"\nThen read its results:\n\n    kore-fast evaluate --vlmevalkit {folder}")
    return 0


def _read_results(options: argparse.Namespace) -> int:
    from kore_fast.evaluation.lmms import read_vlmevalkit

    _refuse(options, (*_IN_MEMORY, *_TO_MEASURE, *_JUDGE, "run"), "--vlmevalkit reads results that are there")
    print(read_vlmevalkit(options.vlmevalkit, options.benchmarks or None).table())
    return 0


def _judge(options: argparse.Namespace) -> Judge | None:
    from kore_fast.evaluation.lmms import Judge

    if options.judge_url is None and options.judge_model is None:
        _refuse(options, ("judge_key_env",), "it goes with --judge-url and --judge-model")
        return None
    if options.judge_url is None or options.judge_model is None:
        raise RecipeError("evaluate: a judge has --judge-url URL and --judge-model NAME, both of them")
    if not options.judge_url.startswith(("http://", "https://")):
        raise RecipeError(f"evaluate --judge-url {options.judge_url}: want an address, as http://localhost:8000/v1")
    if not options.judge_model:
        raise RecipeError("evaluate --judge-model: it is empty; give the judge's name at its endpoint")
    return Judge(base_url=options.judge_url, model=options.judge_model, api_key_env=options.judge_key_env)


def _refuse(options: argparse.Namespace, names: tuple[str, ...], reason: str) -> None:
    for name in names:
        if getattr(options, name) not in (None, False, "auto"):
            raise RecipeError(f"evaluate: --{name.replace('_', '-')} has no place here: {reason}")
