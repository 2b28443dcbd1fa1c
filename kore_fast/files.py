"""Plain files, written whole or not at all: a killed process leaves no half-written result under its final name."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from kore_fast.errors import DataError


def partial_path(path: str | Path) -> Path:
    """Where `atomic_path` and `new_folder` write first: a kill in the middle leaves it there."""
    path = Path(path)
    return path.with_name(f".{path.name}.partial")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` when the block ends without an exception.

    Raises:
        DataError: the disk is full or the folder cannot be written; names the file. What was there before stays.
    """
    path = Path(path)
    temporary = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):  # where the folder is a file, the temporary one cannot be looked for either
            temporary.unlink(missing_ok=True)
        raise DataError(
            f"{path}: could not be written ({error.strerror or error}); free some space or choose another folder, "
            "then give the same command again: finished work is kept"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_new_folder(path: str | Path) -> None:
    """Raises `DataError` where ``path`` is anything but absent or an empty folder."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"{path}: is there already and not empty; choose another folder, or remove this one first")


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; rename it to ``path`` when the block ends without an exception.

    Raises:
        DataError: ``path`` is there and not empty, the disk is full or the place cannot be written; names it.
    """
    check_new_folder(path)
    target = Path(path).resolve()
    temporary = partial_path(target)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as written:
                    os.fsync(written.fileno())
        if target.exists():
            target.rmdir()
        os.replace(temporary, target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise DataError(
            f"{path}: could not be written ({error.strerror or error}); free some space or choose another folder, "
            "then give the same command again"
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def whole_text(text: str) -> str:
    """Text that UTF-8 can hold: of half a character (a lone surrogate), which JSON can hold, the sign of a replaced
    one."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON with a final newline; key order is kept, so equal values give equal files."""
    encoder = json.JSONEncoder(indent=2, ensure_ascii=False, allow_nan=False)
    # Piece by piece: the reports of a large set are as long as its texts.
    write_pieces(path, chain(encoder.iterencode(value), "\n"))


def write_pieces(path: str | Path, pieces: Iterable[str]) -> None:
    """Write pieces of text one after another as UTF-8, whole or not at all; only one is held at a time.

    What goes wrong in making a piece is raised as it is, not as a failure to write.
    """
    failure: OSError | None = None

    def watched() -> Iterator[str]:
        nonlocal failure
        try:
            yield from pieces
        except OSError as error:
            failure = error
            raise

    try:
        with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(watched())
    except DataError:
        if failure is not None:
            raise failure from None
        raise


# One encoder: `json.dumps` would make one for each of a hundred thousand rows.
json_line = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    """Write one JSON value a line; only one is held at a time."""
    write_pieces(path, (json_line(row) + "\n" for row in rows))


def write_json_list(path: str | Path, rows: Iterable[Any]) -> None:
    """Write a JSON list, one value a line; only one is held at a time."""
    write_json_lines(path, map(json_line, rows))


def write_json_lines(path: str | Path, lines: Iterable[str]) -> None:
    """`write_json_list` for values that are JSON already, each by `json_line`."""

    def pieces() -> Iterator[str]:
        written = 0
        for line in lines:
            yield "[\n" if not written else ",\n"
            yield line
            written += 1
        yield "\n]\n" if written else "[]\n"

    write_pieces(path, pieces())


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: missing or not JSON; names the file and the place.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder; name a file in it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None


def read_jsonl(path: str | Path) -> list[tuple[int, Any]]:
    """Read a JSON-lines file as (line number, value) pairs; empty lines are passed over.

    Raises:
        DataError: missing or a line that is not JSON; names the file and the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder; name a file in it") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error})") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not valid JSON ({error})") from None
    return rows


_SPACE = re.compile(r"[ \t\n\r]*")
_AFTER_A_VALUE = tuple(" \t\n\r,]")
_BLOCK = 1 << 16


def iterate_json(path: str | Path) -> Iterator[tuple[str, Any]]:
    """The values of a JSON list or of a JSON-lines file, told apart by their first character, as (place, value).

    ``place`` is ``"sample N"`` counted from 0 in a list, ``"line N"`` counted from 1 in JSON lines, where empty lines
    are passed over. Only one value is held at a time; a byte-order mark is passed over.

    Raises:
        DataError: missing, not UTF-8 or not JSON; names the file and the line.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            start = file.read(_BLOCK)
            while start and start.isspace():
                start = file.read(_BLOCK)
            is_list = start.lstrip().startswith("[")
            file.seek(0)
            yield from _values_of_list(path, file) if is_list else _values_of_lines(path, file)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder; name a file in it") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error})") from None


def _values_of_lines(path: str | Path, file: TextIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not valid JSON ({error})") from None
        yield f"line {number}", value


def _values_of_list(path: str | Path, file: TextIO) -> Iterator[tuple[str, Any]]:
    decoder = json.JSONDecoder()
    text, at, line, ended = "", 0, 1, False

    def more() -> bool:
        """Read on, by as much as is waiting, so that a long value is not parsed again and again."""
        nonlocal text, at, line, ended
        block = file.read(max(_BLOCK, len(text) - at))
        line += text.count("\n", 0, at)
        text, at, ended = text[at:] + block, 0, not block
        return not ended

    def next_mark() -> str:
        nonlocal at
        while True:
            at = _SPACE.match(text, at).end()  # type: ignore[union-attr]  # the pattern matches anywhere
            if at < len(text) or not more():
                return text[at : at + 1]

    def refuse(what: str, place: int) -> DataError:
        return DataError(f"{path}, line {line + text.count(chr(10), 0, place)}: not valid JSON ({what})")

    next_mark()
    at += 1  # the opening bracket
    count = 0
    while True:
        if next_mark() == "]" and count == 0:
            break
        while True:
            try:
                value, end = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                if not ended:  # it may be whole with what comes next
                    more()
                    continue
                raise refuse(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:
                raise refuse(str(error), at) from None
            if ended or text[end : end + 1] in _AFTER_A_VALUE:
                break
            more()  # a number may go on in what comes next
        at = end
        yield f"sample {count}", value
        count += 1
        mark = next_mark()
        if mark == "]":
            break
        if mark != ",":
            raise refuse(f"expected ',' or ']' after sample {count - 1}, found {mark!r}", at)
        at += 1
    at += 1
    if next_mark():
        raise refuse("there is more after the list's end", at)


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


_LARGE = 64 << 20
_EDGE = 1 << 20
_SAMPLE = 4 << 10


def quick_digest(path: str | Path) -> str:
    """Hex SHA-256 of a file; of a file above 64 MiB, of its size, its first and last MiB and the first 4 KiB of every
    MiB between: enough to tell weights apart by any tensor of that size, without a minute of reading. Empty for what
    is no file."""
    path = Path(path)
    if not path.is_file():
        return ""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size > _LARGE:
            digest.update(file.read(_EDGE))
            for place in range(_EDGE, size - _EDGE, _EDGE):
                file.seek(place)
                digest.update(file.read(_SAMPLE))
            file.seek(-_EDGE, os.SEEK_END)
        while block := file.read(_EDGE):
            digest.update(block)
    return digest.hexdigest()


def inside(folder: str | Path, relative: str) -> Path:
    """Resolve ``relative`` below ``folder``.

    Raises:
        DataError: the path is absolute or leaves the folder (``..`` or a link that points outside).
    """
    root = Path(folder).resolve()
    path = (root / relative).resolve()
    if Path(relative).is_absolute() or not path.is_relative_to(root):
        raise DataError(f"{relative!r} leaves its folder {folder}; use a path below that folder")
    return path
