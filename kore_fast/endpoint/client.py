"""One model behind an OpenAI-compatible server: what is sent, what is sent again, and when to stop.

The retries are ours alone (the openai package's are off), so that every request is counted, paced and bounded.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from functools import cache
from types import TracebackType
from typing import Any, NoReturn
from urllib.parse import urlsplit

from pydantic import BaseModel

from kore_fast.endpoint.cache import Reply
from kore_fast.endpoint.forms import json_schema
from kore_fast.endpoint.options import EndpointOptions, Structured
from kore_fast.endpoint.pace import Pace
from kore_fast.endpoint.packages import needed
from kore_fast.endpoint.tokens import count_message_tokens, count_tokens
from kore_fast.endpoint.totals import Totals
from kore_fast.errors import LanguageModelError
from kore_fast.files import whole_text

LARGEST_BODY = 4 << 20
"""Bytes of a server's reply; a compressed one may have a sixteenth of it."""
FAILURES_IN_A_ROW = 10
"""So many requests given up without one success between them end the run."""
_BUSY_FACTOR = 5
_LIMIT_KEYS = ("max_tokens", "max_completion_tokens")
_FORMAT_REFUSED = re.compile("response_format|json_schema|json_object|structured|guided|grammar", re.IGNORECASE)


class RequestFailedError(Exception):
    """One request was not answered, for the reason given; others may be."""


class Secret:
    """An API key that shows itself to nobody but the client."""

    def __init__(self, value: str) -> None:
        self._value = value

    def __repr__(self) -> str:
        return "Secret()"

    def reveal(self) -> str:
        """The key."""
        return self._value

    def hidden_in(self, text: str) -> str:
        """``text`` with the key's every appearance taken out (servers repeat it in their errors)."""
        return text.replace(self._value, "[key]") if len(self._value) >= 8 else text


def read_key(options: EndpointOptions) -> Secret:
    """The key from the environment.

    Raises:
        LanguageModelError: the variable is not set; names it, never its value.
    """
    variable = options.key_variable
    if variable is None:
        return Secret("none")
    value = os.environ.get(variable, "").strip()
    if not value:
        other = "leave 'api_key_env' out" if options.base_url else "set 'base_url'"
        raise LanguageModelError(
            f"the environment variable {variable} is not set; put the API key in it, or {other} for a server that "
            "needs none"
        )
    if not value.isascii() or not value.isprintable() or " " in value:
        raise LanguageModelError(
            f"the environment variable {variable} holds no API key: it has blanks or odd characters"
        )
    return Secret(value)


_LOGGERS = (
    "openai", "openai._base_client", "openai._legacy_response", "openai._response", "httpx2",
    "httpcore2.connection", "httpcore2.http11", "httpcore2.http2", "httpcore2.proxy", "httpcore2.socks",
)  # fmt: skip


class _Hidden(logging.Filter):
    """Takes the key out of what the packages below log: in debug logs, a server's headers, which may repeat it."""

    def __init__(self, key: Secret) -> None:
        super().__init__()
        self._key = key

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = self._key.hidden_in(record.getMessage()), ()
        return True


class Connection:
    """Sends requests to one model, a bounded number at a time and a minute; use as ``async with``."""

    def __init__(self, options: EndpointOptions, totals: Totals) -> None:
        self.options, self.totals = options, totals
        self.key = read_key(options)
        self.openai = needed("openai")
        self._pace = Pace(options.requests_per_minute, options.tokens_per_minute)
        self._slots = asyncio.Semaphore(options.concurrency)
        first: Structured = "schema" if options.structured == "auto" else options.structured
        self._structured: Structured = first
        # OpenAI's newer models refuse the older name; many other servers know no other.
        self._limit_key = _LIMIT_KEYS[0 if options.base_url else 1]
        self._limit_changed = False
        self._given_up = 0

    async def __aenter__(self) -> Connection:
        import httpx2

        self._filter = _Hidden(self.key)
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(self._filter)
        most = self.options.concurrency
        http = self.openai.DefaultAsyncHttpxClient(
            limits=httpx2.Limits(max_connections=most, max_keepalive_connections=most),
            timeout=httpx2.Timeout(self.options.timeout),
            event_hooks={"response": [_bounded]},
        )
        self._cast = httpx2.Response
        self._client = self.openai.AsyncOpenAI(
            api_key=self.key.reveal(),
            base_url=self.options.base_url,
            max_retries=0,
            timeout=self.options.timeout,
            http_client=http,
            default_headers={"Accept-Encoding": "identity"},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(self._filter)

    @property
    def client(self) -> Any:
        """The openai client (for files and batches)."""
        return self._client

    @property
    def place(self) -> str:
        """The server's address, for people."""
        parts = urlsplit(str(self._client.base_url))
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")

    def body(self, messages: Sequence[Mapping[str, Any]], form: type[BaseModel] | None) -> dict[str, Any]:
        """What is sent for one request; without a form the answer is free text."""
        options = self.options
        whole: dict[str, Any] = {"model": options.model, "messages": messages, self._limit_key: options.max_tokens}
        if options.temperature is not None:
            whole["temperature"] = options.temperature
        if options.seed is not None:
            whole["seed"] = options.seed
        if form is not None and self._structured == "schema":
            form_schema = {"name": form.__name__, "schema": json_schema(form), "strict": True}
            whole["response_format"] = {"type": "json_schema", "json_schema": form_schema}
        elif form is not None and self._structured == "json_object":
            whole["response_format"] = {"type": "json_object"}
        return {**whole, **options.extra_body}

    async def send(
        self, messages: Sequence[Mapping[str, Any]], form: type[BaseModel] | None, expected_tokens: int
    ) -> Reply:
        """Send one request, again while the server fails and the options allow it.

        Raises:
            RequestFailedError: no answer to this request.
            LanguageModelError: no answer to any.
        """
        prompt_tokens = count_message_tokens(messages)
        foreseen = prompt_tokens + expected_tokens
        failures = busy = 0
        while True:
            async with self._slots:
                await self._pace.turn(foreseen)
                body = self.body(messages, form)
                self.totals.requests += 1
                outcome = await self._once(body)
            if isinstance(outcome, _Again):
                if outcome.changed:
                    continue
                if outcome.busy:
                    busy += 1
                else:
                    failures += 1
                wait = self._wait(outcome, failures + busy)
                if failures >= self.options.attempts or busy >= self.options.attempts * _BUSY_FACTOR:
                    self._gave_up(f"{outcome.reason} ({failures + busy} attempts)")
                self.totals.retries += 1
                await asyncio.sleep(wait)
                continue
            try:
                reply = self._reply(outcome, prompt_tokens)
            except RequestFailedError as error:
                failures += 1
                if failures >= self.options.attempts:
                    self._gave_up(f"{error} ({failures + busy} attempts)")
                self.totals.retries += 1
                await asyncio.sleep(self._wait(_Again(str(error)), failures))
                continue
            self._given_up = 0
            self._pace.correct(foreseen, reply.prompt_tokens + reply.completion_tokens)
            return reply

    async def _once(self, body: dict[str, Any]) -> bytes | _Again:
        """The body of a successful reply, or why to send again; what need not be sent again is raised."""
        openai = self.openai
        try:
            # The same as chat.completions.create, without a walk through all parameters' types that takes longer than
            # the rest; the reply is read as it came, because it may need repair.
            response = await asyncio.wait_for(
                self._client.post("/chat/completions", cast_to=self._cast, body=body), self.options.timeout
            )
            return bytes(response.content)
        except (openai.APITimeoutError, asyncio.TimeoutError):
            return _Again(f"no answer within {self.options.timeout:g} s")
        except openai.APIStatusError as error:
            return self._refusal(error, body)
        except openai.APIConnectionError as error:
            cause = type(error.__cause__).__name__ if error.__cause__ else "no connection"
            return _Again(f"the connection to {self.place} failed ({cause})")
        except openai.OpenAIError as error:
            raise LanguageModelError(self.key.hidden_in(f"{self.place}: {error}")) from None

    def _refusal(self, error: Any, body: dict[str, Any]) -> _Again:
        status, code = error.status_code, str(error.code or "")
        said = self.key.hidden_in(_message(error))
        reason = f"the server answers {status}: {said}"
        if status in (401, 403):
            variable = self.options.key_variable
            hint = f"check the key in {variable}" if variable else "name the key's variable in 'api_key_env'"
            raise LanguageModelError(f"{self.place}: refuses the key ({status}): {said}; {hint}") from None
        unknown = re.search(r"model\W.*(not found|not exist|unknown|not available)|(unknown|invalid) model", said, re.I)
        if status == 404 or code == "model_not_found" or (status == 400 and unknown):
            raise LanguageModelError(
                f"{self.place}: no model {self.options.model!r} there ({status}): {said}; check 'model' and 'base_url' "
                "(it ends with /v1 at most servers)"
            ) from None
        if status == 402 or code in ("insufficient_quota", "billing_hard_limit_reached"):
            raise LanguageModelError(
                f"{self.place}: the account has no credit left: {said}; the same command goes on when it has"
            ) from None
        if self._adapt(status, said, body):
            return _Again(reason, changed=True)
        if status in (408, 409, 425, 429) or status >= 500:
            wait = _retry_after(error.response.headers)
            return _Again(reason, busy=status == 429 or (status == 503 and wait is not None), wait=wait)
        return self._gave_up(reason)

    def _adapt(self, status: int, said: str, body: dict[str, Any]) -> bool:
        """Whether the request in another form may be accepted; that form is then in force for all."""
        if status not in (400, 404, 422, 500, 501):
            return False
        if self.options.structured == "auto" and "response_format" in body and _FORMAT_REFUSED.search(said):
            sent: Structured = "schema" if body["response_format"]["type"] == "json_schema" else "json_object"
            # Another request's refusal may have led further already.
            if self._structured == sent:
                self._structured = "json_object" if sent == "schema" else "text"
            return True
        key = next(key for key in _LIMIT_KEYS if key in body)
        if key in said and ("unsupported" in said.lower() or "not supported" in said.lower()):
            if key != self._limit_key:
                return True
            if not self._limit_changed:
                self._limit_key, self._limit_changed = _LIMIT_KEYS[1 - _LIMIT_KEYS.index(key)], True
                return True
        return False

    def _reply(self, content: bytes, prompt_tokens: int) -> Reply:
        """A reply's parts.

        Raises:
            RequestFailedError: it is no chat completion; a broken one may come whole at the next attempt.
        """
        try:
            record = json.loads(self.key.hidden_in(content.decode("utf-8")))
        except (ValueError, RecursionError):
            raise RequestFailedError("the server's reply is cut off or no JSON") from None
        return read_reply(record, prompt_tokens, self.totals, self.options.model)

    def _wait(self, outcome: _Again, number: int) -> float:
        if outcome.wait is not None:
            if outcome.wait > self.options.longest_wait:
                raise LanguageModelError(
                    f"{self.place}: asks to wait {outcome.wait:.0f} s ({outcome.reason}); give the same command again "
                    "after that: all answers so far are kept"
                )
            self._pace.pause(outcome.wait)
            return outcome.wait
        return min(60.0, self.options.backoff * 2 ** min(number - 1, 10)) * random.uniform(0.5, 1.0)

    def _gave_up(self, reason: str) -> NoReturn:
        self._given_up += 1
        if self._given_up >= FAILURES_IN_A_ROW:
            check = "" if self.totals.answers else "check 'base_url' and that the server runs; "
            raise LanguageModelError(
                f"{self.place}: {self._given_up} requests in a row failed, the last because {reason}; {check}the same "
                "command goes on from here: all answers so far are kept"
            ) from None
        raise RequestFailedError(reason) from None


class _Again:
    """Why a request is sent again."""

    def __init__(self, reason: str, *, busy: bool = False, changed: bool = False, wait: float | None = None) -> None:
        self.reason, self.busy, self.changed, self.wait = reason, busy, changed, wait


NO_TEXT = "no text"
"""`Reply.finish` where a server ended in order and its message has no text, not even an empty one."""


def read_reply(record: Any, prompt_tokens: int, totals: Totals, model: str) -> Reply:
    """A chat completion's parts; tokens that it does not tell are counted roughly.

    Raises:
        RequestFailedError: it is no chat completion.
    """
    try:
        choice = record["choices"][0]
        message = choice["message"]
        answer, refusal = message.get("content"), message.get("refusal")
        finish = choice.get("finish_reason")
        usage = record.get("usage") or {}
        told: list[Any] = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
    except (KeyError, IndexError, TypeError, AttributeError):
        raise RequestFailedError("the server's reply is no chat completion") from None
    if isinstance(answer, list):  # some servers send parts
        answer = "".join(str(part.get("text", "")) for part in answer if isinstance(part, dict))
    text = whole_text(answer) if isinstance(answer, str) else ""
    if isinstance(refusal, str) and refusal:
        text, finish = whole_text(refusal), "refusal"
    elif not isinstance(answer, str) and finish in (None, "stop"):
        finish = NO_TEXT
    if not all(isinstance(count, int) and count >= 0 for count in told):
        totals.tokens_estimated += 1
        told = [prompt_tokens, count_tokens(text)]
    totals.prompt_tokens += told[0]
    totals.completion_tokens += told[1]
    named = record.get("model")
    return Reply(text, str(finish or "stop"), named if isinstance(named, str) and named else model, *told)


def _message(error: Any) -> str:
    body = error.body
    if isinstance(body, dict):
        inner = body.get("error", body)
        said = inner.get("message") if isinstance(inner, dict) else inner
        said = said or body.get("message") or body.get("detail") or error.message
    else:
        said = error.message
    flat = " ".join(str(said).split())
    return flat if len(flat) <= 400 else f"{flat[:400]} …"


def _retry_after(headers: Any) -> float | None:
    """Seconds that the server asks to wait."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * unit
        except ValueError:
            try:
                seconds = parsedate_to_datetime(value).timestamp() - time.time()
            except (TypeError, ValueError, OverflowError):
                continue
        if seconds == seconds:
            return max(0.0, seconds)
    return None


async def _bounded(response: Any) -> None:
    """Let no reply grow without end; files of batches are long and go to disk."""
    if response.request.url.path.endswith("/content"):
        return
    encoded = response.headers.get("content-encoding", "identity").lower() != "identity"
    response.stream = _bounded_stream()(response.stream, LARGEST_BODY // 16 if encoded else LARGEST_BODY)


@cache
def _bounded_stream() -> Any:
    import httpx2

    class Bounded(httpx2.AsyncByteStream):
        def __init__(self, stream: Any, left: int) -> None:
            self.stream, self.left = stream, left

        async def __aiter__(self) -> AsyncIterator[bytes]:
            async for part in self.stream:
                self.left -= len(part)
                if self.left < 0:
                    raise httpx2.ReadError("the server's reply is too long")
                yield part

        async def aclose(self) -> None:
            await self.stream.aclose()

    return Bounded
