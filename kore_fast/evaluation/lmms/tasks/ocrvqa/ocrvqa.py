"""OCRVQA's questions; an answer is right where it is the reference, upper or lower case."""

from __future__ import annotations

import ast
from typing import Any


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    return [doc["image"].convert("RGB")]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    return f"{doc['question']}{(lmms_eval_specific_kwargs or {}).get('post_prompt', '')}"


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    prediction = results[0].strip().lower()
    return {"exact_match": float(any(truth.strip().lower() == prediction for truth in references(doc["answer"])))}


def references(answer: str) -> list[str]:
    """The right answers: the cell's text, or those of a list written out in it."""
    if answer.startswith("[") and answer.endswith("]"):
        try:
            listed = ast.literal_eval(answer)
        except (ValueError, SyntaxError):
            return [answer]
        if isinstance(listed, list):
            return [str(one) for one in listed]
    return [answer]
