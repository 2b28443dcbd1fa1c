"""Items with their pictures, a folder to search in, and a model's answers, for tests of the whole pipeline."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from kore_fast.cli import main
from python_tests.augmentation.images.conftest import draw
from python_tests.augmentation.language.server import Server, asked_question, item_name, task_of

HOMES = ("amber", "slate", "birch", "coral", "tundra")
BRANCHES = ("dialogue", "recognition", "caption", "vqa")
FOUND = "found_pictures/"


def make_items(folder: Path, count: int, *, search: Path | None = None) -> Path:
    """``items.jsonl`` with a picture each; into ``search``, three further pictures of each."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for n in range(count):
        draw(n).save(folder / "images" / f"{n}.png")
        home = HOMES[n % len(HOMES)]
        rows.append(
            {
                "id": f"i{n}",
                "name": f"Gor{n}",
                "type": "creature",
                "image": f"images/{n}.png",
                "text": f"The Gor{n} lives in the {home} hills. It sings at dawn. It was first seen in 1907.",
                "facts": {"home": f"{home} hills", "food": ("moss", "fern")[n % 2]},
                "source": "invented",
                "licence": "CC0-1.0",
            }
        )
        if search is not None:
            search.mkdir(parents=True, exist_ok=True)
            for k in range(3):
                draw(100_000 + 3 * n + k).save(search / f"Gor{n} animal {k}.png")
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answer(body: dict[str, Any]) -> str:
    """What a model says that now and then invents a year: the third question's answer is not in the text."""
    name, task = item_name(body), task_of(body)
    home = re.search(r"lives in the (\w+) hills", body["messages"][1]["content"])
    place = home.group(1) if home else "far"
    if task == "questions":
        asked = ("Where does {} live?", "When does {} sing?", "When was {} first caught?", "When was {} first seen?")
        return json.dumps({"questions": [question.format(name) for question in asked]})
    if task == "answer":
        question = asked_question(body)
        said = {
            "Where": f"{name} lives in the {place} hills.",
            "When does": f"{name} sings at dawn.",
            "caught": f"{name} was first caught in 1999.",
            "seen": f"{name} was first seen in 1907.",
        }
        return json.dumps({"answer": next(text for key, text in said.items() if key in question)})
    if task == "summary":
        return json.dumps({"summary": f"A creature of the {place} hills that sings at dawn."})
    rows = [
        ("Where does {} live?", f"{place} hills", f"It lives in the {place} hills."),
        ("When does {} sing?", "dawn", "It sings at dawn."),
    ]
    return json.dumps(
        {
            "quadruplets": [
                {"question": q.format(name), "answer": a, "subject": name, "hypernym": "animal", "sentence": s}
                for q, a, s in rows
            ]
        }
    )


def model(server: Server, **changes: Any) -> dict[str, Any]:
    """The section ``language_model`` for a server on loopback."""
    return {"model": "m", "base_url": server.url, "backoff": 0.01, "timeout": 5.0, "concurrency": 8, **changes}


def run_augment(items: Path, run: Path, *more: str, **plan: Any) -> int:
    """``kore-fast augment`` with each section of the plan as a ``--set``."""
    sets = [part for key, value in plan.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    return main(["augment", "--items", str(items), "--run", str(run), *more, *sets])


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rejects(run: Path) -> list[dict[str, str]]:
    """The rows of ``rejects.jsonl``."""
    lines = (run / "augment" / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def samples(run: Path) -> list[dict[str, Any]]:
    """The samples that a run wrote."""
    found: list[dict[str, Any]] = json.loads((run / "augment" / "samples.json").read_text(encoding="utf-8"))
    return found
