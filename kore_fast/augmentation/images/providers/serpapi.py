"""SerpApi: Google's image results, paid, by a key that is part of the request's address.

Written from the documentation of its engine google_images; not run against the real service.
"""

from __future__ import annotations

from typing import Any

from kore_fast.augmentation.images.fetch import Unavailable
from kore_fast.augmentation.images.licences import licence_code
from kore_fast.augmentation.images.providers.provider import Found, plain_text, web_address, whole_number
from kore_fast.augmentation.images.providers.web import WebProvider, rows


class SerpApi(WebProvider):
    """Searches by words; where only some licences are allowed, among pictures under Creative Commons."""

    name = "serpapi"
    public_endpoint = "https://serpapi.com/search.json"
    default_key_env = "SERPAPI_API_KEY"
    needs_key = True

    def parameters(self, query: str, count: int) -> dict[str, str]:
        """There is no parameter for a count: a page holds about a hundred results."""
        asked = {"engine": "google_images", "q": query, "ijn": "0", "safe": "active"}
        if self.options.licences != "any":
            asked["licenses"] = "cl"
        return asked

    def secret_parameters(self) -> dict[str, str]:
        """The key."""
        return {"api_key": self.key()}

    def parse(self, body: dict[str, Any]) -> list[Found | None]:
        """The ``images_results``: ``original`` is the picture, ``link`` its page."""
        results = rows(body.get("images_results"))
        error = plain_text(self.redact(str(body.get("error") or "")), 200)
        if not results and error and "any results" not in error:  # finding nothing is told as an error too
            raise Unavailable(f"SerpApi answered {error!r}", again=False)
        return [self._found(row) for row in results]

    def _found(self, row: dict[str, Any]) -> Found | None:
        url = web_address(row.get("original"))
        if url is None:
            return None
        deed = web_address(row.get("license_details_url"))
        code = licence_code(None, deed)
        return Found(
            url=url,
            source_page=web_address(row.get("link")),
            title=plain_text(row.get("title")),
            author=plain_text(row.get("source")),
            licence=code if code is None or not code.startswith("by") else f"CC {code.upper()}",
            licence_url=deed,
            width=whole_number(row.get("original_width")),
            height=whole_number(row.get("original_height")),
        )
