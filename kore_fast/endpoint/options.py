"""How a model behind an OpenAI-compatible address is reached, and what may be spent."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Count = Annotated[int, Field(ge=1)]
Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Structured = Literal["schema", "json_object", "text"]


class EndpointOptions(BaseModel):
    """A chat model at a server: which, where, how fast, at what price."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    model: Annotated[str, Field(min_length=1)]
    """The model's name at the server."""
    base_url: str | None = None
    """``http://localhost:8000/v1`` and the like: vLLM, SGLang, Ollama, ``transformers serve``. Default: OpenAI's."""
    api_key_env: str | None = None
    """The environment variable that holds the key. Default: OPENAI_API_KEY at OpenAI, none at another address: a key is
    sent elsewhere only when it is named for it."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Default: the server's; reasoning models take no other."""
    max_tokens: Count = 1024
    """Of one answer. Reasoning models count their thoughts: give them more."""
    seed: int | None = None
    extra_body: dict[str, Any] = {}
    """Further parameters for the server, such as ``reasoning_effort`` or ``chat_template_kwargs``."""

    structured: Literal["auto", "schema", "json_object", "text"] = "auto"
    """How the form of an answer is asked for: by JSON schema, as any JSON object, or in words alone. ``auto`` starts
    with the schema and takes the next when the server refuses it. Answers are checked alike in all three."""
    attempts: Annotated[int, Field(ge=1, le=20)] = 6
    """How often a request is sent while the server fails (timeouts, broken connections, 5xx); a server that says it
    is too busy (429) is asked five times as often."""
    backoff: Annotated[float, Field(gt=0, le=60)] = 1.0
    """Seconds before the second attempt; each further one waits twice as long, up to a minute. A server's Retry-After
    is obeyed."""
    longest_wait: Annotated[float, Field(gt=0)] = 600.0
    """A server that asks to wait for more seconds than this ends the run, to be continued later."""
    timeout: Annotated[float, Field(gt=0)] = 120.0
    """Seconds for one request as a whole."""
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 16
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None

    price_in: Price | None = None
    price_out: Price | None = None
    """Money for a million tokens, read and written; with the Batch API, its prices. Without both, costs are unknown."""

    @field_validator("base_url")
    @classmethod
    def _plain_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            parts = urlsplit(value)
            host = parts.hostname
        except ValueError:
            host = None
        if host is None or parts.scheme not in ("http", "https"):
            raise ValueError("'base_url' must look like http://localhost:8000/v1 or https://host/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            # Not repeated here: it may be a secret.
            raise ValueError("'base_url' must hold no user, password, query or fragment; name the key in 'api_key_env'")
        return value.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _a_variable(cls, value: str | None) -> str | None:
        # A key pasted here would end in recipes and reports, so it is not repeated either.
        if value is not None and not (value.replace("_", "").isalnum() and value.upper() == value):
            raise ValueError("'api_key_env' must be the name of an environment variable, in capitals; never the key")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> EndpointOptions:
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("give both 'price_in' and 'price_out', or neither")
        taken = {"model", "messages", "temperature", "max_tokens", "max_completion_tokens", "seed", "response_format"}
        for key in sorted(taken & self.extra_body.keys()):
            raise ValueError(f"'extra_body' holds {key!r}, which is set already; use the option of that name")
        if self.extra_body.get("stream") or self.extra_body.get("n", 1) != 1:
            raise ValueError("'extra_body' must not ask for 'stream' or several choices ('n')")
        return self

    @property
    def parameters(self) -> dict[str, Any]:
        """What decides an answer besides model and messages."""
        given = {"temperature": self.temperature, "seed": self.seed}
        return {
            **{key: value for key, value in given.items() if value is not None},
            "max_tokens": self.max_tokens,
            "extra_body": self.extra_body,
        }

    @property
    def key_variable(self) -> str | None:
        """The environment variable to read the key from."""
        return self.api_key_env or (None if self.base_url else "OPENAI_API_KEY")

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """Money for so many tokens, or None where prices are not given."""
        if self.price_in is None or self.price_out is None:
            return None
        return (prompt_tokens * self.price_in + completion_tokens * self.price_out) / 1e6
