"""``kore-fast evaluate``: a recipe's stages, EVOKE's questions, or the retention benchmarks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kore_fast.cli import benchmarks, runs
from kore_fast.cli.arguments import count, device_of, dtype_and_device, dtype_of, recipe_arguments

if TYPE_CHECKING:
    from kore_fast.evaluation.answering import Answerer

# What is said of one model, option by option; a recipe says it in its file.
_OF_A_MODEL = ("model", "adapter", "endpoint", "api_key_env", "limit", "batch_size", "max_new_tokens", "device")


def add_evaluate(commands: Any) -> None:
    command = commands.add_parser("evaluate", help="adaptation, retention and drift of the base and of every method")
    recipe_arguments(command).nargs = "?"
    runs.one_method(command)
    group = command.add_argument_group("one model instead of a recipe, with --evoke or --benchmarks")
    group.add_argument(
        "--model", metavar="MODEL", help="a folder or a hub name; with --endpoint its name at the server"
    )
    group.add_argument("--adapter", type=Path, metavar="DIR", help="an adapter of that model; it is not merged")
    group.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible server, as http://localhost:8000/v1")
    group.add_argument("--api-key-env", metavar="VAR", help="the environment variable that holds the server's key")
    group.add_argument("--limit", type=count, metavar="N", help="only the first N questions (of each benchmark)")
    group.add_argument(
        "--batch-size", type=count, metavar="N", help="questions (at a server: requests) at once (default: 8)"
    )
    group.add_argument(
        "--max-new-tokens",
        type=count,
        metavar="N",
        help="of an answer (default: EVOKE's 128, benchmarks' 1024)",
    )
    dtype_and_device(group, None, "a GPU where there is one")
    command.add_argument_group("EVOKE").add_argument(
        "--evoke", type=Path, metavar="FILE", help="evoke_evaluation_data.jsonl, its pictures below it"
    )
    benchmarks.add_arguments(command)
    command.set_defaults(work=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    """A recipe's stages, EVOKE's questions to one model, or benchmarks on one model."""
    from kore_fast.errors import RecipeError

    wanted = benchmarks.wanted(options)
    if [options.recipe is not None, options.evoke is not None, wanted].count(True) != 1:
        raise RecipeError("evaluate: give a recipe or --evoke FILE, --benchmarks or --vlmevalkit DIR, one of them")
    if options.recipe is not None:
        if given := next((name for name in _OF_A_MODEL if getattr(options, name) is not None), None):
            option = f"--{given.replace('_', '-')}"
            raise RecipeError(f"evaluate: {option} goes with --evoke or --benchmarks; a recipe says it itself")
        benchmarks.refuse_its_options(options, "a recipe has them under evaluation.retention")
        return runs.run(options)
    what = "--benchmarks" if wanted else "--evoke"
    if options.method is not None or options.set:
        raise RecipeError(f"evaluate {what}: --method and --set are a recipe's")
    if wanted:
        return benchmarks.evaluate(options)
    benchmarks.refuse_its_options(options, "they go with --benchmarks")
    if options.model is None:
        raise RecipeError(
            "evaluate --evoke: name the model with --model: a folder, a hub name, or its name at --endpoint"
        )
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
    folder = benchmarks.folder_of(options, "evoke")
    scores = evaluate_evoke(
        questions, options.evoke.resolve().parent, answerer, folder, limit=options.limit, progress=bar, say=print
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
            dtype=dtype_of(options.dtype),
            device=device_of(device),
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
