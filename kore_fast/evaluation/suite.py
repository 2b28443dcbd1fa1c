"""Everything that is measured on one model: adaptation, retention and drift, each part a file that is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from kore_fast.data.conversations import Encoded, encode, encode_texts
from kore_fast.data.old_knowledge import Picture, PlainQuestion, Text, picture_prompts
from kore_fast.data.questions import Question
from kore_fast.evaluation.answering import ModelAnswerer
from kore_fast.evaluation.batches import BatchSize, check_finite
from kore_fast.evaluation.drift import measure_drift
from kore_fast.evaluation.generation import Prompt
from kore_fast.evaluation.held_out_leak import held_out_leak
from kore_fast.evaluation.kept import Asked, ask_all
from kore_fast.evaluation.metrics import (
    Metric,
    cover_exact_match,
    cover_exact_match_corrected,
    mean,
    share,
    token_f1,
)
from kore_fast.evaluation.naming import score_choices
from kore_fast.files import inside, read_jsonl, write_jsonl
from kore_fast.progress import Progress, silent

Row = dict[str, Any]
Answers = Callable[[str, Sequence[str], Sequence[Prompt], str], list[str]]
"""Of a part's file, the keys of its prompts, the prompts, and what the progress bar says."""


@dataclass(frozen=True)
class Suite:
    """What to measure; an empty part is left out, and its figures with it."""

    questions: Sequence[Question] = ()
    """About the new knowledge, in wordings that were not trained on."""
    image_root: Path = Path()
    earlier: Sequence[Question] = ()
    """About what an earlier run injected, which is old knowledge now."""
    earlier_root: Path = Path()
    capitals: Sequence[PlainQuestion] = ()
    texts: Sequence[Text] = ()
    text_tokens: int = 128
    pictures: Sequence[Picture] = ()
    drift_samples: int = 64
    """Drift in chat and on pictures is measured on so many of the base's own answers and descriptions."""
    max_new_tokens: int = 32
    batch_size: int = 32
    bf16: bool = False


def evaluate(
    model: nn.Module,
    base: nn.Module | None,
    processor: Any,
    suite: Suite,
    folder: Path,
    *,
    base_folder: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Metric]:
    """Measure ``model``, keep every prediction below ``folder``, and return its figures.

    Parts whose file is there already are not measured again, and of a part that was being answered or measured every
    batch is kept, so that a killed run continues, with the same result. A batch that memory does not suffice for is
    halved, as are those after it.

    Args:
        base: the untouched base model, for drift; ``model`` itself when the base is measured; None for a PEFT model,
            whose base is itself with its adapters off.
        base_folder: where the base was measured; its own answers are the held-out prompts of the drift. Default: the
            base's answers are ``folder``'s.

    Returns:
        name → {"value", "low", "high", "count"} with 95 % intervals: Wilson's for shares, Student's for means.

    Raises:
        DataError: a file below ``folder`` cannot be read or written; names it.
        KoreError: memory does not suffice for one prompt alone, or what was measured is not finite (a training that
            diverged); says of which part.
    """
    base_folder = folder if base_folder is None else base_folder
    metrics: dict[str, Metric] = {}

    answerer = ModelAnswerer(
        model,
        processor,
        max_new_tokens=suite.max_new_tokens,
        batch_size=BatchSize(suite.batch_size),
        bf16=suite.bf16,
    )

    def answers(part: str, keys: Sequence[str], prompts: Sequence[Prompt], label: str) -> list[str]:
        asked = [Asked(key, prompt) for key, prompt in zip(keys, prompts, strict=True)]
        found = ask_all(asked, answerer, _journal(folder / part), progress=progress, label=label)
        return [answer.text or "" for answer in found]

    def drift(part: str, sequences: Sequence[Encoded], label: str) -> list[Row]:
        path = folder / part

        def measure() -> list[Row]:
            # Each part begins with whole batches, so that its own do not depend on where a call was killed.
            found = measure_drift(
                model,
                base,
                processor,
                sequences,
                bf16=suite.bf16,
                progress=progress,
                label=label,
                journal=_journal(path),
            )
            return [asdict(one) for one in found]

        return _part(path, measure)

    def drifted(rows: Sequence[Row], what: str) -> None:
        if rows:  # a base that answers nothing has no answers to drift from
            metrics[f"kl_{what}"] = mean([row["kl"] for row in rows])
            metrics[f"hidden_{what}"] = mean([row["hidden"] for row in rows])

    held_out: list[Encoded] = []
    if suite.questions:
        asked = partial(_questions, suite.questions, suite.image_root, "questions.jsonl", "new knowledge", answers)
        metrics |= _scored(_part(folder / "questions.jsonl", asked), by_name="adaptation", by_picture="by_picture")
    if suite.earlier:
        asked = partial(_questions, suite.earlier, suite.earlier_root, "earlier.jsonl", "earlier knowledge", answers)
        metrics |= _scored(_part(folder / "earlier.jsonl", asked), by_name="earlier", by_picture="earlier_by_picture")
    if suite.capitals:
        rows = _part(folder / "capitals.jsonl", lambda: _capitals(suite, answers))
        metrics["capitals"] = share([row["cem"] for row in rows])
        sequences = [
            encode(processor, [("user", row["text"]), ("assistant", row["prediction"])])
            for _, row in read_jsonl(base_folder / "capitals.jsonl")[: suite.drift_samples]
            if row["prediction"]
        ]
        drifted(drift("drift_chat.jsonl", sequences, "drift on chat"), "chat")
        held_out += sequences
    if suite.texts:
        passages = encode_texts(processor, [text.text for text in suite.texts], suite.text_tokens)
        rows = drift("drift_text.jsonl", passages, "held-out text")
        if rows:
            metrics["wikipedia_loss"] = mean([row["loss"] for row in rows])
        drifted(rows, "text")
        held_out += passages[: suite.drift_samples]
    if suite.pictures:
        path = folder / "pictures.jsonl"
        rows = _part(path, partial(_pictures, model, processor, suite, _journal(path), progress))
        metrics["picture_naming"] = share([row["chosen"] == row["name"] for row in rows])
        described = suite.pictures[: suite.drift_samples]
        prompts = [Prompt(picture_prompts()[0], picture.path) for picture in described]
        if described:
            rows = _part(
                folder / "descriptions.jsonl",
                lambda: [
                    {"id": picture.id, "text": prompt.text, "prediction": answer}
                    for picture, prompt, answer in zip(
                        described,
                        prompts,
                        answers("descriptions.jsonl", [p.id for p in described], prompts, "describe pictures"),
                        strict=True,
                    )
                ],
            )
            told = {row["id"]: row["prediction"] for _, row in read_jsonl(base_folder / "descriptions.jsonl")}
            shown = [
                encode(
                    processor,
                    [("user", f"<image>\n{prompt.text}"), ("assistant", told[picture.id])],
                    [picture.path],
                )
                for picture, prompt in zip(described, prompts, strict=True)
                if told.get(picture.id)
            ]
            drifted(drift("drift_pictures.jsonl", shown, "drift on pictures"), "picture")
            held_out += shown
    if held_out and base is not model:
        path = folder / "held_out_leak.jsonl"
        leak = partial(held_out_leak, model, base, processor, held_out, progress=progress, journal=_journal(path))
        rows = _part(path, lambda: [asdict(row) for row in leak()])
        if rows:
            metrics["held_out_leak"] = mean([row["leak"] for row in rows])
            metrics["outputs_moved"] = mean([row["moved"] for row in rows])
    return metrics


def _part(path: Path, measure: Callable[[], list[Row]]) -> list[Row]:
    if not path.exists():
        rows = measure()
        check_finite(rows, path)
        write_jsonl(path, rows)
    _journal(path).unlink(missing_ok=True)
    return [row for _, row in read_jsonl(path)]


def _journal(path: Path) -> Path:
    """Where a part's answers or figures are kept until it is whole."""
    return path.with_suffix(".partial.jsonl")


def _scored(rows: Sequence[Row], *, by_name: str, by_picture: str) -> dict[str, Metric]:
    """The figures of answered questions, with a prefix for each form."""
    metrics: dict[str, Metric] = {}
    for prefix, forms in ((by_name, ("by_name", None)), (by_picture, ("by_picture",))):
        chosen = [row for row in rows if row["form"] in forms]
        if chosen:
            metrics[f"{prefix}_cem"] = share([row["cem"] for row in chosen])
            metrics[f"{prefix}_cem_corrected"] = share([row["cem_corrected"] for row in chosen])
            metrics[f"{prefix}_f1"] = mean([row["f1"] for row in chosen])
    return metrics


def _questions(questions: Sequence[Question], root: Path, part: str, label: str, answers: Answers) -> list[Row]:
    prompts = [Prompt(q.text, inside(root, q.image), f"question {q.question_id!r}") for q in questions]
    found = answers(part, [q.question_id for q in questions], prompts, label)
    return [
        {
            "question_id": question.question_id,
            "type": question.type,
            "form": question.form,
            "text": question.text,
            "answer": question.answer,
            "prediction": prediction,
            "cem": cover_exact_match(prediction, question.answer),
            "cem_corrected": cover_exact_match_corrected(prediction, question.answer),
            "f1": token_f1(prediction, question.answer),
        }
        for question, prediction in zip(questions, found, strict=True)
    ]


def _capitals(suite: Suite, answers: Answers) -> list[Row]:
    prompts = [Prompt(question.text) for question in suite.capitals]
    found = answers("capitals.jsonl", [question.id for question in suite.capitals], prompts, "capitals")
    return [
        {
            "id": question.id,
            "text": question.text,
            "answer": question.answer,
            "prediction": prediction,
            "cem": cover_exact_match(prediction, question.answer),
        }
        for question, prediction in zip(suite.capitals, found, strict=True)
    ]


def _pictures(model: nn.Module, processor: Any, suite: Suite, journal: Path, progress: Progress) -> list[Row]:
    paths, choices = [p.path for p in suite.pictures], [p.choices for p in suite.pictures]
    shown = progress(range(len(paths)), len(paths), "name pictures")

    def advance(done: int) -> None:
        for _ in range(done):
            next(shown, None)

    scores = score_choices(model, processor, paths, choices, bfloat16=suite.bf16, progress=advance, journal=journal)
    return [
        {
            "id": picture.id,
            "name": picture.name,
            "chosen": picture.choices[max(range(len(row)), key=row.__getitem__)],
            "scores": dict(zip(picture.choices, row, strict=True)),
        }
        for picture, row in zip(suite.pictures, scores, strict=True)
    ]
