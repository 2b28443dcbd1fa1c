"""Rough counts of tokens: of texts, and of messages with pictures."""

from __future__ import annotations

from kore_fast.endpoint.tokens import PICTURE_TOKENS, count_message_tokens, count_tokens


def test_parts_count_as_the_text_in_them_and_pictures_by_the_piece() -> None:
    plain = [{"role": "user", "content": "What is it?"}]
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10_000}}
    parts = [{"role": "user", "content": [picture, {"type": "text", "text": "What is it?"}]}]
    assert count_message_tokens(plain) > count_tokens("What is it?")
    assert count_message_tokens(parts) - count_message_tokens(plain) == PICTURE_TOKENS
    assert count_message_tokens([*plain, *parts]) == count_message_tokens(plain) + count_message_tokens(parts)
    assert count_message_tokens([]) == 0
