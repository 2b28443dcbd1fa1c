"""The one interface behind which every image search stands, and what they share in reading words."""

from __future__ import annotations

import re
import unicodedata
from html.parser import HTMLParser
from types import TracebackType
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field


class Found(BaseModel):
    """One result of a search, as its provider describes it: not yet downloaded, nothing of it checked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field(max_length=4000)
    """Where the picture is: a web address, or for a local folder the path below it."""
    source_page: str | None = None
    title: str | None = None
    author: str | None = None
    licence: str | None = None
    """The licence's name as the provider gives it; None where it gives none."""
    licence_url: str | None = None
    width: int | None = None
    height: int | None = None
    mime: str | None = None


class Provider(Protocol):
    """Searches for pictures and reads them. Used as an asynchronous context, in which the network may be opened."""

    @property
    def name(self) -> str:
        """The name that options know it by."""
        ...

    def scope(self) -> dict[str, Any]:
        """What the results depend on besides the query, as plain JSON without secrets: part of the cache's key."""
        ...

    async def search(self, query: str, count: int) -> list[Found]:
        """At most ``count`` results, best first.

        Raises:
            Unavailable: the search may succeed at another time.
            DataError: no search will succeed before the user has done what the error says.
        """
        ...

    async def download(self, found: Found) -> bytes:
        """The file of a result, whatever it holds.

        Raises:
            Rejected: it cannot be had, and could not next time.
            Unavailable: it may be had at another time.
        """
        ...

    async def __aenter__(self) -> Provider: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def plain_query(query: str) -> str:
    """A query of words only, at most 40 of them and 250 characters.

    Names hold what a search engine takes for an operator ("Mission: Impossible", "-ism", "A OR B").
    """
    words: list[str] = []
    for word in re.findall(r"[^\W_](?:[\w'’.&-]*[^\W_])?", unicodedata.normalize("NFC", query)):
        word = word.lower() if word in ("AND", "OR", "NOT") else word
        if len(words) == 40 or len(" ".join([*words, word])) > 250:
            break
        words.append(word)
    return " ".join(words)


def plain_text(value: object, limit: int = 300) -> str | None:
    """A stranger's text as one line of at most ``limit`` characters, without markup; None where nothing is left."""
    if not isinstance(value, str):
        return None
    if "<" in value or "&" in value:
        reader = _TextOnly()
        reader.feed(value[:20_000])
        reader.close()
        value = " ".join(reader.parts)
    kept = "".join(" " if unicodedata.category(character)[0] in "CZ" else character for character in value)
    return " ".join(kept.split())[:limit].strip() or None


def web_address(value: object) -> str | None:
    """``value`` where it is an http or https address of usable length, else None."""
    if isinstance(value, str) and len(value) <= 4000 and re.match(r"https?://[^\s/]", value):
        return value if value.isprintable() else None
    return None


def whole_number(value: object) -> int | None:
    """A width or height that is one."""
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value[:9])
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


class _TextOnly(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style") and self._hidden > 0

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)
