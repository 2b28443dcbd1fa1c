"""Precision and recall of the grounding check on answers known to be good or corrupted.

python -m kore_fast.augmentation.measure_grounding ANSWERS.jsonl [--embedding FOLDER] [--show]
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kore_fast.augmentation.grounding import Grounding, GroundingOptions, Verdict
from kore_fast.errors import DataError
from kore_fast.files import read_jsonl


@dataclass(frozen=True)
class Checked:
    """One answer, what it is and what the check says."""

    split: str
    kind: str
    good: bool
    question: str
    answer: str
    verdict: Verdict


@dataclass(frozen=True)
class Score:
    """Of unsupported answers: ``precision`` is the share of doubted answers that are corrupted, ``recall`` the share of
    corrupted answers that are doubted; ``kept`` is the share of good answers that are not doubted."""

    precision: float
    recall: float
    kept: float
    good: int
    corrupted: int


def check_file(path: str | Path, grounding: Grounding) -> list[Checked]:
    """Check every answer of a file (its form is described in the README beside the committed one).

    Raises:
        DataError: a line lacks a key.
    """
    checked = []
    for number, row in read_jsonl(path):
        try:
            for one in row["answers"]:
                verdict = grounding.check_text(
                    row["text"], row["name"], row.get("facts", {}), one["question"], one["answer"]
                )
                checked.append(
                    Checked(row["split"], one["kind"], one["supported"], one["question"], one["answer"], verdict)
                )
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: not a text with its answers ({error!r})") from None
    return checked


def score(checked: Iterable[Checked]) -> Score:
    """Counts over answers; a share of nothing is 1."""
    rows = list(checked)
    good = [one for one in rows if one.good]
    corrupted = [one for one in rows if not one.good]
    caught = sum(not one.verdict.supported for one in corrupted)
    doubted = sum(not one.verdict.supported for one in good)
    return Score(
        precision=caught / (caught + doubted) if caught + doubted else 1.0,
        recall=caught / len(corrupted) if corrupted else 1.0,
        kept=1 - doubted / len(good) if good else 1.0,
        good=len(good),
        corrupted=len(corrupted),
    )


def table(checked: Sequence[Checked]) -> str:
    """The scores of each split, and by kind the share that was judged rightly."""
    lines = ["| split | good | corrupted | precision | recall | good answers kept |", "|---|---|---|---|---|---|"]
    splits = sorted({one.split for one in checked})
    for split in splits:
        of = score(one for one in checked if one.split == split)
        lines.append(f"| {split} | {of.good} | {of.corrupted} | {of.precision:.3f} | {of.recall:.3f} | {of.kept:.3f} |")
    for good, title in ((False, "corruption"), (True, "good answer")):
        lines += ["", f"| {title} | " + " | ".join(splits) + " |", "|---" * (1 + len(splits)) + "|"]
        kinds: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
        for one in checked:
            if one.good is good:
                kinds[one.kind][one.split].append(one.verdict.supported is good)
        for kind, by_split in sorted(kinds.items()):
            cells = (f"{sum(by_split[split])} of {len(by_split[split])}" for split in splits)
            lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="precision and recall of the grounding check")
    parser.add_argument("answers", help="a JSON-lines file of texts with good and corrupted answers")
    parser.add_argument("--embedding", help="the folder of a sentence-embedding model")
    parser.add_argument("--show", help="print what was judged wrongly in this split")
    given = parser.parse_args(arguments)
    checked = check_file(given.answers, Grounding(GroundingOptions(embedding=given.embedding)))
    for one in checked:
        if one.split == given.show and one.verdict.supported is not one.good:
            print(f"{'good' if one.good else 'bad'} {one.kind}: {one.question} → {one.answer} {one.verdict.reasons}")
    print(table(checked))


if __name__ == "__main__":
    main()
