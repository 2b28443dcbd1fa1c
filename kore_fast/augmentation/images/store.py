"""The picture cache: one folder of small files, each written whole or not at all, so that any process may share it.

``searches/`` holds what a query found, ``downloads/`` what became of each address (a picture, or the reason why not),
``pictures/`` each picture once, under its SHA-256, with its origin beside it. A file's name is a hash of what it is
about; nothing is ever looked for by listing a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from kore_fast.augmentation.images.content import EXTENSIONS, decode_picture, perceptual_hash
from kore_fast.augmentation.images.providers.provider import Found
from kore_fast.errors import DataError

Record = TypeVar("Record", bound=BaseModel)


class Dropped(BaseModel):
    """A result that is not downloaded, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    reason: str


class SearchRecord(BaseModel):
    """What one query found; with ``failure``, why it found nothing this time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    provider: str
    query: str
    found: tuple[Found, ...] = ()
    dropped: tuple[Dropped, ...] = ()
    failure: str | None = None


class Outcome(BaseModel):
    """What became of one address: a picture's SHA-256, or a reason."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    sha256: str | None = None
    reason: str | None = None
    again: bool = False
    """The reason is a passing one: the next run tries once more."""
    bounds: dict[str, Any] | None = None
    """The bounds that the reason belongs to; under others, it is tried once more."""


class Picture(BaseModel):
    """A picture in the cache, with its origin."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    """The path below the cache's folder."""
    sha256: str
    perceptual: str
    """`perceptual_hash` as 64 hexadecimal digits."""
    format: str
    bytes: int
    width: int
    height: int
    provider: str
    query: str
    url: str
    source_page: str | None = None
    title: str | None = None
    author: str | None = None
    licence: str | None = None
    licence_url: str | None = None


class PictureStore:
    """The cache below ``folder``, which is made where it is missing."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def tidy(self) -> None:
        """Remove what processes that were killed left half-written more than a day ago."""
        for path in self.folder.glob("*/??/.*.partial"):
            with suppress(OSError):
                if path.stat().st_mtime < time.time() - 86_400:
                    path.unlink()

    def search(self, key: str) -> SearchRecord | None:
        """The record of a search, or None."""
        return self._read(self._place("searches", key, ".json"), SearchRecord)

    def save_search(self, key: str, record: SearchRecord) -> None:
        """Write the record of a search."""
        self._write(self._place("searches", key, ".json"), _json(record))

    def outcome(self, key: str) -> Outcome | None:
        """What became of an address, or None."""
        return self._read(self._place("downloads", key, ".json"), Outcome)

    def save_outcome(self, key: str, outcome: Outcome) -> None:
        """Write what became of an address."""
        self._write(self._place("downloads", key, ".json"), _json(outcome))

    def picture(self, sha256: str) -> Picture | None:
        """A picture with the origin that it was first found with, or None where it, or its file, is not there."""
        picture = self._read(self._place("pictures", sha256, ".json"), Picture)
        if picture is None:
            return None
        try:
            whole = (self.folder / picture.file).stat().st_size == picture.bytes
        except OSError:
            return None
        return picture if whole else None

    def add(self, data: bytes, found: Found, *, provider: str, query: str, max_pixels: int, min_side: int) -> Picture:
        """Check and keep a downloaded file, byte for byte, under its own hash and format.

        Raises:
            DataError: it is no usable picture (the reason), or cannot be written.
        """
        picture = describe(data, found, provider=provider, query=query, max_pixels=max_pixels, min_side=min_side)
        return self.put(data, picture)

    def put(self, data: bytes, picture: Picture) -> Picture:
        """Keep a file with its description; where it is there already, with the one that it has."""
        known = self.picture(picture.sha256)
        if known is not None:
            return known
        self._write(self.folder / picture.file, data)
        # Last: a picture that is described is there.
        self._write(self._place("pictures", picture.sha256, ".json"), _json(picture))
        return picture

    def _place(self, room: str, key: str, suffix: str) -> Path:
        return self.folder / _below(room, key, suffix)

    def _read(self, path: Path, kind: type[Record]) -> Record | None:
        try:
            return kind.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValidationError:
            raise DataError(f"{path}: is not a record of this picture cache; remove it to have it made anew") from None

    def _write(self, path: Path, data: bytes) -> None:
        # Not `atomic_path`: two processes that write the same entry need temporary names of their own.
        temporary = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException as error:
            if temporary is not None:
                with suppress(OSError):
                    os.unlink(temporary)
            if isinstance(error, OSError):
                raise DataError(
                    f"{path}: could not be written ({error.strerror or error}); free some space or choose another "
                    "folder, then give the same command again: finished work is kept"
                ) from error
            raise


def describe(data: bytes, found: Found, *, provider: str, query: str, max_pixels: int, min_side: int) -> Picture:
    """Check a downloaded file and say what it is.

    Raises:
        DataError: it is no usable picture (the reason).
    """
    image = decode_picture(data, max_pixels=max_pixels, min_side=min_side)
    sha256 = hashlib.sha256(data).hexdigest()
    kind = image.format or ""
    return Picture(
        file=_below("pictures", sha256, EXTENSIONS[kind]),
        sha256=sha256,
        perceptual=f"{perceptual_hash(image):064x}",
        format="JPEG" if kind == "MPO" else kind,
        bytes=len(data),
        width=image.width,
        height=image.height,
        provider=provider,
        query=query,
        **origin(found),
    )


def _below(room: str, key: str, suffix: str) -> str:
    return f"{room}/{key[:2]}/{key}{suffix}"


def origin(found: Found) -> dict[str, str | None]:
    """What a picture takes over from the result that led to it."""
    return {
        "url": found.url,
        "source_page": found.source_page,
        "title": found.title,
        "author": found.author,
        "licence": found.licence,
        "licence_url": found.licence_url,
    }


def key_of(*parts: Any) -> str:
    """A name for plain JSON values: equal values, equal names."""
    text = json.dumps(parts, ensure_ascii=True, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _json(record: BaseModel) -> bytes:
    values = record.model_dump(mode="json", exclude_none=True)
    return (json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "replace")
