"""Openverse: openly licensed pictures of many collections; a token is optional and allows more searches.

Written from the documentation of its API (/v1/images/); not run against the real service.
"""

from __future__ import annotations

from typing import Any

from kore_fast.augmentation.images.providers.provider import Found, plain_text, web_address, whole_number
from kore_fast.augmentation.images.providers.web import WebProvider, rows


class Openverse(WebProvider):
    """Searches by words, and by licence where only some are allowed."""

    name = "openverse"
    public_endpoint = "https://api.openverse.org/v1/images/"
    default_key_env = "OPENVERSE_TOKEN"
    most = 20  # without a token, a larger page is refused

    def parameters(self, query: str, count: int) -> dict[str, str]:
        """A page of results; adult content is left out, as it is by default."""
        asked = {"q": query, "page_size": str(count), "mature": "false"}
        if self.options.licences != "any":
            asked["license"] = ",".join(self.options.licences)
        return asked

    def headers(self) -> dict[str, str]:
        """The token, where there is one."""
        return {"Authorization": f"Bearer {self.key()}"} if self.key() else {}

    def parse(self, body: dict[str, Any]) -> list[Found | None]:
        """The ``results``; a licence is told by its code and version."""
        return [self._found(row) for row in rows(body.get("results"))]

    def remedy(self) -> str:
        """A token lives for some hours."""
        if not self.key():
            return super().remedy()
        return f"the token in the environment variable {self.key_env}; tokens expire: get a new one and set it"

    def _found(self, row: dict[str, Any]) -> Found | None:
        url = web_address(row.get("url"))
        if url is None:
            return None
        code = (plain_text(row.get("license"), 50) or "").lower()
        version = plain_text(row.get("license_version"), 25)
        names = {"cc0": "CC0", "pdm": "Public domain", "": None}
        licence = names[code] if code in names else f"CC {code.upper()}" if code.startswith("by") else code
        kind = plain_text(row.get("filetype"), 20)
        return Found(
            url=url,
            source_page=web_address(row.get("foreign_landing_url")),
            title=plain_text(row.get("title")),
            author=plain_text(row.get("creator")),
            licence=f"{licence} {version}" if licence and version else licence,
            licence_url=web_address(row.get("license_url")),
            width=whole_number(row.get("width")),
            height=whole_number(row.get("height")),
            mime=f"image/{'jpeg' if kind == 'jpg' else kind}" if kind else None,
        )
