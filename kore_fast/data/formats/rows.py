"""Files of rows, JSON lists and JSON lines: samples in and out, one held at a time, checked as a whole first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from kore_fast.data.formats.records import Keys, RecordError, sample_of
from kore_fast.data.images import MAX_PIXELS
from kore_fast.data.samples import Sample, SampleChecks, checked_for_writing
from kore_fast.errors import DataError
from kore_fast.files import iterate_json, write_json_list, write_jsonl

Records = Callable[[], Iterable[tuple[str, Any]]]


def write_rows(
    path: str | Path,
    samples: Iterable[Sample],
    row: Callable[[Sample, list[str]], dict[str, Any]],
    image_root: str | Path | None,
    *,
    absolute_images: bool,
    lines: bool,
) -> None:
    """Write ``row(sample, its picture paths)`` for each sample, whole or not at all.

    Args:
        image_root: the pictures' folder; each must be there when it is given.
        absolute_images: write whole paths instead of paths below ``image_root``.
        lines: JSON lines instead of a JSON list.

    Raises:
        DataError: lists every problem; nothing is written then.
    """
    if absolute_images and image_root is None:
        raise DataError(f"{path}: absolute picture paths need the pictures' folder; name it")
    base = Path(image_root).resolve() if absolute_images and image_root is not None else None
    checks = SampleChecks(image_root, decode=False)
    rows = (
        row(sample, [image if base is None else str(base / image) for image in sample.images])
        for sample in checked_for_writing(path, samples, checks)
    )
    (write_jsonl if lines else write_json_list)(path, rows)


def read_rows(
    path: str | Path,
    image_root: str | Path | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
    keys: Keys | None = None,
) -> Iterator[Sample]:
    """Samples of a JSON list or JSON lines of any form that `sample_of` knows.

    The whole file is checked before the first sample comes (it is read twice).

    Raises:
        DataError: lists every problem of the file at once.
    """
    return read_records(path, lambda: iterate_json(path), image_root, max_pixels=max_pixels, keys=keys)


def read_records(
    path: str | Path,
    records: Records,
    image_root: str | Path | None,
    *,
    max_pixels: int = MAX_PIXELS,
    keys: Keys | None = None,
) -> Iterator[Sample]:
    """`read_rows` for records from anywhere; ``records()`` gives (place, record) from the start each time."""
    checks = SampleChecks(image_root, max_pixels=max_pixels)
    found = False
    for number, (place, record) in enumerate(records()):
        found = True
        identity = record.get("id") if isinstance(record, dict) else None
        named = place if identity is None else f"{place}, id {identity!r}"
        try:
            sample = sample_of(record, number, image_root=image_root, keys=keys)
        except RecordError as error:
            checks.problems.add(*(f"{named}: {problem}" for problem in error.problems))
            continue
        checks.add(sample, named)
    if not found:
        checks.problems.add("there is no sample in it")
    checks.problems.raise_any(path, "samples")
    return (sample_of(record, number, image_root=image_root, keys=keys) for number, (_, record) in enumerate(records()))
