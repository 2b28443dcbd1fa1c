"""Every command on the pages is run: here in a small copy of what it names, or in the test that the table names."""

from __future__ import annotations

import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from kore_fast.cli import main
from kore_fast.recipe.stages import KINDS
from python_tests.augmentation.language.server import Server
from python_tests.docs.conftest import keep_scores
from python_tests.docs.pages import PAGES, ROOT, Found, commands, inline_commands

ELSEWHERE: dict[str, tuple[str, list[str]]] = {
    # Each target is what a person gives; .ci/run gives it too, the quickstart with less data.
    "make test": (".ci/run", ["make test"]),
    "make test-lmms-eval": (".ci/run", ["make test-lmms-eval"]),
    "make lint": (".ci/run", ["make lint"]),
    "make quickstart": (".ci/run", ["make quickstart-short"]),
    "make install": ("Makefile", ["test: $(STAMP)", "install: $(STAMP)"]),
    "make test-all": ("Makefile", ['pytest -m ""']),
    "make bench": ("Makefile", ["bench: $(STAMP)", "pytest benchmarks"]),
    "pytest benchmarks/bench_covariance.py": ("benchmarks/gpu_check.sh", ['benchmarks/bench_covariance.py "--rows=']),
    "python benchmarks/plot.py": ("python_tests/docs/test_plots.py", ['run_path(str(ROOT / "benchmarks" / "plot.py")']),
    "python -m pytest -m slow python_tests/constraint/test_memory.py": (
        "python_tests/constraint/test_memory.py",
        ["def test_llava_7b_within_twelve_gigabytes", "@pytest.mark.slow"],
    ),
    "make gpu-check": ("benchmarks/gpu_check.sh", ["pytest"]),
    "pip install": ("Makefile", ['pip install --quiet -e ".[dev]"', "pip install --quiet torch==$(TORCH)"]),
    "torchrun --nproc-per-node N -m kore_fast covariance": (
        "python_tests/recipe/test_processes.py",
        ["torch.distributed.run", 'launch(["covariance"'],
    ),
    "torchrun --nproc-per-node N -m kore_fast init": (
        "python_tests/recipe/test_processes.py",
        ["torch.distributed.run", 'launch(["init"'],
    ),
    "accelerate launch --config_file recipes/accelerate/ddp.yaml -m kore_fast train": (
        "python_tests/recipes/test_paper_recipes.py",
        ["launch_command_parser", '"-m", "kore_fast", "train"'],
    ),
    "python recipes/tiny_vlm/build.py": (".ci/run", ["build/tiny_vlm", "make quickstart-short"]),
    "python recipes/tiny_vlm/evaluate_grounding.py": (
        "python_tests/recipes/test_tiny_vlm.py",
        ['load("evaluate_grounding")'],
    ),
    "python recipes/quickstart/prepare_items.py": (
        "python_tests/recipes/test_quickstart_data.py",
        ['script("prepare_items"'],
    ),
    "python -m kore_fast.augmentation.measure_grounding": (
        "python_tests/augmentation/test_grounding.py",
        ["measure_grounding import", "main(["],
    ),
    "python -m pytest -m slow python_tests/augmentation/test_pipeline_scale.py": (
        "python_tests/augmentation/test_pipeline_scale.py",
        ["def test_10_000_items_from_the_cache", "@pytest.mark.slow"],
    ),
    "kore-fast run recipes/llava_v1_5_7b": (
        "python_tests/recipes/test_paper_recipes.py",
        ["def test_it_runs_in_small", 'main(small.command("run", path'],
    ),
    **{
        f"kore-fast run recipes/tiny_vlm_sequential{part}": (
            "python_tests/recipes/test_tiny_recipes.py",
            ["def test_the_sequence_runs_in_small", 'main(["run", str(path)'],
        )
        for part in ("", "/second.yaml", "/second_lora.yaml")
    },
    "python recipes/tiny_vlm_sequential/leak_by_source.py": (
        "python_tests/recipes/test_tiny_recipes.py",
        ["leak_by_source.py", 'script["main"]'],
    ),
    "kore-fast evaluate --benchmarks": ("python_tests/test_cli_benchmarks.py", ["--benchmarks"]),
    "kore-fast evaluate --vlmevalkit": ("python_tests/test_cli_benchmarks.py", ["--vlmevalkit"]),
}
"""Beginning of a command that takes hours, other machines or other programs → the file that runs it or what is behind
it, with words that stand in that file. ``N`` is any number; variables before a command do not count."""

LEAVES = {
    "augment": "augment/samples.json",
    "covariance": "covariance/text.safetensors",
    "init": "init/kore/adapter_model.safetensors",
    "train": "train/kore/adapter/adapter_model.safetensors",
    "evaluate": "evaluate/kore/scores.json",
    "report": "report/report.html",
    "run": "report/report.html",
}
"""What a stage leaves in the run's folder, as the pages say."""

FENCED = [command for page in PAGES for command in commands(page)]
# One whole command is run once, however often the pages give it.
OURS = sorted({found.text: found for found in FENCED if found.text.startswith("kore-fast ")}.items())


def elsewhere(text: str) -> str | None:
    """The entry of the table that a command falls under; a dry run needs nothing, so it is run here."""
    if "--dry-run" in text:
        return None
    plain = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", text)
    plain = re.sub(r"(--nproc-per-node) \d+", r"\1 N", plain)
    return max((start for start in ELSEWHERE if f"{plain} ".startswith(f"{start} ")), key=len, default=None)


def complete(found: Found) -> bool:
    """Whether a command in running text can be given as it is; others name a command, or a place for the reader's."""
    words = found.text.split()
    return words[0] != "kore-fast" or (len(words) > 2 and not any(word.isupper() for word in words))


@pytest.mark.parametrize("found", FENCED, ids=str)
def test_every_command_is_run_somewhere(found: Found) -> None:
    assert found.text.startswith("kore-fast ") or elsewhere(found.text), f"{found}: neither ours nor in ELSEWHERE"


@pytest.mark.parametrize("found", [f for page in PAGES for f in inline_commands(page) if complete(f)], ids=str)
def test_commands_in_the_text_are_run_too(found: Found) -> None:
    fenced = {text for text, _ in OURS}
    assert found.text in fenced or elsewhere(found.text), f"{found}: give it in a block, or name its test in ELSEWHERE"


@pytest.mark.parametrize("start", ELSEWHERE)
def test_what_runs_it_is_there(start: str) -> None:
    used = {elsewhere(found.text) for page in PAGES for found in [*commands(page), *inline_commands(page)]}
    assert start in used, "no page has it any more"
    file, words = ELSEWHERE[start]
    text = (ROOT / file).read_text(encoding="utf-8")
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize(("text", "found"), [pytest.param(t, f, id=t) for t, f in OURS if not elsewhere(t)])
def test_a_command(text: str, found: Found, place: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    _, command, *rest = words = shlex.split(text)
    if command == "run" and "--dry-run" in rest:
        # The real recipe: a dry run needs nothing else.
        monkeypatch.chdir(ROOT)
        assert main(words[1:]) == 0
        return
    recipe = next((Path(word).name for word in rest if word.startswith("recipes/")), None)
    run = place / "runs" / (recipe or "none")
    if command in KINDS:
        # What it would make is made anew; what it starts from is there.
        method = rest[rest.index("--method") + 1] if "--method" in rest else ""
        shutil.rmtree(run / command / method, ignore_errors=True)
    elif command == "run":
        # All that is before is as another run has left it, and is skipped.
        for stage in ("evaluate", "report"):
            shutil.rmtree(run / stage)
    elif command == "compare":
        # That its jobs run, and continue, is in python_tests/recipe/test_study.py, minutes long.
        keep_scores(place)
    outputs = [place / after for option, after in pairwise(rest) if option in ("--output", "--pad")]
    for output in outputs:
        shutil.rmtree(output, ignore_errors=True)
    arguments = [word.replace("http://localhost:8000/v1", server.url) for word in words[1:]]
    assert main(arguments) == 0, found
    if recipe and command in LEAVES:
        assert (run / LEAVES[command]).is_file()
    assert [output for output in outputs if not any(output.iterdir())] == []
    assert ("localhost:8000" in text) == bool(server.requests)
