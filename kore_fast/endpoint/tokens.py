"""About how many tokens a request takes, without a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

BYTES_PER_TOKEN = 4
"""A rough count that needs no tokenizer: right within a fifth or so for English, and for most scripts."""
PICTURE_TOKENS = 600
"""Of a picture, roughly: LLaVA-v1.5 takes 576; servers that cut large pictures into tiles take more."""
_MARKS = 4


def count_tokens(text: str) -> int:
    """About how many tokens a text is."""
    return -(-len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN)


def count_message_tokens(messages: Iterable[Mapping[str, Any]]) -> int:
    """About how many tokens messages are, with the marks around each; a content may be text or a list of parts."""
    return sum(_MARKS + _content_tokens(message["content"]) for message in messages)


def _content_tokens(content: Any) -> int:
    if isinstance(content, str):
        return count_tokens(content)
    return sum(count_tokens(part["text"]) if part["type"] == "text" else PICTURE_TOKENS for part in content)
