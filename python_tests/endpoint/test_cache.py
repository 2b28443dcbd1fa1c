from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from pathlib import Path

import pytest

from kore_fast.endpoint.cache import Entry, Reply, RequestCache, request_key, request_rest
from kore_fast.errors import DataError


def reply(text: str = "x", tokens: int = 3) -> Reply:
    return Reply(text, "stop", "m", 10, tokens)


def test_an_answer_is_kept_with_all_that_it_took(tmp_path: Path) -> None:
    with RequestCache(tmp_path / "c.sqlite") as cache:
        assert cache.answer("k") is None
        cache.refuse("k", "summary", "summary/1", reply("bad", 5), "it is bad")
        cache.refuse("k", "summary", "summary/1", reply("worse", 5), "it is worse")
        assert cache.answer("k") is None
        assert cache.refused("k") == Entry("worse", "stop", "m", 20, 10, 2, "it is worse")
        cache.accept("k", "summary", "summary/1", reply("good", 7))
        assert cache.refused("k") is None
    with RequestCache(tmp_path / "c.sqlite") as cache:
        assert cache.answer("k") == Entry("good", "stop", "m", 30, 17, 3)
        assert len(cache) == 1


def test_the_first_of_two_answers_stays(tmp_path: Path) -> None:
    with RequestCache(tmp_path / "c.sqlite") as one, RequestCache(tmp_path / "c.sqlite") as two:
        one.accept("k", "t", "t/1", reply("first"))
        two.accept("k", "t", "t/1", reply("second"))
        assert two.answer("k") == one.answer("k")
        assert two.answer("k").answer == "first"  # type: ignore[union-attr]


def test_several_writers_share_a_file(tmp_path: Path) -> None:
    def fill(start: int) -> None:
        with RequestCache(tmp_path / "c.sqlite") as cache:
            for number in range(start, start + 100):
                cache.accept(f"k{number}", "t", "t/1", reply(str(number)))

    threads = [threading.Thread(target=fill, args=(start,)) for start in (0, 50, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with RequestCache(tmp_path / "c.sqlite") as cache:
        assert len(cache) == 200
        assert all(cache.answer(f"k{n}").answer == str(n) for n in range(200))  # type: ignore[union-attr]


def test_the_export_depends_on_the_answers_alone(tmp_path: Path) -> None:
    for name, order in (("a", (1, 2, 3)), ("b", (3, 1, 2))):
        with RequestCache(tmp_path / f"{name}.sqlite") as cache:
            for number in order:
                cache.accept(f"k{number}", "t", "t/1", reply(f"é{number}"))
            cache.refuse("bad", "t", "t/1", reply("no"), "bad")
            cache.export(tmp_path / f"{name}.jsonl")
    written = (tmp_path / "a.jsonl").read_bytes()
    assert written == (tmp_path / "b.jsonl").read_bytes()
    rows = [json.loads(line) for line in written.decode().splitlines()]
    assert [row["key"] for row in rows] == ["k1", "k2", "k3", "bad"]
    assert rows[3]["problem"] == "bad"
    assert rows[0] == {
        "key": "k1", "task": "t", "prompt": "t/1", "answer": "é1", "finish": "stop", "model": "m",
        "prompt_tokens": 10, "completion_tokens": 3, "asks": 1,
    }  # fmt: skip


def test_half_characters_are_kept_as_replaced(tmp_path: Path) -> None:
    with RequestCache(tmp_path / "c.sqlite") as cache:
        cache.accept("k", "t", "t/1", reply("a\ud800b"))
        assert cache.answer("k").answer == "a\ufffdb"  # type: ignore[union-attr]


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database, but long enough to be taken for one" * 100)
    with pytest.raises(DataError, match="cannot be used as a request cache"):
        RequestCache(tmp_path / "text")
    newer = sqlite3.connect(tmp_path / "newer")
    newer.execute("pragma user_version = 9")
    newer.close()
    with pytest.raises(DataError, match="format 9"):
        RequestCache(tmp_path / "newer")
    with pytest.raises(DataError, match="cannot be used"):
        RequestCache(tmp_path)


def test_every_part_of_a_request_is_in_its_key() -> None:
    said = [{"role": "user", "content": "é"}]
    base = request_key(said, request_rest("m", {"a": 1, "b": 2}, {"type": "object"}, "t/1"))
    assert base == request_key(said, request_rest("m", {"b": 2, "a": 1}, {"type": "object"}, "t/1"))
    whole = [[["user", "é"]], [1, "m", {"a": 1, "b": 2}, {"type": "object"}, "t/1"]]
    assert base == hashlib.sha256(json.dumps(whole, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    others = [
        request_key([{"role": "user", "content": "e"}], request_rest("m", {"a": 1, "b": 2}, {"type": "object"}, "t/1")),
        request_key(said, request_rest("n", {"a": 1, "b": 2}, {"type": "object"}, "t/1")),
        request_key(said, request_rest("m", {"a": 1, "b": 3}, {"type": "object"}, "t/1")),
        request_key(said, request_rest("m", {"a": 1, "b": 2}, {"type": "array"}, "t/1")),
        request_key(said, request_rest("m", {"a": 1, "b": 2}, {"type": "object"}, "t/2")),
    ]
    assert len({base, *others}) == 6
