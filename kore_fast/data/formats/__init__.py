"""Sample files of other trainers, in and out: what each is called, and which one a file is.

Every format reads back what it wrote, ``item`` and ``branch`` included; other extra keys are passed over. ``system`` is
kept. A text turn's ``<image>`` marks come back where they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kore_fast.data.formats import llama_factory, llava, messages, parquet, swift
from kore_fast.data.images import MAX_PIXELS
from kore_fast.data.samples import Sample, missing_image
from kore_fast.errors import DataError
from kore_fast.files import iterate_json


class Write(Protocol):
    """Writes samples, whole or not at all, holding few at a time."""

    def __call__(
        self,
        path: str | Path,
        samples: Iterable[Sample],
        image_root: str | Path | None = None,
        *,
        absolute_images: bool = False,
    ) -> None: ...


class Read(Protocol):
    """Checks a whole file, then gives its samples one by one."""

    def __call__(
        self, path: str | Path, image_root: str | Path | None = None, *, max_pixels: int = MAX_PIXELS
    ) -> Iterator[Sample]: ...


@dataclass(frozen=True)
class Format:
    """A file format of samples."""

    name: str
    suffix: str
    summary: str
    write: Write
    read: Read
    holds_pictures: bool = False
    """Pictures are in the file, so paths in it stay relative."""


FORMATS = {
    form.name: form
    for form in (
        Format("llava", ".json", "LLaVA JSON, as KORE-74K", llava.write, llava.read),
        Format(
            "llama-factory",
            ".json",
            "LLaMA-Factory ShareGPT with its dataset_info.json",
            llama_factory.write,
            llama_factory.read,
        ),
        Format("swift", ".jsonl", "ms-swift JSON lines", swift.write, swift.read),
        Format("messages", ".jsonl", "TRL and Hugging Face messages", messages.write, messages.read),
        Format(
            "parquet", ".parquet", "Hugging Face parquet with the pictures in it", parquet.write, parquet.read, True
        ),
    )
}


@dataclass(frozen=True)
class Converted:
    """What `convert` did."""

    source_format: str
    format: str
    samples: int
    unpacked: int
    """Pictures written out of a parquet file."""


def format_of(name: str) -> Format:
    """A format by its name.

    Raises:
        DataError: names the known ones.
    """
    if name not in FORMATS:
        raise DataError(f"no format {name!r}; known are {', '.join(FORMATS)}")
    return FORMATS[name]


def detect(path: str | Path) -> str:
    """The name of a file's format, judged by its first bytes and its first record.

    Raises:
        DataError: no such file, or a record of another shape; says what was found and what is read.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) == b"PAR1":
                return "parquet"
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror or error})") from None
    place, record = next(iterate_json(path), ("", None))
    if record is None:
        raise DataError(f"{path}: there is no sample in it")
    name = _shape(record, lines=place.startswith("line"))
    if name is None:
        found = f"the keys {', '.join(map(repr, record))}" if isinstance(record, dict) else type(record).__name__
        raise DataError(
            f"{path}, {place}: {found}, which is no format that is read: a list of turns under 'conversations' "
            "(from, value) or 'messages' (role, content), or 'query' and 'response'; and pictures under 'image' or "
            "'images'"
        )
    return name


def _shape(record: Any, *, lines: bool) -> str | None:
    if not isinstance(record, dict):
        return None
    turns = next(
        (record[key] for key in ("messages", "conversations", "conversation") if isinstance(record.get(key), list)),
        None,
    )
    if turns is None:
        return "swift" if isinstance(record.get("query"), str) and isinstance(record.get("response"), str) else None
    first = turns[0] if turns else {}
    if not isinstance(first, dict):
        return None
    if "from" in first or "value" in first:
        return "llama-factory" if "images" in record or "messages" in record else "llava"
    if any(isinstance(turn, dict) and isinstance(turn.get("content"), list) for turn in turns):
        return "messages"
    return "swift" if lines else "llama-factory"


def read_any(
    path: str | Path, image_root: str | Path | None = None, *, max_pixels: int = MAX_PIXELS
) -> Iterator[Sample]:
    """Samples of a file of any known format."""
    return FORMATS[detect(path)].read(path, image_root, max_pixels=max_pixels)


def convert(
    source: str | Path,
    target: str | Path,
    format: str,
    *,
    source_format: str | None = None,
    image_root: str | Path | None = None,
    absolute_images: bool = False,
    unpack_to: str | Path | None = None,
) -> Converted:
    """Write a file of samples in another format.

    Args:
        format: a name of `FORMATS`.
        source_format: by default what `detect` says.
        image_root: the folder that picture paths are below, by default the source's, or ``images`` in it where the
            first picture is only there (as ``kore-fast augment`` leaves them when it searches).
        absolute_images: write whole paths, for trainers that are started elsewhere.
        unpack_to: a folder for the pictures inside a parquet source, which is then the ``image_root``.

    Raises:
        DataError: an unknown format, or everything that is wrong with the source; the target is not touched then.
    """
    writer = format_of(format)
    reader = format_of(source_format or detect(source))
    if Path(source).resolve() == Path(target).resolve():
        raise DataError(f"{target}: is the source itself; name another file")
    root = _root_of(source) if image_root is None else Path(image_root)
    unpacked = 0
    if reader.name == "parquet" and unpack_to is not None:
        unpacked = parquet.unpack_images(source, unpack_to)
        root = Path(unpack_to)
    count = 0

    def counted() -> Iterator[Sample]:
        nonlocal count
        for sample in reader.read(source, root):
            count += 1
            yield sample

    writer.write(target, counted(), root, absolute_images=absolute_images)
    return Converted(reader.name, writer.name, count, unpacked)


def _root_of(source: str | Path) -> Path:
    """The folder that a file's pictures are below, as far as its first record tells."""
    beside = Path(source).parent
    if detect(source) != "llava":
        return beside
    record = next(iterate_json(source), ("", None))[1]
    image = record.get("image") if isinstance(record, dict) else None
    first = image[0] if isinstance(image, list) and image else image
    if isinstance(first, str) and missing_image(beside, first) and not missing_image(beside / "images", first):
        return beside / "images"
    return beside
