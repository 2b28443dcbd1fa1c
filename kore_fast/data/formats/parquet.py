"""Parquet with the pictures in it: TRL's messages, and ``images`` that ``datasets`` decodes by itself.

The file's schema carries Hugging Face's features, so ``datasets.load_dataset("parquet", data_files=…)`` gives PIL
pictures. pyarrow is needed (``pip install "kore-fast[parquet]"``).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from kore_fast.data.formats.messages import messages_row
from kore_fast.data.formats.rows import read_records
from kore_fast.data.images import IMAGE_FORMATS, MAX_PIXELS, check_image
from kore_fast.data.problems import Problems
from kore_fast.data.samples import Sample, SampleChecks, checked_for_writing
from kore_fast.errors import DataError
from kore_fast.files import atomic_path, inside

# Rows of pictures are heavy: small groups keep writing, reading and a viewer's pages light.
GROUP_ROWS = 100
GROUP_BYTES = 32 << 20
_OURS = b"kore_fast"


def write(
    path: str | Path, samples: Iterable[Sample], image_root: str | Path | None = None, *, absolute_images: bool = False
) -> None:
    """Write samples with their pictures' bytes; ``path`` inside each picture is its path below ``image_root``.

    Memory holds one group of at most 100 rows or about 32 MiB.

    Raises:
        DataError: pyarrow is missing, no ``image_root``, or a sample is not valid; nothing is written then.
    """
    pa, pq = _pyarrow()
    if image_root is None:
        raise DataError(f"{path}: pictures go into a parquet file; name the folder that they are in")
    if absolute_images:
        raise DataError(f"{path}: pictures go into a parquet file, so paths in it stay relative")
    root = Path(image_root)
    schema = _schema(pa)
    checks = SampleChecks(root, decode=False)
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        rows: list[dict[str, Any]] = []
        size = 0
        for sample in checked_for_writing(path, samples, checks):
            pictures = [{"bytes": _bytes(root, image), "path": image} for image in sample.images]
            rows.append(messages_row(sample, pictures))
            size += sum(len(picture["bytes"]) for picture in pictures)
            if len(rows) >= GROUP_ROWS or size >= GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows, size = [], 0
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def read(path: str | Path, image_root: str | Path | None = None, *, max_pixels: int = MAX_PIXELS) -> Iterator[Sample]:
    """Samples of a parquet file of messages or conversations with pictures.

    A sample names its pictures by the paths inside the file where kore_fast wrote it, else by their bytes' hash (other
    writers keep bare file names, which repeat); `unpack_images` writes the files under the same names.

    Raises:
        DataError: pyarrow is missing, it is no parquet file, or the list of every problem in it.
    """
    return read_records(path, lambda: _rows(path), image_root, max_pixels=max_pixels)


def unpack_images(path: str | Path, folder: str | Path, *, max_pixels: int = MAX_PIXELS) -> int:
    """Write the pictures inside a parquet file below ``folder`` and return how many files that made.

    Raises:
        DataError: lists the pictures that cannot be decoded, leave the folder, or differ from a file that is there.
    """
    problems = Problems()
    written = 0
    for place, name, content in _pictures(path):
        try:
            target = inside(folder, name)
            if target.is_file():
                if target.read_bytes() != content:
                    raise DataError(f"{name!r} is there already with other content; choose an empty folder")
                continue
            with atomic_path(target) as temporary:
                temporary.write_bytes(content)
                check_image(temporary.parent, temporary.name, max_pixels=max_pixels)
            written += 1
        except DataError as error:
            problems.add(f"{place}: {error}")
    problems.raise_any(path, "pictures")
    return written


def _bytes(root: Path, image: str) -> bytes:
    try:
        return inside(root, image).read_bytes()
    except OSError as error:
        raise DataError(f"image {image!r} below {root} cannot be read ({error.strerror or error})") from None


def _rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with pictures' names in place of their bytes."""
    for number, row, ours in _batches(path, pictures=False):
        for key in ("images", "image"):
            if row.get(key) is not None:
                given = row[key] if isinstance(row[key], list) else [row[key]]
                row[key] = [_name(picture, ours) for picture in given]
        yield f"row {number}", row


def _pictures(path: str | Path) -> Iterator[tuple[str, str, bytes]]:
    for number, row, ours in _batches(path, pictures=True):
        for key in ("images", "image"):
            given = row.get(key) or []
            for picture in given if isinstance(given, list) else [given]:
                if isinstance(picture, dict) and picture.get("bytes"):
                    yield f"row {number}", _name(picture, ours), picture["bytes"]


def _batches(path: str | Path, *, pictures: bool) -> Iterator[tuple[int, dict[str, Any], bool]]:
    _, pq = _pyarrow()
    try:
        # Nothing is kept open between files of many shards, and bytes are left out where paths say enough.
        with pq.ParquetFile(path) as file:
            ours = _OURS in (file.schema_arrow.metadata or {})
            names = [file.schema.column(place).path for place in range(len(file.schema))]
            columns = [name for name in names if pictures or not ours or not name.endswith(".bytes")]
            number = 0
            for batch in file.iter_batches(batch_size=32, columns=columns):
                for row in batch.to_pylist():
                    yield number, row, ours
                    number += 1
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as parquet ({error})") from None


def _name(picture: Any, ours: bool) -> Any:
    if not isinstance(picture, dict):
        return picture
    if ours or not picture.get("bytes"):
        return picture.get("path")
    content = picture["bytes"]
    try:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            suffix = str(image.format).lower()
    except Exception:  # not a picture; decoding it says so in its place
        suffix = "bin"
    return f"{hashlib.sha256(content).hexdigest()[:24]}.{suffix}"


def _schema(pa: Any) -> Any:
    text = pa.string()
    picture = pa.struct([("bytes", pa.binary()), ("path", text)])
    part = pa.struct([("type", text), ("text", text)])
    message = pa.struct([("role", text), ("content", pa.list_(part))])
    value = {"dtype": "string", "_type": "Value"}
    # A list of one feature is the form that old and new versions of datasets both read.
    features = {
        "id": value,
        "messages": [{"role": value, "content": [{"type": value, "text": value}]}],
        "images": [{"_type": "Image"}],
        "item": value,
        "branch": value,
    }
    columns = [
        ("id", text),
        ("messages", pa.list_(message)),
        ("images", pa.list_(picture)),
        ("item", text),
        ("branch", text),
    ]
    metadata = {"huggingface": json.dumps({"info": {"features": features}}), _OURS: b"samples"}
    return pa.schema(columns, metadata=metadata)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise DataError('parquet files need pyarrow: pip install "kore-fast[parquet]"') from None
    return pyarrow, pyarrow.parquet
