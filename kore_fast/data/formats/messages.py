"""TRL's and Hugging Face's messages as JSON lines: content in parts of type ``image`` and ``text``, ``images`` beside.

``datasets.load_dataset("json", data_files=…).cast_column("images", List(Image()))`` decodes the pictures; relative
paths are looked up from where the program runs, so write absolute ones or start it in the pictures' folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kore_fast.data.formats.records import messages_of, provenance, split_parts
from kore_fast.data.formats.rows import read_rows, write_rows
from kore_fast.data.images import MAX_PIXELS
from kore_fast.data.samples import Sample


def messages_row(sample: Sample, images: list[Any]) -> dict[str, Any]:
    """The row of a sample, with ``images`` as they are given; a row without pictures has an empty list, which TRL
    asks for."""
    messages = [{"role": one["role"], "content": split_parts(one["content"])} for one in messages_of(sample)]
    return {"id": sample.id, "messages": messages, "images": images, **provenance(sample)}


def write(
    path: str | Path, samples: Iterable[Sample], image_root: str | Path | None = None, *, absolute_images: bool = False
) -> None:
    """One sample a line; ``id``, ``item`` and ``branch`` are extra columns."""
    write_rows(path, samples, messages_row, image_root, absolute_images=absolute_images, lines=True)


def read(path: str | Path, image_root: str | Path | None = None, *, max_pixels: int = MAX_PIXELS) -> Iterator[Sample]:
    """Samples of a file of messages, whose content may also be plain text with ``<image>`` marks; see `read_rows`."""
    return read_rows(path, image_root, max_pixels=max_pixels)
