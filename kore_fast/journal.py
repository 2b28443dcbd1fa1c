"""A file of rows that grows as they come, so that work which was killed goes on after the last of them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kore_fast.errors import DataError
from kore_fast.files import json_line, read_jsonl


class Journal:
    """JSON lines at ``path``. What `append` has taken is on disk when it returns."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def rows(self, *keys: str) -> list[dict[str, Any]]:
        """The rows so far. A last line that a killed process left torn is dropped for good.

        Raises:
            DataError: a line that is not JSON, has not all of ``keys``, or is torn and cannot be dropped; names the
                file.
        """
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            # Cut off, or the next row would continue it.
            try:
                os.truncate(self.path, whole)
            except OSError as error:
                raise self._unwritable(error) from error
        found = read_jsonl(self.path)
        for number, row in found:
            if not isinstance(row, dict) or not row.keys() >= set(keys):
                raise DataError(f"{self.path}, line {number}: not a row that was kept here; remove the file")
        return [row for _, row in found]

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows at the end; without any, the file is made if it is not there.

        Raises:
            DataError: the disk is full or the file cannot be written; names it.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json_line(row) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(
            f"{self.path}: could not be written ({error.strerror or error}); free some space or choose another folder, "
            "then give the same command again: what is there is kept"
        )
