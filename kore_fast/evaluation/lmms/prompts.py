"""Where pictures stand in a question."""

from __future__ import annotations

from kore_fast.data.conversations import IMAGE


def pictures_first(text: str, images: int) -> str:
    """``text`` after as many ``<image>`` as pictures, and without any in it.

    lmms-eval's tasks give text and pictures apart. Where the mark stands in a text no picture is meant: SEED-Bench puts
    it for an option that is a file's name.
    """
    return f"{IMAGE}\n" * images + text.replace(IMAGE, "").strip()
