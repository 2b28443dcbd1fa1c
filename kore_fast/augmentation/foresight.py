"""What an augmentation would send, cost and take, told before anything is sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kore_fast.augmentation.augment import Assembly
from kore_fast.augmentation.grounding import Grounding
from kore_fast.augmentation.images import PictureSearch
from kore_fast.augmentation.images.options import ImageSearchOptions
from kore_fast.augmentation.images.providers import make_provider
from kore_fast.augmentation.images.providers.web import WebProvider
from kore_fast.augmentation.images.search import usual_rate
from kore_fast.augmentation.language import LanguageModelWriter
from kore_fast.augmentation.language.judge import LanguageModelJudge
from kore_fast.augmentation.language.options import LanguageModelOptions
from kore_fast.augmentation.plan import AugmentationPlan
from kore_fast.augmentation.templates import TemplateWriter
from kore_fast.augmentation.wordings import Wordings
from kore_fast.augmentation.writer import Round
from kore_fast.data.items import Item, load_items
from kore_fast.endpoint.tokens import count_tokens
from kore_fast.endpoint.totals import money
from kore_fast.errors import DataError
from kore_fast.progress import minutes

# A request beside the item's text: instructions, and an answer of the usual length.
_TOKENS_BESIDE_THE_TEXT = 450
# Of templates alone, and of putting together what lies in the caches.
_ASSEMBLY_SECONDS = 3.0


@dataclass(frozen=True)
class JudgeEstimate:
    """What the judge would be asked: what is written already is counted; of the rest, the most that it can come to."""

    requests: int
    """To send about answers that are there."""
    cached: int
    """Judged already."""
    further: int
    """At most so many more, about answers that the writer has yet to give."""
    prompt_tokens: int
    """Further ones included, as in the next two."""
    completion_tokens: int
    cost: float | None
    only_doubtful: bool

    def describe(self) -> str:
        """One line for people."""
        said = f"{self.requests:,} requests to send, {self.cached:,} answered already"
        at_most = ""
        if self.further:
            condition = " (if the rules doubt all)" if self.only_doubtful else ""
            said += f", at most {self.further:,} more about answers not written yet{condition}"
            at_most = "at most "
        return (
            f"{said}; {at_most}about {self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens, "
            f"{money(self.cost)}"
        )


def foresee_judge(
    plan: AugmentationPlan, items: Sequence[Item], writer: LanguageModelWriter, wordings: Wordings
) -> JudgeEstimate | None:
    """What the judge would be asked; None where there is none. Nothing is sent."""
    checks = plan.checks
    if checks is None or checks.judge == "off" or checks.action == "off":
        return None
    judge = LanguageModelJudge(writer.model, writer.cache, seed=plan.seed)
    grounding = Grounding(checks, judge=judge)
    seen: set[str] = set()
    sent = cached = prompt = completion = further = 0
    for item, rounds in Assembly(items, plan, wordings=wordings, writer=writer).to_check():
        for case in grounding.to_judge(item, rounds):
            request = judge.request(case)
            if request.key in seen:
                continue
            seen.add(request.key)
            if judge.look_up(request, read=False)[1] is not None:
                cached += 1
            else:
                sent += 1
                prompt, completion = prompt + request.prompt_tokens, completion + request.expected_tokens
    # All rounds of an item, whatever the rules will say of them.
    everything = Grounding(checks.model_copy(update={"judge": "all"}), judge=judge)
    openings = TemplateWriter(wordings, plan.model_copy(update={"rounds": 1}))
    for item in items:
        for case in everything.to_judge(item, _unwritten(item, plan, writer, openings)):
            request = judge.request(case)
            further += 1
            prompt, completion = prompt + request.prompt_tokens, completion + request.expected_tokens
    cost = writer.model.cost(prompt, completion)
    return JudgeEstimate(sent, cached, further, prompt, completion, cost, checks.judge == "doubtful")


def _unwritten(
    item: Item, plan: AugmentationPlan, writer: LanguageModelWriter, openings: TemplateWriter
) -> Iterator[Round]:
    """Rounds of the most words that are allowed, in the place of those that the model has yet to write."""
    requests = writer.requests(item)
    tasks = {request.task for request in writer.texts(item, requests, read=False).missing}
    question = f"What is this of {item.name}, and what is it like?"
    if tasks & {"questions", "answer", "answers"}:
        for variant in range(plan.dialogues):
            yield from openings.dialogue(item, variant)
        yield from [Round(question, "longest " * plan.prose_words)] * requests.question_count
    if "summary" in tasks:
        yield Round(question, f"{item.name}. " + "longest " * plan.summary_words)
    if tasks & {"quadruplets", "spoken_quadruplets"}:
        yield from [Round(question, "longest " * 12)] * plan.vqa


def least_seconds(model: LanguageModelOptions, requests: int, tokens: int) -> float | None:
    """How long so many requests take at least, by the rates that are set; None where none is, as then only the server
    decides, or the Batch API does."""
    if model.batch_api:
        return None
    rates = ((requests, model.requests_per_minute), (tokens, model.tokens_per_minute))
    bounds = [60.0 * count / rate for count, rate in rates if rate is not None]
    return max(bounds, default=None)


def describe_time(model: LanguageModelOptions, requests: int, tokens: int, *, rounds: int = 1) -> str:
    """How long so many requests take, as far as that can be said; ``rounds`` of the Batch API."""
    if model.batch_api:
        each = "" if rounds == 1 else f" for each of {rounds} rounds"
        return f"time: up to 24 hours{each}, by the Batch API"
    least = least_seconds(model, requests, tokens)
    if least is not None:
        return f"time: {minutes(least)} by the rates set, longer if the server is slower"
    turns = -(-requests // model.concurrency)
    return (
        f"time: not known before the server has answered; {requests:,} requests, {model.concurrency} at a time, take "
        f"{turns:,} times as long as one"
    )


def search_seconds(search: PictureSearch | ImageSearchOptions, searches: int) -> float:
    """How long so many searches take at least; 0 in a folder."""
    options = search.options if isinstance(search, PictureSearch) else search
    provider = search.provider if isinstance(search, PictureSearch) else make_provider(search)
    if not isinstance(provider, WebProvider):
        return 0.0
    return 60.0 * searches / (options.requests_per_minute or usual_rate(provider))


def rough_seconds(items_file: Path, plan: AugmentationPlan) -> float | None:
    """What an augmentation takes with empty caches, as far as rates decide it; None where a server does."""
    model, search = plan.language_model, plan.image_search
    if model is None and search is None:
        return _ASSEMBLY_SECONDS
    if model is not None and least_seconds(model, 1, 1) is None:
        return None
    try:
        items = load_items(items_file, check_images=False, skip=lambda problem: None)
        # Of the pictures that VQA asks for nobody knows how many are the same.
        pictures = search_seconds(search, len(items)) if search is not None else 0.0
    except DataError:  # the stage itself says what is wrong
        return _ASSEMBLY_SECONDS
    if model is None:
        return _ASSEMBLY_SECONDS + pictures
    questions = min(model.questions, plan.dialogues * (plan.rounds - 1)) if "dialogue" in plan.branches else 0
    each = (1 + (1 if model.answers_together else questions) if questions else 0) + sum(
        ("caption" in plan.branches, "vqa" in plan.branches and plan.vqa > 0)
    )
    shown = sum(min(count_tokens(item.text), model.max_text_tokens) for item in items)
    writing = least_seconds(model, each * len(items), each * (shown + _TOKENS_BESIDE_THE_TEXT * len(items)))
    return _ASSEMBLY_SECONDS + pictures + (writing or 0.0)
