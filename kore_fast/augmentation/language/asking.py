"""Asking a model for what a request cache does not hold: several requests at a time, each until its answer is usable.

The writer and the judge are made of it: each says which requests there are, and reads their answers in its own way.
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from kore_fast.augmentation.language.item_requests import Request
from kore_fast.augmentation.language.options import LanguageModelOptions
from kore_fast.augmentation.language.prompting import harmless, load_prompts
from kore_fast.augmentation.language.schemas import UnusableError
from kore_fast.endpoint.cache import Entry, Reply, RequestCache
from kore_fast.endpoint.client import Connection, RequestFailedError
from kore_fast.endpoint.totals import Totals, money, said_cost
from kore_fast.progress import Progress, silent

UnitT = TypeVar("UnitT")
NOT_ASKED = "the model has not been asked yet; prepare the items first"


@dataclass(frozen=True)
class Missing:
    """Why there is no text: what a request came to."""

    reason: str
    final: bool
    """The model answered, and nothing of it could be used; False: it has not answered, and may yet."""


@dataclass(frozen=True)
class Outstanding:
    """What one unit of work still asks for."""

    missing: list[Request]
    """What can be asked now and has no answer; further requests may follow from the answers."""
    found: int
    """Requests that are done with: answered, or refused for good."""


@dataclass
class Account:
    """What a set of answers took, whenever it was paid: the same after any number of interruptions."""

    counts: Counter[str] = field(default_factory=Counter)
    models: set[str] = field(default_factory=set)
    rejected: Counter[str] = field(default_factory=Counter)

    def add(self, request: Request, entry: Entry) -> None:
        """Take up an answer or a final refusal."""
        self.counts["requests"] += entry.asks
        self.counts["prompt_tokens"] += entry.prompt_tokens
        self.counts["completion_tokens"] += entry.completion_tokens
        self.models.add(entry.model)
        self.counts["unusable" if entry.problem else "answers"] += 1
        if entry.problem:
            self.rejected[f"{request.task}: {kind_of(entry.problem)}"] += 1

    @property
    def settled(self) -> int:
        """Requests that are done with: answered, or refused for good."""
        return self.counts["answers"] + self.counts["unusable"]

    def take(self, other: Account) -> None:
        """Take up all of another account."""
        self.counts.update(other.counts)
        self.models |= other.models
        self.rejected.update(other.rejected)

    def summary(self, model: LanguageModelOptions, prompts: dict[str, str], keys: Sequence[str]) -> dict[str, Any]:
        """For the data card; plain JSON values. ``keys`` are the counts to tell."""
        return {
            "model": model.model,
            "models_reported": sorted(self.models),
            "parameters": model.parameters,
            "prompts": prompts,
            **{key: self.counts[key] for key in keys},
            "cost": said_cost(model.cost(self.counts["prompt_tokens"], self.counts["completion_tokens"])),
            "unusable_answers": dict(sorted(self.rejected.items())),
        }


class Asker(ABC, Generic[UnitT]):
    """A model, a request cache, and a way to fill it; a unit (an item, a case) is what is prepared as one."""

    label = "ask"
    """What the progress bar says, before the model's name."""

    def __init__(self, model: LanguageModelOptions, cache: RequestCache | str | Path) -> None:
        """``cache`` is the request cache or its file, made where it is missing.

        Raises:
            DataError: the cache or a prompt of one's own cannot be used.
        """
        self.model = model
        self.cache = cache if isinstance(cache, RequestCache) else RequestCache(cache)
        self.prompts = load_prompts(model.prompts)
        self.totals = Totals()
        """Of all preparing so far."""
        self._failed: dict[str, str] = {}

    @abstractmethod
    def look(self, unit: UnitT) -> Callable[[], Outstanding]:
        """Make a unit's requests; what comes back tells, whenever it is called, which of them are missing."""

    def look_up(self, request: Request, *, read: bool = True) -> tuple[Any, Entry | None]:
        """What can be used of a request's answer, or `Missing`; and the answer or final refusal that it rests on.

        With ``read=False`` an answer is not read, and None stands for it.
        """
        entry = self.cache.answer(request.key)
        if entry is not None:
            try:
                return request.read(entry.answer, entry.finish) if read else None, entry
            except UnusableError as error:
                # Kept under rules that have become stricter since: it counts as one unusable reply.
                self.cache.discard(request.key)
                self.cache.refuse(request.key, request.task, request.prompt, entry, str(error))
        refused = self.cache.refused(request.key)
        if refused is not None and refused.asks >= self.model.asks:
            return Missing(f"no usable answer from the model: {refused.problem}", final=True), refused
        return Missing(self._failed.get(request.key, NOT_ASKED), final=False), None

    def failed(self, request: Request) -> bool:
        """Whether the server did not answer this request when last asked."""
        return request.key in self._failed

    def messages(self, request: Request) -> list[dict[str, str]]:
        """What is sent: from the second time on, with the unusable reply and what was wrong with it."""
        refused = self.cache.refused(request.key)
        if refused is None:
            return request.messages
        shown = harmless(refused.answer[:4000]) or "(nothing)"
        again = (
            f"That cannot be used: {harmless(refused.problem[:500])}. "
            "Reply once more, with nothing but the JSON object as described."
        )
        return [*request.messages, {"role": "assistant", "content": shown}, {"role": "user", "content": again}]

    def take(self, request: Request, reply: Reply) -> bool:
        """Keep a reply as the answer or, with what is wrong, as one that cannot be used."""
        problem = {
            "content_filter": "the server's content filter stopped the answer",
            "refusal": f"the model refused: {reply.answer[:200]}",
        }.get(reply.finish)
        if problem is None and not reply.answer.strip():
            problem = "the answer is empty" + (": max_tokens was used up" if reply.finish == "length" else "")
        if problem is None:
            try:
                request.read(reply.answer, reply.finish)
            except UnusableError as error:
                problem = str(error)
        if problem is None:
            self.cache.accept(request.key, request.task, request.prompt, reply)
            self.totals.answers += 1
            return True
        self.cache.refuse(request.key, request.task, request.prompt, reply, problem)
        refused = self.cache.refused(request.key)
        if refused is not None and refused.asks >= self.model.asks:
            self.totals.unusable += 1
            self.totals.reasons[f"{request.task}: {kind_of(problem)}"] += 1
        else:
            self.totals.asked_again += 1
        return False

    def prepare(self, units: Iterable[UnitT], show: Progress = silent) -> dict[str, Any]:
        """Ask the model for all that the cache does not hold; returns the totals of this run.

        Units are taken up a few at a time, so memory does not grow with their number. A request that the server does
        not answer in all its attempts is left for the next run; so is everything after Ctrl-C or ``kill -9``. With
        ``batch_api``, see `prepare_in_batches`.

        Raises:
            LanguageModelError: the model cannot be reached or used (no key, unknown model, server down, openai not
                installed). What was answered before is kept.
        """
        return _run(self.prepare_async(units, show))

    async def prepare_async(self, units: Iterable[UnitT], show: Progress = silent) -> dict[str, Any]:
        """`prepare` for callers with an event loop of their own."""
        if self.model.batch_api:
            from kore_fast.augmentation.language.batch import prepare_in_batches

            await prepare_in_batches(self, units, show)
            return self.run_totals()
        total = len(units) if isinstance(units, Sequence) else None
        self.start()
        async with LazyConnection(self.model, self.totals) as connection:
            waiting = iter(units)
            ticks = show(_count(), total, f"{self.label} {self.model.model}", note=self.note)
            next(ticks, None)

            async def work() -> None:
                for unit in waiting:
                    await self.fill(unit, connection, flying)
                    self.totals.items += 1
                    next(ticks, None)

            flying: dict[str, asyncio.Task[None]] = {}
            workers = [asyncio.ensure_future(work()) for _ in range(self.model.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for task in [*workers, *flying.values()]:
                    task.cancel()
                await asyncio.gather(*workers, *flying.values(), return_exceptions=True)
                close = getattr(ticks, "close", None)
                if close is not None:
                    close()
        return self.run_totals()

    async def fill(self, unit: UnitT, connection: LazyConnection, flying: dict[str, asyncio.Task[None]]) -> None:
        """Ask for all that the cache does not hold of one unit; ``flying`` holds the requests under way, by key."""
        look = self.look(unit)
        outstanding = look()
        self.totals.cached += outstanding.found
        while outstanding.missing:
            tasks = []
            for request in outstanding.missing:
                # Two items with the same text may ask the same: one request serves both.
                if request.key not in flying:
                    task = asyncio.ensure_future(self._ask(request, connection))
                    flying[request.key] = task
                    task.add_done_callback(partial(_landed, flying, request.key))
                tasks.append(flying[request.key])
            await asyncio.gather(*tasks)
            outstanding = look()

    async def _ask(self, request: Request, connection: LazyConnection) -> None:
        while True:
            refused = self.cache.refused(request.key)
            if refused is not None and refused.asks >= self.model.asks:
                return
            server = await connection.get()
            try:
                reply = await server.send(self.messages(request), request.form, request.expected_tokens)
            except RequestFailedError as error:
                self.give_up(request.key, request.task, str(error))
                return
            if self.take(request, reply):
                return

    def start(self) -> None:
        """Begin a run: what failed in an earlier one may be asked again."""
        self._failed.clear()

    def give_up(self, key: str, task: str, reason: str) -> None:
        """Leave a request that the server does not answer for the next run."""
        self._failed[key] = f"no answer from the model: {reason}"
        self.totals.failed += 1
        self.totals.reasons[f"{task}: {kind_of(reason)}"] += 1

    @property
    def failures(self) -> dict[str, str]:
        """What the server did not answer in this run, by the requests' keys."""
        return dict(self._failed)

    def fail(self, failures: dict[str, str]) -> None:
        """Take over `failures` of another process."""
        self._failed.update(failures)

    def run_totals(self) -> dict[str, Any]:
        """The totals of all preparing so far; plain JSON values."""
        return self.totals.as_dict(self._cost())

    def _cost(self) -> float | None:
        return self.model.cost(self.totals.prompt_tokens, self.totals.completion_tokens)

    def note(self) -> str:
        """What is said beside the progress bar."""
        totals = self.totals
        tokens = f"{_short(totals.prompt_tokens)} tokens in, {_short(totals.completion_tokens)} out"
        trouble = [
            f"{count} {word}"
            for count, word in ((totals.retries, "retries"), (totals.unusable, "unusable"), (totals.failed, "failed"))
            if count
        ]
        return ", ".join([f"{totals.requests} requests", tokens, money(self._cost()), *trouble])


class LazyConnection:
    """A `Connection` made when it is first needed: where everything is in the cache, neither key nor openai is."""

    def __init__(self, options: LanguageModelOptions, totals: Totals) -> None:
        self._options, self._totals = options, totals
        self._connection: Connection | None = None

    async def __aenter__(self) -> LazyConnection:
        return self

    async def get(self) -> Connection:
        if self._connection is None:
            # No await before it is set: two askers get the same one.
            self._connection = Connection(self._options, self._totals)
            await self._connection.__aenter__()
        return self._connection

    async def __aexit__(self, *given: Any) -> None:
        if self._connection is not None:
            await self._connection.__aexit__(*given)


def _run(work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """Run to the end, also where a loop runs already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    outcome: list[dict[str, Any] | BaseException] = []

    def run() -> None:
        try:
            outcome.append(asyncio.run(work))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _landed(flying: dict[str, asyncio.Task[None]], key: str, _: object) -> None:
    flying.pop(key, None)


def _count() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


def kind_of(reason: str) -> str:
    """A reason without what differs from case to case, so that like ones can be counted."""
    return reason.split(":")[0].split(" (")[0][:120]


def _short(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.1f}k" if count >= 1e3 else str(count)
