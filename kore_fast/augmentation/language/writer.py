"""The language-model writer: dialogue, caption and VQA in the paper's way, by any OpenAI-compatible model.

`LanguageModelWriter.prepare` asks the model and fills the request cache; the methods of `Writer` then read that cache
only, so that assembly neither waits nor depends on luck. What was read for an item is kept in the cache as a whole, so
that a further run asks the cache once an item.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kore_fast.augmentation import generic
from kore_fast.augmentation.basis import Basis, code_mark, package_mark
from kore_fast.augmentation.language.asking import NOT_ASKED, Account, Asker, Missing, Outstanding
from kore_fast.augmentation.language.item_requests import ItemRequests, Request
from kore_fast.augmentation.language.options import LanguageModelOptions
from kore_fast.augmentation.language.prompting import WRITER_TASKS
from kore_fast.augmentation.language.schemas import VisualQuestion
from kore_fast.augmentation.options import AugmentationOptions
from kore_fast.augmentation.templates import TemplateWriter
from kore_fast.augmentation.wordings import Wordings, fill
from kore_fast.augmentation.writer import CannotWriteError, Round
from kore_fast.data.items import Item
from kore_fast.endpoint.cache import Entry, RequestCache
from kore_fast.endpoint.totals import money, said_cost


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
    unanswered: int = 0
    """Questions that the text does not answer, where ``answers`` are not told."""
    account: Account | None = None
    """What the entries took, where they were not read one by one."""

    @property
    def found(self) -> int:
        """Requests that are done with: answered, or refused for good."""
        return len(self.entries) if self.account is None else self.account.settled

    def spent(self) -> Account:
        """What the entries took."""
        if self.account is not None:
            return self.account
        account = Account()
        for request, entry in self.entries:
            account.add(request, entry)
        return account

    def dump(self) -> str:
        """Two lines of JSON, of texts from which nothing is missing: `Kept`, and what `load` reads."""
        account = self.spent()
        told = {
            "cut": self.cut,
            "unanswered": self.answers.count(""),
            "refused": [(request.key, entry.asks) for request, entry in self.entries if entry.problem],
            "account": [account.counts, sorted(account.models), account.rejected],
        }
        quadruplets: Any = self.quadruplets
        if isinstance(quadruplets, list):
            quadruplets = [[getattr(one, part) for part in _PARTS] for one in quadruplets]
        answers = [_told(one) for one in self.answers]
        texts = [_told(self.questions), answers, _told(self.summary), _told(quadruplets)]
        return f"{json.dumps(told)}\n{json.dumps(texts, ensure_ascii=False)}"

    @classmethod
    def load(cls, kept: Kept, texts: str) -> Texts:
        """The second line that `dump` wrote, with the first."""
        questions, answers, summary, quadruplets = json.loads(texts)
        return cls(
            questions=_read(questions),
            answers=[_read(one) for one in answers],
            summary=_read(summary),
            quadruplets=[VisualQuestion(**dict(zip(_PARTS, one, strict=True))) for one in quadruplets]
            if isinstance(quadruplets, list)
            else _read(quadruplets),
            cut=kept.cut,
            account=kept.account,
        )


@dataclass(frozen=True)
class Kept:
    """What `Texts` rest on: enough for whoever does not need the texts themselves."""

    cut: bool
    unanswered: int
    account: Account

    @property
    def found(self) -> int:
        """Requests that are done with: answered, or refused for good."""
        return self.account.settled

    @classmethod
    def load(cls, value: str, cache: RequestCache) -> Kept | None:
        """The first line of `Texts.dump`; None where a reply that could not be used has been followed by another."""
        told = json.loads(value)
        for key, asks in told["refused"]:
            refused = cache.refused(key)
            if refused is None or refused.asks != asks:
                return None
        counts, models, rejected = told["account"]
        return cls(told["cut"], told["unanswered"], Account(Counter(counts), set(models), Counter(rejected)))


_PARTS = tuple(VisualQuestion.model_fields)


def _told(text: Any) -> Any:
    return {"refused": text.reason} if isinstance(text, Missing) else text


def _read(text: Any) -> Any:
    return Missing(text["refused"], final=True) if isinstance(text, dict) else text


# What decides neither which requests there are nor how their answers are read.
_REACHED_BY = {
    "base_url", "api_key_env", "structured", "attempts", "backoff", "longest_wait", "timeout", "concurrency",
    "requests_per_minute", "tokens_per_minute", "price_in", "price_out", "batch_api", "batch_requests", "batch_bytes",
    "batch_poll", "prompts",
}  # fmt: skip
_MADE_BY_TEMPLATES = {"negatives", "by_picture", "links", "branches"}
_ASKED_FOR = ("dialogue", "caption", "vqa")
_CODE = (
    "kore_fast.augmentation.language", "kore_fast.augmentation.prose", "kore_fast.augmentation.wordings",
    "kore_fast.augmentation.chance", "kore_fast.data.items",
)  # fmt: skip


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


class LanguageModelWriter(Asker[Item]):
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
        super().__init__(model, cache)
        self.options = options or AugmentationOptions()
        self._wordings = wordings or Wordings()
        self._template = TemplateWriter(self._wordings, self.options)
        self._opening = TemplateWriter(self._wordings, self.options.model_copy(update={"rounds": 1}))
        self._last: tuple[Item, Texts] | None = None
        self._read: set[str] = set()
        self._used = Account()

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
        summary = self._texts(item).summary
        if not isinstance(summary, str):
            raise CannotWriteError(summary.reason if summary else NOT_ASKED)
        answer = fill(generic.CAPTION_TELL, it=self._wordings.reference(item), prose=summary)
        return Round(self._template.caption_question(item), answer, item.name)

    def vqa(self, item: Item) -> list[Round]:
        """The model's short questions; each searches for its subject with the hypernym.

        Raises:
            CannotWriteError: there is no usable question.
        """
        if not self.options.vqa:
            return []
        found = self._texts(item).quadruplets
        if not isinstance(found, list):
            raise CannotWriteError(found.reason if found else NOT_ASKED)
        if self.options.natural_answers:
            return [Round(one.question, one.sentence, one.search) for one in found]
        return [Round(f"{one.question} {generic.VQA_SUFFIX}", one.answer, one.search) for one in found]

    def _texts(self, item: Item) -> Texts:
        if self._last is None or self._last[0] is not item:
            basis = self._basis_of(item)
            texts = self._kept(item, basis)
            if texts is None:
                texts = self.texts(item)
                if not texts.missing and not texts.failed:
                    self.cache.keep_derived("texts", item.id, basis, texts.dump())
            self._last = (item, texts)
            if item.id not in self._read:
                self._read.add(item.id)
                self._count_used(texts)
        return self._last[1]

    @cached_property
    def _basis(self) -> Basis:
        # Of a plan's options those of augmentation: the others are other parts'.
        own = set(AugmentationOptions.model_fields) - _MADE_BY_TEMPLATES
        return Basis(
            code_mark(*_CODE),
            package_mark("json-repair"),
            self.model.model_dump(mode="json", exclude=_REACHED_BY),
            {task: self.prompts[task].model_dump(mode="json") for task in sorted(WRITER_TASKS)},
            self.options.model_dump(mode="json", include=own),
            [branch for branch in _ASKED_FOR if branch in self.options.branches],
        )

    def _basis_of(self, item: Item) -> str:
        return self._basis.of(item.model_dump_json())

    def _kept(self, item: Item, basis: str) -> Texts | None:
        """What an earlier run read for the item, from the same answers."""
        value = self.cache.derived("texts", item.id, basis)
        if value is None:
            return None
        told, _, texts = value.partition("\n")
        kept = Kept.load(told, self.cache)
        return None if kept is None else Texts.load(kept, texts)

    def recall(self, item: Item) -> str | None:
        """A hash of all that the cache holds for an item, where an earlier run has read it and nothing has come since.

        The item counts as read then, as for `summary`.
        """
        value = self.cache.derived("texts", item.id, self._basis_of(item))
        if value is None:
            return None
        kept = Kept.load(value.partition("\n")[0], self.cache)
        if kept is None:
            return None
        if item.id not in self._read:
            self._read.add(item.id)
            self._count_used(Texts(cut=kept.cut, unanswered=kept.unanswered, account=kept.account))
        return hashlib.sha256(value.encode()).hexdigest()

    def _count_used(self, texts: Texts) -> None:
        self._used.take(texts.spent())
        counts = self._used.counts
        counts["items"] += 1
        counts["texts_cut"] += texts.cut
        counts["questions_not_answered_by_the_text"] += texts.unanswered or texts.answers.count("")
        counts["not_answered"] += len(texts.missing) + texts.failed

    def summary(self) -> dict[str, Any]:
        """What the samples written so far rest on, for the data card: the same after any number of interruptions.

        Requests, tokens and cost are those that the answers took, whenever they were paid.
        """
        keys = (
            "items", "requests", "answers", "unusable", "not_answered", "questions_not_answered_by_the_text",
            "texts_cut", "prompt_tokens", "completion_tokens",
        )  # fmt: skip
        prompts = {task: self.prompts[task].version for task in sorted(WRITER_TASKS)}
        return {"writer": "language model", **self._used.summary(self.model, prompts, keys)}

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
        value, entry = self.look_up(request, read=read)
        if entry is not None:
            texts.entries.append((request, entry))
        elif self.failed(request):
            texts.failed += 1
        else:
            texts.missing.append(request)
        return value

    def look(self, unit: Item) -> Callable[[], Outstanding]:
        """The item's requests, and which of them are missing."""
        value = self.cache.derived("texts", unit.id, self._basis_of(unit))
        kept = None if value is None else Kept.load(value.partition("\n")[0], self.cache)
        if kept is not None:
            done = Outstanding([], kept.found)
            return lambda: done
        asked = self.requests(unit)

        def outstanding() -> Outstanding:
            texts = self.texts(unit, asked, read=False)
            return Outstanding(texts.missing, len(texts.entries))

        return outstanding

    def start(self) -> None:
        """Begin a run: what failed in an earlier one may be asked again."""
        super().start()
        self._last = None

    def estimate(self, items: Iterable[Item]) -> Estimate:
        """A dry run: what `prepare` would send now, nothing sent. Tokens are counted at four bytes each."""
        count = requests = cached = prompt = completion = 0
        second_round = False
        for item in items:
            count += 1
            kept = self._kept(item, self._basis_of(item))
            if kept is not None:
                cached += kept.found
                continue
            asked = self.requests(item)
            texts = self.texts(item, asked, read=False)
            to_send = list(texts.missing)
            cached += texts.found
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
