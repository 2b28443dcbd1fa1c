"""What the searches on the web share: one JSON request a query, keys that stay out of sight, bounded downloads."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, ClassVar
from urllib.parse import quote, quote_plus, urlencode

from typing_extensions import Self

from kore_fast.augmentation.images.fetch import Answer, Fetcher, Rejected, Unavailable, host_of
from kore_fast.augmentation.images.options import ImageSearchOptions
from kore_fast.augmentation.images.providers.provider import Found, plain_query, plain_text
from kore_fast.errors import DataError

_SEARCH_BYTES = 8_000_000


class WebProvider(ABC):
    """A search by one GET request that answers with JSON.

    A key lives in the environment and, for the time of a request, in its headers or query; the answer is read field by
    field, so that neither a request's address nor an answer as such is ever stored, logged or part of an error.
    """

    name: ClassVar[str]
    public_endpoint: ClassVar[str]
    default_key_env: ClassVar[str | None] = None
    needs_key: ClassVar[bool] = False
    most: ClassVar[int] = 100
    """The most results that one request may ask for."""

    def __init__(self, options: ImageSearchOptions) -> None:
        self.options = options
        self.endpoint = options.endpoint or self.public_endpoint
        self.key_env = options.key_env or self.default_key_env
        self._stack = AsyncExitStack()
        self._searches: Fetcher | None = None
        self._pictures: Fetcher | None = None

    @abstractmethod
    def parameters(self, query: str, count: int) -> dict[str, str]:
        """The request's query, without the key."""

    @abstractmethod
    def parse(self, body: dict[str, Any]) -> list[Found | None]:
        """The results in an answer, best first; None for one that cannot be used.

        Raises:
            Unavailable: the answer says that something went wrong.
        """

    def headers(self) -> dict[str, str]:
        """The request's headers, with the key where it belongs there."""
        return {}

    def secret_parameters(self) -> dict[str, str]:
        """The key, where it belongs in the address."""
        return {}

    def scope(self) -> dict[str, Any]:
        """The endpoint; see `Provider.scope`."""
        return {"endpoint": self.endpoint}

    def key(self) -> str:
        """The key in the environment, or nothing."""
        return os.environ.get(self.key_env, "").strip() if self.key_env else ""

    async def __aenter__(self) -> Self:
        if self.needs_key and not self.key():
            raise DataError(
                f"image search with {self.name!r} needs a key, and the environment variable {self.key_env} is not set; "
                "set it, or choose provider 'wikimedia', 'openverse' or 'local'"
            )
        key = self.key()
        if not key.isascii() or not key.isprintable() or " " in key:
            raise DataError(f"the key in the environment variable {self.key_env} is not one plain word; correct it")
        private = self.options.allow_private_addresses
        if key and not private and not self.endpoint.startswith("https:"):
            raise DataError(
                f"the key in {self.key_env} would be sent to {host_of(self.endpoint)} without encryption; "
                "use an https endpoint"
            )
        agent = user_agent(self.options.contact)
        # An endpoint is the user's own choice; what it finds is not.
        trusted = private or self.options.endpoint is not None
        self._searches = await self._stack.enter_async_context(Fetcher(user_agent=agent, allow_private=trusted))
        self._pictures = await self._stack.enter_async_context(Fetcher(user_agent=agent, allow_private=private))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def search(self, query: str, count: int) -> list[Found]:
        """See `Provider.search`."""
        words = plain_query(query)
        if not words:
            return []
        assert self._searches is not None
        host = host_of(self.endpoint)
        parameters = {**self.parameters(words, min(count, self.most)), **self.secret_parameters()}
        try:
            answer = await self._searches.get(
                f"{self.endpoint}?{urlencode(parameters)}",
                max_bytes=_SEARCH_BYTES,
                timeout=self.options.timeout,
                headers={"Accept": "application/json", **self.headers()},
            )
        except Rejected as error:  # a redirect, for one: it would take the key to another host
            raise DataError(f"image search with {self.name!r}: {self.redact(str(error))}; correct 'endpoint'") from None
        except Unavailable as error:
            raise Unavailable(self.redact(str(error)), wait=error.wait, again=error.again) from None
        self._check(answer, host)
        body = self._json(answer, host)
        return self._clean([one for one in self.parse(body) if one is not None][:count])

    async def download(self, found: Found) -> bytes:
        """See `Provider.download`."""
        assert self._pictures is not None
        answer = await self._pictures.get(
            found.url,
            max_bytes=self.options.max_bytes,
            timeout=self.options.timeout,
            redirects=self.options.redirects,
            headers={"Accept": "image/*"},
        )
        host = host_of(found.url)
        answer.raise_passing(host)
        if answer.status != 200:
            raise Rejected(f"{host} answered {answer.status}")
        return answer.body

    def redact(self, text: str) -> str:
        """``text`` without the key, in any spelling that an address gives it."""
        key = self.key()
        for spelling in {key, quote(key, safe=""), quote_plus(key)} if key else ():
            text = text.replace(spelling, "***")
        return text

    def _clean(self, found: list[Found]) -> list[Found]:
        """``found`` without the key: a provider that echoed it would hand it to a picture's host."""
        clean = []
        for one in found:
            if not self.key() or "***" not in self.redact(one.url):
                fields = {name: self.redact(value) if isinstance(value, str) else value for name, value in one}
                clean.append(Found(**fields))
        return clean

    def refused(self, answer: Answer, body: str) -> bool:
        """Whether the answer says that the key, or who asks, is not welcome."""
        return answer.status in (401, 403)

    def remedy(self) -> str:
        """What to do when the service refuses who asks."""
        state = "the key in" if self.key() else "no key is set in"
        return f"{state} the environment variable {self.key_env}; set one that the service accepts"

    def _check(self, answer: Answer, host: str) -> None:
        said = self._said(answer)
        if self.refused(answer, said):
            raise DataError(
                f"image search with {self.name!r}: {host} answered {answer.status}{said and f' ({said})'} "
                f"to {self.remedy()}, then give the same command again: finished work is kept"
            )
        try:
            answer.raise_passing(host)
        except Unavailable as error:
            raise Unavailable(f"{error}{said and f' ({said})'}", wait=error.wait) from None
        if answer.status != 200:
            raise Unavailable(f"{host} answered {answer.status}{said and f' ({said})'}", again=False)

    def _json(self, answer: Answer, host: str) -> dict[str, Any]:
        try:
            body = self._scrub(json.loads(answer.body))
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise Unavailable(f"{host} did not answer with a JSON object", again=False)
        return body

    def _scrub(self, value: Any) -> Any:
        """JSON without the key, before any text of it is cut short: half a key is still a secret."""
        if isinstance(value, str):
            return self.redact(value)
        if isinstance(value, list):
            return [self._scrub(one) for one in value]
        if isinstance(value, dict):
            return {name: self._scrub(one) for name, one in value.items()}
        return value

    def _said(self, answer: Answer) -> str:
        """A refusal's own words, without the key."""
        if answer.status == 200:
            return ""
        # Once as it came, once more as it reads: markup can spell a key in ways of its own.
        said = plain_text(self.redact(answer.body.decode("utf-8", "replace")), 20_000) or ""
        return self.redact(said)[:200].strip()


def user_agent(contact: str | None) -> str:
    """What this project calls itself on the web."""
    from kore_fast import __version__

    return f"kore-fast/{__version__}" + (f" ({contact})" if contact else "")


def rows(value: object) -> list[dict[str, Any]]:
    """The objects in a list of an answer; nothing where there is no list."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
