"""Cutting prose to length at places where a reader would pause."""

from __future__ import annotations

import re
from functools import lru_cache

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])")
_CLAUSE_END = re.compile(r"[,;:—]")


def sentences(text: str) -> list[str]:
    """The text's sentences, on one line each."""
    return list(_sentences(text))


# A text is taken apart by several in turn: writers, the grounding check, links.
@lru_cache(maxsize=64)
def _sentences(text: str) -> tuple[str, ...]:
    flat = " ".join(text.split())
    found, start = [], 0
    for end in _SENTENCE_END.finditer(flat):
        found.append(flat[start : end.end()].strip())
        start = end.end()
    return (*found, flat[start:]) if flat[start:] else tuple(found)


def shorten(text: str, words: int) -> tuple[str, str]:
    """(leading sentences of at most ``words`` words, the rest); a first sentence that is longer is cut."""
    parts = sentences(text)
    kept = 0
    while kept < len(parts) and len(" ".join(parts[: kept + 1]).split()) <= words:
        kept += 1
    if not kept:
        return _cut(parts[0], words), " ".join(parts[1:])
    return " ".join(parts[:kept]), " ".join(parts[kept:])


def summarise(text: str, words: int) -> str:
    """At most ``words`` words: the leading sentences, or the first that is short enough, or the opening clauses."""
    parts = sentences(text)
    if len(parts[0].split()) <= words:
        return shorten(text, words)[0]
    for sentence in parts[1:]:
        if 5 <= len(sentence.split()) <= words:
            return sentence
    return _cut(parts[0], words)


def _cut(sentence: str, words: int) -> str:
    """The sentence's opening clauses if they make a sentence of their own, else its first words and "…"."""
    opening = ""
    for end in _CLAUSE_END.finditer(sentence):
        clause = sentence[: end.start()].rstrip()
        if len(clause.split()) <= words:
            opening = clause
    if len(opening.split()) >= 8:
        return f"{opening}."
    return " ".join(sentence.split()[:words]).rstrip(",;:—") + " …"
