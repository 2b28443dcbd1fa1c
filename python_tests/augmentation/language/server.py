"""A real HTTP server on loopback that speaks as much of OpenAI's API as is used, and misbehaves on demand."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any


def task_of(body: dict[str, Any]) -> str:
    """Which task a request is."""
    text = " ".join(message["content"] for message in body["messages"])
    for task in ("quadruplets", "questions", "answers", "summary", "answer"):
        if f'{{"{task}":' in text:
            return task
    if '{"supported":' in text:
        return "judge"
    raise AssertionError(text)


def quoted(body: dict[str, Any], kind: str) -> str:
    """What a request holds between the marks of its question, answer or material."""
    match = re.search(rf"<({kind}-\w+)>\n(.*?)\n</\1>", body["messages"][1]["content"], re.DOTALL)
    assert match
    return match.group(2)


def asked_question(body: dict[str, Any]) -> str:
    """The quoted question of an answer request."""
    return quoted(body, "question")


def item_name(body: dict[str, Any]) -> str:
    match = re.search(r"^name: (.*)$", body["messages"][1]["content"], re.MULTILINE)
    assert match
    return match.group(1)


def good_answer(body: dict[str, Any]) -> str:
    """What a well-behaved model says; it depends on the request alone."""
    task = task_of(body)
    if task == "judge":  # literal-minded: the answer stands in the text or it does not
        holds = quoted(body, "answer") in quoted(body, "material")
        return json.dumps({"supported": holds, "reason": "It is there." if holds else "The text has no such words."})
    name = item_name(body)
    if task == "questions":
        return json.dumps({"questions": [f"What is fact {n} of {name}?" for n in range(1, 11)]})
    if task == "answer":
        number = re.search(r"fact (\d+)", asked_question(body))
        assert number
        return json.dumps({"answer": f"Fact {number.group(1)} of {name} is known."})
    if task == "answers":
        count = len(re.findall(r"^\d+\. ", body["messages"][1]["content"], re.MULTILINE))
        rows = [{"number": n, "answer": f"Fact {n} of {name} is known."} for n in range(1, count + 1)]
        return json.dumps({"answers": rows})
    if task == "summary":
        return json.dumps({"summary": f"A creature that is called {name}."})
    rows = [
        {
            "question": f"What colour number {n} has {name}?",
            "answer": f"shade {n}",
            "subject": name,
            "hypernym": "animal",
            "sentence": f"It has shade {n}.",
        }
        for n in range(1, 6)
    ]
    return json.dumps({"quadruplets": rows})


@dataclass
class Reply:
    """How to answer one request; by default well."""

    content: str | None = None
    status: int = 200
    body: Any = None
    """Instead of a completion."""
    headers: dict[str, str] = field(default_factory=dict)
    finish: str = "stop"
    delay: float = 0.0
    truncate: bool = False
    """Promise more bytes than are sent."""
    reset: bool = False
    """Close the connection without a word."""
    raw: bytes | None = None
    """The whole body as it is."""
    usage: bool = True


Script = Callable[[dict[str, Any], int], Reply]
"""Request body and how often this very request has come (from 0) → reply."""


def error(status: int, message: str, code: str | None = None, **headers: str) -> Reply:
    return Reply(status=status, body={"error": {"message": message, "code": code}}, headers=headers)


class Server:
    """Use as ``with Server(script) as server``; ``server.url`` is the base_url."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or (lambda body, times: Reply())
        self.requests: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.times: list[float] = []
        self.seen: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        """Well answered requests by their messages."""
        self.most_at_once = self._now = 0
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.polls_needed = 1
        self.calls: list[str] = []

    def __enter__(self) -> Server:
        ready = threading.Event()
        self._loop = asyncio.new_event_loop()

        async def begin() -> None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            ready.set()

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(begin())
            self._loop.run_forever()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        ready.wait()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        async def end() -> None:
            self._server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
                if length is None and "chunked" in head.lower():
                    body = b""
                    while size := int((await reader.readline()).strip(), 16):
                        body += await reader.readexactly(size)
                        await reader.readline()
                    await reader.readline()
                else:
                    body = await reader.readexactly(int(length.group(1))) if length else b""
                method, path, _ = head.split("\r\n")[0].split(" ")
                if not await self._one(method, path, head, body, writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _one(self, method: str, path: str, head: str, data: bytes, writer: asyncio.StreamWriter) -> bool:
        if path != "/v1/chat/completions":
            self.calls.append(f"{method} {path.partition('?')[0]}")
            status, content = self._files_and_batches(method, path.partition("?")[0], data)
            return await self._write(writer, status, content, {})
        body = json.loads(data)
        identity = json.dumps(body["messages"])
        self.requests.append(body)
        self.headers.append(head)
        self.times.append(time.monotonic())
        reply = self.script(body, self.seen[identity])
        self.seen[identity] += 1
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            if reply.delay:
                await asyncio.sleep(reply.delay)
        finally:
            self._now -= 1
        if reply.reset:
            writer.transport.abort()
            return False
        if reply.status == 200 and reply.body is None and reply.raw is None:
            self.served[identity] += 1
        content = self.completion(body, reply)
        return await self._write(writer, reply.status, content, reply.headers, reply.truncate)

    def completion(self, body: dict[str, Any], reply: Reply) -> bytes:
        if reply.raw is not None:
            return reply.raw
        if reply.body is not None:
            return json.dumps(reply.body).encode()
        content = good_answer(body) if reply.content is None else reply.content
        record = {
            "id": "c",
            "object": "chat.completion",
            "created": 1,
            "model": "small-model-2026",
            "choices": [
                {"index": 0, "finish_reason": reply.finish, "message": {"role": "assistant", "content": content}}
            ],
        }
        if reply.usage:
            record["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        return json.dumps(record).encode()

    async def _write(
        self, writer: asyncio.StreamWriter, status: int, content: bytes, headers: dict[str, str], cut: bool = False
    ) -> bool:
        more = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{more}Content-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + (content[: len(content) // 2] if cut else content))
        await writer.drain()
        return not cut

    def _files_and_batches(self, method: str, path: str, data: bytes) -> tuple[int, bytes]:
        def out(value: Any) -> tuple[int, bytes]:
            return 200, json.dumps(value).encode()

        if (method, path) == ("POST", "/v1/files"):
            name = f"file-{len(self.files)}"
            self.files[name] = data[data.index(b'{"custom_id"') : data.rindex(b"}") + 1]
            return out({"id": name, "object": "file", "bytes": 1, "created_at": 1, "filename": "f", "purpose": "batch"})
        if method == "GET" and path.startswith("/v1/files/"):
            return 200, self.files[path.split("/")[3]]
        if (method, path) == ("POST", "/v1/batches"):
            name = f"batch-{len(self.batches)}"
            self.batches[name] = {
                "id": name,
                "object": "batch",
                "status": "validating",
                "created_at": 1,
                "endpoint": "/v1/chat/completions",
                "completion_window": "24h",
                "input_file_id": json.loads(data)["input_file_id"],
                "polls": 0,
            }
            return out(self.batches[name])
        if (method, path) == ("GET", "/v1/batches"):
            return out({"object": "list", "data": list(self.batches.values()), "has_more": False})
        batch = self.batches[path.split("/")[3]]
        batch["polls"] += 1
        if batch["polls"] > self.polls_needed and batch["status"] == "validating":
            self._work_off(batch)
        return out(batch)

    def _work_off(self, batch: dict[str, Any]) -> None:
        done, failed = [], []
        for line in self.files[batch["input_file_id"]].decode().splitlines():
            row = json.loads(line)
            assert (row["method"], row["url"]) == ("POST", "/v1/chat/completions")
            identity = json.dumps(row["body"]["messages"])
            self.requests.append(row["body"])
            reply = self.script(row["body"], self.seen[identity])
            self.seen[identity] += 1
            response = {"status_code": reply.status, "body": json.loads(self.completion(row["body"], reply))}
            (done if reply.status == 200 else failed).append(
                json.dumps({"id": "r", "custom_id": row["custom_id"], "response": response, "error": None})
            )
        for key, lines in (("output_file_id", done), ("error_file_id", failed)):
            if lines:
                name = f"file-{len(self.files)}"
                self.files[name] = "\n".join(reversed(lines)).encode()
                batch[key] = name
        batch["status"] = "completed"
        batch["request_counts"] = {
            "total": len(done) + len(failed),
            "completed": len(done),
            "failed": len(failed),
        }
