"""A judge: any OpenAI-compatible endpoint, put before lmms-eval's tasks by a server on loopback.

The tasks differ in how they reach a judge: the address with or without ``/chat/completions``, read when they are
imported, the model fixed in the code (HallusionBench asks "gpt-4"), failures counted as wrong answers. They all speak
to a loopback server instead, which asks the endpoint that was named for the model that was named. So the key stays out
of lmms-eval, answers that were paid for are kept, and an endpoint that fails is seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from kore_fast.endpoint.packages import needed
from kore_fast.errors import DataError
from kore_fast.evaluation.lmms.readable import Readable
from kore_fast.files import whole_text
from kore_fast.journal import Journal

UNREADABLE_SHARE = 0.1
"""With a larger share of answers that cannot be read, the benchmark is missing."""


class Judge(BaseModel):
    """Who judges free answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_url: str = Field(pattern=r"^https?://")
    """The endpoint, with its version: ``https://api.openai.com/v1``, ``http://127.0.0.1:8000/v1``."""
    model: str = Field(min_length=1)
    api_key_env: str | None = None
    """The environment variable that holds the key; none for an endpoint without one."""
    timeout: float = Field(default=120, gt=0)
    """Seconds for one answer."""
    attempts: int = Field(default=5, ge=1)

    def key(self) -> str | None:
        """The key.

        Raises:
            DataError: the variable is not set.
        """
        if self.api_key_env is None:
            return None
        value = os.environ.get(self.api_key_env, "")
        if not value:
            raise DataError(
                f"the judge's key: the environment variable {self.api_key_env} is not set; set it, or leave "
                "api_key_env out for an endpoint without a key"
            )
        return value


@dataclass
class Judging:
    """What happened at the judge while one benchmark was scored."""

    readable: Readable
    asked: int = 0
    unreadable: int = 0
    failure: str | None = None
    """Why the endpoint gave no answer. From then on it is not asked again."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def problem(self) -> str | None:
        """Why the benchmark's score is not to be trusted."""
        if self.failure is not None:
            return f"the judge failed: {self.failure}"
        if self.unreadable > UNREADABLE_SHARE * self.asked:
            return f"{self.unreadable} of {self.asked} answers of the judge could not be read; take a stronger judge"
        return None


@contextmanager
def judging(judge: Judge, readable: Readable, cache: Path) -> Iterator[Judging]:
    """Stand between lmms-eval's tasks and the judge while the block runs.

    Sets the environment variables that the tasks read, for the block only. The tasks' modules must be imported after
    that: some keep what they read.

    Args:
        readable: what it does not hold of is counted as not readable.
        cache: JSON lines; what stands there is not asked again, what is answered is added.
    """
    record = Judging(readable)
    answers = _Answers(judge, cache, record)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer = json.dumps(answers.answer(json.loads(body))).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    own = f"127.0.0.1:{server.server_address[1]}"
    without_proxy = ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1")))
    try:
        with environment(
            API_TYPE="openai",
            OPENAI_API_URL=f"http://{own}/v1/chat/completions",
            OPENAI_API_KEY="kept-by-the-loopback-server",
            MODEL_VERSION=judge.model,
            NO_PROXY=without_proxy,
            no_proxy=without_proxy,
        ):
            yield record
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables for the block, and what was there before after it."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Answers:
    def __init__(self, judge: Judge, cache: Path, record: Judging) -> None:
        self.judge, self.record = judge, record
        self.key = judge.key()
        self.openai = needed("openai")
        self.kept = Journal(cache)
        self.known = {row["request"]: row["answer"] for row in self.kept.rows("request", "answer")}

    def answer(self, payload: dict[str, Any]) -> dict[str, Any]:
        payload = {**payload, "model": self.judge.model}
        name = hashlib.sha256(json.dumps([self.judge.base_url, payload], sort_keys=True).encode()).hexdigest()
        with self.record.lock:
            answer, stopped = self.known.get(name), self.record.failure is not None
        if answer is None and not stopped:
            answer = self._ask(payload)
            if answer is not None:
                with self.record.lock:
                    self.known[name] = answer
                    try:
                        self.kept.append([{"request": name, "answer": answer}])
                    except DataError as error:  # what raises here would be a wrong answer to the task
                        self.record.failure = str(error)
        if answer is None:
            # Not an error: the tasks would ask again for minutes, and then count it as wrong all the same.
            return _completion(self.judge.model, "no answer")
        with self.record.lock:
            self.record.asked += 1
            text = answer["choices"][0]["message"]["content"] or ""
            self.record.unreadable += not self.record.readable(_asked(payload), text)
        return answer

    @cached_property
    def client(self) -> Any:
        """It sends again what a busy or failing server did not answer, and obeys Retry-After."""
        return self.openai.OpenAI(
            base_url=self.judge.base_url,
            api_key=self.key or "none",
            timeout=self.judge.timeout,
            max_retries=self.judge.attempts - 1,
        )

    def _ask(self, payload: dict[str, Any]) -> dict[str, Any] | None:
        try:
            # As the task wrote it, with parameters that the client's own call may not know.
            found = self.client.post("/chat/completions", body=payload, cast_to=object)
            # A server that does not say that it sends JSON gives text.
            return _checked(json.loads(found) if isinstance(found, str) else found, self.judge.model)
        except self.openai.APIStatusError as error:
            problem = f"HTTP {error.status_code}: {error.message}"
        except (self.openai.OpenAIError, ValueError) as error:
            problem = str(error)
        with self.record.lock:
            hidden = problem if self.key is None else problem.replace(self.key, "(the key)")
            url = f"{self.judge.base_url.rstrip('/')}/chat/completions"
            self.record.failure = f"{url}, model {self.judge.model}: {whole_text(hidden)}"
        return None


def _asked(payload: dict[str, Any]) -> str:
    """The text of a request's last message, without its pictures."""
    content = payload["messages"][-1]["content"]
    return content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)


def _checked(value: Any, model: str) -> dict[str, Any]:
    """The parts of an answer that are used and kept; ValueError where it is none."""
    try:
        content = value["choices"][0]["message"]["content"]
        if not isinstance(content, str):
            raise TypeError("the content is no text")
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"not an answer of a chat endpoint: {json.dumps(value)[:200]}") from error
    return _completion(whole_text(str(value.get("model", model))), whole_text(content))


def _completion(model: str, content: str) -> dict[str, Any]:
    return {
        "id": "judge",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }
