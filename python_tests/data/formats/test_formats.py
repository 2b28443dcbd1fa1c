from __future__ import annotations

import json
import random
import sys
import tracemalloc
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kore_fast.data.formats import FORMATS, convert, detect, format_of, read_any
from kore_fast.data.formats.records import join_parts, split_parts
from kore_fast.data.samples import Sample
from kore_fast.errors import DataError

NEEDS_PYARROW = pytest.mark.skipif(find_spec("pyarrow") is None, reason="parquet needs pyarrow")
NAMES = [pytest.param(name, marks=[NEEDS_PYARROW] if name == "parquet" else []) for name in FORMATS]
TEXT = [name for name in FORMATS if name != "parquet"]


def sample(identity: str, image: Any, *values: str, **more: Any) -> Sample:
    turns = [{"from": "human" if n % 2 == 0 else "gpt", "value": value} for n, value in enumerate(values)]
    return Sample.model_validate({"id": identity, "image": image, "conversations": turns} | more)


SAMPLES = [
    sample("a-vqa-0", "pictures/a b.png", "<image>\nWhat is it?", "An owl.", item="a", branch="vqa"),
    sample(
        "b-dialogue-0",
        "ü.png",
        "<image>\nWho?",
        "Ü – “quoted”.",
        "And\nthen?",
        "\tNo\u2028more.",
        item="b",
        branch="dialogue",
    ),
    sample("text", None, "Hello.", "Good day."),
    sample("two", ["ü.png", "pictures/a b.png"], "<image>\n<image>\nDo they differ?", "Yes."),
    sample("glued", ["ü.png", "ü.png"], "<image><image>Which?", "Both.", "So 1 < 2 > 0?", "Yes."),
    sample("after", "ü.png", "What is here?\n<image>", "An owl.", system="Answer briefly."),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for number, name in enumerate(("pictures/a b.png", "ü.png")):
        Image.new("RGB", (4 + number, 4), (200, 30, 30)).save(tmp_path / name)
    return tmp_path


def path_for(name: str, root: Path, stem: str = "out") -> Path:
    return root / f"{stem}{FORMATS[name].suffix}"


def write(name: str, root: Path, samples: Any = SAMPLES, **options: Any) -> Path:
    path = path_for(name, root)
    FORMATS[name].write(path, samples, root, **options)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_a_round_trip_gives_equal_samples_with_their_provenance(name: str, root: Path) -> None:
    path = write(name, root)
    assert detect(path) == name
    assert list(FORMATS[name].read(path, root)) == SAMPLES
    assert list(read_any(path, root)) == SAMPLES
    first = path.read_bytes()
    FORMATS[name].write(path, iter(SAMPLES), root)
    assert path.read_bytes() == first


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", NAMES)
def test_every_format_turns_into_every_other(source: str, target: str, root: Path) -> None:
    path = write(source, root)
    done = convert(path, path_for(target, root, "again"), target, image_root=root)
    assert (done.source_format, done.format, done.samples) == (source, target, len(SAMPLES))
    assert list(FORMATS[target].read(path_for(target, root, "again"), root)) == SAMPLES


@pytest.mark.parametrize("name", TEXT)
def test_absolute_paths_are_written_on_demand_and_come_back_relative(name: str, root: Path) -> None:
    path = write(name, root, absolute_images=True)
    assert str((root / "ü.png").resolve()) in path.read_text()
    assert list(FORMATS[name].read(path, root)) == SAMPLES
    (root / "elsewhere").mkdir()
    with pytest.raises(DataError, match=r"is outside the image folder .*; name the folder that holds it"):
        FORMATS[name].read(path, root / "elsewhere")
    with pytest.raises(DataError, match="absolute picture paths need the pictures' folder"):
        FORMATS[name].write(path, SAMPLES, absolute_images=True)


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_written_leaves_the_old_file(name: str, root: Path) -> None:
    path = write(name, root)
    before = path.read_bytes()
    bad = [
        SAMPLES[0],
        sample("mark", "ü.png", "What?", "An owl."),
        sample("missing", "no.png", "<image>\nWhat?", "An owl."),
        sample("outside", "../no.png", "<image>\nWhat?", ""),
        SAMPLES[0],
    ]
    with pytest.raises(DataError) as caught:
        FORMATS[name].write(path, iter(bad), root)
    said = str(caught.value)
    assert "5 problems in its samples" in said
    for part in (
        "sample 'mark': 1 image(s), but 0 <image> mark(s)",
        "sample 'missing': no image 'no.png' below",
        "sample 'outside': turn 2 is empty",
        "sample 'outside': image '../no.png' is not a usable path",
        "id 'a-vqa-0' comes at 0 and again at 4",
    ):
        assert part in said
    assert path.read_bytes() == before
    assert not list(root.glob(".*.partial"))


def save(root: Path, records: Any, *, lines: bool = False) -> Path:
    path = root / ("in.jsonl" if lines else "in.json")
    text = "".join(json.dumps(one) + "\n" for one in records) if lines else json.dumps(records, indent=1)
    path.write_text(text, encoding="utf-8")
    return path


USERS = [
    (
        "llama-factory",
        False,
        {
            "messages": [
                {"content": "<image>Who is he?", "role": "user"},
                {"content": "Nobody.", "role": "assistant"},
            ],
            "images": ["ü.png"],
        },
    ),
    (
        "llama-factory",
        False,
        {
            "conversations": [
                {"from": "system", "value": "Be short."},
                {"from": "human", "value": "<image>Who is he?"},
                {"from": "gpt", "value": "Nobody."},
            ],
            "images": ["ü.png"],
            "tools": "[]",
        },
    ),
    (
        "llava",
        False,
        {
            "id": 1,
            "image": "ü.png",
            "conversations": [
                {"from": "human", "value": "<image>Who is he?"},
                {"from": "gpt", "value": "Nobody."},
            ],
        },
    ),
    ("swift", True, {"query": "<image>Who is he?", "response": "Nobody.", "images": ["ü.png"], "history": []}),
    (
        "swift",
        True,
        {
            "system": "Be short.",
            "messages": [
                {"role": "user", "content": "<image>Who is he?"},
                {"role": "assistant", "content": "Nobody."},
            ],
            "images": "ü.png",
        },
    ),
    (
        "messages",
        True,
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "text": None, "index": 0},
                        {"type": "text", "text": ""},
                        {"type": "text", "text": "Who is he?"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "Nobody."}]},
            ],
            "images": [{"path": "ü.png", "bytes": None}],
        },
    ),
    (
        "messages",
        True,
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "ü.png"}, {"type": "text", "text": "Who?"}]},
                {"role": "assistant", "content": "Nobody."},
            ]
        },
    ),
]


@pytest.mark.parametrize(("name", "lines", "record"), USERS)
def test_users_own_files_are_told_apart_and_read(name: str, lines: bool, record: Any, root: Path) -> None:
    path = save(root, [record, record if "id" not in record else {**record, "id": 2}], lines=lines)
    assert detect(path) == name
    first, second = read_any(path, root)
    assert first.images == ("ü.png",)
    assert first.conversations[0].value.replace("\n", "").startswith("<image>Who")
    assert first.conversations[1].value == "Nobody."
    assert first.id != second.id
    assert (first.system == "Be short.") == ("Be short." in json.dumps(record))


def test_a_dataset_info_says_under_which_keys(root: Path) -> None:
    turns = [{"who": "person", "says": "<image>What?"}, {"who": "machine", "says": "An owl."}]
    path = save(root, [{"talk": turns, "pics": ["ü.png"]}])
    with pytest.raises(DataError, match="which is no format that is read"):
        detect(path)
    info = {
        "mine": {
            "file_name": "in.json",
            "formatting": "sharegpt",
            "columns": {"messages": "talk", "images": "pics"},
            "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "person", "assistant_tag": "machine"},
        }
    }
    (root / "dataset_info.json").write_text(json.dumps(info))
    (only,) = FORMATS["llama-factory"].read(path, root)
    assert (only.images, only.conversations[1].value) == (("ü.png",), "An owl.")
    write("llama-factory", root)
    assert set(json.loads((root / "dataset_info.json").read_text())) == {"mine", "out"}
    info["mine"]["formatting"] = "alpaca"
    (root / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match="describes it as 'alpaca'"):
        FORMATS["llama-factory"].read(path, root)
    (root / "dataset_info.json").write_text("[]")
    with pytest.raises(DataError, match="expected an object of datasets, found list"):
        write("llama-factory", root)


def test_llama_factorys_entry_names_the_columns_and_tags_of_the_rows(root: Path) -> None:
    path = write("llama-factory", root)
    entry = json.loads((root / "dataset_info.json").read_text())["out"]
    rows = json.loads(path.read_text())
    assert entry["file_name"] == path.name
    tags = entry["tags"]
    for row in rows:
        messages = row[entry["columns"]["messages"]]
        if messages[0][tags["role_tag"]] == tags["system_tag"]:
            messages = messages[1:]
        roles = [message[tags["role_tag"]] for message in messages]
        assert roles == [tags["user_tag"], tags["assistant_tag"]] * (len(roles) // 2)
        marks = sum(message[tags["content_tag"]].count("<image>") for message in messages)
        assert marks == len(row[entry["columns"]["images"]])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [{"role": "tool", "content": "x"}]}, "turn 1 has the role 'tool'; known roles: assistant, bot"),
        ({"messages": ["x"]}, "turn 1 is str, expected an object"),
        ({"messages": [{"role": "user", "content": 4}]}, "turn 1 has no text or list of parts under 'content'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            "turn 1 has a part of type 'video'; known are 'image' and 'text'",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]},
            "turn 2 is a system turn; it may only come first",
        ),
        (
            {"messages": [{"role": "system", "content": "x"}], "system": "y"},
            "there is a system turn and another text under 'system'",
        ),
        ({"messages": [], "images": [{"bytes": "x"}]}, "expected its path below the image folder"),
        ({"messages": [], "images": ["a"], "image": "b"}, "'images' and 'image' differ; keep one"),
        ({"messages": []}, "there are no turns"),
        ({"text": "x"}, "no list of turns under 'messages' or 'conversations' or 'conversation'; its keys are 'text'"),
        ("x", "expected a JSON object, found str"),
        ({"messages": [{"role": "user", "content": "x"}], "id": 1.5}, "'id': input should be a valid string"),
    ],
)
def test_what_is_wrong_with_a_record_is_named_with_its_line(record: Any, message: str, root: Path) -> None:
    good = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    path = save(root, [good, record], lines=True)
    with pytest.raises(DataError) as caught:
        FORMATS["swift"].read(path, root)
    assert "in.jsonl: " in str(caught.value)
    assert "line 2" in str(caught.value)
    assert message in str(caught.value)


def test_files_that_hold_no_samples(root: Path) -> None:
    for text, message in (("", "there is no sample in it"), ("[]", "there is no sample"), ("{", "line 1: not valid")):
        (root / "in.json").write_text(text)
        with pytest.raises(DataError, match=message):
            detect(root / "in.json")
    with pytest.raises(DataError, match="cannot be opened"):
        detect(root / "no.json")
    (root / "in.json").write_text('[{"a": 1}]')
    with pytest.raises(DataError, match=r"sample 0: the keys 'a', which is no format that is read"):
        detect(root / "in.json")
    with pytest.raises(DataError, match="no format 'csv'; known are llava, llama-factory"):
        format_of("csv")
    path = write("swift", root)
    with pytest.raises(DataError, match="is the source itself"):
        convert(path, path, "llava")


def test_without_pyarrow_parquet_says_what_to_install(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (root / "x.parquet").write_bytes(b"PAR1")
    for use in (
        lambda: FORMATS["parquet"].write(root / "y.parquet", SAMPLES, root),
        lambda: read_any(root / "x.parquet"),
    ):
        with pytest.raises(DataError, match=r"pip install \"kore-fast\[parquet\]\""):
            use()


def test_parts_give_back_the_text_whatever_stands_around_the_marks() -> None:
    rng = random.Random(0)
    pieces = ["<image>", "<image>", "\n", " ", "\n\n", "What", "is it?", "\t", "<", "image>"]
    for _ in range(5000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 9)))
        problems: list[str] = []
        parts = split_parts(text)
        assert join_parts(parts, "turn 1", [], problems) == text, parts
        assert sum(part["type"] == "image" for part in parts) == text.count("<image>")
        assert not problems
    assert split_parts("<image>\nWhat?") == [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert split_parts("What?\n<image>") == [{"type": "text", "text": "What?"}, {"type": "image"}]


def many(count: int, image: str | None = None) -> Iterator[Sample]:
    for number in range(count):
        mark = "" if image is None else "<image>\n"
        yield sample(
            f"s{number}", image, f"{mark}Question {number}?", f"Answer {number}. " * 60, item="i", branch="vqa"
        )


@pytest.mark.parametrize("name", NAMES)
def test_memory_does_not_grow_with_the_number_of_samples(name: str, root: Path) -> None:
    path = path_for(name, root)
    count = 3000
    tracemalloc.start()
    try:
        FORMATS[name].write(path, many(count, "ü.png"), root)
        assert sum(1 for _ in FORMATS[name].read(path, root)) == count
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # 3,000 samples are 3 MB of text and far more as objects; what stays is their ids and one group of rows.
    assert path.stat().st_size > 2_500_000 or name == "parquet"
    assert peak < 2_500_000
