"""MMDU turn by turn: each question with the conversation so far and the pictures shown so far, then a judge's scores.

The judge sees question, reference and answer, not the pictures; its scores of 0 to 10 on MMDU's six dimensions and
over all become points from 0 to 100, the mean over all turns that it scored. The wording of its task is our own.
"""

from __future__ import annotations

import json
import os
import re
import urllib.request
from collections.abc import Sequence
from typing import Any

IMAGE_HERE = "<ImageHere>"
DIMENSIONS = (
    "Creativity",
    "Richness",
    "Visual Perception",
    "Logical Coherence",
    "Answer Accuracy",
    "Image Relationship Understanding",
)
OVERALL = "Overall Score"
_TASK = f"""You grade how well an assistant answered a question about one or several pictures, which you do not see. \
A reference answer tells you what they show. Grade strictly, with whole numbers from 0 (useless) to 10 (clearly better \
than the reference); 5 is an answer that is right in the main and no more. Grade these dimensions:

- Creativity: ideas of its own where the question leaves room for them.
- Richness: how much of substance it says, with explanations and examples.
- Visual Perception: what it says of the pictures is what the reference says they show.
- Logical Coherence: it follows from what was asked and does not contradict itself.
- Answer Accuracy: it answers the question, and rightly.
- Image Relationship Understanding: it keeps the pictures apart and relates them rightly.
- {OVERALL}: the answer as a whole.

Give a short reason for each, then end with one line, a JSON object with exactly these keys and their grades:
{{{", ".join(f'"{name}": n' for name in (*DIMENSIONS, OVERALL))}}}"""
_OBJECT = re.compile(r"\{[^{}]*\}")


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    """The pictures of the first question; later rounds bring theirs."""
    return _shown(doc, 1)


def doc_to_text(
    doc: dict[str, Any],
    lmms_eval_specific_kwargs: dict[str, Any] | None = None,
    *,
    previous_output: Sequence[str] | None = None,
    round_idx: int | None = None,
    previous_round_info: Any = None,
) -> Any:
    """The first question; for a later round (pictures so far, conversation so far, whether it ended, answers, None).

    The conversation is a list of (role, text) turns.
    """
    questions = [question.replace(IMAGE_HERE, "<image>") for question in doc["questions"]]
    if not round_idx:
        return questions[0]
    answers = list(previous_output or ())
    if round_idx >= len(questions):
        return [], "", True, answers, None
    turns: list[tuple[str, str]] = []
    for question, answer in zip(questions, answers, strict=False):
        # What the model says may look like the mark of a picture; it shows none.
        turns += [("user", question), ("assistant", answer.replace("<image>", ""))]
    turns.append(("user", questions[round_idx]))
    return _shown(doc, round_idx + 1), turns, False, answers, None


def process_results(doc: dict[str, Any], results: list[list[str]]) -> dict[str, list[float | None]]:
    """Per figure, the points of each turn; None where the judge's answer cannot be read."""
    turns = [
        read_grades(_judge(judge_task(question, reference, answer)))
        for question, reference, answer in zip(doc["questions"], doc["answers"], results[0], strict=True)
    ]
    return {name.lower().replace(" ", "_"): [turn.get(name) for turn in turns] for name in (OVERALL, *DIMENSIONS)}


def judge_task(question: str, reference: str, answer: str) -> str:
    """What the judge is asked about one turn."""
    asked = question.replace(IMAGE_HERE, "[picture]")
    return (
        f"{_TASK}\n\n<question>\n{asked}\n</question>\n\n<reference>\n{reference}\n</reference>\n\n"
        f"<answer>\n{answer}\n</answer>"
    )


def read_grades(text: str) -> dict[str, float]:
    """The grades of a judge's answer as points from 0 to 100: its last object, in JSON's quotes or Python's."""
    for found in reversed(_OBJECT.findall(text)):
        try:
            grades = json.loads(found.replace("'", '"'))
        except ValueError:
            continue
        if isinstance(grades, dict) and OVERALL in grades:
            return {
                name: 10 * min(max(float(grade), 0.0), 10.0)
                for name, grade in grades.items()
                if isinstance(grade, (int, float)) and not isinstance(grade, bool)
            }
    return {}


def mean_of_turns(results: Sequence[Sequence[float | None]]) -> float | None:
    """Over all turns of all conversations that were scored; None where none was."""
    points = [value for turns in results for value in turns if value is not None]
    return sum(points) / len(points) if points else None


def _shown(doc: dict[str, Any], rounds: int) -> list[Any]:
    marks = sum(question.count(IMAGE_HERE) for question in doc["questions"][:rounds])
    return [image.convert("RGB") for image in doc["images"][:marks]]


def _judge(task: str) -> str:
    payload = {
        "model": os.environ.get("MODEL_VERSION", "gpt-4o"),
        "messages": [{"role": "user", "content": task}],
        "temperature": 0,
        "max_tokens": 1024,
    }
    request = urllib.request.Request(
        os.environ.get("OPENAI_API_URL", "https://api.openai.com/v1/chat/completions"),
        json.dumps(payload).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}"},
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        return str(json.loads(response.read())["choices"][0]["message"]["content"])
