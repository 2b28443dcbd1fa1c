"""The slow parts of an augmentation over Ray Data, on one machine or on a cluster: what a language model is to write,
image search with its downloads, and CLIP's vectors. A judge is asked by the driver.

Workers hold nothing that lasts and need no shared disk. They are sent what is missing in the caches, row by row, and
send back plain rows; the driver alone writes the caches. The assembly that follows reads them as ever, so that its
output is that of a local run, and a run that was killed goes on where it stopped, with Ray or without.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import platform
import socket
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from kore_fast.augmentation.clip import Clip, ClipOptions
from kore_fast.augmentation.images import ImageSearchOptions, PictureSearch
from kore_fast.augmentation.images.providers import Found, make_provider
from kore_fast.augmentation.images.providers.web import WebProvider
from kore_fast.augmentation.images.search import Limits, QueryRun, normal_query, usual_rate
from kore_fast.augmentation.images.store import Outcome, Picture, PictureStore, SearchRecord, describe
from kore_fast.augmentation.language import LanguageModelOptions, LanguageModelWriter, RequestCache
from kore_fast.augmentation.language.asking import LazyConnection
from kore_fast.augmentation.language.prompting import Prompt
from kore_fast.augmentation.options import AugmentationOptions
from kore_fast.data.items import Item
from kore_fast.endpoint.totals import Totals
from kore_fast.errors import DataError, KoreError, LanguageModelError
from kore_fast.progress import Progress, silent

log = logging.getLogger(__name__)

_CONNECT_SECONDS = 10.0
_AT_A_TIME = 64
"""The most rows that a worker is handed at once."""
_FRUITLESS = 3
"""So many passes in a row without one finished row end the run."""


class RayOptions(BaseModel):
    """Where Ray runs and how much of it is used.

    Limits for a server (``concurrency``, requests and tokens a minute, ``per_host``) hold for all workers together:
    each gets its share, and no more workers work than there are shares. A key is never sent to a worker: its
    environment variable must be set where the workers run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str | None = None
    """``auto`` or ``host:port`` of a cluster that runs; kore_fast must be installed on its machines, and this program
    run on one of them. Default: RAY_ADDRESS if it is set, else a Ray of this machine for the time of the run."""
    workers: Annotated[int, Field(ge=1)] = 4
    """The most workers of one kind; fewer while the cluster has no more place."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    """Of a worker that computes CLIP's vectors; half a GPU lets two of them share one."""

    @field_validator("address")
    @classmethod
    def _no_client(cls, value: str | None) -> str | None:
        if value is not None and value.startswith("ray://"):
            raise ValueError(
                "'address' must not be a Ray client's (ray://): run the command on a machine of the cluster, with "
                "address 'auto' or by 'ray job submit'"
            )
        return value


@dataclass(frozen=True)
class _Row:
    """What is sent to a worker and comes back: one piece of work."""

    id: str
    body: dict[str, Any]
    """Plain JSON values."""
    files: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class _Work:
    """A kind of worker, and how many there may be."""

    kind: type
    arguments: dict[str, Any]
    workers: int
    calls: int = 1
    """Rows that one worker works on at the same time."""
    gpus: float = 0.0
    rows: int = _AT_A_TIME
    """The most rows handed over at once."""
    reads_files: bool = False
    """Before the worker, pictures are read on this machine."""


class Cluster:
    """Fills the caches of an augmentation by workers of Ray; use as ``with Cluster(options) as cluster``.

    A Ray that this process has started or joined already is used, and left running.

    Raises:
        DataError: Ray is not installed or cannot be reached.
    """

    def __init__(self, options: RayOptions) -> None:
        self.options = options
        self._stack = ExitStack()

    def __enter__(self) -> Cluster:
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise DataError(
                f"the augmentation over Ray needs ray ({error}): pip install \"kore-fast[ray]\"; or leave 'ray' out"
            ) from None
        if not ray.is_initialized():
            # Ray would else report to its makers that it is used.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            _refuse_a_silent_address(self.options.address or os.environ.get("RAY_ADDRESS"))
            try:
                ray.init(
                    self.options.address, include_dashboard=False if self.options.address is None else None,
                    log_to_driver=False, logging_level=logging.ERROR,
                )  # fmt: skip
            except (ConnectionError, RuntimeError, ValueError) as error:
                where = self.options.address or "this machine"
                raise DataError(f"Ray at {where}: cannot be used ({error}); correct 'ray.address'") from None
            self._stack.callback(ray.shutdown)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def ask(self, writer: LanguageModelWriter, items: Iterable[Item], show: Progress = silent) -> dict[str, Any]:
        """`LanguageModelWriter.prepare` by workers. With ``batch_api`` there is nothing to spread: it is done here.

        Raises:
            LanguageModelError: see there. What was answered before is kept.
            DataError: the workers end without having done anything.
        """
        if writer.model.batch_api:
            return writer.prepare(items, show)
        writer.start()
        model = writer.model
        limits = [model.concurrency, model.requests_per_minute, model.tokens_per_minute]
        workers = min(self.options.workers, *(limit for limit in limits if limit is not None))
        share = {
            "concurrency": model.concurrency // workers,
            "requests_per_minute": model.requests_per_minute and model.requests_per_minute // workers,
            "tokens_per_minute": model.tokens_per_minute and model.tokens_per_minute // workers,
            "prompts": None,  # a folder of this machine; what is in it is sent
        }
        given = writer.options.model_dump(include=set(AugmentationOptions.model_fields))
        own = AugmentationOptions.model_validate(given)
        arguments = {"model": model.model_copy(update=share), "options": own, "prompts": writer.prompts}
        work = _Work(_Asker, arguments, workers, calls=model.concurrency // workers)
        waiting: Sequence[Item] | Iterable[Item] = items
        while True:
            rows, later = self._missing_answers(writer, waiting)
            done = show(self._through(rows, work), len(rows), f"ask {model.model} by Ray", note=writer.note)
            for row in done:
                for entry in row.body["rows"]:
                    writer.cache.adopt(entry)
                writer.fail(row.body["failures"])
                writer.totals.add(row.body["totals"])
                _raise(row)
                writer.totals.items += 1
            if not later:
                return writer.run_totals()
            waiting = later

    def _missing_answers(self, writer: LanguageModelWriter, items: Iterable[Item]) -> tuple[list[_Row], list[Item]]:
        """What there is to ask, and the items that wait for the same requests of another one."""
        rows: list[_Row] = []
        later: list[Item] = []
        asked: set[str] = set()
        for item in items:
            texts = writer.texts(item, read=False)
            missing = {request.key for request in texts.missing}
            if missing & asked:
                later.append(item)
                continue
            asked |= missing
            writer.totals.cached += len(texts.entries)
            if not missing:
                writer.totals.items += 1
                continue
            keys = [*(request.key for request, _ in texts.entries), *missing]
            known = [row for key in keys if (row := writer.cache.row(key)) is not None]
            rows.append(_Row(item.id, {"item": item.model_dump(mode="json"), "known": known}))
        return rows, later

    def find(self, search: PictureSearch, queries: Iterable[str], show: Progress = silent) -> None:
        """`PictureSearch.prepare` by workers. A folder of pictures is on this machine: it is searched here.

        Raises:
            DataError: see there; or the workers end without having done anything. Finished work is kept.
        """
        if not isinstance(search.provider, WebProvider):
            asyncio.run(search.prepare(queries, show))
            return
        search.store.tidy()
        names = dict.fromkeys(name for query in queries if (name := normal_query(query)))
        rows = [row for name in names if (row := _missing_pictures(search, name)) is not None]
        options = search.options
        workers = min(self.options.workers, options.per_host, options.concurrency)
        share = {
            "concurrency": options.concurrency // workers,
            "per_host": options.per_host // workers,
            "requests_per_minute": (options.requests_per_minute or usual_rate(search.provider)) / workers,
        }
        arguments = {"options": options.model_copy(update=share)}
        work = _Work(_Finder, arguments, workers, calls=options.concurrency // workers)
        for row in show(self._through(rows, work), len(rows), "images by Ray"):
            _raise(row)
            _take_pictures(search, row)

    def score(self, clip: Clip, pictures: Iterable[str | Path], texts: Iterable[str], show: Progress = silent) -> None:
        """`Clip.warm` by workers, each with the model loaded once. Weights in a file must be on every machine, under
        the same path. Pictures are read on this machine a few batches ahead of the workers.

        Raises:
            DataError: a worker has no open_clip or no weights, or others than this machine; or the workers end without
                having done anything. Finished work is kept.
        """
        rows = [
            _Row(f"{one.kind}/{one.keys[0]}", {"kind": one.kind, "keys": one.keys, "values": one.values})
            for one in clip.unknown(pictures, texts)
        ]
        if not rows:
            return
        arguments = {"options": clip.options, "weights": clip.weights}
        work = _Work(
            _Scorer, arguments, self.options.workers, gpus=self.options.gpus_per_worker, rows=1, reads_files=True
        )
        for row in show(self._through(rows, work), len(rows), "CLIP by Ray"):
            _raise(row)
            vectors = [np.frombuffer(data, dtype="<f4") for data in row.files]
            clip.adopt(row.body["kind"], dict(zip(row.body["keys"], vectors, strict=True)))

    def _through(self, rows: list[_Row], work: _Work) -> Iterator[_Row]:
        """The rows that workers make of ``rows``, as they come.

        A worker that dies takes the rows with it that it had in hand; they are handed out again. Ray's own retries are
        off: they would repeat what was done, and paid, already.
        """
        fruitless = 0
        while rows:
            done = set()
            for row in self._pass(rows, work):
                done.add(row.id)
                yield row
            rows = [row for row in rows if row.id not in done]
            fruitless = 0 if done else fruitless + 1
            if fruitless == _FRUITLESS:
                raise DataError(
                    f"Ray: {len(rows):,} pieces of work are left, and {_FRUITLESS} times all workers ended without "
                    "finishing one; Ray's logs (/tmp/ray/session_latest/logs on the machines) say why. Often memory "
                    "ran out: fewer workers or smaller batches need less"
                )
            if rows:
                log.warning("Ray: a worker ended; %d pieces of work that are not done are given out again", len(rows))

    def _pass(self, rows: list[_Row], work: _Work) -> Iterator[_Row]:
        import ray
        from ray.data import ActorPoolStrategy, TaskPoolStrategy

        there = ray.cluster_resources()
        places = int(there.get("CPU", 0) / self.options.cpus_per_worker)
        if work.gpus:
            places = min(places, int(there.get("GPU", 0) / work.gpus))
            if not places:
                raise DataError(
                    f"ray.gpus_per_worker is {work.gpus:g} but Ray knows of {there.get('GPU', 0):g} GPUs; set it to 0"
                )
        size = min(work.rows, max(1, len(rows) // (2 * work.workers)))
        blocks = [_table(rows[start : start + size]) for start in range(0, len(rows), size)]
        with _context():
            data = ray.data.from_arrow(blocks)
            if work.reads_files:
                here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
                data = data.map_batches(
                    _read_pictures,
                    batch_size=1,
                    batch_format="pyarrow",
                    compute=TaskPoolStrategy(size=2),
                    num_cpus=0,
                    label_selector=here,
                )
            with warnings.catch_warnings():
                # Ray calls 'ray_remote_args_fn' deprecated; the extra admits only versions that have it.
                warnings.filterwarnings("ignore", "`ray_remote_args_fn` is deprecated")
                data = data.map_batches(
                    work.kind,
                    fn_constructor_kwargs=work.arguments,
                    batch_size=1,
                    batch_format="pyarrow",
                    compute=ActorPoolStrategy(
                        min_size=max(1, min(places, work.workers, len(blocks))),
                        max_size=max(1, min(work.workers, len(blocks))),
                        max_tasks_in_flight_per_actor=2,
                        max_concurrent_calls_per_actor=work.calls,
                    ),
                    num_cpus=self.options.cpus_per_worker,
                    num_gpus=work.gpus or None,
                    ray_remote_args_fn=_never_twice,
                )
            for table in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
                yield from _rows(table)


def _refuse_a_silent_address(address: str | None) -> None:
    """Ray itself would wait for minutes at an address where nobody listens."""
    host, colon, port = (address or "").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise DataError(
            f"Ray at {address}: nobody answers there ({error}); correct 'ray.address' (or RAY_ADDRESS), or leave it "
            "out for a Ray of this machine"
        ) from None


def _never_twice() -> dict[str, Any]:
    """A task that died with its worker is not begun again by Ray, but the worker is."""
    return {"max_task_retries": 0, "max_restarts": -1}


@contextmanager
def _context() -> Iterator[None]:
    """Ray Data's settings: rows come as they are made, and a worker that died does not end the rest. Its reports on
    every pass go to its log files alone."""
    from ray.data import DataContext

    consoles = [one for one in logging.getLogger("ray.data").handlers if isinstance(one, logging.StreamHandler)]
    levels = [one.level for one in consoles]
    for console in consoles:
        console.setLevel(logging.ERROR)
    context = DataContext.get_current()
    wanted = {"target_max_block_size": 1, "max_errored_blocks": -1, "enable_progress_bars": False}
    before = {name: getattr(context, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(context, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        for console, level in zip(consoles, levels, strict=True):
            console.setLevel(level)


def _table(rows: Sequence[_Row]) -> Any:
    import pyarrow as pa

    columns = {
        "id": pa.array([row.id for row in rows], pa.string()),
        "body": pa.array([json.dumps(row.body) for row in rows], pa.large_string()),
        "files": pa.array([row.files for row in rows], pa.large_list(pa.large_binary())),
    }
    return pa.table(columns)


def _rows(table: Any) -> Iterator[_Row]:
    for row in table.to_pylist():
        yield _Row(row["id"], json.loads(row["body"]), tuple(row["files"]))


def _raise(row: _Row) -> None:
    """Raise what ended a worker."""
    if (problem := row.body.get("error")) is None:
        return
    kinds: dict[str, type[KoreError]] = {kind.__name__: kind for kind in (DataError, LanguageModelError)}
    kind, said, place = problem
    if kind not in kinds:
        raise RuntimeError(f"on the machine {place}: {said}")
    raise kinds[kind](f"{said} (on the machine {place})")


def _problem(error: Exception, hide: Callable[[str], str] = str) -> list[str]:
    """An error as plain values: Ray would log it, and only pickles of errors travel."""
    told = isinstance(error, KoreError)
    said = str(error) if told else "".join(traceback.format_exception(error))
    return [type(error).__name__ if told else "", hide(said), platform.node()]


# What follows runs in the workers.


class _Asker:
    """Asks a language model for all that is missing for an item."""

    def __init__(self, model: LanguageModelOptions, options: AugmentationOptions, prompts: dict[str, Prompt]) -> None:
        self.model, self.options, self.prompts = model, options, prompts
        self.totals = Totals()
        self.connection = LazyConnection(model, self.totals)
        self.places = asyncio.Semaphore(model.concurrency)

    async def __call__(self, batch: Any) -> Any:
        (row,) = _rows(batch)
        async with self.places:
            yield _table([_Row(row.id, await self.ask(row.body))])

    async def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        item = Item.model_validate(body["item"])
        known = {entry["key"]: entry for entry in body["known"]}
        with RequestCache(":memory:") as cache:
            for entry in known.values():
                cache.adopt(entry)
            writer = LanguageModelWriter(self.model, cache, options=self.options)
            writer.prompts, writer.totals = self.prompts, self.totals
            cached, error = self.totals.cached, None
            flying: dict[str, asyncio.Task[None]] = {}
            try:
                await writer.fill(item, self.connection, flying)
            except Exception as problem:
                for task in flying.values():
                    task.cancel()
                await asyncio.gather(*flying.values(), return_exceptions=True)
                error = _problem(problem, self._hide)
            self.totals.cached = cached  # the driver counts these
            made = [entry for entry in cache.rows() if known.get(entry["key"]) != entry]
        return {"rows": made, "failures": writer.failures, "totals": self.totals.take(), "error": error}

    def _hide(self, text: str) -> str:
        key = os.environ.get(self.model.key_variable or "", "").strip()
        return text.replace(key, "[key]") if len(key) >= 8 else text


class _Carried(PictureStore):
    """The entries of one query, on their way between the driver and a worker."""

    def __init__(self) -> None:
        super().__init__("")
        self.searches: dict[str, SearchRecord] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.pictures: dict[str, Picture] = {}
        self.files: dict[str, bytes] = {}

    def search(self, key: str) -> SearchRecord | None:
        return self.searches.get(key)

    def save_search(self, key: str, record: SearchRecord) -> None:
        self.searches[key] = record

    def outcome(self, key: str) -> Outcome | None:
        return self.outcomes.get(key)

    def save_outcome(self, key: str, outcome: Outcome) -> None:
        self.outcomes[key] = outcome

    def picture(self, sha256: str) -> Picture | None:
        return self.pictures.get(sha256)

    def add(self, data: bytes, found: Found, *, provider: str, query: str, max_pixels: int, min_side: int) -> Picture:
        picture = describe(data, found, provider=provider, query=query, max_pixels=max_pixels, min_side=min_side)
        self.files[picture.sha256] = data
        return self.pictures.setdefault(picture.sha256, picture)


def _missing_pictures(search: PictureSearch, query: str) -> _Row | None:
    """What a worker needs to know to go on with a query; None where nothing is to be done."""
    record = search.store.search(search.search_key(query))
    body: dict[str, Any] = {"query": query, "record": None, "outcomes": [], "pictures": []}
    if record is None or record.failure is not None:
        return _Row(query, body)
    if not search.sift(record, lambda found: search.settled(found) is None)[2]:
        return None
    body["record"] = record.model_dump(mode="json")
    for found in record.found:
        outcome = search.settled(found)
        if outcome is None:
            continue
        body["outcomes"].append([search.download_key(found), outcome.model_dump(mode="json")])
        if outcome.sha256 is not None and (picture := search.store.picture(outcome.sha256)) is not None:
            body["pictures"].append(picture.model_dump(mode="json"))
    return _Row(query, body)


def _take_pictures(search: PictureSearch, row: _Row) -> None:
    """Write what a worker found; of two that were as far, the first stays."""
    store = search.store
    for told, data in zip(row.body["pictures"], row.files, strict=True):
        store.put(data, Picture.model_validate(told))
    for key, told in row.body["outcomes"]:
        before = store.outcome(key)
        if before is None or before.sha256 is None or store.picture(before.sha256) is None:
            store.save_outcome(key, Outcome.model_validate(told))
    key = search.search_key(row.id)
    record = store.search(key)
    if record is None or record.failure is not None:
        store.save_search(key, SearchRecord.model_validate(row.body["record"]))


class _Finder:
    """Searches for a query and downloads what it needs."""

    def __init__(self, options: ImageSearchOptions) -> None:
        self.options = options
        self.provider = make_provider(options)
        self.limits = Limits(options, self.provider)
        self.places = asyncio.Semaphore(options.concurrency)
        self.decoders = ThreadPoolExecutor(2, thread_name_prefix="decode")
        self.opening = asyncio.Lock()
        self.opened = False

    async def __call__(self, batch: Any) -> Any:
        (row,) = _rows(batch)
        async with self.places:
            try:
                yield _table([await self.find(row)])
            except Exception as error:
                yield _table([_Row(row.id, {"error": _problem(error)})])

    async def find(self, row: _Row) -> _Row:
        async with self.opening:
            if not self.opened:
                await self.provider.__aenter__()
                self.opened = True
        search = PictureSearch(self.options, "", provider=self.provider)
        search.store = store = _Carried()
        key = search.search_key(row.id)
        if row.body["record"] is not None:
            store.save_search(key, SearchRecord.model_validate(row.body["record"]))
        store.outcomes = {name: Outcome.model_validate(told) for name, told in row.body["outcomes"]}
        pictures = [Picture.model_validate(told) for told in row.body["pictures"]]
        store.pictures = {picture.sha256: picture for picture in pictures}
        known = set(store.outcomes)
        await QueryRun(search, self.decoders, self.limits).prepare(row.id)
        body = {
            "record": store.searches[key].model_dump(mode="json"),
            "outcomes": [
                [name, outcome.model_dump(mode="json")] for name, outcome in store.outcomes.items() if name not in known
            ],
            "pictures": [store.pictures[sha256].model_dump(mode="json") for sha256 in store.files],
        }
        return _Row(row.id, body, tuple(store.files.values()))


def _read_pictures(batch: Any) -> Any:
    """Put the pictures' bytes into the row; runs on the driver's machine."""
    (row,) = _rows(batch)
    if row.body["kind"] == "text":
        return batch
    read = {}
    for key, path in zip(row.body["keys"], row.body["values"], strict=True):
        try:
            read[key] = Path(path).read_bytes()
        except OSError:  # gone since it was listed: the assembly says so
            continue
    return _table([_Row(row.id, {**row.body, "keys": list(read), "values": []}, tuple(read.values()))])


class _Scorer:
    """Computes CLIP's vectors; the model stays loaded."""

    def __init__(self, options: ClipOptions, weights: str) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="kore-fast-clip-")
        self.clip = Clip(options, self.folder.name)
        self.weights = weights

    def __call__(self, batch: Any) -> Any:
        (row,) = _rows(batch)
        kind, keys = row.body["kind"], row.body["keys"]
        try:
            if self.clip.weights != self.weights:
                raise DataError(
                    f"CLIP: the weights here are {self.clip.weights}, the driver's {self.weights}; copy the same file "
                    "to all machines"
                )
            contents = dict(zip(keys, row.body["values"] if kind == "text" else row.files, strict=True))
            vectors = self.clip.compute(kind, contents)
        except Exception as error:
            return _table([_Row(row.id, {"error": _problem(error)})])
        files = tuple(vector.astype("<f4").tobytes() for vector in vectors.values())
        return _table([_Row(row.id, {"kind": kind, "keys": list(vectors)}, files)])
