"""A journal: rows in order, torn ends dropped, what is wrong with it told."""

from __future__ import annotations

from pathlib import Path

import pytest

from kore_fast.errors import DataError
from kore_fast.journal import Journal


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "deep" / "rows.jsonl")
    assert journal.rows("key") == []
    journal.append([])
    assert journal.path.read_bytes() == b""
    rows = [{"key": "a", "value": "zwei\nZeilen \u2028 und \x85 ü"}, {"key": "b", "value": None}]
    journal.append(rows[:1])
    journal.append(rows[1:])
    assert journal.rows("key", "value") == Journal(journal.path).rows() == rows


def test_whatever_byte_a_kill_stops_at_whole_rows_stay(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "rows.jsonl")
    rows = [{"key": "ä"}, {"key": "b"}]
    journal.append(rows)
    whole = journal.path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(len(whole) + 1):
        journal.path.write_bytes(whole[:size])
        kept = rows[: (size >= first) + (size == len(whole))]
        assert journal.rows() == kept
        journal.append([{"key": "c"}])
        assert journal.rows() == [*kept, {"key": "c"}]


@pytest.mark.parametrize("line", ["[1]", '{"other": 1}', '"key"'])
def test_a_row_of_something_else_is_named(tmp_path: Path, line: str) -> None:
    journal = Journal(tmp_path / "rows.jsonl")
    journal.append([{"key": "a"}])
    journal.path.write_text(journal.path.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: not a row that was kept here; remove the file"):
        journal.rows("key")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file.rows\.jsonl: could not be written .* what is there is kept"):
        Journal(tmp_path / "file" / "rows.jsonl").append([{}])
