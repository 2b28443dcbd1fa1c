"""The knobs of augmentation, in one place."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Branch = Literal["dialogue", "recognition", "caption", "vqa", "links"]


class AugmentationOptions(BaseModel):
    """What is written for each item, how much of it, and how closely it follows the paper."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = 0
    branches: tuple[Branch, ...] = ("dialogue", "recognition", "caption", "vqa")
    """"links" too asks about two items at once: comparison and multi-hop, which the paper leaves open."""
    negatives: bool = True
    """Recognition also gets "No" examples (another item's picture or name); the paper has only "Yes"."""
    natural_answers: bool = True
    """Recognition and VQA answer in short whole sentences; False asks for and gives single words, as the paper does.
    A small model trained on single words answers every question with one."""
    dialogues: Annotated[int, Field(ge=1)] = 2
    """Dialogues an item."""
    rounds: Annotated[int, Field(ge=1)] = 5
    """Rounds a dialogue, at most, the opening one included."""
    prose_words: Annotated[int, Field(ge=8)] = 60
    """The most words of an item's prose in one answer; longer prose ends at the last sentence that fits."""
    summary_words: Annotated[int, Field(ge=8)] = 25
    """The most words of prose in a caption (25 in the paper)."""
    vqa: Annotated[int, Field(ge=0)] = 4
    """VQA samples an item (up to 5 in the paper)."""
    links: Annotated[int, Field(ge=1)] = 2
    """Links an item takes part in, at most, if "links" is among the branches."""
    by_picture: Annotated[int, Field(ge=0)] = 2
    """Held-out questions an item that point at the picture without a name; by name, each fact is asked once."""

    @classmethod
    def kore_74k(cls, seed: int = 0) -> AugmentationOptions:
        """The shape of KORE-74K: for each item one dialogue of a template round and up to 10 more, one recognition
        sample, always "Yes", one caption and up to 5 VQA samples, with single words as answers."""
        return cls(seed=seed, dialogues=1, rounds=11, negatives=False, natural_answers=False, summary_words=25, vqa=5)
