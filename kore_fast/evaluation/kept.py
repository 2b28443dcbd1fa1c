"""Answers kept as they come: a JSON-lines file that grows batch by batch, so that nothing is asked twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kore_fast.errors import DataError
from kore_fast.evaluation.answering import Answer, Answerer
from kore_fast.evaluation.generation import Prompt
from kore_fast.files import read_jsonl
from kore_fast.progress import Progress, silent


@dataclass(frozen=True)
class Asked:
    """A prompt and the key that its answer is kept under; keys of one file differ."""

    key: str
    prompt: Prompt

    @property
    def question(self) -> list[str | None]:
        """What was asked: an answer to something else under the same key does not count."""
        return [self.prompt.text, self.prompt.image.name if self.prompt.image else None]


def ask_all(
    asked: Sequence[Asked],
    answerer: Answerer,
    journal: Path,
    *,
    known: dict[str, Answer] | None = None,
    progress: Progress = silent,
    label: str = "answer",
) -> list[Answer]:
    """An answer to each; those that ``journal`` or ``known`` hold are not asked for again.

    Every batch of answers is on disk before the next is asked for. A last line that a killed process left torn is
    dropped. What has no answer (a server that failed) is not in the journal, and is asked again next time.

    Raises:
        DataError: the journal cannot be read or written; names it.
    """
    there = {**_read(journal, asked), **(known or {})}
    wanted = [i for i, one in enumerate(asked) if one.key not in there]
    found: dict[str, Answer] = {}
    if wanted:
        left = set(wanted)
        with _writing(journal):
            journal.parent.mkdir(parents=True, exist_ok=True)
            journal.touch()
        for answers in answerer.answers([one.prompt for one in asked], wanted, progress, label):
            # A batch may hold more than was missing: what it was made of decides its last bits.
            new = {asked[i]: answer for i, answer in answers.items() if i in left}
            left -= answers.keys()
            found |= {one.key: answer for one, answer in new.items()}
            with _writing(journal), open(journal, "a", encoding="utf-8") as file:
                for one, answer in new.items():
                    if answer.text is not None:
                        row = {"key": one.key, "question": one.question, "answer": answer.text}
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
    return [there[one.key] if one.key in there else found[one.key] for one in asked]


@contextmanager
def _writing(journal: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{journal}: could not be written ({error.strerror or error}); free some space or choose another folder, "
            "then give the same command again: answers so far are kept"
        ) from error


def _read(journal: Path, asked: Sequence[Asked]) -> dict[str, Answer]:
    if not journal.exists():
        return {}
    data = journal.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(journal, whole)
    questions = {one.key: one.question for one in asked}
    there = {}
    for number, row in read_jsonl(journal):
        if not isinstance(row, dict) or not {"key", "question", "answer"} <= row.keys():
            raise DataError(f"{journal}, line {number}: not an answer that was kept here; remove the file")
        if questions.get(row["key"]) == row["question"]:
            there[row["key"]] = Answer(row["answer"])
    return there
