"""What is asked of the language model that writes, beside how it is reached."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from kore_fast.endpoint.options import EndpointOptions


class LanguageModelOptions(EndpointOptions):
    """A chat model behind an OpenAI-compatible address, and what the writer asks of it.

    What decides an answer (model, temperature, max_tokens, seed, extra_body, prompts) is part of the request cache's
    key. How it is reached (address, speed, prices, ``structured``) is not: a server that moved costs nothing again.
    """

    questions: Annotated[int, Field(ge=1, le=30)] = 10
    """The most dialogue questions of an item (10 in the paper); dialogues and rounds may ask for fewer."""
    answers_together: bool = False
    """One request answers all of an item's questions: cheaper. The paper makes one request a question."""
    include_facts: bool = True
    """The item's facts are shown to the model beside its text; False shows the text alone, as in the paper."""
    max_text_tokens: Annotated[int, Field(ge=16)] = 6000
    """An item's text is cut to this (4 bytes a token) at the end of a sentence; how many were is in the summary."""
    prompts: Path | None = None
    """A folder with prompt files of one's own; those that are not in it are the built-in ones."""
    asks: Annotated[int, Field(ge=1, le=10)] = 3
    """How often a request is asked until its answer is usable; from the second time on with what was wrong."""
    batch_api: bool = False
    """OpenAI's Batch API: cheaper, within a day. Questions go first, answers in a second round."""
    batch_requests: Annotated[int, Field(ge=1, le=50_000)] = 50_000
    """The most requests in one batch."""
    batch_bytes: Annotated[int, Field(ge=1024, le=200_000_000)] = 190_000_000
    """The most bytes in one batch's file."""
    batch_poll: Annotated[float, Field(gt=0)] = 30.0
    """Seconds between two looks at a batch."""
