"""Wikimedia Commons: free, with licences and authors; its policy asks for a contact in the User-Agent.

Written from the documentation of the MediaWiki API (generator=search, prop=imageinfo) and of CommonsMetadata; not run
against the real service.
"""

from __future__ import annotations

from typing import Any

from kore_fast.augmentation.images.fetch import Unavailable
from kore_fast.augmentation.images.providers.provider import Found, plain_text, web_address, whole_number
from kore_fast.augmentation.images.providers.web import WebProvider, rows


class Wikimedia(WebProvider):
    """Searches the file pages of Commons for raster pictures."""

    name = "wikimedia"
    public_endpoint = "https://commons.wikimedia.org/w/api.php"
    most = 50

    def scope(self) -> dict[str, Any]:
        """The endpoint, and the width that pictures are asked for at."""
        return {**super().scope(), "width": self.options.width}

    def parameters(self, query: str, count: int) -> dict[str, str]:
        """One request finds the files and describes them."""
        asked = {
            "action": "query",
            "format": "json",
            "formatversion": "2",
            "generator": "search",
            "gsrsearch": f"{query} filetype:bitmap",
            "gsrnamespace": "6",
            "gsrlimit": str(count),
            "prop": "imageinfo",
            "iiprop": "url|size|mime|sha1|extmetadata",
            "iiextmetadatafilter": "LicenseShortName|UsageTerms|LicenseUrl|Artist|ObjectName",
            "maxlag": "5",
        }
        if self.options.width is not None:
            asked["iiurlwidth"] = str(self.options.width)
        return asked

    def parse(self, body: dict[str, Any]) -> list[Found | None]:
        """The pages in the order of their ``index``: the answer lists them by page number."""
        if isinstance(body.get("error"), dict):  # with status 200: the server is behind, or asked too often
            raise Unavailable(f"Commons answered {plain_text(body['error'].get('info')) or 'with an error'}")
        query = body.get("query")
        pages = rows(query.get("pages")) if isinstance(query, dict) else []
        pages.sort(key=lambda page: whole_number(page.get("index")) or 1 << 30)
        return [self._found(page) for page in pages]

    def remedy(self) -> str:
        """No key: what Commons minds is a User-Agent without a way to reach whoever runs it, or too many requests."""
        return f"the contact {self.options.contact!r}; give a working one ('contact'), or ask for fewer searches"

    def _found(self, page: dict[str, Any]) -> Found | None:
        info = next(iter(rows(page.get("imageinfo"))), {})
        thumbnail = web_address(info.get("thumburl")) if self.options.width is not None else None
        url = thumbnail or web_address(info.get("url"))
        if url is None:
            return None
        about = info.get("extmetadata")

        def said(field: str) -> str | None:
            entry = about.get(field) if isinstance(about, dict) else None
            return plain_text(entry.get("value")) if isinstance(entry, dict) else None

        name = plain_text(page.get("title")) or ""
        return Found(
            url=url,
            source_page=web_address(info.get("descriptionurl")),
            title=said("ObjectName") or name.removeprefix("File:") or None,
            author=said("Artist"),
            licence=said("LicenseShortName") or said("UsageTerms"),
            licence_url=web_address(said("LicenseUrl")),
            width=whole_number(info.get("thumbwidth" if thumbnail else "width")),
            height=whole_number(info.get("thumbheight" if thumbnail else "height")),
            mime=plain_text(info.get("mime"), 100),
        )
