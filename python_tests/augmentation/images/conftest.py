"""A real HTTP server on loopback that plays search services, picture hosts and their hostile relatives."""

from __future__ import annotations

import io
import json
import socketserver
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from PIL import Image


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: Web

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        with self.web.lock:
            self.web.asked.append((self.path, dict(self.headers)))
        route = self.web.routes.get(path)
        if route is None:
            self.reply(404, b"nothing here", "text/plain")
        else:
            route(self)

    def reply(self, status: int, body: bytes, kind: str = "image/png", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {"Content-Length": str(len(body)), **named}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def reply_json(self, value: Any, status: int = 200, **headers: str) -> None:
        self.reply(status, json.dumps(value).encode(), "application/json", **headers)

    def query(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: Any) -> None:  # clients that hang up are part of the tests
        pass


class Web:
    """``routes`` maps a path to what answers it; ``asked`` keeps every request."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.routes: dict[str, Callable[[Handler], None]] = {}
        self.server: socketserver.BaseServer = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"web": self}))
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def put(self, path: str, body: bytes, kind: str = "image/png", status: int = 200, **headers: str) -> str:
        self.routes[path] = lambda handler: handler.reply(status, body, kind, **headers)
        return self.url + path

    def route(self, path: str, answer: Callable[[Handler], None]) -> str:
        self.routes[path] = answer
        return self.url + path

    def paths(self) -> list[str]:
        with self.lock:
            return [urlsplit(path).path for path, _ in self.asked]

    def forget(self) -> None:
        with self.lock:
            self.asked.clear()


@pytest.fixture
def web() -> Iterator[Web]:
    web = Web()
    yield web
    web.server.shutdown()
    web.server.server_close()


def draw(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """A picture unlike that of any other seed: coloured blocks, smoothly enlarged."""
    state, values = seed * 2654435761 % 2**32 or 1, bytearray()
    for _ in range(6 * 5 * 3):
        state ^= state << 13 & 0xFFFFFFFF
        state ^= state >> 17
        state ^= state << 5 & 0xFFFFFFFF
        values.append(state & 255)
    return Image.frombytes("RGB", (6, 5), bytes(values)).resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is very large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.fixture
def make() -> Any:
    """The makers of pictures: ``make.draw``, ``make.encode``, ``make.png_header``."""
    return type("Make", (), {"draw": staticmethod(draw), "encode": staticmethod(encode), "png_header": png_header})


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BRAVE_API_KEY", "SERPAPI_API_KEY", "OPENVERSE_TOKEN"):
        monkeypatch.delenv(name, raising=False)
