"""OpenAI's Batch API: the same requests as files, answered within a day at a lower price.

Each round gathers what can be asked now (first questions, summaries and quadruplets, then answers, then whatever could
not be used), uploads it in files, waits, and puts the replies into the request cache. A state file beside the cache
names what was handed in, so that a process that was killed waits for the same batches and pays for none twice.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kore_fast.augmentation.language.client import Connection, RequestFailedError, read_reply
from kore_fast.data.items import Item
from kore_fast.errors import LanguageModelError
from kore_fast.files import read_json, write_json
from kore_fast.progress import Progress

if TYPE_CHECKING:
    from kore_fast.augmentation.language.item_requests import Request
    from kore_fast.augmentation.language.writer import LanguageModelWriter

ENDPOINT = "/v1/chat/completions"
_LONG = 3600.0
"""Seconds for a file up or down."""
_RUNNING = ("validating", "in_progress", "finalizing", "cancelling")


def state_path(cache: Path) -> Path:
    """The state file beside a request cache."""
    return cache.with_name(f"{cache.name}.batches.json")


async def prepare_in_batches(writer: LanguageModelWriter, items: Sequence[Item], show: Progress) -> None:
    """Ask the model by batches for all that the cache does not hold.

    Raises:
        LanguageModelError: the server refuses the key, the file or the batch, or does not answer.
    """
    state = _State(state_path(writer.cache.path))
    _take_delivered(writer, items)  # what a run that was killed had fetched
    for item in items:
        writer.totals.cached += len(writer.texts(item, read=False).entries)
    if not state.batches and next(_missing(writer, items), None) is None:
        writer.totals.items += len(items)
        return
    async with Connection(writer.model, writer.totals) as connection:
        writer.start()
        tries: Counter[str] = Counter()
        while state.batches or await _hand_in(writer, items, connection, state):
            for entry in state.batches:
                await _order(connection, state, entry)
            for entry in list(state.batches):
                await _finish(writer, connection, state, entry, tries, show)
            _take_delivered(writer, items)
    writer.totals.items += len(items)


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


def _missing(writer: LanguageModelWriter, items: Iterable[Item]) -> Iterator[Request]:
    seen: set[str] = set()
    for item in items:
        for request in writer.texts(item, read=False).missing:
            if request.key not in seen:
                seen.add(request.key)
                yield request


async def _hand_in(writer: LanguageModelWriter, items: Sequence[Item], connection: Connection, state: _State) -> bool:
    """Upload what is missing and order its batches; False when nothing is missing."""
    for path, count in _files(writer, items, connection):
        try:
            with open(path, "rb") as file:
                uploaded = await _call(connection, partial(_upload, connection, file))
        finally:
            path.unlink(missing_ok=True)
        # Before the batch is ordered: a kill in between must not order it twice.
        state.write([*state.batches, {"file": uploaded.id, "batch": None, "requests": count}])
        writer.totals.requests += count
    return bool(state.batches)


def _files(writer: LanguageModelWriter, items: Sequence[Item], connection: Connection) -> Iterator[tuple[Path, int]]:
    """The missing requests as files of at most so many requests and bytes, made one at a time."""
    options = writer.model
    file, count, size = None, 0, 0

    def begun() -> Any:
        return tempfile.NamedTemporaryFile("wb", prefix="kore-fast-", suffix=".jsonl", delete=False)

    try:
        for request in _missing(writer, items):
            body = connection.body(writer.messages(request), request.form)
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
    writer: LanguageModelWriter,
    connection: Connection,
    state: _State,
    entry: dict[str, Any],
    tries: Counter[str],
    show: Progress,
) -> None:
    """Wait for one batch and put its replies into the cache."""
    client = connection.client
    ticks = show(range(entry["requests"]), entry["requests"], f"batch {entry['batch']}", note=writer.note)
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
        await asyncio.sleep(writer.model.batch_poll)
    for file in (batch.output_file_id, batch.error_file_id):
        if file:
            await _call(connection, partial(_download, writer, connection, file, tries))
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


async def _download(writer: LanguageModelWriter, connection: Connection, file: str, tries: Counter[str]) -> None:
    """A batch's replies, line by line through a file on disk: they may be many."""
    with tempfile.TemporaryFile() as kept:
        async with connection.client.files.with_streaming_response.content(file, timeout=_LONG) as response:
            async for part in response.iter_bytes():
                kept.write(part)
        kept.seek(0)
        writer.cache.begin()
        try:
            for line in kept:
                if line.strip():
                    _deliver(writer, connection, line, tries)
        finally:
            writer.cache.commit()


def _deliver(writer: LanguageModelWriter, connection: Connection, line: bytes, tries: Counter[str]) -> None:
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
            writer.cache.deliver(key, read_reply(body, 0, writer.totals, writer.model.model))
        except RequestFailedError as failure:
            _again(writer, key, str(failure), tries, final=False)
        return
    inner = body.get("error") if isinstance(body, dict) else None
    said = (inner or error).get("message") if isinstance(inner or error, dict) else inner or error
    final = isinstance(status, int) and 400 <= status < 500 and status not in (408, 409, 425, 429)
    _again(writer, key, f"the server answers {status or 'nothing'}: {said or 'no reason given'}", tries, final=final)


def _again(writer: LanguageModelWriter, key: str, reason: str, tries: Counter[str], *, final: bool) -> None:
    """Leave a request for the next round, or for the next run."""
    tries[key] += 1
    if final or tries[key] >= writer.model.attempts:
        writer.give_up(key, "batch", reason)
    else:
        writer.totals.retries += 1


def _take_delivered(writer: LanguageModelWriter, items: Iterable[Item]) -> None:
    for item in items:
        # Answers delivered in the same round as their questions do not exist, so one look at an item is enough.
        for request in writer.texts(item, read=False).missing:
            reply = writer.cache.delivered(request.key)
            if reply is not None:
                writer.take(request, reply)


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
