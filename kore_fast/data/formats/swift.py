"""ms-swift JSON lines: ``messages`` of role and content with ``<image>`` marks, and a list of ``images``.

ms-swift looks relative paths up below the environment variable ROOT_IMAGE_DIR.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kore_fast.data.formats.records import messages_of, provenance
from kore_fast.data.formats.rows import read_rows, write_rows
from kore_fast.data.images import MAX_PIXELS
from kore_fast.data.samples import Sample


def write(
    path: str | Path, samples: Iterable[Sample], image_root: str | Path | None = None, *, absolute_images: bool = False
) -> None:
    """One sample a line; ``id``, ``item`` and ``branch`` are extra columns."""

    def row(sample: Sample, images: list[str]) -> dict[str, Any]:
        return {"id": sample.id, "messages": messages_of(sample), "images": images, **provenance(sample)}

    write_rows(path, samples, row, image_root, absolute_images=absolute_images, lines=True)


def read(path: str | Path, image_root: str | Path | None = None, *, max_pixels: int = MAX_PIXELS) -> Iterator[Sample]:
    """Samples of an ms-swift file, of messages or of ``query``, ``response`` and ``history``; see `read_rows`."""
    return read_rows(path, image_root, max_pixels=max_pixels)
