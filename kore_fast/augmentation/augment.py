"""Items → training samples of four branches, the raw samples without augmentation, and held-out questions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kore_fast.augmentation.chance import rank
from kore_fast.augmentation.held_out import held_out_questions
from kore_fast.augmentation.links import LinkOptions, find_links, link_samples
from kore_fast.augmentation.options import AugmentationOptions
from kore_fast.augmentation.templates import TemplateWriter
from kore_fast.augmentation.wordings import Wordings
from kore_fast.augmentation.writer import CannotWriteError, ImageSource, OwnImage, Round, Writer
from kore_fast.data.items import IMAGE_TOKEN, Item
from kore_fast.data.questions import Question
from kore_fast.data.samples import Sample, Turn, validate_sample


@dataclass(frozen=True)
class Augmented:
    """What comes of a set of items."""

    samples: list[Sample]
    """The training samples of all branches."""
    knowledge: list[Sample]
    """The raw form: one question an item, answered with its prose (training without augmentation)."""
    questions: list[Question]
    """Evaluation, in wordings never trained on."""
    summary: dict[str, Any]
    """Counts and sizes by branch, what was left out and why; plain JSON values."""


def augment(
    items: Sequence[Item],
    options: AugmentationOptions | None = None,
    *,
    wordings: Wordings | None = None,
    writer: Writer | None = None,
    images: ImageSource | None = None,
) -> Augmented:
    """Write samples and held-out questions for ``items``.

    What an item gets does not depend on the order of the items; its recognition example with another item depends on
    which others there are. ``writer`` is by default the template writer with ``wordings``, ``images`` the items' own.

    Raises:
        DataError: a worded fact key that looks like a misspelling of one that the items have.
    """
    options = options or AugmentationOptions()
    wordings = wordings or Wordings()
    wordings.check_keys(items)
    writer = writer or TemplateWriter(wordings, options)
    images = images or OwnImage()
    samples: list[Sample] = []
    rejects: list[dict[str, str]] = []
    for item in items:
        for branch in options.branches:
            if branch == "links":
                continue
            try:
                drafts = _drafts(branch, item, items, writer, options)
            except CannotWriteError as error:
                rejects.append({"item": item.id, "branch": branch, "reason": str(error)})
                continue
            for number, (shown, rounds) in enumerate(drafts):
                image = images.find(shown, rounds[0].search)
                samples.append(_sample(f"{item.id}-{branch}-{number}", item, branch, image, rounds))
    if "links" in options.branches:
        linking = LinkOptions(seed=options.seed, per_item=options.links)
        found = find_links(items, linking)
        samples += link_samples(items, found, wordings, linking, image=lambda item: images.find(item, item.name))
    knowledge = []
    for item in items:
        raw = writer.knowledge(item)
        knowledge.append(_sample(f"{item.id}-knowledge", item, "knowledge", images.find(item, raw.search), [raw]))
    questions, left_out = held_out_questions(items, wordings, options)
    for sample in [*samples, *knowledge]:
        validate_sample(sample)
    summary = {
        "items": len(items),
        "options": options.model_dump(mode="json"),
        "samples": len(samples),
        "branches": {branch: _sizes(s for s in samples if s.branch == branch) for branch in options.branches},
        "knowledge": _sizes(knowledge),
        "questions": {
            form: {
                "questions": sum(question.form == form for question in questions),
                "by_fact": _counted(str(question.type) for question in questions if question.form == form),
            }
            for form in ("by_name", "by_picture")
        },
        "questions_left_out": left_out,
        "prose_shortened": sum(len(item.text.split()) > options.prose_words for item in items),
        "rejects": rejects,
    }
    return Augmented(samples, knowledge, questions, summary)


def _drafts(
    branch: str, item: Item, others: Sequence[Item], writer: Writer, options: AugmentationOptions
) -> list[tuple[Item, list[Round]]]:
    """The branch's samples as (item whose picture is shown, rounds)."""
    write: dict[str, Callable[[], list[tuple[Item, list[Round]]]]] = {
        "dialogue": lambda: [(item, writer.dialogue(item, variant)) for variant in range(options.dialogues)],
        "recognition": lambda: _recognition(item, others, writer, options),
        "caption": lambda: [(item, [writer.caption(item)])],
        "vqa": lambda: [(item, [one]) for one in writer.vqa(item)],
    }
    return write[branch]()


def _recognition(
    item: Item, others: Sequence[Item], writer: Writer, options: AugmentationOptions
) -> list[tuple[Item, list[Round]]]:
    drafts = [(item, [writer.recognition(item, item)])]
    if not options.negatives:
        return drafts
    different = [other for other in others if other.image != item.image and other.name != item.name]
    # One of its own kind is harder to tell apart.
    candidates = [other for other in different if other.type == item.type] or different
    if not candidates:
        return drafts
    other = min(candidates, key=lambda other: rank(options.seed, item.id, "other", other.id))
    # Either the item's name with another picture, or its picture with another name.
    asked, shown = (item, other) if rank(options.seed, item.id, "which") % 2 else (other, item)
    return [*drafts, (shown, [writer.recognition(asked, shown)])]


def _sample(identity: str, item: Item, branch: str, image: str, rounds: Sequence[Round]) -> Sample:
    turns = []
    for number, one in enumerate(rounds):
        mark = f"{IMAGE_TOKEN}\n" if number == 0 else ""
        turns.append(Turn(speaker="human", value=mark + one.question))
        turns.append(Turn(speaker="gpt", value=one.answer))
    return Sample(id=identity, image=image, conversations=tuple(turns), item=item.id, branch=branch)


def _sizes(samples: Iterable[Sample]) -> dict[str, float]:
    chosen = list(samples)
    texts = [turn.value.replace(IMAGE_TOKEN, "").strip() for sample in chosen for turn in sample.conversations]
    words = sum(len(text.split()) for text in texts)
    return {
        "samples": len(chosen),
        "rounds": sum(len(sample.conversations) // 2 for sample in chosen),
        "words": words,
        "words_per_sample": round(words / len(chosen), 1) if chosen else 0.0,
        "characters": sum(len(text) for text in texts),
    }


def _counted(keys: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    return dict(sorted(counts.items()))
