"""The pages of the documentation, and the commands, blocks and links on them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "results" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "recipes").rglob("README.md")),
]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What begins like a command where it stands between backquotes in a sentence or a table.
_PROGRAMS = "kore-fast|make|pip|pytest|python|torchrun|accelerate"
_INLINE = re.compile(rf"(?<!`)`((?:{_PROGRAMS}) [^`\n]+)`(?!`)")
_QUOTED = re.compile(r"(?<!`)`([a-z_]+: [^`\n]+)`(?!`)")


@dataclass(frozen=True)
class Found:
    """A command or a block, and where it stands."""

    page: Path
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.text.splitlines()[0]}"


def blocks(page: Path, language: str) -> list[Found]:
    """The page's fenced blocks of a language; those of commands have none."""
    text = page.read_text(encoding="utf-8")
    return [Found(page, body) for kind, body in _FENCE.findall(text) if kind == language]


def languages(page: Path) -> set[str]:
    """The languages that its fenced blocks name."""
    return {kind for kind, _ in _FENCE.findall(page.read_text(encoding="utf-8"))}


def commands(page: Path) -> list[Found]:
    """Every command of the page's fenced blocks, without its comment; a line that ends in \\ goes on."""
    lines = [line for block in blocks(page, "") for line in block.text.replace("\\\n", " ").splitlines()]
    stripped = (re.sub(r"\s+#.*", "", line).strip() for line in lines)
    return [Found(page, line) for line in stripped if line and not line.startswith("#")]


def inline_commands(page: Path) -> list[Found]:
    """Commands between backquotes in the running text."""
    return [Found(page, command) for command in _INLINE.findall(_prose(page))]


def inline_keys(page: Path) -> list[Found]:
    """What looks like a recipe's keys and values between backquotes in the running text."""
    return [Found(page, text) for text in _QUOTED.findall(_prose(page))]


def links(page: Path) -> list[str]:
    """Targets of the page's links and pictures that are files."""
    found = re.findall(r"\]\(([^)\s]+)\)", _prose(page))
    return [link for link in found if not link.startswith(("http:", "https:", "mailto:"))]


def _prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))
