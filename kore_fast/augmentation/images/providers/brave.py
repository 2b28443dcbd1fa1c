"""Brave's image search: an index of the whole web, by key; it does not tell licences.

Written from the documentation of its API (/res/v1/images/search); not run against the real service.
"""

from __future__ import annotations

from typing import Any

from kore_fast.augmentation.images.fetch import Answer
from kore_fast.augmentation.images.providers.provider import Found, plain_text, web_address, whole_number
from kore_fast.augmentation.images.providers.web import WebProvider, rows


class Brave(WebProvider):
    """Searches by words, with the key in a header."""

    name = "brave"
    public_endpoint = "https://api.search.brave.com/res/v1/images/search"
    default_key_env = "BRAVE_API_KEY"
    needs_key = True

    def parameters(self, query: str, count: int) -> dict[str, str]:
        """Words as they are: a corrected name would be another one."""
        return {"q": query, "count": str(count), "safesearch": "strict", "spellcheck": "false"}

    def headers(self) -> dict[str, str]:
        """The key."""
        return {"X-Subscription-Token": self.key()}

    def refused(self, answer: Answer, body: str) -> bool:
        """A wrong key is answered with 422, as a wrong parameter is."""
        return super().refused(answer, body) or (answer.status == 422 and "SUBSCRIPTION_TOKEN" in body)

    def parse(self, body: dict[str, Any]) -> list[Found | None]:
        """The ``results``: ``url`` is the page, ``properties.url`` the picture."""
        return [self._found(row) for row in rows(body.get("results"))]

    def _found(self, row: dict[str, Any]) -> Found | None:
        properties = row.get("properties")
        picture = properties if isinstance(properties, dict) else {}
        url = web_address(picture.get("url"))
        if url is None:
            return None
        return Found(
            url=url,
            source_page=web_address(row.get("url")),
            title=plain_text(row.get("title")),
            width=whole_number(picture.get("width")),
            height=whole_number(picture.get("height")),
        )
