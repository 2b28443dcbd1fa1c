"""The pictures of the benchmarks are those that their rows give."""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path

import pytest

from python_tests.docs.pages import ROOT

DEVICES = sorted(path for path in (ROOT / "benchmarks" / "results").iterdir() if path.is_dir())


@pytest.mark.parametrize("device", DEVICES, ids=lambda path: path.name)
def test_the_command_draws_what_is_committed(device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rows in device.glob("*.jsonl"):
        shutil.copyfile(rows, tmp_path / rows.name)
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "benchmarks" / "plot.py"), run_name="__main__")
    drawn = {path.name: path for path in tmp_path.glob("*.png")}
    assert set(drawn) == {path.name for path in device.glob("*.png")}
    # Another matplotlib letters otherwise; the size says which panels and cases there are.
    assert {name: _size(path) for name, path in drawn.items()} == {name: _size(device / name) for name in drawn}


def _size(picture: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(picture) as image:
        return image.size
