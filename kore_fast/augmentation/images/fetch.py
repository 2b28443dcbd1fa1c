"""Bounded requests to addresses that strangers chose: only public ones, however they are named or redirected to.

The host is resolved here, every address it has is checked, and the connection is made to a checked address, so that a
name which resolves differently a moment later gains nothing. No proxy is taken from the environment, and no
compression is asked for. Names and addresses are checked anew at every redirect.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
import zlib
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kore_fast.errors import DataError

if TYPE_CHECKING:
    import httpcore2
    import httpx2

Resolve = Callable[[str, int], Awaitable[list[str]]]

_REDIRECTS = (301, 302, 303, 307, 308)
_PASSING = (408, 425, 429)
_NEXT_ADDRESS = 5.0
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_NAT64_LOCAL = ipaddress.IPv6Network("64:ff9b:1::/48")


class Rejected(Exception):
    """A download that would fail in the same way next time; the text is the reason."""


class Unavailable(Exception):
    """A request that may succeed at another time; ``wait`` is how long the server asks to wait, in seconds."""

    def __init__(self, reason: str, *, wait: float | None = None, again: bool = True) -> None:
        super().__init__(reason)
        self.wait = wait
        self.again = again
        """Whether trying once more in the same run makes sense."""


@dataclass(frozen=True)
class Answer:
    """What a server answered, after redirects."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def raise_passing(self, host: str) -> None:
        """Raises `Unavailable` for a status that says "later"."""
        if self.status in _PASSING or self.status >= 500:
            raise Unavailable(f"{host} answered {self.status}", wait=retry_after(self.headers))


def check_address(address: str, *, allow_private: bool = False) -> None:
    """Refuse an IP address that is not on the public internet, in whatever form it is embedded.

    With ``allow_private``, only link-local ones are refused: at such an address clouds keep a machine's credentials.

    Raises:
        Rejected: private, loopback, link-local, shared, multicast, reserved or unspecified, also as the IPv4 address
            within an IPv4-mapped, IPv4-compatible, 6to4, Teredo or NAT64 one.
    """
    ip = ipaddress.ip_address(address)
    within: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = [ip]
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            within = [ip.ipv4_mapped]
        elif ip in _NAT64:  # reserved by itself, public or not by what it stands for
            within = [ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)]
        elif ip in _NAT64_LOCAL:
            raise Rejected(f"{address} is not a public address")
        elif ip.sixtofour is not None:
            within.append(ip.sixtofour)
        elif ip.teredo is not None:
            within += ip.teredo
    if allow_private:
        if any(one.is_link_local for one in within):
            raise Rejected(f"{address} is a link-local address")
        return
    for one in within:
        # What counts as global has changed between versions of Python; the others have not.
        if (
            not one.is_global
            or one.is_private
            or one.is_loopback
            or one.is_link_local
            or one.is_multicast
            or one.is_reserved
            or one.is_unspecified
            or (isinstance(one, ipaddress.IPv6Address) and one.is_site_local)
        ):
            raise Rejected(f"{address} is not a public address")


async def resolve_host(host: str, port: int) -> list[str]:
    """All IP addresses of ``host``, by the system's resolver.

    Raises:
        Unavailable: there is no such host, or no answer.
        Rejected: not a host's name.
    """
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    except socket.gaierror as error:
        raise Unavailable(f"the host {host} cannot be found ({error.strerror})", again=False) from None
    except (UnicodeError, OverflowError, ValueError):
        raise Rejected(f"{host!r} is not a host's name") from None
    return list(dict.fromkeys(str(address[4][0]) for address in found))


class Fetcher:
    """An HTTP client for addresses that are not trusted; an asynchronous context.

    Args:
        user_agent: sent with every request.
        allow_private: also connect to addresses that are not public, but for link-local ones.
        resolve: (host, port) → its IP addresses.
    """

    def __init__(self, *, user_agent: str, allow_private: bool = False, resolve: Resolve | None = None) -> None:
        self._user_agent = user_agent
        self._allow_private = allow_private
        self._resolve = resolve
        self._pool: httpcore2.AsyncConnectionPool | None = None

    async def __aenter__(self) -> Fetcher:
        http = _http()
        import httpcore2

        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=http.create_ssl_context(),
            max_connections=None,
            max_keepalive_connections=16,
            keepalive_expiry=5.0,
            network_backend=_checked_backend(self._addresses),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            await self._pool.aclose()
            self._pool = None

    async def get(
        self,
        url: str,
        *,
        max_bytes: int,
        timeout: float,
        redirects: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """The answer to a GET request, whatever its status, in at most ``timeout`` seconds and ``max_bytes`` bytes.

        ``headers`` go to the first server only. No error holds the address beyond its host.

        Raises:
            Rejected: not http or https, a user name in it, an address that is not public, too many redirects, too
                many bytes (as sent or unpacked).
            Unavailable: no connection, a broken one, or the time is over.
        """
        try:
            return await asyncio.wait_for(self._follow(url, max_bytes, redirects, headers or {}), timeout)
        except (TimeoutError, asyncio.TimeoutError):
            raise Unavailable(f"{host_of(url)} took longer than {timeout:g} s", again=False) from None

    async def _follow(self, url: str, max_bytes: int, redirects: int, headers: Mapping[str, str]) -> Answer:
        target = _parsed(url)
        for hop in range(redirects + 1):
            answer = await self._once(target, max_bytes, headers if hop == 0 else {})
            if answer.status not in _REDIRECTS:
                return answer
            place = answer.headers.get("location")
            if not place:
                raise Rejected(f"{target.host} answered {answer.status} without saying where to go")
            try:
                joined = str(target.join(place))
            except Exception:
                raise Rejected(f"{target.host} redirects to something that is not an address") from None
            target = _parsed(joined)
        raise Rejected(f"more than {redirects} redirects, the last to {target.host}")

    async def _once(self, url: httpx2.URL, max_bytes: int, headers: Mapping[str, str]) -> Answer:
        import httpcore2

        if self._pool is None:
            raise RuntimeError("a Fetcher is used within 'async with'")
        sent = {
            "Host": url.netloc.decode("ascii"),
            "User-Agent": self._user_agent,
            "Accept-Encoding": "identity",
            **headers,
        }
        target = httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        try:
            async with self._pool.stream("GET", target, headers=list(sent.items())) as response:
                received = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
                if response.status in _REDIRECTS:
                    return Answer(response.status, received, b"")
                body = await _bounded(response.aiter_stream(), received, max_bytes, url.host)
                return Answer(response.status, received, body)
        except httpcore2.ConnectError as error:
            raise Unavailable(f"no connection to {url.host} ({error})") from None
        except (httpcore2.NetworkError, httpcore2.RemoteProtocolError, httpcore2.TimeoutException) as error:
            raise Unavailable(f"the connection to {url.host} broke ({error or type(error).__name__})") from None
        except httpcore2.LocalProtocolError:
            raise Rejected(f"the address on {url.host} cannot be asked for") from None

    async def _addresses(self, host: str, port: int) -> list[str]:
        found = await (self._resolve or resolve_host)(host, port)
        if not found:
            raise Unavailable(f"the host {host} has no address", again=False)
        for address in found:
            try:
                check_address(address, allow_private=self._allow_private)
            except Rejected as error:
                raise Rejected(f"the host {host} is refused: {error}") from None
        return found


def host_of(url: str) -> str:
    """The host in an address, for messages; nothing else of it."""
    try:
        return str(_http().URL(url).host) or "?"
    except Exception:
        return "?"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a ``Retry-After`` header asks to wait, given as a number or a date."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _parsed(url: str) -> httpx2.URL:
    try:
        parsed = _http().URL(url)
        port = parsed.port
    except DataError:
        raise
    except Exception:  # the parser's own error, and what its parts raise for hostile input
        raise Rejected("not a web address") from None
    if parsed.scheme not in ("http", "https"):
        raise Rejected(f"only http and https are fetched, not {parsed.scheme[:20] or 'an address without scheme'!r}")
    if parsed.userinfo:
        raise Rejected(f"the address on {parsed.host} holds a user name or password")
    if not parsed.host or (port is not None and not 0 < port < 65536):
        raise Rejected("the address has no usable host or port")
    return parsed


async def _bounded(chunks: AsyncIterable[bytes], headers: Mapping[str, str], max_bytes: int, host: str) -> bytes:
    """The body, unpacked where a server packed it unasked, in at most ``max_bytes`` bytes each way."""
    length = headers.get("content-length", "")
    if length.isdigit() and int(length[:20]) > max_bytes:
        raise Rejected(f"{host} announces {int(length[:20]):,} bytes, more than the {max_bytes:,} allowed")
    packing = headers.get("content-encoding", "identity").strip().lower() or "identity"
    if packing not in ("identity", "gzip", "x-gzip"):
        raise Rejected(f"{host} sends it packed as {packing[:20]!r}, which was not asked for")
    unpacker = None if packing == "identity" else zlib.decompressobj(16 + zlib.MAX_WBITS)
    received, body = 0, bytearray()
    async for chunk in chunks:
        received += len(chunk)
        if received > max_bytes:
            raise Rejected(f"{host} sends more than the {max_bytes:,} bytes allowed")
        if unpacker is None:
            body += chunk
            continue
        try:
            body += unpacker.decompress(chunk, max_bytes + 1 - len(body))
        except zlib.error:
            raise Rejected(f"{host} sends gzip that cannot be unpacked") from None
        if len(body) > max_bytes:
            raise Rejected(f"{host} sends gzip that unpacks to more than the {max_bytes:,} bytes allowed")
    if unpacker is not None and not unpacker.eof:
        raise Rejected(f"{host} sends gzip that is cut short")
    return bytes(body)


def _checked_backend(addresses: Resolve) -> httpcore2.AsyncNetworkBackend:
    """Connections to checked addresses only; TLS still asks for the host's name, as the pool knows no other."""
    import httpcore2

    class Checked(httpcore2.AsyncNetworkBackend):
        def __init__(self) -> None:
            self._inner = httpcore2.AnyIOBackend()

        async def connect_tcp(
            self,
            host: str,
            port: int,
            timeout: float | None = None,
            local_address: str | None = None,
            socket_options: Iterable[Any] | None = None,
        ) -> httpcore2.AsyncNetworkStream:
            failure: Exception | None = None
            checked = await addresses(host, port)
            for place, address in enumerate(checked):
                # An address that nobody answers at must not take the time of the others.
                limit = timeout if place == len(checked) - 1 else min(timeout or _NEXT_ADDRESS, _NEXT_ADDRESS)
                try:
                    return await self._inner.connect_tcp(address, port, limit, local_address, socket_options)
                except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                    failure = error
            raise httpcore2.ConnectError(str(failure or "no address"))

        async def sleep(self, seconds: float) -> None:
            await asyncio.sleep(seconds)

    return Checked()


def _http() -> Any:
    try:
        import httpx2
    except ImportError:
        raise DataError(
            'searching for images on the web needs httpx2; pip install "kore-fast[augment]" on Python 3.11 or newer, '
            "or search a folder of your own (provider: local)"
        ) from None
    return httpx2
