"""Searched pictures, chosen by CLIP, as a source for samples; all pictures of the samples below one folder."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kore_fast.augmentation.clip import Choice, Clip
from kore_fast.augmentation.images import Picture, PictureSearch
from kore_fast.augmentation.options import AugmentationOptions
from kore_fast.augmentation.provenance import PictureSource
from kore_fast.augmentation.writer import CannotWriteError, Writer
from kore_fast.data.items import Item
from kore_fast.files import inside, partial_path

FOUND = "found_pictures"
"""The folder of found pictures in the samples' image folder."""


@dataclass(frozen=True)
class Wanted:
    """What is searched for an item."""

    item: Item
    name: str
    """For recognition and caption; empty where neither is written."""
    texts: tuple[str, ...]
    """For VQA, each once."""

    @property
    def queries(self) -> tuple[str, ...]:
        """Everything, the name first."""
        return (self.name, *self.texts) if self.name else self.texts


def wanted_of(item: Item, writer: Writer, options: AugmentationOptions) -> Wanted:
    """What is searched for an item: its name for recognition and caption, and what VQA asks for."""
    name = item.name if {"recognition", "caption"} & set(options.branches) else ""
    texts: list[str] = []
    if "vqa" in options.branches:
        with suppress(CannotWriteError):
            texts = [one.search for one in writer.vqa(item) if one.search]
    return Wanted(item, name, tuple(dict.fromkeys(texts)))


class FoundImages:
    """Of an item's found pictures the most similar one for recognition, the next for its caption, and for a VQA sample
    the one that fits its search best. Where none was found, and in dialogues, the item's own.

    Reads caches only: `PictureSearch.prepare` and `Clip.warm` come before.

    Args:
        items_folder: of the items' own pictures.
        folder: the samples' image folder; pictures are linked or copied into it.
    """

    def __init__(self, search: PictureSearch, clip: Clip, items_folder: Path, folder: Path) -> None:
        self.search, self.clip = search, clip
        self.items_folder, self.folder = items_folder, folder
        self.counts: Counter[str] = Counter()
        """Samples by where their picture comes from."""
        self._last: tuple[tuple[str, str], tuple[list[Picture], Choice]] | None = None

    def find(self, item: Item, search: str, branch: str) -> tuple[str, PictureSource]:
        """See `ImageSource.find`."""
        own = inside(self.items_folder, item.image)
        if branch in ("recognition", "caption", "vqa") and search:
            pictures, choice = self._choice(item, search, own, by_text=branch == "vqa")
            if choice.kept:
                one = choice.kept[min(1, len(choice.kept) - 1) if branch == "caption" else 0]
                picture = next(found for found in pictures if found.sha256 == one.sha256)
                self.counts[f"{branch}: found"] += 1
                source = PictureSource(
                    False, picture.provider, picture.source_page, picture.author, picture.licence, search, one.score
                )
                return self._placed(one.path, f"{FOUND}/{one.path.name}"), source
            self.counts[f"{branch}: the item's own, as none was found"] += 1
        else:
            self.counts[f"{branch}: the item's own"] += 1
        # Below the folder by its true path: "images/../a.png" would be another place there.
        name = own.relative_to(self.items_folder.resolve()).as_posix()
        return self._placed(own, name), PictureSource(source=item.source, licence=item.licence)

    def pictures(self, wanted: Iterable[Wanted]) -> Iterator[Path]:
        """Every picture that `find` will want scored, item by item."""
        for one in wanted:
            own = inside(self.items_folder, one.item.image)
            if one.name:
                yield own
            for query in one.queries:
                for picture in self.search.candidates(query, own=own):
                    yield self.search.path(picture)

    def _choice(self, item: Item, query: str, own: Path, *, by_text: bool) -> tuple[list[Picture], Choice]:
        key = (f"{item.id}\n{by_text}", query)
        if self._last is None or self._last[0] != key:
            pictures = self.search.candidates(query, own=own)
            paths = [self.search.path(picture) for picture in pictures]
            choice = self.clip.best_for_text(query, paths) if by_text else self.clip.closest(own, paths)
            self._last = (key, (pictures, choice))
        return self._last[1]

    def _placed(self, path: Path, name: str) -> str:
        target = self.folder / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = partial_path(target)
            partial.unlink(missing_ok=True)
            try:
                os.link(path, partial)
            except OSError:  # another disk, or a file system without links
                shutil.copyfile(path, partial)
            os.replace(partial, target)
        return name
