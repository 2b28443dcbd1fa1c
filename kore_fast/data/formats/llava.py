"""LLaVA JSON, KORE-74K's own form: a list of ``{"id", "image", "conversations": [{"from", "value"}]}``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kore_fast.data.formats.rows import read_rows, write_rows
from kore_fast.data.images import MAX_PIXELS
from kore_fast.data.samples import Sample


def write(
    path: str | Path, samples: Iterable[Sample], image_root: str | Path | None = None, *, absolute_images: bool = False
) -> None:
    """One sample a line; ``item``, ``branch`` and ``system`` are keys that LLaVA passes over."""

    def row(sample: Sample, images: list[str]) -> dict[str, Any]:
        record = sample.to_record()
        if images:
            record["image"] = images[0] if isinstance(sample.image, str) else images
        return record

    write_rows(path, samples, row, image_root, absolute_images=absolute_images, lines=False)


def read(path: str | Path, image_root: str | Path | None = None, *, max_pixels: int = MAX_PIXELS) -> Iterator[Sample]:
    """Samples of a LLaVA file; see `read_rows`."""
    return read_rows(path, image_root, max_pixels=max_pixels)
