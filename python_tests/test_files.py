"""Files: whole or not at all, and errors that name them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from kore_fast import files
from kore_fast.errors import DataError
from kore_fast.files import (
    atomic_path,
    inside,
    iterate_json,
    new_folder,
    quick_digest,
    read_json,
    read_jsonl,
    sha256_file,
    whole_text,
    write_json,
    write_jsonl,
    write_text,
)


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["os.replace", "os.fsync", "pathlib.Path.write_text"])
def test_full_disk_names_the_file_and_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    monkeypatch.setattr(place, full)
    with pytest.raises(DataError, match=r"a\.txt: could not be written \(No space left on device\)"):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_failure_while_writing_keeps_the_old(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_values_that_json_has_not_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", float("nan"))
    with pytest.raises(ValueError):
        write_jsonl(tmp_path / "a.jsonl", [1.0, float("inf")])
    assert not list(tmp_path.iterdir())


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match="taken"):
        write_text(tmp_path / "taken" / "a.txt", "x")


def test_written_and_read(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": "ä→\u2028"}
    write_json(tmp_path / "new" / "a.json", value)
    assert read_json(tmp_path / "new" / "a.json") == value
    assert (tmp_path / "new" / "a.json").read_text().startswith('{\n  "b"')
    write_jsonl(tmp_path / "a.jsonl", [value, 3])
    assert read_jsonl(tmp_path / "a.jsonl") == [(1, value), (2, 3)]


def test_broken_files_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a":\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: not valid JSON"):
        read_jsonl(path)
    with pytest.raises(DataError, match=r"a\.jsonl: not valid JSON"):
        read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        read_jsonl(path)
    with pytest.raises(DataError, match="not valid JSON"):
        read_json(path)
    for read in (read_json, read_jsonl):
        with pytest.raises(DataError, match="gone: no such file"):
            read(tmp_path / "gone")
        with pytest.raises(DataError, match="is a folder; name a file in it"):
            read(tmp_path)


def test_hash_of_a_file_larger_than_a_block(tmp_path: Path) -> None:
    content = os.urandom((1 << 20) + 17)
    (tmp_path / "a").write_bytes(content)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_weights_that_differ_in_the_middle_have_another_digest(tmp_path: Path) -> None:
    """Of a merged or fully trained model header, embedding and vision tower stay as they are."""
    size, tensor = (70 << 20) + 5, 3 << 20
    seen = set()
    for place in (None, 0, 1 << 20, (17 << 20) + 311, size - tensor):
        path = tmp_path / "model.safetensors"
        with open(path, "wb") as file:
            file.truncate(size)
            if place is not None:
                file.seek(place)
                file.write(b"\1" * tensor)
        assert path.stat().st_size == size
        assert quick_digest(path) == quick_digest(path)
        seen.add(quick_digest(path))
    assert len(seen) == 5
    assert quick_digest(tmp_path) == quick_digest(tmp_path / "gone") == ""


def test_text_that_utf_8_can_hold() -> None:
    assert whole_text("a\ud800b") == "a\ufffdb"
    assert whole_text("\ud83d\ude00 ü\u2028\x00") == "😀 ü\u2028\x00"


def test_inside(tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / "link").symlink_to(outside)
    (folder / "within").symlink_to(folder / "a")
    assert inside(folder, "a/../b") == folder.resolve() / "b"
    assert inside(folder, "within") == folder.resolve() / "a"
    for bad in ("../outside", "link/a", str(folder / "a"), "a/../../outside", "/etc/hostname"):
        with pytest.raises(DataError, match="leaves its folder"):
            inside(folder, bad)


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with new_folder(target) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "a.txt").write_text("a")
        assert not target.exists()
    assert (target / "inner" / "a.txt").read_text() == "a"
    with pytest.raises(DataError, match="is there already and not empty"), new_folder(target):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is there already"), new_folder(tmp_path / "file"):
        pass
    (tmp_path / "empty").mkdir()

    def fail(error: BaseException) -> None:
        with new_folder(tmp_path / "empty") as temporary:
            (temporary / "half").write_text("half")
            raise error

    with pytest.raises(DataError, match="No space left"):
        fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    assert not any((tmp_path / "empty").iterdir())
    with new_folder(tmp_path / "empty") as temporary:
        (temporary / "whole").write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "empty", "file"]


def random_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(4 if depth > 2 else 6)
    if kind == 4:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 5:
        return {f"k{n}]": random_value(rng, depth + 1) for n in range(rng.randrange(4))}
    return (rng.randrange(-(10**9), 10**9), rng.random(), 'ü"],[\n ' * rng.randrange(3), rng.choice((None, True)))[kind]


@pytest.mark.parametrize("block", [1, 2, 7, 1 << 16])
def test_values_come_one_by_one_as_a_whole_parse_gives_them(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_BLOCK", block)
    rng = random.Random(block)
    for indent in (None, 2):
        values = [random_value(rng) for _ in range(40)]
        (tmp_path / "list.json").write_text("\ufeff \n" + json.dumps(values, indent=indent, ensure_ascii=False) + "\n ")
        assert list(iterate_json(tmp_path / "list.json")) == [(f"sample {n}", v) for n, v in enumerate(values)]
        (tmp_path / "lines.jsonl").write_text("\n".join(["", *(json.dumps({"v": value}) for value in values)]))
        assert list(iterate_json(tmp_path / "lines.jsonl")) == [
            (f"line {n + 2}", {"v": v}) for n, v in enumerate(values)
        ]
    (tmp_path / "list.json").write_text("[ ]")
    assert list(iterate_json(tmp_path / "list.json")) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[\n{"a": 1},\n{"a": }\n]', "line 3: not valid JSON"),
        ("[1, 2", "not valid JSON \\(expected ',' or ']' after sample 1, found ''"),
        ("[1 2]", "expected ',' or '\\]' after sample 0, found '2'"),
        ("[1,]", "line 1: not valid JSON"),
        ("[1]\n[2]", "line 2: not valid JSON \\(there is more after the list's end"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": 1}\n{"a"', "line 2: not valid JSON"),
    ],
)
def test_a_broken_list_or_line_is_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "broken").write_text(text)
    with pytest.raises(DataError, match=said):
        list(iterate_json(tmp_path / "broken"))


def test_what_cannot_be_iterated(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes('["ü"]'.encode("latin-1"))
    for name, said in (("none", "no such file"), ("latin", "not UTF-8 text"), (".", "is a folder")):
        with pytest.raises(DataError, match=said):
            list(iterate_json(tmp_path / name))


def test_a_failure_to_make_a_piece_is_not_one_to_write(tmp_path: Path) -> None:
    def pieces() -> Any:
        yield "first"
        raise PermissionError(errno.EACCES, "not yours")

    with pytest.raises(PermissionError, match="not yours"):
        files.write_pieces(tmp_path / "out", pieces())
    assert list(tmp_path.iterdir()) == []
