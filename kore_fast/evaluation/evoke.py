"""EVOKE's questions, put as its own code puts them, and the tables of what was answered."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kore_fast.data.questions import Question
from kore_fast.errors import DataError, LanguageModelError
from kore_fast.evaluation.answering import Answer, Answerer
from kore_fast.evaluation.generation import Prompt
from kore_fast.evaluation.kept import Asked, ask_all
from kore_fast.evaluation.metrics import (
    Metric,
    cover_exact_match,
    cover_exact_match_corrected,
    knowledge_adaptation,
    mean,
    share,
    token_f1,
)
from kore_fast.files import inside, read_json, read_jsonl, write_json, write_jsonl, write_text
from kore_fast.progress import Progress, silent

Row = dict[str, Any]

PREDICTIONS, SCORES = "predictions.jsonl", "scores.json"
_JOURNAL, _SETTINGS = "predictions.partial.jsonl", "answers.json"
_FORMAT = "kore_fast.evoke/2"
_SCORES = ("cem", "cem_corrected", "f1", "ka")
_HEADS = {"cem": "CEM", "cem_corrected": "CEM, corrected", "f1": "F1", "ka": "K.A"}
_KINDS = {"news": "news", "wiki": "entity"}
_BOUNDS = {"": "value", "_low": "low", "_high": "high"}


def evaluate_evoke(
    questions: Sequence[Question],
    image_root: Path,
    answerer: Answerer,
    folder: Path,
    *,
    limit: int | None = None,
    progress: Progress = silent,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Ask EVOKE's questions, keep every answer below ``folder``, and score them.

    The question's text goes to the model as it stands in the file, after the picture: the released evaluations of
    LLaVA and Qwen2.5-VL add nothing either (the file's texts end with what form of answer is wanted).

    ``folder`` gets ``predictions.jsonl`` (in the questions' order), ``scores.json``, and the tables ``scores.csv`` and
    ``scores.md``. Whatever was answered there before is not asked again: a call that was killed goes on and ends with
    the files that an uninterrupted one writes. Questions that a server did not answer stand in the predictions
    with the reason, count in no score, and are asked again by the next call.

    Args:
        questions: from `read_evoke_questions`.
        image_root: the folder that their pictures are below.
        limit: ask only the first so many; further answers that are there already stay.
        say: is told how many answers are there already.

    Returns:
        The content of ``scores.json``: ``metrics`` and, in ``by_kind`` and ``by_type``, the same of a part, with shares
        from 0 to 1 and 95 % intervals (Wilson's for CEM, Student's for F1 and K.A).

    Raises:
        DataError: ``folder`` holds answers of another model or of other settings, or a file cannot be used.
        LanguageModelError: the server answers none of the questions.
        KoreError: see the answerer's.
    """
    if not questions:
        raise DataError("no questions to ask")
    folder.mkdir(parents=True, exist_ok=True)
    _check_same(folder, answerer)
    asked = [Asked(question.question_id, _prompt(question, image_root)) for question in questions]
    there = _answers_there(folder / PREDICTIONS, asked)
    chosen = asked[:limit]
    found = ask_all(chosen, answerer, folder / _JOURNAL, known=there, progress=progress, label="EVOKE", say=say)
    answers = {**there, **{one.key: answer for one, answer in zip(chosen, found, strict=True)}}
    digests = {one.key: one.question[1] for one in asked}
    rows = [_row(q, digests[q.question_id], answers[q.question_id]) for q in questions if q.question_id in answers]
    write_jsonl(folder / PREDICTIONS, rows)
    (folder / _JOURNAL).unlink(missing_ok=True)
    wanted = {one.key for one in chosen}
    measured = [row for row in rows if row["question_id"] in wanted]
    scores = {"answerer": dict(answerer.about), **score_rows(measured)}
    write_json(folder / SCORES, scores)
    write_text(folder / "scores.csv", scores_csv(scores))
    write_text(folder / "scores.md", scores_markdown(scores))
    return scores


def score_rows(rows: Sequence[Row]) -> dict[str, Any]:
    """Scores of predictions: all of them, by news and entity, and by EVOKE's type (the commonest first).

    Raises:
        LanguageModelError: there is no answer to score.
    """
    missing = [row for row in rows if row["prediction"] is None]
    if len(missing) == len(rows):
        reason = missing[0]["missing"] if missing else "nothing was asked"
        raise LanguageModelError(f"none of the {len(rows)} questions was answered; the first, as {reason}")
    kinds = [_KINDS.get(row["cnn_wiki_type"], row["cnn_wiki_type"]) for row in rows]
    types = Counter(row["type"] for row in rows if row["type"] is not None)
    return {
        "questions": len(rows),
        "answered": len(rows) - len(missing),
        "missing": len(missing),
        "metrics": _metrics(rows),
        "by_kind": {
            kind: _part([row for row, its in zip(rows, kinds, strict=True) if its == kind])
            for kind in sorted({kind for kind in kinds if kind is not None}, key=lambda kind: (kind != "news", kind))
        },
        "by_type": {
            kind: _part([row for row in rows if row["type"] == kind])
            for kind in sorted(types, key=lambda kind: (-types[kind], kind))
        },
    }


def scores_csv(scores: Mapping[str, Any]) -> str:
    """The scores as a table for programs: a line a part, values from 0 to 1 with their intervals."""
    columns = ["part", "name", "questions", "answered"]
    columns += [f"{score}{end}" for score in _SCORES for end in _BOUNDS]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for part, name, values in _parts(scores):
        line: dict[str, Any] = {"part": part, "name": name}
        line |= {key: values[key] for key in ("questions", "answered")}
        for score in _SCORES:
            metric = values["metrics"].get(f"evoke_{score}", {})
            line |= {
                f"{score}{end}": metric.get(key) for end, key in (("", "value"), ("_low", "low"), ("_high", "high"))
            }
        writer.writerow(line)
    return out.getvalue()


def scores_markdown(scores: Mapping[str, Any]) -> str:
    """The scores as a table for people, in percent with 95 % intervals."""
    lines = [
        f"| | questions | {' | '.join(_HEADS.values())} |",
        f"|---|--:|{'--:|' * len(_HEADS)}",
    ]
    for part, name, values in _parts(scores):
        cells = [_cell(values["metrics"].get(f"evoke_{score}")) for score in _SCORES]
        title = {"all": "**all**", "kind": f"**{name}**"}.get(part, name.replace("|", "\\|"))
        lines.append(f"| {title} | {values['answered']:,} | {' | '.join(cells)} |")
    notes = ["CEM is scored as by EVOKE's own code, quirks included; K.A = (CEM + F1) / 2 with that CEM."]
    if scores["missing"]:
        notes.append(
            f"{scores['missing']:,} of {scores['questions']:,} questions have no answer (the server gave none) and "
            "count in no score."
        )
    return "\n".join([*lines, "", *notes, ""])


def _prompt(question: Question, image_root: Path) -> Prompt:
    return Prompt(question.text, inside(image_root, question.image), f"question {question.question_id!r}")


def _check_same(folder: Path, answerer: Answerer) -> None:
    """Refuse to mix the answers of two models; where a server is does not matter."""
    given = {"format": _FORMAT, **{key: value for key, value in answerer.about.items() if key != "server"}}
    path = folder / _SETTINGS
    if not path.exists():
        if any((folder / name).exists() for name in (PREDICTIONS, _JOURNAL)):
            raise DataError(f"{folder}: holds predictions, but not whose ({_SETTINGS}); choose another folder")
        write_json(path, given)
        return
    kept = read_json(path)
    if kept == given:
        return
    kept = kept if isinstance(kept, dict) else {}
    odd = next((key for key in {**given, **kept} if kept.get(key) != given.get(key)), "format")
    raise DataError(
        f"{folder}: holds answers given under another {odd.replace('_', ' ')} ({kept.get(odd)!s:.60}, now "
        f"{given.get(odd)!s:.60}); choose another folder, or remove this one"
    )


def _answers_there(path: Path, asked: Sequence[Asked]) -> dict[str, Answer]:
    """Answers of an earlier call to the same questions about the same pictures."""
    if not path.exists():
        return {}
    questions = {one.key: one.question for one in asked}
    there = {}
    for number, row in read_jsonl(path):
        if not isinstance(row, dict) or not {"question_id", "text", "image_digest", "prediction"} <= row.keys():
            raise DataError(f"{path}, line {number}: not a prediction that was kept here; remove the file")
        same = questions.get(row["question_id"]) == [row["text"], row["image_digest"]]
        if same and row["prediction"] is not None:
            there[row["question_id"]] = Answer(row["prediction"])
    return there


def _row(question: Question, image_digest: str | None, answer: Answer) -> Row:
    row: Row = {
        "question_id": question.question_id,
        "type": question.type,
        "cnn_wiki_type": question.cnn_wiki_type,
        "image": question.image,
        "image_digest": image_digest,
        "text": question.text,
        "answer": question.answer,
        "prediction": answer.text,
    }
    if answer.text is None:
        return {**row, "missing": answer.missing}
    return {
        **row,
        "cem": cover_exact_match(answer.text, question.answer),
        "cem_corrected": cover_exact_match_corrected(answer.text, question.answer),
        "f1": token_f1(answer.text, question.answer),
    }


def _part(rows: Sequence[Row]) -> dict[str, Any]:
    answered = sum(row["prediction"] is not None for row in rows)
    return {"questions": len(rows), "answered": answered, "metrics": _metrics(rows) if answered else {}}


def _metrics(rows: Sequence[Row]) -> dict[str, Metric]:
    answered = [row for row in rows if row["prediction"] is not None]
    return {
        "evoke_cem": share([row["cem"] for row in answered]),
        "evoke_cem_corrected": share([row["cem_corrected"] for row in answered]),
        "evoke_f1": mean([row["f1"] for row in answered]),
        "evoke_ka": mean([knowledge_adaptation(row["cem"], row["f1"]) for row in answered]),
    }


def _parts(scores: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    parts: list[tuple[str, str, Mapping[str, Any]]] = [("all", "", scores)]
    for part in ("kind", "type"):
        parts += [(part, name, values) for name, values in scores[f"by_{part}"].items()]
    return parts


def _cell(metric: Metric | None) -> str:
    if metric is None or metric["value"] is None:
        return "–"
    text = f"{100 * metric['value']:.2f}"
    if metric["low"] is None or metric["high"] is None:
        return text
    return f"{text} [{100 * metric['low']:.1f}, {100 * metric['high']:.1f}]"
