"""The request cache: what a model answered, by all that decides an answer; one SQLite file.

Each answer is one transaction, so a killed process leaves whole answers only. Several processes of one machine may
share a file. What was worked out from answers and items is kept beside them, to be had again without the work; it may
be deleted at any time. ``sqlite3 requests.sqlite 'select * from answers'`` shows the answers, and `RequestCache.export`
writes them as JSON lines. Nothing in it tells of time.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from json.encoder import encode_basestring_ascii as _quoted
from pathlib import Path
from typing import Any

from kore_fast.errors import DataError
from kore_fast.files import whole_text, write_jsonl

_TABLES = """
create table if not exists answers (
    key text primary key, task text not null, prompt text not null, model text not null, answer text not null,
    finish text not null, prompt_tokens integer not null, completion_tokens integer not null, asks integer not null
);
create table if not exists refused (
    key text primary key, task text not null, prompt text not null, model text not null, answer text not null,
    finish text not null, prompt_tokens integer not null, completion_tokens integer not null, asks integer not null,
    problem text not null
);
create table if not exists delivered (
    key text primary key, model text not null, answer text not null, finish text not null,
    prompt_tokens integer not null, completion_tokens integer not null
);
create table if not exists derived (
    kind text not null, item text not null, basis text not null, value text not null, primary key (kind, item)
);
create trigger if not exists answer_deleted after delete on answers begin
    delete from derived where kind = 'texts';
end;
create trigger if not exists answer_changed after update on answers begin
    delete from derived where kind = 'texts';
end;
"""
_PENDING = 200
"""Derived values written in one transaction: each alone would take longer than what it saves."""
_FORMAT = 1


@dataclass(frozen=True)
class Reply:
    """What a server sent for one request."""

    answer: str
    """The raw text."""
    finish: str
    """Why it ended: ``stop``, ``length``, ``content_filter``, ``refusal``, ``no text``."""
    model: str
    """The model's name as the server reports it."""
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Entry(Reply):
    """A reply in the cache; tokens are those of all ``asks`` that it took."""

    asks: int = 1
    problem: str = ""
    """Why it cannot be used; empty for an answer."""


def canonical(value: Any) -> str:
    """JSON with sorted keys and no blanks, in ASCII: equal values, equal text."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))


def request_rest(model: str, parameters: dict[str, Any], schema: Any, prompt: str) -> str:
    """All that decides an answer besides the messages, in canonical JSON; ``prompt`` is its name with version."""
    return canonical([_FORMAT, model, parameters, schema, prompt])


def request_key(messages: list[dict[str, str]], rest: str) -> str:
    """Hex SHA-256 of all that decides an answer, in canonical JSON; ``rest`` is the same for many requests."""
    # What `canonical` would write, without an encoder made for each of a hundred thousand requests.
    said = ",".join(f"[{_quoted(message['role'])},{_quoted(message['content'])}]" for message in messages)
    return hashlib.sha256(f"[[{said}],{rest}]".encode("ascii")).hexdigest()


class RequestCache:
    """Answers by `request_key`, and the replies that could not be used, which are never taken for answers.

    The file must be on a disk of this machine: SQLite's shared log does not work over a network.
    """

    def __init__(self, path: str | Path) -> None:
        """Open or make the file.

        Raises:
            DataError: it cannot be opened or is no request cache; names it.
        """
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Used by one thread at a time, but not always by the one that opened it.
            self._base = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            self._base.execute("pragma journal_mode = wal")
            self._base.execute("pragma synchronous = normal")
            self._base.execute("pragma cache_size = -16384")
            self._pending: dict[tuple[str, str], tuple[str, str]] = {}
            version = self._base.execute("pragma user_version").fetchone()[0]
            if version not in (0, _FORMAT):
                raise DataError(
                    f"{path}: a request cache of format {version}, this is for format {_FORMAT}; move it away"
                )
            self._base.executescript(_TABLES)
            if version == 0:
                self._base.execute(f"pragma user_version = {_FORMAT}")
        except (OSError, sqlite3.Error) as error:
            raise DataError(
                f"{path}: cannot be used as a request cache ({error}); move it away or name another"
            ) from None

    def __enter__(self) -> RequestCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; the answers are in it."""
        try:
            self._write_pending()
        finally:
            self._base.close()

    def answer(self, key: str) -> Entry | None:
        """The answer to a request."""
        row = self._base.execute(
            "select answer, finish, model, prompt_tokens, completion_tokens, asks from answers where key = ?", (key,)
        ).fetchone()
        return None if row is None else Entry(*row)

    def refused(self, key: str) -> Entry | None:
        """The last reply that could not be used, while there is no answer."""
        row = self._base.execute(
            "select answer, finish, model, prompt_tokens, completion_tokens, asks, problem from refused where key = ?",
            (key,),
        ).fetchone()
        return None if row is None else Entry(*row)

    def accept(self, key: str, task: str, prompt: str, reply: Reply) -> None:
        """Keep a usable reply; where another process was faster, its answer stays."""
        self._write("answers", key, task, prompt, reply, None)

    def refuse(self, key: str, task: str, prompt: str, reply: Reply, problem: str) -> None:
        """Keep a reply that could not be used, to be shown when asking again."""
        self._write("refused", key, task, prompt, reply, problem)

    def _write(self, table: str, key: str, task: str, prompt: str, reply: Reply, problem: str | None) -> None:
        self._run("begin immediate")
        try:
            before = self.refused(key)
            asks = 1 + (before.asks if before else 0)
            spent = before or Reply("", "", "", 0, 0)
            row: list[Any] = [key, task, prompt, reply.model, whole_text(reply.answer), reply.finish]
            row += [reply.prompt_tokens + spent.prompt_tokens, reply.completion_tokens + spent.completion_tokens, asks]
            self._run("delete from refused where key = ?", (key,))
            self._run("delete from delivered where key = ?", (key,))
            if problem is None:
                self._run("insert or ignore into answers values (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            else:
                self._run("insert into refused values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", [*row, whole_text(problem)])
            self._run("commit")
        except BaseException:
            if self._base.in_transaction:
                self._base.execute("rollback")
            raise

    def row(self, key: str) -> dict[str, Any] | None:
        """The answer to a request, or the last reply that could not be used, as `rows` gives it."""
        return next(self._rows("where key = ?", (key,)), None)

    def adopt(self, row: dict[str, Any]) -> None:
        """Keep a `row` of another cache. An answer that is there stays; so does a refused reply of as many asks."""
        key, problem = row["key"], row.get("problem")
        values = [row[name] for name in ("key", "task", "prompt", "model", "answer", "finish")]
        values += [row[name] for name in ("prompt_tokens", "completion_tokens", "asks")]
        self._run("begin immediate")
        try:
            if self.answer(key) is None:
                if problem is None:
                    self._run("delete from refused where key = ?", (key,))
                    self._run("insert into answers values (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
                else:
                    before = self.refused(key)
                    if before is None or before.asks < row["asks"]:
                        self._run(
                            "insert or replace into refused values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", [*values, problem]
                        )
            self._run("commit")
        except BaseException:
            if self._base.in_transaction:
                self._base.execute("rollback")
            raise

    def discard(self, key: str) -> None:
        """Forget an answer that is no longer usable."""
        self._pending.clear()
        self._run("delete from answers where key = ?", (key,))

    def derived(self, kind: str, item: str, basis: str) -> str | None:
        """What was worked out for an item, on the same basis; see `keep_derived`."""
        row = (
            self._pending.get((kind, item))
            or self._base.execute(
                "select basis, value from derived where kind = ? and item = ?", (kind, item)
            ).fetchone()
        )
        return None if row is None or row[0] != basis else str(row[1])

    def keep_derived(self, kind: str, item: str, basis: str, value: str) -> None:
        """Keep what was worked out for an item, in place of what was kept before.

        ``basis`` tells all that it depends on, the code included, so that nothing old is ever taken for new. What is
        of the kind ``texts`` may depend on answers too: it is forgotten when one is deleted or changed, even by hand.
        It reaches the disk with what follows, or when the file is closed.
        """
        self._pending[kind, item] = (basis, value)
        if len(self._pending) >= _PENDING:
            self._write_pending()

    def _write_pending(self) -> None:
        if not self._pending:
            return
        rows = [(*which, *kept) for which, kept in self._pending.items()]
        self._pending.clear()
        self._run("begin immediate")
        try:
            self._run_many("insert or replace into derived values (?, ?, ?, ?)", rows)
            self._run("commit")
        except BaseException:
            if self._base.in_transaction:
                self._base.execute("rollback")
            raise

    def deliver(self, key: str, reply: Reply) -> None:
        """Keep a reply that nobody has looked at (from a batch)."""
        row = (key, reply.model, whole_text(reply.answer), reply.finish, reply.prompt_tokens, reply.completion_tokens)
        self._run("insert or replace into delivered values (?, ?, ?, ?, ?, ?)", row)

    def delivered(self, key: str) -> Reply | None:
        """A reply that nobody has looked at."""
        row = self._base.execute(
            "select answer, finish, model, prompt_tokens, completion_tokens from delivered where key = ?", (key,)
        ).fetchone()
        return None if row is None else Reply(*row)

    def begin(self) -> None:
        """Begin a transaction for many deliveries."""
        self._run("begin immediate")

    def commit(self) -> None:
        """End the transaction."""
        self._run("commit")

    def rows(self) -> Iterator[dict[str, Any]]:
        """All entries in the order of their keys; ``problem`` is there for replies that could not be used."""
        return self._rows("order by key", ())

    def _rows(self, which: str, values: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        for table, more in (("answers", ""), ("refused", ", problem")):
            found = self._base.execute(
                f"select key, task, prompt, answer, finish, model, prompt_tokens, completion_tokens, asks{more} "
                f"from {table} {which}",
                values,
            )
            for key, task, prompt, *rest in found:
                entry = asdict(Entry(*rest))
                if not more:
                    del entry["problem"]
                yield {"key": key, "task": task, "prompt": prompt, **entry}

    def export(self, path: str | Path) -> None:
        """Write all entries as JSON lines: the same answers, the same bytes."""
        write_jsonl(path, self.rows())

    def __len__(self) -> int:
        return int(self._base.execute("select count(*) from answers").fetchone()[0])

    def _run(self, statement: str, values: Any = ()) -> None:
        with self._telling():
            self._base.execute(statement, values)

    def _run_many(self, statement: str, rows: Any) -> None:
        with self._telling():
            self._base.executemany(statement, rows)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise DataError(
                f"{self.path}: could not be written ({error}); free some space, then give the same command again: "
                "all answers so far are kept"
            ) from None
