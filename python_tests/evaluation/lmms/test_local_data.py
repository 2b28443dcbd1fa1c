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


# The data sets' repositories on the hub, laid out in small, and other forms of them; + marks what is measured.
REPOSITORIES = {
    "mme": "data/test-00000-of-00004-a25531.parquet+ data/test-00003-of-00004-b.parquet+ README.md",
    "mmbench": "cc/test-00000-of-00001.parquet cn/dev-00000-of-00001.parquet cn/test-00000-of-00001.parquet "
    "en/dev-00000-of-00001.parquet+ en/test-00000-of-00001.parquet",
    "mmbench of the hub": "cn/dev/0000.parquet en/dev/0000.parquet+ en/test/0000.parquet",
    "seedbench2_plus": "data/test-00000-of-00001.parquet+",
    "ocrvqa": "data/test-00000-of-00002.parquet+ data/train-00000-of-00010.parquet data/validation-00000-of-2.parquet",
    "ocrvqa of VLMEvalKit": "OCRVQA_TEST.tsv OCRVQA_TESTCORE.tsv+",
    "scienceqa": "ScienceQA-FULL/test-00000-of-00001.parquet ScienceQA-FULL/train-00000-of-00001.parquet "
    "ScienceQA-IMG/test-00000-of-00001.parquet+ ScienceQA-IMG/validation-00000-of-00001.parquet",
    "mmmu": "data/dev-00000-of-00001.parquet data/test-00000-of-00006.parquet data/validation-00000-of-00001.parquet+",
    "mmmu of its authors": "Art/dev-00000-of-00001.parquet Art/validation-00000-of-00001.parquet+ "
    "Music/validation-00000-of-00001.parquet+ Music/test-00000-of-00001.parquet",
    "mia_bench": "data/test-00000-of-00001.parquet+",
    "mmdu": "benchmark.json+ mmdu-45k.json mmdu_pics.zip",
    "mathvista": "annot_testmini.json source.json images.zip data/testmini-00000-of-00001-725687bf7a18d64b.parquet+ "
    "data/test-00000-of-00002-6b81.parquet data/test-00001-of-00002-6a61.parquet",
    "mathvision": "data/test-00000-of-00001-3532.parquet+ data/testmini-00000-of-00001-f8ff.parquet images.zip",
    "pope": "Full/adversarial-00000-of-00001.parquet Full/popular-00000-of-00001.parquet "
    "Full/random-00000-of-00001.parquet data/test-00000-of-00002-x.parquet+ .cache/huggingface/test.parquet",
    "hallusionbench": "data/image-00000-of-00001.parquet+ data/non_image-00000-of-00001.parquet",
    "evoke": "evoke_injection_data.json evoke_evaluation_data.jsonl+ evaluation/red.png",
}


def laid_out(folder: Path, files: str) -> None:
    for name in files.split():
        (folder / name.rstrip("+")).parent.mkdir(parents=True, exist_ok=True)
        (folder / name.rstrip("+")).touch()


@pytest.mark.parametrize("case", REPOSITORIES)
def test_a_whole_repository_of_the_hub(case: str, tmp_path: Path) -> None:
    benchmark = BENCHMARKS[case.partition(" ")[0]]
    laid_out(tmp_path / benchmark.name, REPOSITORIES[case])
    found = [str(file.relative_to(tmp_path / benchmark.name)) for file in local_files(benchmark, tmp_path)]
    assert found == sorted(name[:-1] for name in REPOSITORIES[case].split() if name[-1] == "+")


def test_all_benchmarks_have_their_repository() -> None:
    assert {case.partition(" ")[0] for case in REPOSITORIES} == set(BENCHMARKS)


@pytest.mark.parametrize(
    ("name", "files", "problem"),
    [
        (
            "scienceqa",
            "train-00000-of-00001.parquet",
            "scienceqa: holds the split train, but ScienceQA is measured on test; put files named test-… or test.parq",
        ),
        ("pope", "train.jsonl val.jsonl rest.jsonl", "holds the split train, val, but POPE is measured on test"),
        ("mathvista", "test-00000-of-00001.parquet", "holds the split test, but MathVista is measured on testmini"),
        ("mmbench", "cn/dev-00000-of-00001.parquet", r"holds only cn; put the files of MMBench .*configuration en"),
        ("mmbench", "cn/dev.parquet cc/test.parquet", "holds only cc, cn; put the files of MMBench"),
        ("mmbench", "a/dev-0-of-1.parquet b/dev-0-of-1.parquet", r"split dev in several folders \(a, b\); leave one"),
        ("mmbench", "en/a/dev.parquet en/b/dev.parquet", r"several folders \(en/a, en/b\)"),
        ("mme", "new/test.jsonl old/test.jsonl", r"split test in several folders \(new, old\); leave one, that of MME"),
    ],
)
def test_another_split_or_configuration_is_not_measured(name: str, files: str, problem: str, tmp_path: Path) -> None:
    laid_out(tmp_path / name, files)
    with pytest.raises(DataError, match=problem):
        local_files(BENCHMARKS[name], tmp_path)


def test_names_that_name_no_split_are_all_taken(tmp_path: Path) -> None:
    laid_out(tmp_path / "mmbench", "en/rows.parquet+ cn/rows.parquet en/tested-on.parquet+")
    assert [file.name for file in local_files(BENCHMARKS["mmbench"], tmp_path)] == ["rows.parquet", "tested-on.parquet"]


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
