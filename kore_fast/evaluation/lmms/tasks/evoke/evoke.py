"""EVOKE's questions and its two scores, each from 0 to 1; beside the reference's CEM the one without its quirks."""

from __future__ import annotations

from typing import Any

from kore_fast.evaluation.metrics import cover_exact_match, cover_exact_match_corrected, token_f1


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    return [doc["image"].convert("RGB")]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    return str(doc["text"])


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    prediction, truth = results[0], doc["answer"]
    return {
        "cem": float(cover_exact_match(prediction, truth)),
        "cem_corrected": float(cover_exact_match_corrected(prediction, truth)),
        "f1": token_f1(prediction, truth),
    }
