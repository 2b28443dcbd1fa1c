"""Items → training samples of each branch, the raw samples without augmentation, and held-out questions.

`Assembly` writes sample by sample, in the order of the items, from what its writer and its picture source have ready:
equal inputs give equal samples, and memory holds the items but not what is made of them. `augment` is the same for sets
that fit into memory.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from kore_fast.augmentation.chance import rank
from kore_fast.augmentation.grounding import Grounding
from kore_fast.augmentation.held_out import held_out_questions
from kore_fast.augmentation.links import LinkOptions, find_links, link_samples
from kore_fast.augmentation.options import AugmentationOptions, Branch
from kore_fast.augmentation.provenance import TEMPLATES, PictureSource, Provenance
from kore_fast.augmentation.templates import TemplateWriter
from kore_fast.augmentation.wordings import Wordings
from kore_fast.augmentation.writer import CannotWriteError, ImageSource, OwnImage, Round, Writer
from kore_fast.data.items import IMAGE_TOKEN, Item
from kore_fast.data.questions import Question
from kore_fast.data.samples import Sample, Turn, validate_sample

Draft = tuple[Item, list[Round]]
"""The item whose picture is shown, and what is said."""


UNSUPPORTED = "not supported by the item's text: "
"""How the reason of what the grounding check takes out begins."""


@dataclass(frozen=True)
class Reject:
    """What was not written, or taken out again, and why."""

    item: str
    branch: str
    reason: str
    example: str = ""

    def as_dict(self) -> dict[str, str]:
        """For a file; without an example where there is none."""
        return {key: value for key, value in vars(self).items() if value or key != "example"}


class Assembly:
    """Writes samples and held-out questions for a set of items.

    What an item gets does not depend on the order of the items; its recognition example with another item depends on
    which others there are.

    Args:
        items: in the order in which samples come.
        writer: by default the template writer with ``wordings``.
        writer_name: as provenance gives it.
        images: by default the items' own pictures.
        grounding: checks what ``writer`` wrote in dialogues, captions and VQA; default no check.

    Raises:
        DataError: a worded fact key that looks like a misspelling of one that the items have.
    """

    def __init__(
        self,
        items: Sequence[Item],
        options: AugmentationOptions | None = None,
        *,
        wordings: Wordings | None = None,
        writer: Writer | None = None,
        writer_name: str = TEMPLATES,
        images: ImageSource | None = None,
        grounding: Grounding | None = None,
    ) -> None:
        self.items = items
        self.options = options or AugmentationOptions()
        self.wordings = wordings or Wordings()
        self.wordings.check_keys(items)
        self.writer = writer or TemplateWriter(self.wordings, self.options)
        self.writer_name = writer_name
        self.images = images or OwnImage()
        self.grounding = grounding
        self.rejects: list[Reject] = []
        """Of the samples so far."""
        self._others = _Others(items, self.options.seed)
        self._sizes: dict[str, _Sizes] = {branch: _Sizes() for branch in self.options.branches}
        self._knowledge = _Sizes()
        self._questions: dict[str, Counter[str]] = {form: Counter() for form in ("by_name", "by_picture")}
        self._left_out: dict[str, int] = {}

    def samples(self) -> Iterator[tuple[Sample, Provenance]]:
        """The samples of all branches, each with where it comes from."""
        self.rejects.clear()
        for item in self.items:
            for branch in self.options.branches:
                if branch == "links":
                    continue
                try:
                    drafts = self._drafts(branch, item)
                except CannotWriteError as error:
                    self.rejects.append(Reject(item.id, branch, str(error)))
                    continue
                for number, (shown, rounds) in enumerate(drafts):
                    made = self._checked(item, branch, rounds)
                    if made is None:
                        continue
                    kept, verdict, flags = made
                    image, source = self.images.find(shown, rounds[0].search, branch)
                    sample = _sample(f"{item.id}-{branch}-{number}", item, branch, image, kept)
                    name = self.writer_name if branch != "recognition" else TEMPLATES
                    yield self._counted(branch, sample), Provenance(name, (source,), verdict, flags)
        if "links" in self.options.branches:
            linking = LinkOptions(seed=self.options.seed, per_item=self.options.links)
            sources: list[PictureSource] = []

            def picture(item: Item) -> str:
                image, source = self.images.find(item, item.name, "links")
                sources.append(source)
                return image

            links = find_links(self.items, linking)
            for sample in link_samples(self.items, links, self.wordings, linking, image=picture):
                yield self._counted("links", sample), Provenance(TEMPLATES, tuple(sources))
                sources.clear()

    def to_check(self) -> Iterator[tuple[Item, list[Round]]]:
        """All that the grounding check will be given, for a judge that has to be prepared."""
        for item in self.items:
            for branch in self.options.branches:
                if branch in ("recognition", "links"):
                    continue
                with suppress(CannotWriteError):
                    for _, rounds in self._drafts(branch, item):
                        yield item, rounds

    def knowledge(self) -> Iterator[Sample]:
        """The raw form: one question an item, answered with its prose (training without augmentation)."""
        for item in self.items:
            raw = self.writer.knowledge(item)
            image, _ = self.images.find(item, raw.search, "knowledge")
            sample = _sample(f"{item.id}-knowledge", item, "knowledge", image, [raw])
            validate_sample(sample)
            self._knowledge.add(sample)
            yield sample

    def questions(self) -> list[Question]:
        """Held-out questions, in wordings never trained on."""
        questions, self._left_out = held_out_questions(self.items, self.wordings, self.options)
        for question in questions:
            self._questions[str(question.form)][str(question.type)] += 1
        return questions

    def summary(self) -> dict[str, Any]:
        """Counts and sizes by branch, of what has been taken so far; plain JSON values."""
        return {
            "items": len(self.items),
            "options": self.options.model_dump(mode="json", include=set(AugmentationOptions.model_fields)),
            "samples": sum(sizes.samples for sizes in self._sizes.values()),
            "branches": {branch: sizes.summary() for branch, sizes in self._sizes.items()},
            "knowledge": self._knowledge.summary(),
            "questions": {
                form: {"questions": counts.total(), "by_fact": dict(sorted(counts.items()))}
                for form, counts in self._questions.items()
            },
            "questions_left_out": self._left_out,
            "prose_shortened": sum(len(item.text.split()) > self.options.prose_words for item in self.items),
        }

    def _drafts(self, branch: Branch, item: Item) -> list[Draft]:
        writer, options = self.writer, self.options
        write: dict[str, Callable[[], list[Draft]]] = {
            "dialogue": lambda: [(item, writer.dialogue(item, variant)) for variant in range(options.dialogues)],
            "recognition": lambda: self._recognition(item),
            "caption": lambda: [(item, [writer.caption(item)])],
            "vqa": lambda: [(item, [one]) for one in writer.vqa(item)],
        }
        return write[branch]()

    def _recognition(self, item: Item) -> list[Draft]:
        drafts = [(item, [self.writer.recognition(item, item)])]
        other = self._others.of(item) if self.options.negatives else None
        if other is None:
            return drafts
        # Either the item's name with another picture, or its picture with another name.
        asked, shown = (item, other) if rank(self.options.seed, item.id, "which") % 2 else (other, item)
        return [*drafts, (shown, [self.writer.recognition(asked, shown)])]

    def _checked(
        self, item: Item, branch: str, rounds: list[Round]
    ) -> tuple[list[Round], str | None, tuple[str, ...]] | None:
        """The rounds that the grounding check leaves, its verdict and flags; None where none is left."""
        if self.grounding is None or self.grounding.options.action == "off" or branch == "recognition":
            return rounds, None, ()
        found = self.grounding.ground(item, rounds)
        for finding in found.findings:
            reason = f"{UNSUPPORTED}{finding.reasons[0] if finding.reasons else 'no reason told'}"
            if finding.dropped:
                self.rejects.append(Reject(item.id, branch, reason, f"{finding.question} → {finding.answer}"))
        if not found.rounds:
            return None
        doubted = [finding for finding in found.findings if not finding.dropped]
        flags = tuple(sorted({reason for finding in doubted for reason in finding.reasons}))
        return found.rounds, "doubted" if doubted else "supported", flags

    def _counted(self, branch: str, sample: Sample) -> Sample:
        validate_sample(sample)
        self._sizes[branch].add(sample)
        return sample


class _Others:
    """Which other item an item is shown with: one of its own type, which is harder to tell apart, if there is one.

    Items stand on a ring, in an order of their own; an item gets the next that has another picture and another name.
    """

    def __init__(self, items: Sequence[Item], seed: int) -> None:
        self._seed = seed
        everyone = sorted((rank(seed, "ring", item.id), place) for place, item in enumerate(items))
        kinds: dict[str, list[tuple[int, Item]]] = defaultdict(list)
        self._all = [(mark, items[place]) for mark, place in everyone]
        for mark, item in self._all:
            kinds[item.type].append((mark, item))
        self._kinds = dict(kinds)

    def of(self, item: Item) -> Item | None:
        mark = rank(self._seed, item.id, "other")
        for ring in (self._kinds.get(item.type, []), self._all):
            start = bisect_right(ring, mark, key=lambda place: place[0])
            for step in range(len(ring)):
                _, other = ring[(start + step) % len(ring)]
                if other.image != item.image and other.name != item.name:
                    return other
        return None


class _Sizes:
    """Counts of samples, rounds and words."""

    def __init__(self) -> None:
        self.samples = self.rounds = self.words = self.characters = 0

    def add(self, sample: Sample) -> None:
        texts = [turn.value.replace(IMAGE_TOKEN, "").strip() for turn in sample.conversations]
        self.samples += 1
        self.rounds += len(sample.conversations) // 2
        self.words += sum(len(text.split()) for text in texts)
        self.characters += sum(len(text) for text in texts)

    def summary(self) -> dict[str, float]:
        return {
            "samples": self.samples,
            "rounds": self.rounds,
            "words": self.words,
            "words_per_sample": round(self.words / self.samples, 1) if self.samples else 0.0,
            "characters": self.characters,
        }


def _sample(identity: str, item: Item, branch: str, image: str, rounds: Sequence[Round]) -> Sample:
    turns = []
    for number, one in enumerate(rounds):
        mark = f"{IMAGE_TOKEN}\n" if number == 0 else ""
        turns.append(Turn(speaker="human", value=mark + one.question))
        turns.append(Turn(speaker="gpt", value=one.answer))
    return Sample(id=identity, image=image, conversations=tuple(turns), item=item.id, branch=branch)


@dataclass(frozen=True)
class Augmented:
    """What comes of a set of items."""

    samples: list[Sample]
    """The training samples of all branches."""
    knowledge: list[Sample]
    """See `Assembly.knowledge`."""
    questions: list[Question]
    """Evaluation, in wordings never trained on."""
    rejects: list[Reject]
    """What was not written, and why."""
    summary: dict[str, Any]
    """See `Assembly.summary`."""


def augment(
    items: Sequence[Item],
    options: AugmentationOptions | None = None,
    *,
    wordings: Wordings | None = None,
    writer: Writer | None = None,
    images: ImageSource | None = None,
    grounding: Grounding | None = None,
) -> Augmented:
    """All that `Assembly` makes of ``items``, in lists.

    Raises:
        DataError: see `Assembly`.
    """
    made = Assembly(items, options, wordings=wordings, writer=writer, images=images, grounding=grounding)
    samples = [sample for sample, _ in made.samples()]
    knowledge = list(made.knowledge())
    questions = made.questions()
    return Augmented(samples, knowledge, questions, made.rejects, made.summary())
