"""Files of a benchmark on this machine: which are taken, and their rows as the tasks want them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kore_fast.errors import DataError
from kore_fast.evaluation.lmms import BENCHMARKS
from kore_fast.evaluation.lmms.local_data import _rows, as_parquet, local_files


def rows_of(name: str, data: Path) -> list[dict[str, Any]]:
    (file,) = local_files(BENCHMARKS[name], data)
    return [row for _, row in _rows(BENCHMARKS[name], file)]


def test_files_of_the_split(tmp_path: Path) -> None:
    folder = tmp_path / "pope"
    assert local_files(BENCHMARKS["pope"], tmp_path) == []
    for name in (
        "data/test-00001-of-00002.parquet",
        "data/test-00000-of-00002.parquet",
        "data/train.parquet",
        ".x.tsv",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    found = [file.name for file in local_files(BENCHMARKS["pope"], tmp_path)]
    assert found == ["test-00000-of-00002.parquet", "test-00001-of-00002.parquet"]
    (folder / "more.jsonl").touch()
    with pytest.raises(DataError, match=r"pope: holds files of several kinds \(\.jsonl, \.parquet\)"):
        local_files(BENCHMARKS["pope"], tmp_path)
    (tmp_path / "mme").mkdir()
    with pytest.raises(DataError, match="mme: holds no data file"):
        local_files(BENCHMARKS["mme"], tmp_path)


def test_ocrvqa_of_vlmevalkit(benchmark_data: Path) -> None:
    rows = rows_of("ocrvqa", benchmark_data)
    assert rows[0]["question"] == "Who wrote the red book?"
    # The second row shows the first one's cover.
    assert rows[1]["image"] == rows[0]["image"] != rows[2]["image"]


def test_ocrvqa_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "ocrvqa").mkdir()
    row = {"image": "c.png", "image_id": "17", "questions": ["Who?", "When?"], "answers": ["Ann", "1990"], "title": "T"}
    (tmp_path / "ocrvqa/test.jsonl").write_text(json.dumps(row) + "\n")
    assert rows_of("ocrvqa", tmp_path) == [
        {"index": "17-0", "image": "c.png", "question": "Who?", "answer": "Ann"},
        {"index": "17-1", "image": "c.png", "question": "When?", "answer": "1990"},
    ]


def test_mmdu_in_both_forms(benchmark_data: Path, tmp_path: Path) -> None:
    first, second = rows_of("mmdu", benchmark_data)
    assert (len(first["images"]), len(first["questions"]), len(second["images"])) == (3, 3, 1)
    (tmp_path / "mmdu").mkdir()
    turns = [
        {"from": "user", "value": "What are <ImageHere> and <ImageHere>?"},
        {"from": "assistant", "value": "Two squares."},
    ]
    row = {"id": "7", "image": ["a.png", "b.png"], "conversations": turns}
    (tmp_path / "mmdu/benchmark.json").write_text(json.dumps([row]))
    assert rows_of("mmdu", tmp_path) == [
        {
            "index": "7",
            "images": ["a.png", "b.png"],
            "questions": ["What are <ImageHere> and <ImageHere>?"],
            "answers": ["Two squares."],
        }
    ]
    (tmp_path / "mmdu/benchmark.json").write_text(json.dumps([{**row, "image": ["a.png"]}]))
    with pytest.raises(DataError, match=r"sample 0: not a row of MMDU \(ValueError: 2 <ImageHere> .* 1 pictures"):
        rows_of("mmdu", tmp_path)


def test_a_row_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "evoke").mkdir()
    (tmp_path / "evoke/x.jsonl").write_text('{"question_id": "1"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl, line 1: not a row of EVOKE .* expected evoke_eval"):
        rows_of("evoke", tmp_path)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_as_parquet_with_its_pictures(name: str, benchmark_data: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason='needs pip install "kore-fast[lmms-eval]"')
    benchmark = BENCHMARKS[name]
    written = as_parquet(benchmark, local_files(benchmark, benchmark_data), tmp_path / "one")
    loaded = datasets.load_dataset(
        "parquet", data_files={"test": [str(file) for file in written]}, cache_dir=str(tmp_path / "cache")
    )["test"]
    assert len(loaded) == len(rows_of(name, benchmark_data))
    column = benchmark.images[0]
    shown = loaded[0][column.rstrip("*")]
    assert (shown[0] if column.endswith("*") else shown).convert("RGB").getpixel((3, 3)) == (255, 0, 0)
    if not benchmark.own:  # parquet with its features is taken as it is
        assert as_parquet(benchmark, written, tmp_path / "two") == written


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        ("gone.png", "the picture 'gone.png' is not below"),
        ("../pope.png", "leaves its folder"),
        ("broken.png", "line 1: not a whole picture"),
        ("?", "neither a path"),
        (7, "a picture is int"),
    ],
)
def test_pictures_that_are_none(image: Any, problem: str, tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason='needs pip install "kore-fast[lmms-eval]"')
    (tmp_path / "pope").mkdir()
    (tmp_path / "pope/broken.png").write_bytes(b"\x89PNG no")
    (tmp_path / "pope/test.jsonl").write_text(json.dumps({"question": "Is it?", "image": image}) + "\n")
    files = local_files(BENCHMARKS["pope"], tmp_path)
    with pytest.raises(DataError, match=problem):
        as_parquet(BENCHMARKS["pope"], files, tmp_path / "out")
