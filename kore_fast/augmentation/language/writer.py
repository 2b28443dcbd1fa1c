"""The language-model writer: dialogue, caption and VQA in the paper's way, by any OpenAI-compatible model.

`LanguageModelWriter.prepare` asks the model and fills the request cache; the methods of `Writer` then read that cache
only, so that assembly neither waits nor depends on luck.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from kore_fast.augmentation import generic
from kore_fast.augmentation.language.cache import Entry, Reply, RequestCache
from kore_fast.augmentation.language.client import Connection, RequestFailedError
from kore_fast.augmentation.language.item_requests import ItemRequests, Request
from kore_fast.augmentation.language.options import LanguageModelOptions
from kore_fast.augmentation.language.prompting import harmless, load_prompts
from kore_fast.augmentation.language.schemas import UnusableError, VisualQuestion
from kore_fast.augmentation.language.totals import Totals, money, said_cost
from kore_fast.augmentation.options import AugmentationOptions
from kore_fast.augmentation.templates import TemplateWriter
from kore_fast.augmentation.wordings import Wordings, fill
from kore_fast.augmentation.writer import CannotWriteError, Round
from kore_fast.data.items import Item
from kore_fast.progress import Progress, silent

_MISSING = "the model has not been asked yet; prepare the items first"


@dataclass(frozen=True)
class Missing:
    """Why there is no text: what a request came to."""

    reason: str
    final: bool
    """The model answered, and nothing of it could be used; False: it has not answered, and may yet."""


@dataclass
class Texts:
    """All that the cache holds for one item."""

    questions: list[str] | Missing | None = None
    answers: list[str | Missing] = field(default_factory=list)
    summary: str | Missing | None = None
    quadruplets: list[VisualQuestion] | Missing | None = None
    missing: list[Request] = field(default_factory=list)
    """What can be asked now and has no answer; answers can be asked once there are questions."""
    entries: list[tuple[Request, Entry]] = field(default_factory=list)
    """What was found, refused replies included."""
    failed: int = 0
    """Requests that the server did not answer when last asked."""
    cut: bool = False
    """The item's text was too long to be shown whole."""


@dataclass(frozen=True)
class Estimate:
    """What a run would take, as far as can be said before the model has answered."""

    items: int
    requests: int
    """Requests to send, one each; a failure or an unusable answer costs more."""
    cached: int
    """Requests whose answers are there already."""
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    """None: unknown, because no prices are given."""
    batches: int = 0
    """Rounds of the Batch API, 0 without it."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "cost": said_cost(self.cost)}

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self.items:,} items: {self.requests:,} requests to send, {self.cached:,} answered already; about "
            f"{self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens (4 bytes a token), "
            f"{money(self.cost)}"
            + ("" if self.cost is not None else ": give price_in and price_out for a million tokens")
        )


class LanguageModelWriter:
    """Writes by a language model what the paper lets GPT-4o write, and the rest by templates.

    Each dialogue opens with a template round; the model's questions, answered one by one from the item's text, are
    shared out evenly among the dialogues. A question whose answer the text does not hold, or that the model cannot
    answer in a usable way, is left out. Captions and VQA follow the paper; `AugmentationOptions.natural_answers`
    chooses between VQA answers in sentences and in single words.
    """

    def __init__(
        self,
        model: LanguageModelOptions,
        cache: RequestCache | str | Path,
        wordings: Wordings | None = None,
        options: AugmentationOptions | None = None,
    ) -> None:
        """``cache`` is the request cache or its file, made where it is missing.

        Raises:
            DataError: the cache or a prompt of one's own cannot be used.
        """
        self.model = model
        self.options = options or AugmentationOptions()
        self.cache = cache if isinstance(cache, RequestCache) else RequestCache(cache)
        self.prompts = load_prompts(model.prompts)
        self.totals = Totals()
        """Of all preparing so far."""
        self._wordings = wordings or Wordings()
        self._template = TemplateWriter(self._wordings, self.options)
        self._opening = TemplateWriter(self._wordings, self.options.model_copy(update={"rounds": 1}))
        self._failed: dict[str, str] = {}
        self._last: tuple[Item, Texts] | None = None
        self._read: set[str] = set()
        self._used: Counter[str] = Counter()
        self._models: set[str] = set()
        self._rejected: Counter[str] = Counter()

    # The Writer protocol: from the cache alone.

    def knowledge(self, item: Item) -> Round:
        """By template."""
        return self._template.knowledge(item)

    def recognition(self, item: Item, shown: Item) -> Round:
        """By template."""
        return self._template.recognition(item, shown)

    def dialogue(self, item: Item, variant: int) -> list[Round]:
        """A template round, then this variant's share of the model's questions.

        Raises:
            CannotWriteError: the model gave no usable questions, or has not been asked.
        """
        opening = self._opening.dialogue(item, variant)
        texts = self._texts(item)
        if texts.questions is None:  # one round a dialogue: the template's
            return opening
        if isinstance(texts.questions, Missing):
            raise CannotWriteError(texts.questions.reason)
        unasked = next((one for one in texts.answers if isinstance(one, Missing) and not one.final), None)
        if unasked is not None:
            raise CannotWriteError(unasked.reason)
        answered = [
            Round(question, answer)
            for question, answer in zip(texts.questions, texts.answers, strict=True)
            if isinstance(answer, str) and answer
        ]
        if not answered:
            reasons = [one.reason for one in texts.answers if isinstance(one, Missing)]
            raise CannotWriteError(reasons[0] if reasons else "the model found no answer in the item's text")
        count = self.options.dialogues
        share = answered[len(answered) * variant // count : len(answered) * (variant + 1) // count]
        return [*opening, *share[: self.options.rounds - 1]]

    def caption(self, item: Item) -> Round:
        """The item's name and the model's summary.

        Raises:
            CannotWriteError: there is no usable summary.
        """
        question = self._template.caption(item)
        summary = self._texts(item).summary
        if not isinstance(summary, str):
            raise CannotWriteError(summary.reason if summary else _MISSING)
        answer = fill(generic.CAPTION_TELL, it=self._wordings.reference(item), prose=summary)
        return Round(question.question, answer, question.search)

    def vqa(self, item: Item) -> list[Round]:
        """The model's short questions; each searches for its subject with the hypernym.

        Raises:
            CannotWriteError: there is no usable question.
        """
        if not self.options.vqa:
            return []
        found = self._texts(item).quadruplets
        if not isinstance(found, list):
            raise CannotWriteError(found.reason if found else _MISSING)
        if self.options.natural_answers:
            return [Round(one.question, one.sentence, one.search) for one in found]
        return [Round(f"{one.question} {generic.VQA_SUFFIX}", one.answer, one.search) for one in found]

    def _texts(self, item: Item) -> Texts:
        if self._last is None or self._last[0] is not item:
            texts = self.texts(item)
            self._last = (item, texts)
            if item.id not in self._read:
                self._read.add(item.id)
                self._count_used(texts)
        return self._last[1]

    def _count_used(self, texts: Texts) -> None:
        used = self._used
        used["items"] += 1
        used["texts_cut"] += texts.cut
        for request, entry in texts.entries:
            used["requests"] += entry.asks
            used["prompt_tokens"] += entry.prompt_tokens
            used["completion_tokens"] += entry.completion_tokens
            self._models.add(entry.model)
            if entry.problem:
                used["unusable"] += 1
                self._rejected[f"{request.task}: {_kind(entry.problem)}"] += 1
            else:
                used["answers"] += 1
        used["questions_not_answered_by_the_text"] += texts.answers.count("")
        used["not_answered"] += len(texts.missing) + texts.failed

    def summary(self) -> dict[str, Any]:
        """What the samples written so far rest on, for the data card: the same after any number of interruptions.

        Requests, tokens and cost are those that the answers took, whenever they were paid.
        """
        keys = (
            "items", "requests", "answers", "unusable", "not_answered", "questions_not_answered_by_the_text",
            "texts_cut", "prompt_tokens", "completion_tokens",
        )  # fmt: skip
        counts = {key: self._used[key] for key in keys}
        return {
            "writer": "language model",
            "model": self.model.model,
            "models_reported": sorted(self._models),
            "parameters": self.model.parameters,
            "prompts": {task: prompt.version for task, prompt in sorted(self.prompts.items())},
            **counts,
            "cost": said_cost(self.model.cost(counts["prompt_tokens"], counts["completion_tokens"])),
            "unusable_answers": dict(sorted(self._rejected.items())),
        }

    # What is there and what is missing.

    def requests(self, item: Item) -> ItemRequests:
        """The item's requests."""
        return ItemRequests(item, self.model, self.options, self.prompts)

    def texts(self, item: Item, requests: ItemRequests | None = None, *, read: bool = True) -> Texts:
        """What the cache holds for an item, and what is missing.

        With ``read=False``, answers on which no further request depends are not read: whoever only asks what is
        missing does not wait for it.
        """
        asked = requests or self.requests(item)
        texts = Texts(cut=asked.material.cut)

        def find(request: Request) -> Any:
            return self._find(request, texts, read)

        branches = self.options.branches
        if "dialogue" in branches and asked.question_count:
            questions = self._find(asked.questions(), texts, True)
            texts.questions = questions
            if isinstance(questions, list):
                if self.model.answers_together:
                    together = find(asked.answers(questions))
                    texts.answers = together if isinstance(together, list) else [together] * len(questions)
                else:
                    texts.answers = [find(asked.answer(question)) for question in questions]
        if "caption" in branches:
            texts.summary = find(asked.summary())
        if "vqa" in branches and self.options.vqa:
            texts.quadruplets = find(asked.quadruplets())
        return texts

    def _find(self, request: Request, texts: Texts, read: bool) -> Any:
        entry = self.cache.answer(request.key)
        if entry is not None:
            try:
                value = request.read(entry.answer, entry.finish) if read else None
            except UnusableError as error:
                # Kept under rules that have become stricter since: it counts as one unusable reply.
                self.cache.discard(request.key)
                self.cache.refuse(request.key, request.task, request.prompt, entry, str(error))
            else:
                texts.entries.append((request, entry))
                return value
        refused = self.cache.refused(request.key)
        if refused is not None and refused.asks >= self.model.asks:
            texts.entries.append((request, refused))
            return Missing(f"no usable answer from the model: {refused.problem}", final=True)
        if request.key in self._failed:
            texts.failed += 1
            return Missing(self._failed[request.key], final=False)
        texts.missing.append(request)
        return Missing(_MISSING, final=False)

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
            self.totals.reasons[f"{request.task}: {_kind(problem)}"] += 1
        else:
            self.totals.asked_again += 1
        return False

    def estimate(self, items: Iterable[Item]) -> Estimate:
        """A dry run: what `prepare` would send now, nothing sent. Tokens are counted at four bytes each."""
        count = requests = cached = prompt = completion = 0
        second_round = False
        for item in items:
            count += 1
            asked = self.requests(item)
            texts = self.texts(item, asked, read=False)
            to_send = list(texts.missing)
            cached += len(texts.entries)
            if isinstance(texts.questions, Missing) and any(one.task == "questions" for one in to_send):
                # Questions of a common length stand for those not yet written.
                foreseen = [f"{place} {'what is this ' * 4}?" for place in range(asked.question_count)]
                second_round = True
                if self.model.answers_together:
                    to_send.append(asked.answers(foreseen))
                else:
                    to_send += [asked.answer(question) for question in foreseen]
            requests += len(to_send)
            prompt += sum(one.prompt_tokens for one in to_send)
            completion += sum(one.expected_tokens for one in to_send)
        batches = (2 if second_round else 1 if requests else 0) if self.model.batch_api else 0
        return Estimate(count, requests, cached, prompt, completion, self.model.cost(prompt, completion), batches)

    # Asking the model.

    def prepare(self, items: Iterable[Item], show: Progress = silent) -> dict[str, Any]:
        """Ask the model for all that the cache does not hold; returns the totals of this run.

        Items are taken up a few at a time, so memory does not grow with their number. A request that the server does
        not answer in all its attempts is left for the next run; so is everything after Ctrl-C or ``kill -9``. With
        ``batch_api``, see `prepare_in_batches`.

        Raises:
            LanguageModelError: the model cannot be reached or used (no key, unknown model, server down, openai not
                installed). What was answered before is kept.
        """
        return _run(self.prepare_async(items, show))

    async def prepare_async(self, items: Iterable[Item], show: Progress = silent) -> dict[str, Any]:
        """`prepare` for callers with an event loop of their own."""
        if self.model.batch_api:
            from kore_fast.augmentation.language.batch import prepare_in_batches

            await prepare_in_batches(self, list(items), show)
            return self.run_totals()
        total = len(items) if isinstance(items, Sequence) else None
        self.start()
        async with LazyConnection(self.model, self.totals) as connection:
            waiting = iter(items)
            ticks = show(_count(), total, f"ask {self.model.model}", note=self.note)
            next(ticks, None)

            async def work() -> None:
                for item in waiting:
                    await self.fill(item, connection, flying)
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

    async def fill(self, item: Item, connection: LazyConnection, flying: dict[str, asyncio.Task[None]]) -> None:
        """Ask for all that the cache does not hold of one item; ``flying`` holds the requests under way, by key."""
        asked = self.requests(item)
        first = True
        while True:
            texts = self.texts(item, asked, read=False)
            if first:
                self.totals.cached += len(texts.entries)
                first = False
            if not texts.missing:
                return
            tasks = []
            for request in texts.missing:
                # Two items with the same text may ask the same: one request serves both.
                if request.key not in flying:
                    task = asyncio.ensure_future(self._ask(request, connection))
                    flying[request.key] = task
                    task.add_done_callback(partial(_landed, flying, request.key))
                tasks.append(flying[request.key])
            await asyncio.gather(*tasks)

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
        self._last = None

    def give_up(self, key: str, task: str, reason: str) -> None:
        """Leave a request that the server does not answer for the next run."""
        self._failed[key] = f"no answer from the model: {reason}"
        self.totals.failed += 1
        self.totals.reasons[f"{task}: {_kind(reason)}"] += 1

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


def _kind(reason: str) -> str:
    """A reason without what differs from case to case, so that like ones can be counted."""
    return reason.split(":")[0].split(" (")[0][:120]


def _short(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.1f}k" if count >= 1e3 else str(count)
