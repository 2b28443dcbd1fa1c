"""The knobs of image search: where pictures come from, which may be used, and how much a download may take."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

ProviderName = Literal["local", "wikimedia", "openverse", "brave", "serpapi"]
LicenceCode = Literal["cc0", "pdm", "by", "by-sa", "by-nc", "by-nd", "by-nc-sa", "by-nc-nd"]


class ImageSearchOptions(BaseModel):
    """Where pictures come from and what bounds them.

    A secret is never an option: ``key_env`` names the environment variable that holds it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    provider: ProviderName = "local"
    """``local`` is offline; ``wikimedia`` and ``openverse`` are free and tell licences; ``brave`` and ``serpapi`` take
    a key."""
    folder: str | None = None
    """Local: the folder of pictures, searched by file name and by ``index.jsonl`` beside them."""
    endpoint: str | None = None
    """The provider's address, for a self-hosted one; by default the public service. It may be a private address, as it
    is the user who names it; what it finds may not."""
    contact: str | None = None
    """A mail or web address put in the User-Agent, as Wikimedia's policy demands."""
    key_env: str | None = None
    """The environment variable of the key or token; by default BRAVE_API_KEY, SERPAPI_API_KEY, OPENVERSE_TOKEN (which
    is optional)."""
    licences: Literal["any"] | Annotated[tuple[LicenceCode, ...], Field(min_length=1)] = "any"
    """The licences a picture may have; with a list, a picture of unknown licence is left out."""
    results: Annotated[int, Field(ge=1, le=20)] = 5
    """Pictures a query, best first (5 in the paper)."""
    spare: Annotated[int, Field(ge=0, le=80)] = 5
    """Further results asked for, which take the place of those that cannot be used."""
    width: Literal[250, 330, 500, 960, 1280, 1920, 3840] | None = 960
    """Wikimedia: pictures are asked for at this width (it serves these only), or as they are (None)."""

    max_bytes: Annotated[int, Field(ge=1)] = 20_000_000
    """The most bytes of one picture, both as sent and unpacked."""
    max_pixels: Annotated[int, Field(ge=1)] = 50_000_000
    """The most pixels of one picture, by its header."""
    min_side: Annotated[int, Field(ge=1)] = 64
    """The shorter side of a picture has at least so many pixels; smaller ones are icons."""
    timeout: Annotated[float, Field(gt=0)] = 30.0
    """Seconds that one request may take in all, redirects included."""
    redirects: Annotated[int, Field(ge=0, le=20)] = 5
    """The most redirects that a download follows."""
    near: Annotated[int, Field(ge=0, le=64)] = 12
    """Two pictures whose perceptual hashes differ in at most so many of 256 bits count as one."""

    concurrency: Annotated[int, Field(ge=1, le=64)] = 8
    """Queries worked on at a time."""
    per_host: Annotated[int, Field(ge=1, le=64)] = 2
    """Downloads from one host at a time."""
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Searches a minute; by default 60, and 20 for Openverse without a token."""
    retries: Annotated[int, Field(ge=0, le=10)] = 3
    """Further tries, in one run, of a request that failed for a passing reason."""
    backoff: Annotated[float, Field(ge=0)] = 1.0
    """Seconds before the first further try; doubled each time, unless the server says how long to wait."""
    patience: Annotated[float, Field(ge=0)] = 120.0
    """The longest wait, in seconds, that a server may ask for; beyond it, the request is left for the next run."""

    allow_private_addresses: bool = False
    """For tests only: download from loopback and private addresses too, and send keys without TLS."""

    @model_validator(mode="after")
    def _complete(self) -> ImageSearchOptions:
        if self.provider == "local" and not self.folder:
            raise ValueError("provider 'local' needs 'folder': the folder of pictures to search in")
        if self.provider != "local" and self.folder is not None:
            raise ValueError(f"'folder' is for provider 'local', not for {self.provider!r}; leave it out")
        if self.provider == "wikimedia" and not self.contact:
            raise ValueError("provider 'wikimedia' needs 'contact': a mail or web address for the User-Agent")
        if self.contact is not None and not re.fullmatch(r"[\x21-\x7e]+( [\x21-\x7e]+)*", self.contact):
            raise ValueError("'contact' must be one line of plain ASCII characters")
        if self.provider == "brave" and self.licences != "any":
            raise ValueError(
                "provider 'brave' does not tell licences; use 'wikimedia' or 'openverse', or licences: any"
            )
        if self.endpoint is not None and not re.match(r"https?://[^/?#@]+(/[^?#]*)?$", self.endpoint):
            raise ValueError("'endpoint' must be an http or https address without user name, query or fragment")
        return self
