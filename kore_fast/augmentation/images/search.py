"""Queries → pictures: `PictureSearch.prepare` fills the cache from the network, `candidates` reads it and nothing else.

All that is slow or may fail is in `prepare`; run again, it asks only for what is missing. What the cache holds decides
what `candidates` says, in the order of the search's results: the assembly of samples stays a pure pass.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from kore_fast.augmentation.images.content import bits_apart, hash_file
from kore_fast.augmentation.images.fetch import Rejected, Unavailable, host_of
from kore_fast.augmentation.images.licences import licence_code
from kore_fast.augmentation.images.options import ImageSearchOptions
from kore_fast.augmentation.images.pace import Pace
from kore_fast.augmentation.images.providers import Found, Provider, make_provider
from kore_fast.augmentation.images.providers.web import WebProvider
from kore_fast.augmentation.images.store import Dropped, Outcome, Picture, PictureStore, SearchRecord, key_of, origin
from kore_fast.errors import DataError
from kore_fast.files import sha256_file
from kore_fast.progress import Progress, silent

T = TypeVar("T")

# So many searches in a row that fail mean that the next ones will fail as well.
_IN_A_ROW = 5


@dataclass(frozen=True)
class Report:
    """Why a result of a query, or the query as a whole (``url`` is None), gave no picture."""

    query: str
    url: str | None
    reason: str
    again: bool
    """The next `PictureSearch.prepare` tries once more."""


class PictureSearch:
    """Pictures for queries, through one provider and one cache folder.

    Args:
        options: provider, licences and bounds.
        cache: the folder of the picture cache; several processes, providers and options may share it.
        provider: searches and downloads; by default the one that ``options`` name.
    """

    def __init__(self, options: ImageSearchOptions, cache: str | Path, *, provider: Provider | None = None) -> None:
        self.options = options
        self.store = PictureStore(cache)
        self.provider = provider or make_provider(options)
        self._scope: dict[str, Any] | None = None

    async def prepare(self, queries: Iterable[str], show: Progress = silent, total: int | None = None) -> None:
        """Search for each query and download what it needs, `ImageSearchOptions.concurrency` queries at a time.

        ``queries`` is read as places become free. A download that fails is a `Report`, not an error.

        Raises:
            DataError: the service refuses the key or who asks, a key is missing, several searches in a row fail, or
                the cache cannot be written. Finished work is kept.
        """
        self.store.tidy()
        waiting = iter(show(queries, total, label="images"))
        async with self.provider:
            with ThreadPoolExecutor(2, thread_name_prefix="decode") as decoders:
                run = QueryRun(self, decoders, Limits(self.options, self.provider))

                async def work() -> None:
                    for query in waiting:
                        if name := normal_query(query):
                            await run.prepare(name)

                await _all(work() for _ in range(self.options.concurrency))

    def known(self, query: str) -> bool:
        """Whether the query was searched for; its pictures may still be missing."""
        record = self.store.search(self.search_key(name)) if (name := normal_query(query)) else None
        return record is not None and record.failure is None

    def candidates(self, query: str, *, own: str | Path | None = None) -> list[Picture]:
        """The query's pictures, best first, at most `ImageSearchOptions.results`, each different from the others.

        ``own`` is the item's own picture: it, and what looks the same, is left out. Reads the cache only. A query of
        no words has no pictures.

        Raises:
            DataError: the query was never prepared with these options.
        """
        name = normal_query(query)
        if not name:
            return []
        record = self.store.search(self.search_key(name))
        if record is None:
            raise DataError(
                f"image search: nothing is known of the query {name!r} in {self.store.folder}; prepare it first, with "
                "the same options"
            )
        kept = self.sift(record)[0]
        if own is None:
            return kept
        sha256, shown = _hashes(str(own))
        return [
            picture
            for picture in kept
            if picture.sha256 != sha256 and bits_apart(int(picture.perceptual, 16), shown) > self.options.near
        ]

    def reports(self, queries: Iterable[str]) -> Iterator[Report]:
        """Why results of the queries gave no picture, query by query, as the cache tells it."""
        for query in queries:
            record = self.store.search(self.search_key(name)) if (name := normal_query(query)) else None
            if record is None:
                continue
            if record.failure is not None:
                yield Report(record.query, None, record.failure, True)
            for dropped in record.dropped:
                yield Report(record.query, dropped.url, dropped.reason, False)
            yield from self.sift(record)[1]

    def path(self, picture: Picture) -> Path:
        """Where a picture is on disk."""
        return self.store.folder / picture.file

    def search_key(self, query: str) -> str:
        """The cache's name for a query: provider, endpoint or folder, and whatever else decides the results."""
        licences = self.options.licences
        return key_of(
            1,
            self.provider.name,
            self._scoped(),
            query,
            self.options.results + self.options.spare,
            licences if licences == "any" else sorted(set(licences)),
        )

    def download_key(self, found: Found) -> str:
        """The cache's name for an address; a path in a folder counts with what was in the folder."""
        return key_of(1, found.url) if isinstance(self.provider, WebProvider) else key_of(1, found.url, self._scoped())

    def bounds(self) -> dict[str, Any]:
        """What a refusal depends on."""
        kept = ("max_bytes", "max_pixels", "min_side", "redirects", "allow_private_addresses")
        return {name: getattr(self.options, name) for name in kept}

    def settled(self, found: Found) -> Outcome | None:
        """What became of a result for good, or None where it is to be tried."""
        outcome = self.store.outcome(self.download_key(found))
        if outcome is None or outcome.again:
            return None
        if outcome.sha256 is None:
            return outcome if outcome.bounds == self.bounds() else None
        return outcome if self.store.picture(outcome.sha256) is not None else None

    def sift(
        self, record: SearchRecord, open_: Callable[[Found], bool] | None = None
    ) -> tuple[list[Picture], list[Report], list[Found]]:
        """The pictures of a search that count, in its order; why others before the last of them do not; and those
        that ``open_`` says are still to be tried, as many as places are left at their turn."""
        kept: list[Picture] = []
        reports: list[Report] = []
        todo: list[Found] = []
        for found in record.found:
            if len(kept) + len(todo) == self.options.results:
                break
            if open_ is not None and open_(found):
                todo.append(found)
                continue
            outcome = self.store.outcome(self.download_key(found))
            if outcome is None:
                continue
            if outcome.sha256 is None:
                again = outcome.again or outcome.bounds != self.bounds()
                reports.append(Report(record.query, found.url, outcome.reason or "no reason is known", again))
                continue
            picture = self.store.picture(outcome.sha256)
            if picture is None:
                continue
            reason = self._unfit(picture) or self._same(picture, kept)
            if reason:
                reports.append(Report(record.query, found.url, reason, False))
                continue
            here = {"provider": record.provider, "query": record.query, **origin(found)}
            kept.append(picture.model_copy(update=here))
        return kept, reports, todo

    def _scoped(self) -> dict[str, Any]:
        if self._scope is None:
            self._scope = self.provider.scope()
        return self._scope

    def _unfit(self, picture: Picture) -> str | None:
        """Why a picture that was kept under other bounds does not count under these."""
        if picture.bytes > self.options.max_bytes:
            return f"it has {picture.bytes:,} bytes, more than the {self.options.max_bytes:,} allowed"
        if picture.width * picture.height > self.options.max_pixels:
            return f"it has more than the {self.options.max_pixels:,} pixels allowed"
        if min(picture.width, picture.height) < self.options.min_side:
            return f"its shorter side has fewer than {self.options.min_side} pixels"
        return None

    def _same(self, picture: Picture, kept: list[Picture]) -> str | None:
        shown = int(picture.perceptual, 16)
        for other in kept:
            if picture.sha256 == other.sha256:
                return f"it is the same file as {other.url}"
            if bits_apart(shown, int(other.perceptual, 16)) <= self.options.near:
                return f"it looks the same as {other.url}"
        return None


class Limits:
    """What all requests of one process to a provider share: their pace, and failures in a row."""

    def __init__(self, options: ImageSearchOptions, provider: Provider) -> None:
        rate = options.requests_per_minute or usual_rate(provider)
        self.searches = Pace(options.concurrency, 60 / rate if isinstance(provider, WebProvider) else 0.0)
        self.hosts: dict[str, Pace] = {}
        self.in_a_row = 0


class QueryRun:
    """One call of `PictureSearch.prepare`: what is under way, and what has failed in it."""

    def __init__(self, owner: PictureSearch, decoders: ThreadPoolExecutor, limits: Limits) -> None:
        self.owner = owner
        self.options = owner.options
        self.store = owner.store
        self.provider = owner.provider
        self.decoders = decoders
        self.failed: set[str] = set()
        self.limits = limits
        self.locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def prepare(self, query: str) -> None:
        """Search for a query and download what it needs; see `PictureSearch.prepare`."""
        key = self.owner.search_key(query)
        async with self.alone(key):
            record = self.store.search(key)
            if record is None or (record.failure is not None and key not in self.failed):
                record = await self.search(key, query)
        while True:
            # Only as many as are still missing: further results take the place of those that cannot be used.
            todo = self.owner.sift(record, self.open)[2]
            if not todo:
                return
            await _all(self.download(found, query) for found in todo)

    def open(self, found: Found) -> bool:
        """Whether a result is still to be tried in this run."""
        return self.owner.download_key(found) not in self.failed and self.owner.settled(found) is None

    async def search(self, key: str, query: str) -> SearchRecord:
        count = self.options.results + self.options.spare
        try:
            found = await self.patiently(lambda: self.provider.search(query, count), self.limits.searches)
        except Unavailable as error:
            self.failed.add(key)
            record = SearchRecord(provider=self.provider.name, query=query, failure=str(error))
            self.store.save_search(key, record)
            self.limits.in_a_row += 1
            if (failures := self.limits.in_a_row) >= _IN_A_ROW:
                raise DataError(
                    f"image search with {self.provider.name!r}: {failures} searches in a row failed, the last, "
                    f"for {query!r}, because {error}; when the service answers again, give the same command again: "
                    "finished work is kept"
                ) from None
            return record
        self.limits.in_a_row = 0
        allowed, dropped = self.allowed(found)
        record = SearchRecord(provider=self.provider.name, query=query, found=allowed, dropped=dropped)
        self.store.save_search(key, record)
        return record

    def allowed(self, found: Iterable[Found]) -> tuple[tuple[Found, ...], tuple[Dropped, ...]]:
        """The results whose licence is allowed, each address once, and the others."""
        kept: dict[str, Found] = {}
        dropped = []
        for one in found:
            code = licence_code(one.licence, one.licence_url)
            if self.options.licences == "any" or code in self.options.licences:
                kept.setdefault(one.url, one)
            else:
                dropped.append(Dropped(url=one.url, reason=f"its licence, {one.licence or 'unknown'}, is not allowed"))
        return tuple(kept.values()), tuple(dropped)

    async def download(self, found: Found, query: str) -> None:
        key = self.owner.download_key(found)
        async with self.alone(key):
            if not self.open(found):
                return
            host = host_of(found.url) if isinstance(self.provider, WebProvider) else ""
            pace = self.limits.hosts.setdefault(host, Pace(self.options.per_host))
            try:
                data = await self.patiently(lambda: self.provider.download(found), pace)
                sha256 = await asyncio.get_running_loop().run_in_executor(self.decoders, self.keep, data, found, query)
                outcome = Outcome(url=found.url, sha256=sha256)
            except Rejected as error:
                outcome = Outcome(url=found.url, reason=str(error), bounds=self.owner.bounds())
            except Unavailable as error:
                outcome = Outcome(url=found.url, reason=str(error), again=True)
            if outcome.sha256 is None:
                self.failed.add(key)
            self.store.save_outcome(key, outcome)

    def keep(self, data: bytes, found: Found, query: str) -> str:
        try:
            return self.store.add(
                data,
                found,
                provider=self.provider.name,
                query=query,
                max_pixels=self.options.max_pixels,
                min_side=self.options.min_side,
            ).sha256
        except DataError as error:
            if isinstance(error.__cause__, OSError):  # the disk's fault, not the picture's
                raise
            raise Rejected(str(error)) from None

    async def patiently(self, ask: Callable[[], Awaitable[T]], pace: Pace) -> T:
        """The answer, after as many tries and waits as the options allow."""
        for tried in range(self.options.retries + 1):
            try:
                async with pace.turn():
                    return await ask()
            except Unavailable as error:
                wait = self.options.backoff * 2**tried if error.wait is None else error.wait
                if not error.again or tried == self.options.retries:
                    raise
                if wait > self.options.patience:
                    raise Unavailable(f"{error}, and asks to wait {wait:.0f} s", again=False) from None
                if error.wait is not None:
                    pace.hold(wait)  # it is meant for everybody, not for this request only
                else:
                    await asyncio.sleep(wait)
        raise AssertionError("a try returns or raises")

    @asynccontextmanager
    async def alone(self, key: str) -> AsyncIterator[None]:
        """Nobody else in this run at the same entry."""
        lock = self.locks.get(key)
        if lock is None:
            lock = self.locks[key] = asyncio.Lock()
        async with lock:
            yield


def normal_query(query: str) -> str:
    """A query with single spaces; two that differ in spaces only are one."""
    return " ".join(query.encode("utf-8", "replace").decode("utf-8").split())


def usual_rate(provider: Provider) -> float:
    """Searches a minute where the options do not say: Openverse grants few without a token."""
    return 20.0 if provider.name == "openverse" and isinstance(provider, WebProvider) and not provider.key() else 60.0


def _hashes(path: str) -> tuple[str, int]:
    """The hashes of a picture outside of the cache."""
    try:
        about = os.stat(path)
        return _hashes_at(path, about.st_mtime_ns, about.st_size)
    except OSError as error:
        raise DataError(f"image {path!r} cannot be read ({error.strerror}); correct the item's picture") from None


@lru_cache(maxsize=64)
def _hashes_at(path: str, time: int, size: int) -> tuple[str, int]:
    return sha256_file(path), hash_file(path)


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do all of it at once; where one part fails, end the others before the error goes on."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
