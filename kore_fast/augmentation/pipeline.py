"""An items file → a folder of samples: requests and searches into caches, then one pass that writes.

What is slow or costs money lies in the cache folder, entry by entry, so that a run that was killed pays for nothing
twice; the pass that follows reads caches only and writes the same bytes each time.

    cache/requests.sqlite  cache/pictures/  cache/clip.sqlite
    folder/samples.json  knowledge.json  questions.jsonl  summary.json  rejects.jsonl  card.json  README.md
    folder/contact_sheet.html  folder/images/ (with image search)  folder/formats/
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kore_fast.augmentation.augment import UNSUPPORTED, Assembly, Reject
from kore_fast.augmentation.basis import Basis, code_mark, package_mark
from kore_fast.augmentation.card import CardInfo, CardTotals, Costs, write_card
from kore_fast.augmentation.clip import Clip
from kore_fast.augmentation.cluster import Cluster
from kore_fast.augmentation.contact_sheet import ContactSheet
from kore_fast.augmentation.foresight import describe_time, foresee_judge, search_seconds
from kore_fast.augmentation.found_images import FoundImages, Wanted, wanted_of
from kore_fast.augmentation.grounding import Grounding
from kore_fast.augmentation.images import PictureSearch, Report
from kore_fast.augmentation.images.search import normal_query
from kore_fast.augmentation.language import LanguageModelWriter, RequestCache
from kore_fast.augmentation.language.judge import LanguageModelJudge
from kore_fast.augmentation.plan import AugmentationPlan
from kore_fast.augmentation.provenance import TEMPLATES
from kore_fast.augmentation.templates import TemplateWriter
from kore_fast.augmentation.wordings import Wordings, wordings_beside
from kore_fast.augmentation.writer import ImageSource, OwnImage, Writer
from kore_fast.data.formats import FORMATS
from kore_fast.data.images import MAX_PIXELS
from kore_fast.data.items import Item, image_problem, load_items
from kore_fast.data.questions import write_questions
from kore_fast.data.samples import Written, stream_samples, write_samples, write_written
from kore_fast.endpoint.totals import money
from kore_fast.errors import DataError
from kore_fast.files import inside, sha256_file, write_json, write_jsonl
from kore_fast.progress import Progress, minutes, silent

IMAGES = "images"
"""The samples' image folder where pictures are searched for; else it is that of the items."""
REJECTS = "rejects.jsonl"


def image_root(items: Path, plan: AugmentationPlan, folder: Path) -> Path:
    """The folder that the samples' pictures are below."""
    return items.parent if plan.image_search is None else folder / IMAGES


@dataclass
class Parts:
    """What writes and finds, for one set of items."""

    items: list[Item]
    bad_items: list[str]
    wordings: Wordings
    writer: Writer
    language_model: LanguageModelWriter | None
    search: PictureSearch | None
    clip: Clip | None


def read_parts(items_file: Path, plan: AugmentationPlan, cache: Path, stack: ExitStack) -> Parts:
    """Items and what is to work on them; nothing is asked yet.

    Raises:
        DataError: the items file cannot be used, or a part is not set up.
    """
    bad: list[str] = []
    requests = None
    if plan.language_model is not None:
        cache.mkdir(parents=True, exist_ok=True)
        requests = stack.enter_context(RequestCache(cache / "requests.sqlite"))
    items = load_items(
        items_file,
        skip=bad.append if plan.skip_bad_items else None,
        picture_problem=None if requests is None else partial(_picture_problem, requests, _picture_basis()),
    )
    wordings = wordings_beside(items_file)
    model = None
    writer: Writer = TemplateWriter(wordings, plan)
    if plan.language_model is not None and requests is not None:
        writer = model = LanguageModelWriter(plan.language_model, requests, wordings, plan)
    search = clip = None
    if plan.image_search is not None:
        if plan.clip is None:
            raise DataError(
                "image_search finds pictures that CLIP must choose from: give 'clip' (a model and its weights), or "
                "clip: {unfiltered: true} to take them in the search's order"
            )
        search = PictureSearch(plan.image_search, cache / "pictures")
        clip = stack.enter_context(Clip(plan.clip, cache))
    return Parts(items, bad, wordings, writer, model, search, clip)


def _picture_problem(kept: RequestCache, basis: str, root: str | Path, relative: str) -> str | None:
    """`image_problem`; a picture of the same bytes that could be decoded once is not decoded again."""
    try:
        digest = sha256_file(inside(root, relative))
    except (DataError, OSError, RuntimeError, ValueError):
        return image_problem(root, relative)
    if kept.derived("picture", digest, basis) is None:
        problem = image_problem(root, relative)
        if problem is not None:
            return problem
        kept.keep_derived("picture", digest, basis, "")
    return None


def _picture_basis() -> str:
    return Basis(code_mark("kore_fast.data.images"), package_mark("pillow"), MAX_PIXELS).of()


def describe_cost(items_file: Path, plan: AugmentationPlan, cache: Path) -> str:
    """What a run would ask and cost, in lines for people; nothing is sent.

    Raises:
        DataError: see `read_parts`.
    """
    with ExitStack() as stack:
        parts = read_parts(items_file, plan, cache, stack)
        lines = [f"{len(parts.items):,} items" + (f", {len(parts.bad_items):,} left out" if parts.bad_items else "")]
        model = parts.language_model
        if model is None:
            lines.append("writer: templates, no requests")
        else:
            lines += _requests_foreseen(plan, parts, model)
        if parts.search is not None:
            wanted = {query for one in _wanted(plan, parts) for query in one.queries}
            known = sum(parts.search.known(query) for query in wanted)
            more = "" if model is None else ", and those of VQA once it is written"
            least = search_seconds(parts.search, len(wanted) - known)
            time = f"; {minutes(least)} by the rate, and the downloads" if least else ""
            lines.append(f"{parts.search.provider.name}: {len(wanted) - known:,} searches, {known:,} known{more}{time}")
        return "\n".join(lines)


def _requests_foreseen(plan: AugmentationPlan, parts: Parts, model: LanguageModelWriter) -> list[str]:
    """The writer's and the judge's requests, both together, and the time."""
    written = model.estimate(parts.items)
    lines = [f"{model.model.model}: {written.describe()}"]
    requests, tokens = written.requests, written.prompt_tokens + written.completion_tokens
    rounds, at_most = written.batches, ""
    judged = foresee_judge(plan, parts.items, model, parts.wordings)
    if judged is not None:
        lines.append(f"judge: {judged.describe()}")
        requests += judged.requests + judged.further
        tokens += judged.prompt_tokens + judged.completion_tokens
        rounds += bool(judged.requests + judged.further)
        at_most = "at most " if judged.further else ""
        cost = None if written.cost is None or judged.cost is None else written.cost + judged.cost
        lines.append(f"together: {at_most}{requests:,} requests, {tokens:,} tokens, {money(cost)}")
    if requests:
        lines.append(describe_time(model.model, requests, tokens, rounds=rounds))
    return lines


def produce(
    items_file: Path,
    plan: AugmentationPlan,
    folder: Path,
    cache: Path,
    *,
    name: str | None = None,
    show: Progress = silent,
) -> dict[str, Any]:
    """Everything, from the items file to the files in ``folder``; see the module.

    Args:
        plan: its paths are absolute, see `AugmentationPlan.resolved`.
        cache: kept between runs, and between changes of the plan.
        name: the data set's, for its card.

    Returns:
        What ``summary.json`` holds.

    Raises:
        DataError: the items, a cache or a part cannot be used. Finished work is kept.
        LanguageModelError: the model cannot be reached.
    """
    with ExitStack() as stack:
        parts = read_parts(items_file, plan, cache, stack)
        # With templates and the items' own pictures there is nothing slow to hand out.
        slow = parts.language_model is not None or parts.search is not None
        cluster = stack.enter_context(Cluster(plan.ray)) if plan.ray is not None and slow else None
        if parts.language_model is not None:
            if cluster is None:
                parts.language_model.prepare(parts.items, show)
            else:
                cluster.ask(parts.language_model, parts.items, show)
        # Kept, as a language model's questions are not read from the cache again for each use.
        wanted = [] if parts.search is None else list(_wanted(plan, parts))
        images = _images(items_file, folder, parts, wanted, cluster, show)
        grounding, judge = _grounding(plan, parts, show)
        named = name or items_file.parent.name
        return _write(items_file, plan, folder, parts, images, grounding, judge, wanted, named)


def _grounding(
    plan: AugmentationPlan, parts: Parts, show: Progress
) -> tuple[Grounding | None, LanguageModelJudge | None]:
    """The check in force, and its judge, who has been asked about all that will be put before it."""
    checks, model = plan.checks, parts.language_model
    if checks is None:
        return None, None
    if model is None:
        return Grounding(checks), None
    if checks.judge == "off":
        return Grounding(checks, memory=model.cache), None
    judge = LanguageModelJudge(model.model, model.cache, seed=plan.seed)
    grounding = Grounding(checks, judge=judge, memory=model.cache)
    written = Assembly(parts.items, plan, wordings=parts.wordings, writer=parts.writer).to_check()
    judge.prepare((case for item, rounds in written for case in grounding.to_judge(item, rounds)), show)
    return grounding, judge


def unanswered(summary: dict[str, Any]) -> str:
    """What a run lacks because a server did not answer, in words; empty where nothing is lacking.

    Args:
        summary: what `produce` returned.
    """
    lacking = [
        (sum(summary.get(who, {}).get("not_answered", 0) for who in ("writer", "judge")), "request"),
        (summary.get("pictures_to_try_again", 0), "search or download"),
    ]
    said = []
    for count, what in lacking:
        if count:
            plural = {"request": "requests", "search or download": "searches and downloads"}[what]
            said.append(f"{count:,} {what} was not answered" if count == 1 else f"{count:,} {plural} were not answered")
    return ", ".join(said)


def _wanted(plan: AugmentationPlan, parts: Parts) -> Iterator[Wanted]:
    return (wanted_of(item, parts.writer, plan) for item in parts.items)


def _images(
    items_file: Path, folder: Path, parts: Parts, wanted: Sequence[Wanted], cluster: Cluster | None, show: Progress
) -> ImageSource:
    """Search, download and score; then the source that reads what is there."""
    if parts.search is None or parts.clip is None:
        return OwnImage()
    every = dict.fromkeys(query for one in wanted for query in one.queries)
    if cluster is None:
        asyncio.run(parts.search.prepare(every, show, len(every)))
    else:
        cluster.find(parts.search, every, show)
    found = FoundImages(parts.search, parts.clip, items_file.parent, folder / IMAGES)
    pictures, texts = found.pictures(wanted), (text for one in wanted for text in one.texts)
    if cluster is None:
        parts.clip.warm(pictures, texts)
    else:
        cluster.score(parts.clip, pictures, texts, show)
    return found


def _write(
    items_file: Path,
    plan: AugmentationPlan,
    folder: Path,
    parts: Parts,
    images: ImageSource,
    grounding: Grounding | None,
    judge: LanguageModelJudge | None,
    wanted: Sequence[Wanted],
    name: str,
) -> dict[str, Any]:
    model = parts.language_model
    writer_name = TEMPLATES if model is None else model.model.model
    # Found pictures, a sentence embedding and a judge have caches and counts of their own.
    checks = None if grounding is None else grounding.options
    recallable = isinstance(images, OwnImage) and judge is None and (checks is None or checks.embedding is None)
    assembly = Assembly(
        parts.items,
        plan,
        wordings=parts.wordings,
        writer=parts.writer,
        writer_name=writer_name,
        images=images,
        grounding=grounding,
        memory=None if model is None or not recallable else model.cache,
    )
    totals, sheet = CardTotals(), ContactSheet(per_branch=plan.contact_sheet, seed=plan.seed)
    for item in parts.items:
        totals.add_item(item)

    def samples() -> Iterator[Written]:
        for sample, provenance in assembly.written():
            # The card counts; what exactly is doubted stands on the sheet.
            kinds = {kind_of(UNSUPPORTED + flag) for flag in provenance.flags}
            totals.add_sample(sample, replace(provenance, flags=tuple(sorted(kinds))) if kinds else provenance)
            sheet.add(sample, provenance)
            yield sample

    write_written(folder / "samples.json", samples())
    write_samples(folder / "knowledge.json", assembly.knowledge())
    write_questions(folder / "questions.jsonl", assembly.questions())
    rejects = [*(_item_reject(problem) for problem in parts.bad_items), *assembly.rejects]
    reports = _reports(parts, wanted)
    rejects += (
        Reject(owner, "picture", report.reason, f"{report.query}: {report.url or 'the search'}")
        for owner, report in reports
    )
    write_jsonl(folder / REJECTS, (reject.as_dict() for reject in rejects))
    kinds: Counter[str] = Counter()
    for reject in rejects:
        detail = f"{reject.reason}: {reject.example}" if reject.example else reject.reason
        kind = kind_of(reject.reason)
        kinds[kind] += 1
        totals.add_reject(kind, item=reject.item, branch=reject.branch, example=detail)
    summary = assembly.summary()
    # Item by item they are in the file of rejects.
    summary["rejects"] = {"total": len(rejects), "reasons": dict(sorted(kinds.items()))}
    summary["writer"] = {"writer": TEMPLATES} if model is None else model.summary()
    if judge is not None:
        summary["judge"] = judge.summary()
    if isinstance(images, FoundImages) and parts.clip is not None:
        summary["pictures"] = dict(sorted(images.counts.items()))
        summary["pictures_to_try_again"] = sum(report.again for _, report in reports)
        summary["clip"] = parts.clip.card()
    root = image_root(items_file, plan, folder)
    write_card(folder, totals.card(_card_info(name, plan, summary)))
    sheet.write(folder / "contact_sheet.html", root, title=name, names={item.id: item.name for item in parts.items})
    for format_name in plan.formats:
        form = FORMATS[format_name]
        target = folder / "formats" / format_name / f"samples{form.suffix}"
        form.write(target, stream_samples(folder / "samples.json"), root, absolute_images=not form.holds_pictures)
    write_json(folder / "summary.json", summary)
    return summary


def kind_of(reason: str) -> str:
    """A reason without what differs from case to case, so that a card counts like ones together."""
    reason = re.sub(r"^(?:line|record) \d+(?:, (?:item|id) (?:'(?:[^'\\]|\\.)*'|\"[^\"]*\"))?: ", "", reason)
    if reason.startswith(UNSUPPORTED):
        what = re.split("['\":]", reason.removeprefix(UNSUPPORTED), maxsplit=1)[0].strip()
        return f"{UNSUPPORTED}{what or 'a sentence'}"[:120]
    reason = re.sub(r"'[^']*'|\"[^\"]*\"", "…", reason.partition("; ")[0])
    reason = re.sub(r"\b[\w-]+(?:\.[\w-]+)+(?::\d+)?|\[[0-9a-f:]+\]|\d[\d,.]*", "…", reason)
    return reason[:120]


def _item_reject(problem: str) -> Reject:
    """The report on an item that was left out; what tells its id says so first."""
    named = re.match(r"[^:]*?\b(?:item|id) '((?:[^'\\]|\\.)*)'", problem)
    return Reject(named.group(1) if named else "", "item", problem)


def _reports(parts: Parts, wanted: Sequence[Wanted]) -> list[tuple[str, Report]]:
    """Why results of the searches gave no picture, each with the first item that searched for it."""
    if parts.search is None:
        return []
    owners: dict[str, str] = {}
    for one in wanted:
        for query in one.queries:
            owners.setdefault(normal_query(query), one.item.id)
    return [(owners[report.query], report) for report in parts.search.reports(owners)]


def _card_info(name: str, plan: AugmentationPlan, summary: dict[str, Any]) -> CardInfo:
    writer = summary["writer"]
    models = {"writer": str(writer.get("model", writer["writer"]))}
    if "judge" in summary:
        models["judge"] = summary["judge"]["model"]
    clip = summary.get("clip", {})
    if clip:
        models["clip"] = f"{clip['model']} ({clip['weights']})" if clip["filtered"] else clip["note"]
    asked = [summary[who] for who in ("writer", "judge") if "model" in summary.get(who, {})]
    costs = [one["cost"] for one in asked]
    return CardInfo(
        name=name,
        seed=plan.seed,
        options=summary["options"],
        models=models,
        prompts={task: version for one in asked for task, version in one["prompts"].items()},
        costs=Costs(
            requests=sum(one["requests"] for one in asked),
            prompt_tokens=sum(one["prompt_tokens"] for one in asked),
            completion_tokens=sum(one["completion_tokens"] for one in asked),
            money=sum(costs) if all(isinstance(cost, int | float) for cost in costs) else None,
        ),
    )
