"""OpenAI's Batch API: the same requests as files, answered within a day at a lower price.

Each round gathers what can be asked now (first questions, summaries and quadruplets, then answers, then whatever could
not be used), uploads it in files, waits, and puts the replies into the request cache. A state file beside the cache
names what was handed in, so that a process that was killed waits for the same batches and pays for none twice.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kore_fast.endpoint.client import Connection, RequestFailedError, read_reply
from kore_fast.errors import LanguageModelError
from kore_fast.files import read_json, write_json
from kore_fast.progress import Progress

if TYPE_CHECKING:
    from kore_fast.augmentation.language.asking import Asker
    from kore_fast.augmentation.language.item_requests import Request

UnitT = TypeVar("UnitT")

ENDPOINT = "/v1/chat/completions"
_LONG = 3600.0
"""Seconds for a file up or down."""
_RUNNING = ("validating", "in_progress", "finalizing", "cancelling")


def state_path(cache: Path) -> Path:
    """The state file beside a request cache."""
    return cache.with_name(f"{cache.name}.batches.json")


async def prepare_in_batches(asker: Asker[UnitT], units: Iterable[UnitT], show: Progress) -> None:
    """Ask the model by batches for all that the cache does not hold.

    Units are gone through several times a round. What can be gone through again (a list, an object that reads a file
    whenever it is) is not held in memory; an iterator is.

    Raises:
        LanguageModelError: the server refuses the key, the file or the batch, or does not answer.
    """
    if isinstance(units, Iterator):
        units = list(units)
    asker.start()
    state = _State(state_path(asker.cache.path))
    _take_delivered(asker, units)  # what a run that was killed had fetched
    count, complete = 0, True
    for unit in units:
        outstanding = asker.look(unit)()
        asker.totals.cached += outstanding.found
        complete = complete and not outstanding.missing
        count += 1
    if complete and not state.batches:
        asker.totals.items += count
        return
    async with Connection(asker.model, asker.totals) as connection:
        tries: Counter[str] = Counter()
        while state.batches or await _hand_in(asker, units, connection, state):
            for entry in state.batches:
                await _order(connection, state, entry)
            for entry in list(state.batches):
                await _finish(asker, connection, state, entry, tries, show)
            _take_delivered(asker, units)
    asker.totals.items += count


class _State:
    """Which files and batches are on their way; the file is gone when none is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.batches: list[dict[str, Any]] = read_json(path)["batches"] if path.is_file() else []

    def write(self, batches: list[dict[str, Any]]) -> None:
        self.batches = batches
        if batches:
            write_json(self.path, {"batches": batches})
        else:
            self.path.unlink(missing_ok=True)


def _missing(asker: Asker[UnitT], units: Iterable[UnitT]) -> Iterator[Request]:
    """Each missing request once."""
    # A base of SQLite's own that goes to the disk as it grows: keys are as many as requests.
    with closing(sqlite3.connect("", isolation_level=None)) as seen:
        seen.execute("create table seen (key blob primary key) without rowid")
        for unit in units:
            for request in asker.look(unit)().missing:
                if seen.execute("insert or ignore into seen values (?)", (bytes.fromhex(request.key),)).rowcount:
                    yield request


async def _hand_in(asker: Asker[UnitT], units: Iterable[UnitT], connection: Connection, state: _State) -> bool:
    """Upload what is missing and order its batches; False when nothing is missing."""
    for path, count in _files(asker, units, connection):
        try:
            with open(path, "rb") as file:
                uploaded = await _call(connection, partial(_upload, connection, file))
        finally:
            path.unlink(missing_ok=True)
        # Before the batch is ordered: a kill in between must not order it twice.
        state.write([*state.batches, {"file": uploaded.id, "batch": None, "requests": count}])
        asker.totals.requests += count
    return bool(state.batches)


def _files(asker: Asker[UnitT], units: Iterable[UnitT], connection: Connection) -> Iterator[tuple[Path, int]]:
    """The missing requests as files of at most so many requests and bytes, made one at a time."""
    options = asker.model
    file, count, size = None, 0, 0

    def begun() -> Any:
        return tempfile.NamedTemporaryFile("wb", prefix="kore-fast-", suffix=".jsonl", delete=False)

    try:
        for request in _missing(asker, units):
            body = connection.body(asker.messages(request), request.form)
            row = {"custom_id": request.key, "method": "POST", "url": ENDPOINT, "body": body}
            line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
            if file is not None and (count == options.batch_requests or size + len(line) > options.batch_bytes):
                file.close()
                done, file = Path(file.name), None
                yield done, count
            if file is None:
                file, count, size = begun(), 0, 0
            file.write(line)
            count, size = count + 1, size + len(line)
        if file is not None:
            file.close()
            done, file = Path(file.name), None
            yield done, count
    finally:
        if file is not None:
            file.close()
            os.unlink(file.name)


async def _upload(connection: Connection, file: Any) -> Any:
    file.seek(0)
    return await connection.client.files.create(file=file, purpose="batch", timeout=_LONG)


async def _order(connection: Connection, state: _State, entry: dict[str, Any]) -> None:
    """Order the batch of an uploaded file, unless that was done just before a kill."""
    if entry["batch"] is not None:
        return
    batches = connection.client.batches
    listed = await _call(connection, lambda: batches.list(limit=100))
    ordered = next((batch for batch in listed.data if batch.input_file_id == entry["file"]), None)
    if ordered is None:
        ordered = await _call(
            connection,
            lambda: batches.create(input_file_id=entry["file"], endpoint=ENDPOINT, completion_window="24h"),
        )
    entry["batch"] = ordered.id
    state.write(state.batches)


async def _finish(
    asker: Asker[Any],
    connection: Connection,
    state: _State,
    entry: dict[str, Any],
    tries: Counter[str],
    show: Progress,
) -> None:
    """Wait for one batch and put its replies into the cache."""
    client = connection.client
    ticks = show(range(entry["requests"]), entry["requests"], f"batch {entry['batch']}", note=asker.note)
    shown = 0
    next(ticks, None)
    while True:
        batch = await _call(connection, lambda: client.batches.retrieve(entry["batch"]))
        counts = batch.request_counts
        done = min(entry["requests"], counts.completed + counts.failed) if counts else 0
        for _ in range(done - shown):
            next(ticks, None)
        shown = max(shown, done)
        if batch.status not in _RUNNING:
            break
        await asyncio.sleep(asker.model.batch_poll)
    for file in (batch.output_file_id, batch.error_file_id):
        if file:
            await _call(connection, partial(_download, asker, connection, file, tries))
    state.write([one for one in state.batches if one is not entry])
    if batch.status in ("failed", "cancelled"):
        errors = batch.errors.data if batch.errors and batch.errors.data else []
        said = "; ".join(str(error.message) for error in errors[:3]) or "no reason given"
        raise LanguageModelError(
            connection.key.hidden_in(
                f"{connection.place}: batch {batch.id} {batch.status}: {said}; its replies so far are kept, and the "
                "same command hands in the rest"
            )
        )


async def _download(asker: Asker[Any], connection: Connection, file: str, tries: Counter[str]) -> None:
    """A batch's replies, line by line through a file on disk: they may be many."""
    with tempfile.TemporaryFile() as kept:
        async with connection.client.files.with_streaming_response.content(file, timeout=_LONG) as response:
            async for part in response.iter_bytes():
                kept.write(part)
        kept.seek(0)
        asker.cache.begin()
        try:
            for line in kept:
                if line.strip():
                    _deliver(asker, connection, line, tries)
        finally:
            asker.cache.commit()


def _deliver(asker: Asker[Any], connection: Connection, line: bytes, tries: Counter[str]) -> None:
    try:
        row = json.loads(connection.key.hidden_in(line.decode("utf-8")))
        key, response, error = row["custom_id"], row.get("response") or {}, row.get("error") or {}
        status, body = response.get("status_code"), response.get("body")
    except (ValueError, KeyError, TypeError, AttributeError):
        return  # no request's reply: what is missing is asked again
    if not isinstance(key, str):
        return
    if status == 200:
        try:
            # Tokens of prompts are told by this API; a rough count would need the request.
            asker.cache.deliver(key, read_reply(body, 0, asker.totals, asker.model.model))
        except RequestFailedError as failure:
            _again(asker, key, str(failure), tries, final=False)
        return
    inner = body.get("error") if isinstance(body, dict) else None
    said = (inner or error).get("message") if isinstance(inner or error, dict) else inner or error
    final = isinstance(status, int) and 400 <= status < 500 and status not in (408, 409, 425, 429)
    _again(asker, key, f"the server answers {status or 'nothing'}: {said or 'no reason given'}", tries, final=final)


def _again(asker: Asker[Any], key: str, reason: str, tries: Counter[str], *, final: bool) -> None:
    """Leave a request for the next round, or for the next run."""
    tries[key] += 1
    if final or tries[key] >= asker.model.attempts:
        asker.give_up(key, "batch", reason)
    else:
        asker.totals.retries += 1


def _take_delivered(asker: Asker[UnitT], units: Iterable[UnitT]) -> None:
    for unit in units:
        # Answers delivered in the same round as their questions do not exist, so one look at a unit is enough.
        for request in asker.look(unit)().missing:
            reply = asker.cache.delivered(request.key)
            if reply is not None:
                asker.take(request, reply)


async def _call(connection: Connection, call: Callable[[], Awaitable[Any]]) -> Any:
    """Call the server about files and batches, again while it fails."""
    openai = connection.openai
    attempts = connection.options.attempts
    for attempt in range(1, attempts + 1):
        try:
            return await call()
        except openai.APIStatusError as error:
            said = connection.key.hidden_in(f"{error.status_code}: {error.message}")
            if error.status_code not in (408, 409, 425, 429) and error.status_code < 500:
                raise LanguageModelError(f"{connection.place}: refuses a file or batch ({said})") from None
        except openai.OpenAIError as error:
            said = connection.key.hidden_in(str(error))
        if attempt < attempts:
            await asyncio.sleep(min(60.0, connection.options.backoff * 2 ** (attempt - 1)))
    raise LanguageModelError(
        f"{connection.place}: files and batches failed {attempts} times ({said}); the same command goes on from here"
    )
