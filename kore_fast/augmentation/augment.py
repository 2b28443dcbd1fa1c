"""Items → training samples of each branch, the raw samples without augmentation, and held-out questions.

`Assembly` writes sample by sample, in the order of the items, from what its writer and its picture source have ready:
equal inputs give equal samples, and memory holds the items but not what is made of them. `augment` is the same for sets
that fit into memory.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

from kore_fast.augmentation.basis import Basis, code_mark
from kore_fast.augmentation.chance import rank
from kore_fast.augmentation.grounding import Grounding, Memory
from kore_fast.augmentation.held_out import stream_questions
from kore_fast.augmentation.links import LinkOptions, find_links, link_samples
from kore_fast.augmentation.options import AugmentationOptions, Branch
from kore_fast.augmentation.provenance import TEMPLATES, PictureSource, Provenance
from kore_fast.augmentation.templates import TemplateWriter
from kore_fast.augmentation.wordings import Wordings
from kore_fast.augmentation.writer import CannotWriteError, ImageSource, OwnImage, Round, Writer
from kore_fast.data.items import IMAGE_TOKEN, Item
from kore_fast.data.questions import Question
from kore_fast.data.samples import Sample, Written, validate_sample

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


class Recalling(Writer, Protocol):
    """A writer that can tell, without its texts, that they are what they were."""

    def recall(self, item: Item) -> str | None:
        """A hash of all that it has for an item, None where it cannot tell."""
        ...


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
        memory: keeps what `written` made of each item, for a further run with the same writer, items' own pictures and
            a grounding check by rules alone; default: every item is written anew.

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
        memory: Memory | None = None,
    ) -> None:
        self.items = items
        self.options = options or AugmentationOptions()
        self.wordings = wordings or Wordings()
        self.wordings.check_keys(items)
        self.writer = writer or TemplateWriter(self.wordings, self.options)
        self.writer_name = writer_name
        self.images = images or OwnImage()
        self.grounding = grounding
        self._memory = memory
        self.rejects: list[Reject] = []
        """Of the samples so far."""
        self._others = _Others(items, self.options.seed)
        self._sizes: dict[str, _Sizes] = {branch: _Sizes() for branch in self.options.branches}
        self._knowledge = _Sizes()
        self._questions: dict[str, Counter[str]] = {form: Counter() for form in ("by_name", "by_picture")}
        self._left_out: Counter[str] = Counter()

    def samples(self) -> Iterator[tuple[Sample, Provenance]]:
        """The samples of all branches, each with where it comes from; whoever writes them checks them."""
        self.rejects.clear()
        for item in self.items:
            for sample, provenance in self._of_item(item):
                self._sizes[str(sample.branch)].add(sample)
                yield sample, provenance
        if self.grounding is not None:
            self.grounding.flush()
        yield from self._links()

    def written(self) -> Iterator[tuple[Written, Provenance]]:
        """`samples`, each valid and as its line in a file; with a memory, as an earlier run has kept them.

        Raises:
            DataError: a writer wrote what no sample may hold.
        """
        self.rejects.clear()
        for item in self.items:
            for one, provenance in self._kept_of_item(item):
                self._sizes[str(one.branch)].add(one)
                yield one, provenance
        if self.grounding is not None:
            self.grounding.flush()
        for sample, provenance in self._links():
            yield Written.of(sample), provenance

    def _of_item(self, item: Item) -> Iterator[tuple[Sample, Provenance]]:
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
                yield sample, Provenance(name, (source,), verdict, flags)

    def _kept_of_item(self, item: Item) -> Iterator[tuple[Written, Provenance]]:
        memory = self._memory
        basis = None if memory is None else self._basis_of(item)
        value = None if memory is None or basis is None else memory.derived("samples", item.id, basis)
        if value is not None:
            rejects, rows = json.loads(value)
            self.rejects += [Reject(item.id, *told) for told in rejects]
            for row in rows:
                yield _recalled(row)
            return
        before = len(self.rejects)
        rows = []
        for sample, provenance in self._of_item(item):
            one = Written.of(sample)
            rows.append(_to_recall(one, provenance))
            yield one, provenance
        if memory is not None and (basis := basis or self._basis_of(item)) is not None:
            rejects = [[told.branch, told.reason, told.example] for told in self.rejects[before:]]
            memory.keep_derived("samples", item.id, basis, json.dumps([rejects, rows], ensure_ascii=False))

    def _basis_of(self, item: Item) -> str | None:
        """All that an item's samples depend on; None where its texts cannot be told to be the same."""
        texts = cast(Recalling, self.writer).recall(item)
        if texts is None:
            return None
        other = self._others.of(item) if self.options.negatives else None
        return self._ground.of(item.model_dump_json(), other.model_dump_json() if other is not None else "", texts)

    @cached_property
    def _ground(self) -> Basis:
        return Basis(
            code_mark(*_CODE),
            self.options.model_dump(mode="json", include=set(AugmentationOptions.model_fields)),
            self.wordings.model_dump(mode="json"),
            self.writer_name,
            None if self.grounding is None else self.grounding.options.model_dump(mode="json"),
        )

    def _links(self) -> Iterator[tuple[Sample, Provenance]]:
        if "links" in self.options.branches:
            linking = LinkOptions(seed=self.options.seed, per_item=self.options.links)
            sources: list[PictureSource] = []

            def picture(item: Item) -> str:
                image, source = self.images.find(item, item.name, "links")
                sources.append(source)
                return image

            links = find_links(self.items, linking)
            for sample in link_samples(self.items, links, self.wordings, linking, image=picture):
                self._sizes["links"].add(sample)
                yield sample, Provenance(TEMPLATES, tuple(sources))
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
            self._knowledge.add(sample)
            yield sample

    def questions(self) -> Iterator[Question]:
        """Held-out questions, in wordings never trained on."""
        self._left_out.clear()
        for question in stream_questions(self.items, self.wordings, self.options, self._left_out):
            self._questions[str(question.form)][str(question.type)] += 1
            yield question

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
            "questions_left_out": dict(sorted(self._left_out.items())),
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


_CODE = ("kore_fast.augmentation", "kore_fast.augmentation.language", "kore_fast.data", "kore_fast.files")


def _to_recall(one: Written, provenance: Provenance) -> list[Any]:
    sources = [list(vars(source).values()) for source in provenance.pictures]
    sizes = [size for turn in one.sizes for size in turn]
    told = [provenance.writer, sources, provenance.grounding, provenance.flags]
    return [one.id, one.branch, one.images, sizes, one.line, told]


def _recalled(row: list[Any]) -> tuple[Written, Provenance]:
    identity, branch, images, sizes, line, (writer, sources, grounding, flags) = row
    one = Written(identity, branch, tuple(images), tuple(zip(sizes[::2], sizes[1::2], strict=True)), line)
    return one, Provenance(writer, tuple(PictureSource(*source) for source in sources), grounding, tuple(flags))


class _Others:
    """Which other item an item is shown with: one of its own type, which is harder to tell apart, if there is one.

    Items stand on a ring, in an order of their own; an item gets the next that has another picture and another name.
    """

    def __init__(self, items: Sequence[Item], seed: int) -> None:
        self._seed = seed
        everyone = sorted((rank(seed, "ring", item.id), place) for place, item in enumerate(items))
        kinds: dict[str, list[tuple[int, Item]]] = defaultdict(list)
        for mark, place in everyone:
            kinds[items[place].type].append((mark, items[place]))
        self._kinds = {kind: _Ring(ring) for kind, ring in kinds.items()}
        self._all = _Ring([(mark, items[place]) for mark, place in everyone])

    def of(self, item: Item) -> Item | None:
        mark = rank(self._seed, item.id, "other")
        for ring in (self._kinds.get(item.type), self._all):
            other = None if ring is None else ring.after(mark, item)
            if other is not None:
                return other
        return None


class _Ring:
    def __init__(self, places: Sequence[tuple[int, Item]]) -> None:
        self._marks = [mark for mark, _ in places]
        self._items = [item for _, item in places]
        # How far the next place with another picture, or another name, is: thousands may have the same.
        self._to_image = _steps([item.image for item in self._items])
        self._to_name = _steps([item.name for item in self._items])

    def after(self, mark: int, item: Item) -> Item | None:
        """The first item past ``mark`` with another picture and another name than ``item``."""
        size = len(self._items)
        start, step = bisect_right(self._marks, mark), 0
        while step < size:
            place = (start + step) % size
            other = self._items[place]
            if other.image == item.image:
                step += self._to_image[place]
            elif other.name == item.name:
                step += self._to_name[place]
            else:
                return other
        return None


def _steps(values: Sequence[str]) -> list[int]:
    """For each place of a ring, how many steps on the next other value comes; the ring's size where there is none."""
    size = len(values)
    steps = [size] * size
    for place in reversed(range(2 * size - 1)):
        here, following = place % size, (place + 1) % size
        steps[here] = 1 if values[following] != values[here] else min(size, steps[following] + 1)
    return steps


class _Sizes:
    """Counts of samples, rounds and words."""

    def __init__(self) -> None:
        self.samples = self.rounds = self.words = self.characters = 0

    def add(self, sample: Sample | Written) -> None:
        self.samples += 1
        self.rounds += len(sample.sizes) // 2
        for words, characters in sample.sizes:
            self.words += words
            self.characters += characters

    def summary(self) -> dict[str, float]:
        return {
            "samples": self.samples,
            "rounds": self.rounds,
            "words": self.words,
            "words_per_sample": round(self.words / self.samples, 1) if self.samples else 0.0,
            "characters": self.characters,
        }


def _sample(identity: str, item: Item, branch: str, image: str, rounds: Sequence[Round]) -> Sample:
    turns: list[dict[str, str]] = []
    for one in rounds:
        mark = "" if turns else f"{IMAGE_TOKEN}\n"
        turns += [{"from": "human", "value": mark + one.question}, {"from": "gpt", "value": one.answer}]
    # All turns in one validation, which takes a fraction of one for each.
    return Sample.model_validate(
        {"id": identity, "image": image, "conversations": turns, "item": item.id, "branch": branch}
    )


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
        DataError: see `Assembly`; or a writer wrote what no sample may hold.
    """
    made = Assembly(items, options, wordings=wordings, writer=writer, images=images, grounding=grounding)
    samples = [sample for sample, _ in made.samples()]
    knowledge = list(made.knowledge())
    for sample in (*samples, *knowledge):
        validate_sample(sample)
    questions = list(made.questions())
    return Augmented(samples, knowledge, questions, made.rejects, made.summary())
