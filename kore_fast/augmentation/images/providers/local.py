"""A folder of one's own: offline, searched by the words of file names and of ``index.jsonl`` in it."""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import Self

from kore_fast.augmentation.images.fetch import Rejected, Unavailable
from kore_fast.augmentation.images.options import ImageSearchOptions
from kore_fast.augmentation.images.providers.provider import Found
from kore_fast.data.problems import describe_validation, raise_problems
from kore_fast.errors import DataError
from kore_fast.files import inside, read_jsonl

INDEX = "index.jsonl"
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}


class Entry(BaseModel):
    """One line of ``index.jsonl``: what is known of a picture beyond its file name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: str
    """The path below the folder."""
    title: str | None = None
    tags: tuple[str, ...] = ()
    licence: str | None = None
    licence_url: str | None = None
    author: str | None = None
    source: str | None = None
    """The page it comes from."""


class Local:
    """Finds the pictures that share most words with a query, rare words counting more; equal ones by path.

    Raises:
        DataError: no such folder, or a line of its index that is wrong (at the first search).
    """

    name = "local"

    def __init__(self, options: ImageSearchOptions) -> None:
        self.options = options
        self.folder = Path(options.folder or "")

    def scope(self) -> dict[str, Any]:
        """A fingerprint of the folder: a picture or line that changes makes its searches anew."""
        return {"folder": self._index.fingerprint}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    async def search(self, query: str, count: int) -> list[Found]:
        """See `Provider.search`."""
        return self._index.search(query, count)

    async def download(self, found: Found) -> bytes:
        """See `Provider.download`."""
        return await asyncio.to_thread(self._read, found.url)

    @cached_property
    def _index(self) -> _Index:
        return _Index(self.folder)

    def _read(self, relative: str) -> bytes:
        try:
            with open(inside(self.folder, relative), "rb") as file:
                data = file.read(self.options.max_bytes + 1)
        except FileNotFoundError:
            raise Rejected(f"{relative} is no longer in {self.folder}") from None
        except OSError as error:
            raise Unavailable(f"{relative} cannot be read ({error.strerror})", again=False) from None
        except DataError as error:
            raise Rejected(str(error)) from None
        if len(data) > self.options.max_bytes:
            raise Rejected(f"{relative} has more than the {self.options.max_bytes:,} bytes allowed")
        return data


class _Index:
    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder of pictures; correct 'folder' of the image search")
        self.entries: dict[str, Entry] = {}
        digest = hashlib.sha256()
        root = folder.resolve()
        for path in sorted(root.rglob("*")):
            relative = path.relative_to(root).as_posix()
            if path.suffix.lower() not in _SUFFIXES or relative.startswith(".") or "/." in relative:
                continue
            if path.is_file() and path.resolve().is_relative_to(root):
                about = path.stat()
                digest.update(f"{relative}\0{about.st_size}\0{about.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
                self.entries[relative] = Entry(image=relative)
        if (folder / INDEX).is_file():
            digest.update((folder / INDEX).read_bytes())
            self._read(folder / INDEX)
        if not self.entries:
            raise DataError(f"{folder}: holds no picture ({', '.join(sorted(_SUFFIXES))}); correct 'folder'")
        self.fingerprint = digest.hexdigest()
        self._words = {relative: _words_of(entry) for relative, entry in self.entries.items()}
        self._having: dict[str, list[str]] = defaultdict(list)
        for relative, words in self._words.items():
            for word in words:
                self._having[word].append(relative)

    def search(self, query: str, count: int) -> list[Found]:
        scores: dict[str, float] = defaultdict(float)
        for word in sorted(_tokens([query])):
            having = self._having.get(word, ())
            for relative in having:
                scores[relative] += math.log1p(len(self.entries) / len(having))
        # Of two with the same words in common, the one that says least else.
        best = sorted(scores, key=lambda relative: (-round(scores[relative], 9), len(self._words[relative]), relative))
        return [self._found(self.entries[relative]) for relative in best[:count]]

    def _found(self, entry: Entry) -> Found:
        return Found(
            url=entry.image,
            source_page=entry.source,
            title=entry.title or Path(entry.image).stem.replace("_", " "),
            author=entry.author,
            licence=entry.licence,
            licence_url=entry.licence_url,
        )

    def _read(self, path: Path) -> None:
        problems: list[str] = []
        for number, record in read_jsonl(path):
            try:
                entry = Entry.model_validate(record)
            except ValidationError as error:
                problems += [f"line {number}: {message}" for message in describe_validation(error, Entry.model_fields)]
                continue
            if entry.image not in self.entries:
                problems.append(f"line {number}: there is no picture {entry.image!r} in the folder")
                continue
            self.entries[entry.image] = entry
        raise_problems(path, "index of pictures", problems)


def _words_of(entry: Entry) -> frozenset[str]:
    return frozenset(_tokens([Path(entry.image).with_suffix("").as_posix(), entry.title or "", *entry.tags]))


def _tokens(texts: Iterable[str]) -> set[str]:
    return {word for text in texts for word in re.findall(r"[^\W_]+", text.casefold())}
