"""Where a sample comes from: who wrote it, where its pictures were found, and what the checks said of it."""

from __future__ import annotations

from dataclasses import dataclass

TEMPLATES = "templates"


@dataclass(frozen=True)
class PictureSource:
    """Where one of a sample's pictures comes from; None is what is not known."""

    own: bool = True
    """Whether it is an item's own picture; the rest is then the item's ``source`` and ``licence``."""
    provider: str | None = None
    """Who found it (``wikimedia``), for a picture that was searched for."""
    source: str | None = None
    """Its page, or the source that the item names."""
    author: str | None = None
    licence: str | None = None
    query: str | None = None
    """What was searched for."""
    clip: float | None = None
    """Its CLIP similarity to the item's own picture, where it was measured."""


@dataclass(frozen=True)
class Provenance:
    """Where a sample comes from."""

    writer: str = TEMPLATES
    """``templates``, or the language model's name."""
    pictures: tuple[PictureSource, ...] = ()
    """One for each of the sample's pictures, in their order."""
    grounding: str | None = None
    """The grounding check's verdict in a word (``supported``), None where it was not run."""
    flags: tuple[str, ...] = ()
    """What a reader should look at first, such as ``repaired`` or ``low clip``."""
