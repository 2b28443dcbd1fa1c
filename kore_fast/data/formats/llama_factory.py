"""LLaMA-Factory's ShareGPT form: ``messages`` of role and content, ``images``, and the entry in dataset_info.json.

LLaMA-Factory looks relative pictures up below ``media_dir``, which is ``dataset_dir`` unless it is set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kore_fast.data.formats.records import SYSTEM, Keys, messages_of, provenance
from kore_fast.data.formats.rows import read_rows, write_rows
from kore_fast.data.images import MAX_PIXELS
from kore_fast.data.samples import Sample
from kore_fast.errors import DataError
from kore_fast.files import read_json, write_json

INFO = "dataset_info.json"


def write(
    path: str | Path, samples: Iterable[Sample], image_root: str | Path | None = None, *, absolute_images: bool = False
) -> None:
    """Write the samples, and their entry (named as the file without its suffix) into dataset_info.json beside it.

    Other entries of a dataset_info.json that is there already stay.

    Raises:
        DataError: a sample is not valid, or the dataset_info.json is not one; nothing is written then.
    """
    path = Path(path)
    info = _info(path)

    def row(sample: Sample, images: list[str]) -> dict[str, Any]:
        return {"id": sample.id, "messages": messages_of(sample), "images": images, **provenance(sample)}

    lines = path.suffix == ".jsonl"
    write_rows(path, samples, row, image_root, absolute_images=absolute_images, lines=lines)
    info[path.stem] = {
        "file_name": path.name,
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    }
    write_json(path.with_name(INFO), info)


def read(path: str | Path, image_root: str | Path | None = None, *, max_pixels: int = MAX_PIXELS) -> Iterator[Sample]:
    """Samples of a ShareGPT file; a dataset_info.json beside it says under which keys, else the usual ones are tried.

    See `read_rows`. Turns of tools are refused: KORE has no use for them.
    """
    path = Path(path)
    entry = next(
        (one for one in _info(path).values() if isinstance(one, dict) and one.get("file_name") == path.name), None
    )
    return read_rows(path, image_root, max_pixels=max_pixels, keys=None if entry is None else _keys(path, entry))


def _info(path: Path) -> dict[str, Any]:
    file = path.with_name(INFO)
    if not file.exists():
        return {}
    info = read_json(file)
    if not isinstance(info, dict):
        raise DataError(f"{file}: expected an object of datasets, found {type(info).__name__}; move it out of the way")
    return info


def _keys(path: Path, entry: dict[str, Any]) -> Keys:
    if entry.get("formatting", "alpaca") != "sharegpt" or entry.get("ranking"):
        raise DataError(
            f"{path}: {INFO} describes it as {entry.get('formatting', 'alpaca')!r}"
            f"{' of preferences' if entry.get('ranking') else ''}; conversations in 'sharegpt' form are read"
        )
    columns, tags = entry.get("columns", {}), entry.get("tags", {})
    return Keys(
        messages=(columns.get("messages", "conversations"),),
        images=(columns["images"],) if columns.get("images") else (),
        system=(columns["system"],) if columns.get("system") else (),
        role=(tags.get("role_tag", "from"),),
        content=(tags.get("content_tag", "value"),),
        roles={
            tags.get("user_tag", "human"): "human",
            tags.get("assistant_tag", "gpt"): "gpt",
            tags.get("system_tag", "system"): SYSTEM,
        },
    )
