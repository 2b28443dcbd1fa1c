"""Where pictures stand in a question."""

from __future__ import annotations

from kore_fast.data.conversations import IMAGE


def place_marks(text: str, images: int) -> str:
    """``text`` with as many ``<image>`` as pictures: as it stands where they are right, else all of them first.

    A benchmark's text may hold the mark where no picture is meant (an option that is a file's name, in SEED-Bench).
    """
    if text.count(IMAGE) == images:
        return text
    bare = text.replace(IMAGE, "").strip()
    return f"{IMAGE}\n" * images + bare
