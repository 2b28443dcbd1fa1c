"""The pages hang together: links lead somewhere, what is named exists, and what exists is named."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from kore_fast.cli import main
from kore_fast.recipe.loading import load_recipe
from python_tests.docs.pages import PAGES, ROOT, commands, inline_commands, languages, links

RECIPES = sorted(path for path in (ROOT / "recipes").iterdir() if path.is_dir())
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
LANGUAGES = {"", "python", "yaml", "json", "bibtex"}
"""Of fenced blocks; the first four are run or read by the tests beside this one."""


def command_names() -> list[str]:
    from kore_fast.cli import _parser

    (choices,) = (action.choices for action in _parser()._actions if action.choices)
    return sorted(choices)


@EACH_PAGE
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, f"{page.name}: {link}"


@EACH_PAGE
def test_what_commands_name_exists(page: Path) -> None:
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for found in [*inline_commands(page), *commands(page)]:
        program, *words = found.text.split()
        if program == "kore-fast" and words[0] not in ("COMMAND", "--version"):
            assert words[0] in command_names(), found
        if program == "make" and re.fullmatch(r"[a-z-]+", words[0]):
            assert re.search(rf"^{words[0]}:", makefile, re.MULTILINE), found
        if program == "pip":
            for group in re.findall(r"\[([\w,-]+)\]", found.text):
                for extra in group.split(","):
                    assert re.search(rf"^{extra} = \[", extras, re.MULTILINE), found
        for path in re.findall(r"(?:recipes|python_tests|benchmarks|docs)/[\w./-]*\w", found.text):
            assert (ROOT / path).exists(), found


def test_every_command_and_every_recipe_is_named() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    assert [name for name in command_names() if f"kore-fast {name}" not in text] == []
    assert [path.name for path in RECIPES if not re.search(rf"\b{path.name}\b", text)] == []


def test_every_page_of_the_documentation_is_linked() -> None:
    index = ROOT / "docs" / "README.md"
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {index.name} == {
        link for link in links(index) if re.fullmatch(r"\w+\.md", link)
    }
    assert "docs/README.md" in links(ROOT / "README.md")


@EACH_PAGE
def test_no_block_is_left_out_of_the_tests(page: Path) -> None:
    assert languages(page) <= LANGUAGES


@pytest.mark.parametrize("name", command_names())
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: kore-fast {name}")


def named_recipes() -> set[str]:
    """What follows the recipes' commands on the pages."""
    text = " ".join(found.text for page in PAGES for found in [*commands(page), *inline_commands(page)])
    return set(re.findall(r"kore[-_]fast \w+ (recipes/[\w./-]+)", text))


@pytest.mark.parametrize("name", sorted(named_recipes()))
def test_recipes_that_commands_name_are_recipes(name: str) -> None:
    load_recipe(ROOT / name)


def test_the_front_page_s_quickstart_is_the_committed_run() -> None:
    """The table's cells, value and interval, as `results.csv` has them."""
    metrics = {
        "new facts in wordings not trained on": "adaptation_cem",
        "capitals of the world": "capitals",
        "picture naming, four choices": "picture_naming",
        "held-out Wikipedia loss": "wikipedia_loss",
        "drift on text": "kl_text",
        "drift in chat": "kl_chat",
        "drift on pictures": "kl_picture",
    }
    with (ROOT / "recipes" / "quickstart" / "results" / "results.csv").open(newline="") as file:
        found = {(row["method"], row["metric"]): row for row in csv.DictReader(file)}
    seen = set()
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        metric = next((metric for label, metric in metrics.items() if line.startswith(f"| {label}")), None)
        if metric is None:
            continue
        seen.add(metric)
        for method, cell in zip(("base", "lora", "kore"), line.split("|")[2:5], strict=True):
            row = found[method, metric]
            wanted = [float(row[key]) * (100 if "%" in cell else 1) for key in ("value", "low", "high")]
            shown = re.findall(r"\d+(?:\.\d+)?", cell)
            for text, value in zip(shown, wanted, strict=False):
                assert text == f"{value:.{len(text.partition('.')[2])}f}", line
    assert seen == set(metrics.values())
