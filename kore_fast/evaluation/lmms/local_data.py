"""Benchmarks from files on this machine: what a user downloaded, as parquet that lmms-eval's own tasks read.

A folder holds one folder a benchmark (``mme``, ``pope``, …) with the data set's files as they are on the hub, its whole
repository or a part: parquet named after its split, or JSON lines whose pictures are paths below the folder or base64.
OCRVQA and MMDU are read from VLMEvalKit's TSV files too, EVOKE from its own evaluation file.
"""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import hashlib
import io
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from kore_fast.errors import DataError
from kore_fast.evaluation.lmms.benchmarks import Benchmark
from kore_fast.files import inside, iterate_json, quick_digest

Row = dict[str, Any]
_ENDINGS = (".parquet", ".jsonl", ".json", ".tsv")
_ROWS = 256
# Where VLMEvalKit's TSV shows the picture of another row, its cell holds that row's index.
_LONGEST_INDEX = 64
_BELOW = ("", "images", "imgs", "imgs/evaluation")
# As the hub's own files are called: test-00000-of-00002.parquet.
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d+-of-\d+")
# What the hub takes for a split, and what these data sets have besides.
_SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"} | {
    "testmini",
    "non_image",
    "adversarial",
    "popular",
    "random",
    "lite",
}
IMAGE_HERE = "<ImageHere>"


def local_files(benchmark: Benchmark, data: Path) -> list[Path]:
    """The files of a benchmark below ``data``, none where its folder is not there.

    Where files or their folders name splits, as the hub's do, only those of the benchmark's split; where folders name
    configurations of its data set, only those of the one that is measured.

    Raises:
        DataError: the folder holds no data file, files of several kinds, other splits or configurations only, or the
            split in several folders.
    """
    folder = data / benchmark.name
    if not folder.is_dir():
        return []
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix in _ENDINGS and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    named = [file for file in files if file.name == benchmark.file]
    files = named or files
    if any(file.suffix == ".parquet" for file in files):
        # MathVista's repository has annotations and sources beside its rows.
        files = [file for file in files if file.suffix != ".json"]
    kinds = sorted({file.suffix for file in files})
    if len(kinds) != 1:
        found = f"files of several kinds ({', '.join(kinds)})" if kinds else "no data file"
        raise DataError(
            f"{folder}: holds {found}; put {benchmark.data or 'the files of its data set on the hub'} there, "
            f"as one of {', '.join(_ENDINGS)}"
        )
    return _of_split(benchmark, folder, _of_configuration(benchmark, folder, files))


def _of_configuration(benchmark: Benchmark, folder: Path, files: list[Path]) -> list[Path]:
    """Those below a folder of the configuration's name; where there is none, those below no other's."""
    of: dict[str, list[Path]] = {}
    for file in files:
        parts = file.parent.relative_to(folder).parts
        of.setdefault(next((part for part in reversed(parts) if part in benchmark.configurations), ""), []).append(file)
    for wanted in (*benchmark.configurations[:1], ""):
        if wanted in of:
            return of[wanted]
    raise DataError(
        f"{folder}: holds only {_some(sorted(of))}; put the files of {benchmark.title}{_which(benchmark)} there"
    )


def _of_split(benchmark: Benchmark, folder: Path, files: list[Path]) -> list[Path]:
    """Those of the split; all where none names a split."""
    of: dict[str, list[Path]] = {}
    for file in files:
        of.setdefault(_split_of(file.relative_to(folder), benchmark.split), []).append(file)
    if set(of) == {""}:
        return files
    if benchmark.split in of:
        places = sorted({str(file.parent.relative_to(folder)) for file in of[benchmark.split]})
        if len(places) > 1 and not benchmark.parts:
            raise DataError(
                f"{folder}: holds the split {benchmark.split} in several folders ({_some(places)}); leave one, that "
                f"of {benchmark.title}{_which(benchmark)}"
            )
        return of[benchmark.split]
    raise DataError(
        f"{folder}: holds the split {_some(sorted(filter(None, of)))}, but {benchmark.title} is measured on "
        f"{benchmark.split}; put files named {benchmark.split}-… or {benchmark.split}{files[0].suffix} there"
    )


def _split_of(path: Path, wanted: str) -> str:
    """The split that a file's name tells, or the nearest of its folders; empty where none does."""
    shard = _SHARD.match(path.name)
    if shard is not None:
        return shard[1]
    for name in (path.name.split("-")[0].split(".")[0], *reversed(path.parent.parts)):
        if name == wanted or name in _SPLITS:
            return name
    return ""


def _which(benchmark: Benchmark) -> str:
    return f" (its configuration {benchmark.configurations[0]})" if benchmark.configurations else ""


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def as_parquet(benchmark: Benchmark, files: list[Path], folder: Path) -> list[Path]:
    """Those files as parquet with Hugging Face's features, written below ``folder`` where they are not so already.

    Raises:
        DataError: names the file, the row and what is wrong.
    """
    if benchmark.name not in _NORMALISERS and all(file.suffix == ".parquet" and _has_features(file) for file in files):
        return files
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, file in enumerate(files):
        target = folder / f"{benchmark.split}-{number:05d}.parquet"
        _write(benchmark, file, target)
        written.append(target)
    return written


def _has_features(file: Path) -> bool:
    import pyarrow.parquet as pq

    return b"huggingface" in (pq.read_schema(file).metadata or {})


def _write(benchmark: Benchmark, file: Path, target: Path) -> None:
    """Two passes: the columns' types from all rows without their pictures, then the rows with them."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = {name.rstrip("*"): name.endswith("*") for name in benchmark.images}
    schema: pa.Schema | None = None
    shown: set[str] = set()
    for rows in _chunks(_rows(benchmark, file)):
        shown |= {name for _, row in rows for name in images if name in row}
        plain = [{name: value for name, value in row.items() if name not in images} for _, row in rows]
        names = dict.fromkeys(name for row in plain for name in row)
        try:
            found = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in plain]).schema
            schema = found if schema is None else pa.unify_schemas([schema, found], promote_options="permissive")
        except pa.ArrowException as error:
            raise DataError(f"{file}, {rows[0][0]} and after it: columns of mixed types ({error})") from None
    if schema is None:
        raise DataError(f"{file}: no row in it")
    features = datasets.Features.from_arrow_schema(schema.remove_metadata())
    for name in sorted(shown):
        features[name] = datasets.List(datasets.Image()) if images[name] else datasets.Image()
    whole = features.arrow_schema
    with pq.ParquetWriter(target, whole) as writer:
        for rows in _chunks(_rows(benchmark, file)):
            opened = [
                {
                    name: _pictures(file, place, value, images[name]) if name in images else value
                    for name, value in row.items()
                }
                for place, row in rows
            ]
            writer.write_table(pa.Table.from_pylist(opened, schema=whole))


def _chunks(rows: Iterator[tuple[str, Row]]) -> Iterator[list[tuple[str, Row]]]:
    while chunk := list(islice(rows, _ROWS)):
        yield chunk


def _rows(benchmark: Benchmark, file: Path) -> Iterator[tuple[str, Row]]:
    """(place, row), pictures as they stand in the file."""
    normalise = _NORMALISERS.get(benchmark.name)
    reader = {".parquet": _parquet, ".tsv": _tsv}.get(file.suffix, _json)
    for place, row in reader(file):
        if not isinstance(row, dict):
            raise DataError(f"{file}, {place}: expected an object with the columns of {benchmark.title}'s data set")
        try:
            for one in normalise(row) if normalise else (row,):
                yield place, one
        except (KeyError, ValueError, TypeError, SyntaxError, AttributeError) as error:
            raise DataError(
                f"{file}, {place}: not a row of {benchmark.title} ({type(error).__name__}: {error}); "
                f"expected {benchmark.data}"
            ) from None


def _json(file: Path) -> Iterator[tuple[str, Any]]:
    return iterate_json(file)


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet as pq

    number = 0
    for batch in pq.ParquetFile(file).iter_batches(_ROWS):
        for row in batch.to_pylist():
            yield f"row {number}", row
            number += 1


def _tsv(file: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)

    def read() -> Iterator[Row]:
        with open(file, encoding="utf-8", newline="") as opened:
            yield from csv.DictReader(opened, delimiter="\t")

    borrowed = {row["image"] for row in read() if len(row.get("image") or "") <= _LONGEST_INDEX}
    lent = {row["index"]: row["image"] for row in read() if row.get("index") in borrowed}
    for number, row in enumerate(read()):
        yield f"row {number}", {**row, "image": lent.get(row.get("image", ""), row.get("image"))}


def _pictures(file: Path, place: str, value: Any, several: bool) -> Any:
    if several:
        return [_picture(file, place, one) for one in value]
    return None if value is None else _picture(file, place, value)


def _picture(file: Path, place: str, value: Any) -> dict[str, Any]:
    """A path below the file's folder, base64, bytes, or a picture of a parquet file, as bytes."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        value = _bytes_of(file, value)
    if not isinstance(value, bytes):
        raise DataError(f"{file}, {place}: a picture is {type(value).__name__}; expected a path or base64")
    try:
        with Image.open(io.BytesIO(value)) as image:
            image.verify()
    except Exception as error:  # Pillow raises what its decoders raise
        raise DataError(f"{file}, {place}: not a whole picture ({error})") from None
    return {"bytes": value, "path": None}


def _bytes_of(file: Path, text: str) -> bytes:
    if len(text) < 1024:
        for below in _BELOW:
            path = inside(file.parent, f"{below}/{text}" if below else text)
            if path.is_file():
                return path.read_bytes()
        if Path(text).suffix:
            raise DataError(f"{file}: the picture {text!r} is not below {file.parent}")
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise DataError(f"{file}: a picture is neither a path below {file.parent} nor base64 ({error})") from None


def _ocrvqa(row: Row) -> Iterable[Row]:
    """VLMEvalKit's rows as they are; the hub's, with several questions about one cover, as one row a question."""
    if "questions" not in row:
        yield {key: row[key] for key in ("index", "image", "question", "answer")}
        return
    for number, (question, answer) in enumerate(zip(row["questions"], row["answers"], strict=True)):
        index = f"{row.get('image_id', row.get('index', ''))}-{number}"
        yield {"index": index, "image": row["image"], "question": question, "answer": answer}


def _mmdu(row: Row) -> Iterable[Row]:
    if "conversations" in row:
        turns = [str(turn["value"]) for turn in row["conversations"]]
        questions, answers, images = turns[::2], turns[1::2], row["image"]
    else:
        questions, answers = _list(row["question"]), _list(row["answer"])
        images = row["image"] if isinstance(row["image"], list) else _list(row["image"])
    if not questions or len(questions) != len(answers):
        raise ValueError(f"{len(questions)} questions, {len(answers)} reference answers")
    images = list(images) if isinstance(images, list) else [images]
    marks = sum(question.count(IMAGE_HERE) for question in questions)
    if marks != len(images):
        raise ValueError(f"{marks} {IMAGE_HERE} in the questions, {len(images)} pictures")
    index = str(row.get("index", row.get("id", "")))
    yield {"index": index, "images": images, "questions": questions, "answers": answers}


def _list(value: Any) -> list[str]:
    """A list, or one written out in a cell; a plain text is a list of one."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = ast.literal_eval(value.strip())
    return [value] if isinstance(value, str) else [str(one) for one in value]


def _evoke(row: Row) -> Iterable[Row]:
    yield {key: str(row[key]) for key in ("question_id", "image", "text", "answer")} | {
        key: str(row.get(key, "")) for key in ("type", "cnn_wiki_type")
    }


_NORMALISERS = {"ocrvqa": _ocrvqa, "mmdu": _mmdu, "evoke": _evoke}


def with_pictures(benchmark: Benchmark, data: Path) -> list[Path]:
    """`local_files`, and where they are rows of JSON everything beside them, as they name pictures."""
    files = local_files(benchmark, data)
    if not any(file.suffix in (".json", ".jsonl") for file in files):
        return files
    return sorted(path for path in (data / benchmark.name).rglob("*") if path.is_file())


def fingerprint(benchmark: Benchmark, data: Path) -> str:
    """Hex SHA-256 of what a benchmark is measured on, by name and content; see `quick_digest`."""
    folder = data / benchmark.name
    digests = (f"{path.relative_to(folder)}:{quick_digest(path)}" for path in with_pictures(benchmark, data))
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
