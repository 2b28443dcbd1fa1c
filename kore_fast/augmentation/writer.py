"""The two seams of augmentation: who writes the questions and answers, and where pictures come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kore_fast.augmentation.provenance import PictureSource
from kore_fast.data.items import Item
from kore_fast.errors import DataError


class CannotWriteError(DataError):
    """A writer has nothing to say for an item in one branch; the reason is counted in the summary."""


@dataclass(frozen=True)
class Round:
    """One question with its answer, without ``<image>``.

    ``search`` is what to search for when the picture should not be the item's own (the paper: title; for VQA, subject
    and hypernym).
    """

    question: str
    answer: str
    search: str = ""


class Writer(Protocol):
    """Writes the text of an item's samples. Same item, same arguments: same text, whatever was written before."""

    def knowledge(self, item: Item) -> Round:
        """The raw form: one question, answered with all of the item's prose."""
        ...

    def dialogue(self, item: Item, variant: int) -> list[Round]:
        """A conversation about the item whose first round is shown with the picture; ``variant`` counts from 0."""
        ...

    def recognition(self, item: Item, shown: Item) -> Round:
        """Whether the picture of ``shown`` shows ``item``, answered with yes or no."""
        ...

    def caption(self, item: Item) -> Round:
        """What the picture depicts, in one paragraph."""
        ...

    def vqa(self, item: Item) -> list[Round]:
        """Short questions about what is in the picture, without the item's name in them."""
        ...


class ImageSource(Protocol):
    """Finds the picture that a sample shows."""

    def find(self, item: Item, search: str, branch: str) -> tuple[str, PictureSource]:
        """A path relative to the samples' image folder, and where the picture comes from.

        ``search`` describes what should be seen; two branches of one item may show different pictures.
        """
        ...


class OwnImage:
    """Every sample shows its item's own picture."""

    def find(self, item: Item, search: str, branch: str) -> tuple[str, PictureSource]:
        """The item's picture, whatever is searched for."""
        return item.image, PictureSource(source=item.source, licence=item.licence)
