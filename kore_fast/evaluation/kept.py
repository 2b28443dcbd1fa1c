"""Answers kept as they come: a JSON-lines file that grows batch by batch, so that nothing is asked twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kore_fast.evaluation.answering import Answer, Answerer
from kore_fast.evaluation.generation import Prompt
from kore_fast.files import quick_digest
from kore_fast.journal import Journal
from kore_fast.progress import Progress, silent


@dataclass(frozen=True)
class Asked:
    """A prompt and the key that its answer is kept under; keys of one file differ."""

    key: str
    prompt: Prompt

    @cached_property
    def question(self) -> list[str | None]:
        """What was asked, the picture by its content: an answer to something else under the same key does not
        count."""
        return [self.prompt.text, quick_digest(self.prompt.image) if self.prompt.image else None]


def ask_all(
    asked: Sequence[Asked],
    answerer: Answerer,
    journal: Path,
    *,
    known: dict[str, Answer] | None = None,
    progress: Progress = silent,
    label: str = "answer",
    say: Callable[[str], None] | None = None,
) -> list[Answer]:
    """An answer to each; those that ``journal`` or ``known`` hold are not asked for again.

    Every batch of answers is on disk before the next is asked for. A last line that a killed process left torn is
    dropped. What has no answer (a server that failed) is not in the journal, and is asked again next time.

    Args:
        say: is told how many are there already.

    Raises:
        DataError: the journal cannot be read or written; names it.
    """
    kept = Journal(journal)
    there = {**_read(kept, asked), **(known or {})}
    wanted = [i for i, one in enumerate(asked) if one.key not in there]
    found: dict[str, Answer] = {}
    if say is not None and len(wanted) < len(asked):
        say(f"{label}: {len(asked) - len(wanted):,} of {len(asked):,} answers are there already, in {journal.parent}")
    if wanted:
        left = set(wanted)
        kept.append([])  # a folder that cannot be written is told before the first answer is paid for
        for answers in answerer.answers([one.prompt for one in asked], wanted, progress, label):
            # A batch may hold more than was missing: what it was made of decides its last bits.
            new = {asked[i]: answer for i, answer in answers.items() if i in left}
            left -= answers.keys()
            found |= {one.key: answer for one, answer in new.items()}
            kept.append(
                {"key": one.key, "question": one.question, "answer": answer.text}
                for one, answer in new.items()
                if answer.text is not None
            )
    return [there[one.key] if one.key in there else found[one.key] for one in asked]


def _read(kept: Journal, asked: Sequence[Asked]) -> dict[str, Answer]:
    questions = {one.key: one.question for one in asked}
    rows = kept.rows("key", "question", "answer")
    return {row["key"]: Answer(row["answer"]) for row in rows if questions.get(row["key"]) == row["question"]}
