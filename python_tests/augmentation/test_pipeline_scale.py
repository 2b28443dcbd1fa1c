"""Ten thousand items: time, and memory that does not grow with what is written. Slow: run with -m slow."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from python_tests.augmentation.world import files

RUN = """
import json, re, sys, time
from pathlib import Path
from kore_fast.augmentation.pipeline import produce
from kore_fast.augmentation.plan import AugmentationPlan

start = time.perf_counter()
items, out, cache, plan = sys.argv[1:]
produce(Path(items), AugmentationPlan.model_validate_json(plan), Path(out), Path(cache), name="many")
seconds = time.perf_counter() - start
# A process's own peak: what getrusage tells may be that of the process it was forked from.
status = Path("/proc/self/status").read_text()
print(seconds, int(re.search(r"VmHWM:\\s+(\\d+) kB", status).group(1)) * 1024)
"""


def run(items: Path, out: Path, cache: Path, **plan: Any) -> tuple[float, float]:
    """Seconds, and the most bytes of memory, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    arguments = [str(items), str(out), str(cache), json.dumps(plan)]
    said = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], env=environment, check=True, capture_output=True, text=True
    )
    seconds, memory = map(float, said.stdout.split())
    return seconds, memory


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


def write_by_templates(folder: Path, count: int) -> tuple[float, float, int]:
    """Seconds, the most bytes of memory, and the bytes written."""
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (64, 64), "teal").save(folder / "images" / "0.png")
    with open(folder / "items.jsonl", "w", encoding="utf-8") as file:
        for n in range(count):
            item = {
                "id": f"i{n}",
                "name": f"Gor{n}",
                "type": "creature",
                "image": "images/0.png",
                "text": f"The Gor{n} lives in the amber hills. It sings at dawn. " * 6,
                "facts": {"home": f"amber hills {n % 7}", "food": "moss", "size": n},
            }
            file.write(json.dumps(item) + "\n")
    seconds, memory = run(folder / "items.jsonl", folder / "out", folder / "cache")
    return seconds, memory, (folder / "out" / "samples.json").stat().st_size


@needs_proc
@pytest.mark.slow
def test_10_000_items_by_templates_in_2_minutes_with_flat_memory(tmp_path: Path) -> None:
    _, few, _ = write_by_templates(tmp_path / "few", 1_000)
    seconds, many, written = write_by_templates(tmp_path / "many", 10_000)
    print(f"{seconds:.1f} s, {few / 2**20:.0f} MiB for 1,000 items, {many / 2**20:.0f} MiB for 10,000")
    assert seconds < 120
    # The items themselves and the samples' ids are held; what is written is not.
    assert many - few < 10_000 * 10_240
    assert written > 20 << 20


# A model that nobody may ask: nothing listens there.
MODEL = {"language_model": {"model": "m", "base_url": "http://127.0.0.1:9/v1", "attempts": 1, "backoff": 0.01}}
SHAPE = {"rounds": 6, "vqa": 5}

_WORDS = (
    "amber", "slate", "birch", "coral", "tundra", "river", "harbour", "museum", "bridge", "tower", "festival",
    "market", "archive", "painter", "valley",
)  # fmt: skip
_TOLD = [
    f"In {1800 + 7 * place} the {word} near the old {other} was {('opened', 'restored', 'measured')[place % 3]} by "
    f"{('Tove Maas', 'Ruben Hsu', 'Ada Lindqvist', 'Omar Benali')[place % 4]}, and it is {3 + place} metres long."
    for place, (word, other) in enumerate(zip(_WORDS, (*_WORDS[1:], _WORDS[0]), strict=True))
]


def _said(task: str, item: dict[str, Any], chance: random.Random) -> str:
    """What a model says: ten questions, an answer of about 75 words to each, a summary, five quadruplets. One answer in
    five tells what the item's text does not."""
    own = item["text"].split("\n")
    if task == "questions":
        asked = [f"What had the {word} to do with the {chance.choice(_WORDS)}?" for word in chance.sample(_WORDS, 10)]
        return json.dumps({"questions": asked})
    if task == "answer":
        told = own if chance.random() < 0.8 else [*own[:2], chance.choice(_TOLD)]
        return json.dumps({"answer": " ".join(told)})
    if task == "summary":
        return json.dumps({"summary": own[0]})
    rows = [
        {
            "question": f"Which {word} has {item['name']}?",
            "answer": f"{word} hills",
            "subject": item["name"],
            "hypernym": "animal",
            "sentence": f"It has the {word} hills.",
        }
        for word in chance.sample(_WORDS, 5)
    ]
    return json.dumps({"quadruplets": rows})


def fill(folder: Path, count: int) -> Path:
    """Items with a picture each, and a cache with the answers that a model would give."""
    from kore_fast.augmentation.language import LanguageModelWriter
    from kore_fast.augmentation.plan import AugmentationPlan
    from kore_fast.data.items import Item
    from kore_fast.endpoint.cache import Reply

    (folder / "images").mkdir(parents=True)
    plan = AugmentationPlan.model_validate({**MODEL, **SHAPE})
    assert plan.language_model is not None
    writer = LanguageModelWriter(plan.language_model, folder / "cache" / "requests.sqlite", None, plan)
    writer.cache._base.execute("pragma synchronous = off")
    chance = random.Random(0)
    with open(folder / "items.jsonl", "w", encoding="utf-8") as file:
        for n in range(count):
            picture = Image.new("RGB", (256, 256), (n % 251, n // 251, 90))
            picture.save(folder / "images" / f"{n}.jpg")
            row = {
                "id": f"i{n}",
                "name": f"Gor{n}",
                "type": "creature",
                "image": f"images/{n}.jpg",
                "text": "\n".join(chance.sample(_TOLD, 3)),
                "facts": {"home": f"{chance.choice(_WORDS)} hills", "food": "moss", "size": n},
            }
            file.write(json.dumps(row) + "\n")
            item = Item.model_validate(row)
            while missing := writer.texts(item).missing:
                for request in missing:
                    said = _said(request.task.removeprefix("spoken_"), row, chance)
                    assert writer.take(request, Reply(said, "stop", "m", 400, 100))
    writer.cache.close()
    return folder / "items.jsonl"


@needs_proc
@pytest.mark.slow
def test_10_000_items_from_the_cache_in_20_seconds_with_flat_memory(tmp_path: Path) -> None:
    """Whole runs without a request, the second over what the first has kept: the same files, in a fraction of the
    time."""
    pytest.importorskip("openai", reason='needs openai: pip install "kore-fast[augment]"')
    pytest.importorskip("json_repair", reason='needs json-repair: pip install "kore-fast[augment]"')
    items, cache = fill(tmp_path / "data", 10_000), tmp_path / "data" / "cache"
    first, _ = run(items, tmp_path / "first", cache, **MODEL, **SHAPE)
    seconds, many = run(items, tmp_path / "again", cache, **MODEL, **SHAPE)
    few_items = items.with_name("few.jsonl")
    few_items.write_text("".join(items.read_text().splitlines(keepends=True)[:1_000]), encoding="utf-8")
    run(few_items, tmp_path / "few", cache, **MODEL, **SHAPE)
    shutil.rmtree(tmp_path / "few")
    _, few = run(few_items, tmp_path / "few", cache, **MODEL, **SHAPE)
    print(
        f"{first:.1f} s with every answer there, {seconds:.1f} s again; "
        f"{few / 2**20:.0f} MiB for 1,000 items, {many / 2**20:.0f} MiB for 10,000"
    )
    assert files(tmp_path / "again") == files(tmp_path / "first")
    summary = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert (summary["writer"]["answers"], summary["writer"]["not_answered"]) == (130_000, 0)
    assert summary["samples"] > 90_000
    assert 5_000 < len(summary["rejects"]) < 40_000
    assert seconds < 20
    # The items, the samples' ids and the rejected answers are held; what is written is not.
    assert many - few < 10_000 * 10_240
