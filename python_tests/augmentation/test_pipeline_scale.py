"""Ten thousand items: time, and memory that does not grow with what is written. Slow: run with -m slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

RUN = """
import resource, sys, time
from pathlib import Path
from kore_fast.augmentation.pipeline import produce
from kore_fast.augmentation.plan import AugmentationPlan

start = time.perf_counter()
folder = Path(sys.argv[1])
produce(folder / "items.jsonl", AugmentationPlan(), folder / "out", folder / "cache")
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def write_by_templates(folder: Path, count: int) -> tuple[float, float, int]:
    """Seconds, the most bytes of memory, and the bytes written, in a process of its own."""
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
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    said = subprocess.run(
        [sys.executable, "-c", RUN, str(folder)], env=environment, check=True, capture_output=True, text=True
    )
    seconds, memory = map(float, said.stdout.split())
    return seconds, memory, (folder / "out" / "samples.json").stat().st_size


@pytest.mark.slow
def test_10_000_items_by_templates_in_2_minutes_with_flat_memory(tmp_path: Path) -> None:
    _, few, _ = write_by_templates(tmp_path / "few", 1_000)
    seconds, many, written = write_by_templates(tmp_path / "many", 10_000)
    print(f"{seconds:.1f} s, {few / 2**20:.0f} MiB for 1,000 items, {many / 2**20:.0f} MiB for 10,000")
    assert seconds < 120
    # The items themselves and the samples' ids are held; what is written is not.
    assert many - few < 10_000 * 10_240
    assert written > 20 << 20
