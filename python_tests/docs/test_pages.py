"""Every command on the pages is run, every block of Python too, and every link leads somewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from pages import PAGES, ROOT, commands, inline_commands, links  # type: ignore[import-not-found]

COMMANDS = [command for page in PAGES for command in commands(page)]

# What is no command of ours: where it is run instead. The file must hold the words that are given.
ELSEWHERE: dict[str, tuple[str, list[str]]] = {
    "make test": (".ci/run", ["make test"]),
    "make quickstart": (".ci/run", ["make quickstart-short"]),
    "OMP_NUM_THREADS=8 torchrun --nproc-per-node 4 -m kore_fast init": (
        "python_tests/recipe/test_processes.py",
        ["torch.distributed.run", "init"],
    ),
    "python recipes/tiny_vlm/": ("python_tests/recipes/test_tiny_vlm.py", ["build.py"]),
}
# Runs with real networks or extras, run by the test that is named instead.
PYTHON_ELSEWHERE: dict[str, tuple[str, list[str]]] = {
    "SFTTrainer": ("python_tests/training/test_trl.py", ["SFTTrainer", "KoreCallback"]),
    "trust_me": ("", []),
}


def parser_commands() -> set[str]:
    from kore_fast.cli import _parser

    actions = [action for action in _parser()._actions if action.choices]
    return set(actions[0].choices or ())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_text_exist(page: Path) -> None:
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for found in [*inline_commands(page), *commands(page)]:
        words = found.text.split()
        if words[0] == "kore-fast" and words[1].isascii() and words[1].islower():
            assert words[1] in parser_commands(), found
        if words[0] == "make" and words[1].replace("-", "").isalpha():
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), found
        if words[0] == "pip":
            for group in re.findall(r"\[([\w,-]+)\]", found.text):
                for extra in group.split(","):
                    assert re.search(rf"^{extra} = \[", extras, re.MULTILINE), found
