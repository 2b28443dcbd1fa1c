from __future__ import annotations

import asyncio
import gzip
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from kore_fast.augmentation.images import fetch
from kore_fast.augmentation.images.fetch import Answer, Fetcher, Rejected, Unavailable, check_address, retry_after

pytest.importorskip("httpx2")


def get(url: str, *, private: bool = True, resolve: Any = None, **bounds: Any) -> Answer:
    async def run() -> Answer:
        async with Fetcher(user_agent="test", allow_private=private, resolve=resolve) as fetcher:
            return await fetcher.get(url, **{"max_bytes": 100_000, "timeout": 5.0, "redirects": 3, **bounds})

    return asyncio.run(run())


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.9.1",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "192.0.2.1",
        "198.18.0.1",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd12:3456::1",
        "fec0::1",
        "ff02::1",
        "::127.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "::ffff:0:127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::808:808",
        "2002:7f00:1::1",
        "2002:a9fe:a9fe::",
        "2001:0:7f00:1::1",
        "2001:db8::1",
    ],
)
def test_addresses_that_are_not_public_are_refused_in_every_form(address: str) -> None:
    with pytest.raises(Rejected, match="not a public address"):
        check_address(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "208.80.154.224", "2620:0:861:ed1a::1", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses_are_let_through(address: str) -> None:
    check_address(address)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "localhost",
        "LOCALHOST.",
        "[::ffff:127.0.0.1]",
        "127。0。0。1",
    ],
)
def test_loopback_is_refused_however_it_is_written(web: Any, host: str) -> None:
    web.put("/a.png", b"secret")
    with pytest.raises((Rejected, Unavailable)) as caught:
        get(f"http://{host}:{web.port}/a.png", private=False)
    # Some systems' resolvers know not all of these spellings.
    assert any(reason in str(caught.value) for reason in ("not a public address", "web address", "cannot be found"))
    assert web.asked == []


def answers(*addresses: str) -> Callable[[str, int], Any]:
    async def resolve(host: str, port: int) -> list[str]:
        return list(addresses)

    return resolve


def test_a_name_that_resolves_to_loopback_is_refused_also_beside_a_public_address(web: Any) -> None:
    web.put("/a.png", b"secret")
    for addresses in (("127.0.0.1",), ("93.184.216.34", "127.0.0.1"), ("::ffff:10.0.0.1",)):
        with pytest.raises(Rejected, match=r"the host pictures\.example is refused"):
            get(f"http://pictures.example:{web.port}/a.png", private=False, resolve=answers(*addresses))
    assert web.asked == []


def test_the_connection_goes_to_the_checked_address_without_asking_again(web: Any) -> None:
    web.put("/a.png", b"picture")
    calls = []

    async def rebinding(host: str, port: int) -> list[str]:
        calls.append((host, port))
        return ["127.0.0.1"] if len(calls) == 1 else ["169.254.169.254"]

    assert get(f"http://rebinding.invalid:{web.port}/a.png", resolve=rebinding).body == b"picture"
    assert calls == [("rebinding.invalid", web.port)]
    assert web.asked[0][1]["Host"] == f"rebinding.invalid:{web.port}"


def test_where_one_address_does_not_answer_the_next_is_tried(web: Any) -> None:
    web.put("/a.png", b"picture")
    # Nothing listens at this port of 127.0.0.3.
    assert get(f"http://two.example:{web.port}/a.png", resolve=answers("127.0.0.3", "127.0.0.1")).body == b"picture"


@pytest.fixture
def public_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.1, where the test's server is, counts as public; nothing else does that is not."""

    def check(address: str, *, allow_private: bool) -> None:
        if address != "127.0.0.1":
            check_address(address, allow_private=allow_private)

    monkeypatch.setattr(fetch, "check_address", check)


@pytest.mark.usefixtures("public_start")
@pytest.mark.parametrize(
    "target",
    [
        "http://169.254.169.254/latest/meta-data/",
        "//127.0.0.2:{port}/inside",
        "http://[::1]:{port}/inside",
        "http://2130706434:{port}/inside",
        "http://0x7f000002:{port}/inside",
        "http://inside.example:{port}/inside",
    ],
)
def test_a_redirect_to_a_private_address_is_refused(web: Any, monkeypatch: Any, target: str) -> None:
    system = fetch.resolve_host

    async def resolve(host: str, port: int) -> list[str]:
        return ["10.0.0.5"] if host == "inside.example" else await system(host, port)

    monkeypatch.setattr(fetch, "resolve_host", resolve)
    web.put("/inside", b"secret")
    start = web.put("/a.png", b"", status=302, Location=target.format(port=web.port))
    with pytest.raises(Rejected, match="not a public address"):
        get(start, private=False)
    assert web.paths() == ["/a.png"]


def test_redirects_are_followed_up_to_a_bound_and_not_to_other_schemes(web: Any) -> None:
    web.put("/end", b"here")
    for number, following in enumerate(["/1", "/2", "end"]):
        web.put(f"/{number}", b"", status=301, Location=following)
    assert get(web.url + "/0").body == b"here"
    with pytest.raises(Rejected, match="more than 2 redirects"):
        get(web.url + "/0", redirects=2)
    web.put("/loop", b"", status=307, Location="/loop")
    with pytest.raises(Rejected, match="more than 3 redirects"):
        get(web.url + "/loop")
    for target, reason in {
        "file:///etc/passwd": "only http and https",
        "ftp://127.0.0.1/a": "only http and https",
        f"http://user:pass@127.0.0.1:{web.port}/end": "user name or password",
    }.items():
        with pytest.raises(Rejected, match=reason):
            get(web.put("/odd", b"", status=302, Location=target))
    web.routes["/nowhere"] = lambda handler: handler.reply(302, b"")
    with pytest.raises(Rejected, match="without saying where"):
        get(web.url + "/nowhere")


def test_headers_go_to_the_first_server_only(web: Any) -> None:
    web.put("/end", b"here")
    get(web.put("/start", b"", status=302, Location="/end"), headers={"X-Secret": "word"})
    assert [headers.get("X-Secret") for _, headers in web.asked] == ["word", None]


@pytest.mark.parametrize(
    "url",
    ["", "data:image/png;base64,AAAA", "file:///etc/passwd", "javascript:1", "//host/a", "http://", "http://h:99999/"],
)
def test_what_is_no_web_address_is_refused(url: str) -> None:
    with pytest.raises(Rejected):
        get(url)


def test_more_bytes_than_announced_or_allowed_are_not_read(web: Any) -> None:
    sent = []

    def endless(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for _ in range(4000):
            handler.wfile.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            sent.append(65536)

    with pytest.raises(Rejected, match="sends more than the 100,000 bytes"):
        get(web.route("/endless", endless))
    assert sum(sent) < 64_000_000
    with pytest.raises(Rejected, match="announces 5,000,000,000 bytes"):
        get(web.put("/huge", b"x", Content_Length="5000000000"))
    # A length that is too small cuts the body; one that is too large is a broken connection.
    assert get(web.put("/small", b"0123456789", Content_Length="4", Connection="close")).body == b"0123"

    def broken(handler: Any) -> None:
        handler.reply(200, b"0123", Content_Length="50", Connection="close")
        handler.close_connection = True

    with pytest.raises(Unavailable, match=r"the connection to 127\.0\.0\.1 broke"):
        get(web.route("/broken", broken))


def test_gzip_is_unpacked_within_the_bound(web: Any) -> None:
    assert get(web.put("/a", gzip.compress(b"words" * 100), Content_Encoding="gzip")).body == b"words" * 100
    bomb = gzip.compress(b"\0" * 50_000_000)
    assert len(bomb) < 100_000
    with pytest.raises(Rejected, match="unpacks to more than the 100,000 bytes"):
        get(web.put("/bomb", bomb, Content_Encoding="gzip"))
    with pytest.raises(Rejected, match="cut short"):
        get(web.put("/cut", gzip.compress(b"words" * 100)[:-10], Content_Encoding="gzip"))
    with pytest.raises(Rejected, match="cannot be unpacked"):
        get(web.put("/not", b"words", Content_Encoding="gzip"))
    with pytest.raises(Rejected, match="packed as 'br'"):
        get(web.put("/br", b"words", Content_Encoding="br"))
    assert all(headers["Accept-Encoding"] == "identity" for _, headers in web.asked)


def test_a_slow_drip_ends_at_the_time_limit(web: Any) -> None:
    def drip(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(200):
            handler.wfile.write(b"x")
            time.sleep(0.05)

    start = time.monotonic()
    with pytest.raises(Unavailable, match=r"127.0.0.1 took longer than 0.5 s") as caught:
        get(web.route("/drip", drip), timeout=0.5)
    assert time.monotonic() - start < 4
    assert not caught.value.again


def test_a_reset_connection_and_a_closed_port_are_passing_faults(web: Any) -> None:
    def reset(handler: Any) -> None:
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()
        handler.close_connection = True

    with pytest.raises(Unavailable, match="broke"):
        get(web.route("/reset", reset))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(Unavailable, match=r"no connection to 127\.0\.0\.1"):
            get(f"http://127.0.0.1:{free.getsockname()[1]}/")


def test_proxies_of_the_environment_are_not_used(web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert get(web.put("/a", b"direct")).body == b"direct"


def test_retry_after_is_a_number_or_a_date() -> None:
    assert retry_after({"retry-after": "7"}) == 7
    assert retry_after({}) is None
    assert retry_after({"retry-after": "soon"}) is None
    in_a_minute = retry_after({"retry-after": formatdate(time.time() + 60, usegmt=True)})
    assert in_a_minute is not None
    assert 50 < in_a_minute <= 60
    assert retry_after({"retry-after": formatdate(0, usegmt=True)}) == 0


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls_asks_for_the_name_and_checks_the_certificate(
    tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=p.example"]
    more = ["-addext", "subjectAltName=DNS:pictures.example", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*request, *more], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    names: list[str | None] = []
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            try:
                with context.wrap_socket(plain, server_side=True) as connection:
                    connection.recv(4096)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
            except OSError:
                plain.close()

    threading.Thread(target=serve, daemon=True).start()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    try:
        assert get(f"https://pictures.example:{port}/", resolve=answers("127.0.0.1")).body == b"ok"
        with pytest.raises(Unavailable, match=r"(?i)certificate"):
            get(f"https://other.example:{port}/", resolve=answers("127.0.0.1"))
    finally:
        listener.close()
    assert names == ["pictures.example", "other.example"]
