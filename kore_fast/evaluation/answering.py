"""Who answers: a model in memory, a base with an adapter, or a model behind an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import queue
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import nn

from kore_fast.endpoint.client import NO_TEXT, Connection, RequestFailedError
from kore_fast.endpoint.options import EndpointOptions
from kore_fast.endpoint.totals import Totals
from kore_fast.errors import ConstraintError, DataError, KoreError
from kore_fast.evaluation.batches import BatchSize
from kore_fast.evaluation.generation import Prompt, stream_answers
from kore_fast.files import quick_digest
from kore_fast.progress import Progress, silent

MAX_NEW_TOKENS = 128
"""EVOKE's."""
_WEIGHTS = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"}
_SENT_AS_THEY_ARE = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp", "GIF": "gif"}


@dataclass(frozen=True)
class Answer:
    """What was answered, or why nothing was."""

    text: str | None
    missing: str = ""
    """Why there is no text: never a wrong answer, but none."""


class Answerer(Protocol):
    """Somebody who answers questions, greedily."""

    @property
    def about(self) -> Mapping[str, Any]:
        """What decides the answers, as plain JSON values; ``server`` is where they come from and decides nothing."""
        ...

    def answers(
        self, prompts: Sequence[Prompt], wanted: Sequence[int], progress: Progress = silent, label: str = "answer"
    ) -> Iterator[Mapping[int, Answer]]:
        """Answers to the ``wanted`` places of ``prompts``, by place, as they come; others may be among them."""
        ...


class ModelAnswerer:
    """A model in memory, with or without an adapter; see `stream_answers`."""

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        batch_size: int | BatchSize = 8,
        bf16: bool = False,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.max_new_tokens, self.bf16 = max_new_tokens, bf16
        self.batch_size = batch_size if isinstance(batch_size, BatchSize) else BatchSize(batch_size)
        self.about: Mapping[str, Any] = {**(about or {}), "max_new_tokens": max_new_tokens, "bf16": bf16}

    def answers(
        self, prompts: Sequence[Prompt], wanted: Sequence[int], progress: Progress = silent, label: str = "answer"
    ) -> Iterator[Mapping[int, Answer]]:
        """Batch by batch. Raises `KoreError` for pictures shown to a model that takes none."""
        if any(prompt.image is not None for prompt in prompts) and not hasattr(self.processor, "image_processor"):
            raise KoreError(
                "the questions show pictures, and the model's folder has no image processor: give a vision-language "
                "model, with the processor's files in its folder"
            )
        for answers in stream_answers(
            self.model,
            self.processor,
            prompts,
            wanted=set(wanted),
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            bf16=self.bf16,
            progress=progress,
            label=label,
        ):
            yield {i: Answer(text) for i, text in answers.items()}


def load_answerer(
    model: str | Path,
    adapter: str | Path | None = None,
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: str = "cpu",
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 8,
) -> ModelAnswerer:
    """A model from a folder or a hub name, with an adapter's folder on top (a PEFT adapter, KORE's among them).

    The adapter is not merged: what is measured is what would be served.

    Raises:
        KoreError: no model or processor there; the adapter is missing, not whole, or does not fit the model, so that
            it would change nothing without a word.
    """
    from kore_fast.modules.loading import load_model, load_processor

    if adapter is not None and not (Path(adapter) / "adapter_config.json").is_file():
        raise DataError(f"{adapter}: no adapter there; give the folder that holds adapter_config.json")
    base = load_model(model, dtype)
    try:
        processor = load_processor(model)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise KoreError(f"{model}: a model without its processor or tokenizer ({reason})") from None
    about: dict[str, Any] = {"model": _called(model), "weights": _fingerprint(model, base)}
    if adapter is not None:
        base = load_adapted(base, adapter)
        about |= {"adapter": Path(adapter).resolve().name, "adapter_weights": _folder_digest(Path(adapter))}
    about["dtype"] = str(next(base.parameters()).dtype).removeprefix("torch.")
    return ModelAnswerer(
        base.to(device).eval(), processor, max_new_tokens=max_new_tokens, batch_size=batch_size, about=about
    )


def load_adapted(model: nn.Module, folder: str | Path) -> nn.Module:
    """The model with the adapter of ``folder`` on it, unmerged.

    Raises:
        DataError: a file of the adapter is missing or not whole.
        ConstraintError: the adapter is for another model: layers, shapes or whole tensors do not match. PEFT alone
            would pass over some of these and answer as the base does.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    from kore_fast.files import read_json
    from kore_fast.modules.adapter import is_kore_adapter, load_kore_model
    from kore_fast.modules.adapter_files import CONFIG, WEIGHTS, check_fits, read_adapter

    folder = Path(folder)
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise DataError(f"{folder / CONFIG}: not an object; save the adapter again")
    if str(config.get("peft_type", "LORA")).upper() == "LORA":
        check_fits(read_adapter(folder), model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT would warn of is an error here
            if is_kore_adapter(folder):
                adapted: nn.Module = load_kore_model(model, folder)
            else:
                adapted = PeftModel.from_pretrained(model, str(folder))
        with safe_open(folder / WEIGHTS, "pt") as file:
            saved = set(file.keys())
    except (ValueError, RuntimeError, KeyError, TypeError, OSError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConstraintError(f"{folder}: PEFT cannot load it onto this model ({reason})") from None
    there = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    for names, what in (
        (there - saved, "the adapter's file holds nothing for it, and PEFT would fill it with chance"),
        (saved - there, "the adapter's file holds it, and the model has no place for it"),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ConstraintError(f"{folder}: {min(names)}{more}: {what}; give the model that it was trained on")
    return adapted.eval()


class EndpointAnswerer:
    """A model behind an OpenAI-compatible server: pictures go as data URLs, several requests at a time.

    A request that the server does not answer in all its attempts has no answer, with the reason; ten of them in a row
    end the run. Servers that refuse the key or do not know the model end it at once.
    """

    def __init__(self, options: EndpointOptions) -> None:
        self.options = options
        self.totals = Totals()
        self.about: Mapping[str, Any] = {
            "model": options.model,
            "server": options.base_url or "OpenAI",
            "parameters": options.parameters,
        }

    @classmethod
    def greedy(cls, model: str, base_url: str | None = None, **options: Any) -> EndpointAnswerer:
        """With temperature 0 and at most 128 new tokens, unless ``options`` (`EndpointOptions`) say otherwise."""
        given = {"temperature": 0.0, "max_tokens": MAX_NEW_TOKENS, **options}
        return cls(EndpointOptions(model=model, base_url=base_url, **given))

    def answers(
        self, prompts: Sequence[Prompt], wanted: Sequence[int], progress: Progress = silent, label: str = "answer"
    ) -> Iterator[Mapping[int, Answer]]:
        """One by one, in the order in which the server answers.

        Raises:
            LanguageModelError: the server cannot be reached or used.
            DataError: a picture cannot be read.
        """
        results: queue.Queue[tuple[int, Answer] | BaseException | None] = queue.Queue()
        stop = _Stop()

        def run() -> None:
            # A thread of its own, as a notebook has a loop already.
            try:
                asyncio.run(self._ask_all(prompts, wanted, results, stop))
            except BaseException as error:
                results.put(error)
            finally:
                results.put(None)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        shown = progress(range(len(wanted)), len(wanted), label)
        next(shown, None)
        try:
            while (result := results.get()) is not None:
                if isinstance(result, BaseException):
                    raise result
                yield {result[0]: result[1]}
                next(shown, None)
        finally:
            stop.now()
            thread.join()
            if (close := getattr(shown, "close", None)) is not None:
                close()  # the bar's line ends before an error is told

    async def _ask_all(
        self, prompts: Sequence[Prompt], wanted: Sequence[int], results: queue.Queue[Any], stop: _Stop
    ) -> None:
        waiting = iter(wanted)
        stop.take(asyncio.get_running_loop(), asyncio.current_task())
        async with Connection(self.options, self.totals) as connection:

            async def work() -> None:
                for i in waiting:
                    results.put((i, await self._ask(connection, prompts[i])))

            workers = [asyncio.ensure_future(work()) for _ in range(min(self.options.concurrency, len(wanted)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _ask(self, connection: Connection, prompt: Prompt) -> Answer:
        content: list[dict[str, Any]] = [{"type": "text", "text": prompt.text}]
        if prompt.image is not None:
            content = [{"type": "image_url", "image_url": {"url": data_url(prompt.image)}}, *content]
        messages = [{"role": "user", "content": content if prompt.image is not None else prompt.text}]
        try:
            reply = await connection.send(messages, None, self.options.max_tokens)
        except RequestFailedError as error:
            return Answer(None, str(error))
        if reply.finish == "content_filter":
            return Answer(None, "the server's content filter stopped the answer")
        text = reply.answer.strip()
        if not text and reply.finish == NO_TEXT:
            return Answer(None, "the server's message has no text")
        if not text and reply.finish == "length":
            return Answer(
                None, f"all {reply.completion_tokens} tokens were used up before any text: allow more of them"
            )
        return Answer(text)


class _Stop:
    """Ends the requests under way when nobody waits for their answers any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = False
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any] | None] | None = None

    def take(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any] | None) -> None:
        with self._lock:
            self._running = loop, task
            if self._wanted and task is not None:
                task.cancel()

    def now(self) -> None:
        with self._lock:
            self._wanted = True
            if self._running is not None:
                loop, task = self._running
                if task is not None and not loop.is_closed():
                    loop.call_soon_threadsafe(task.cancel)


def data_url(path: Path) -> str:
    """A picture's file in a data URL; what servers may not know is turned into PNG.

    Raises:
        DataError: it cannot be read; names it.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            kind = _SENT_AS_THEY_ARE.get(image.format or "")
            if kind is None:
                buffer = io.BytesIO()
                image.convert("RGB").save(buffer, "PNG")
                kind, data = "png", buffer.getvalue()
    except FileNotFoundError:
        raise DataError(f"{path}: no such picture") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a whole picture ({error})") from None
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _called(model: str | Path) -> str:
    """A folder's name without where this machine has it; a hub name as it is."""
    return Path(model).resolve().name if Path(model).is_dir() else str(model)


def _fingerprint(path: str | Path, model: nn.Module) -> str:
    """What tells a model from another: its files, or the hub's revision."""
    if Path(path).is_dir():
        return _folder_digest(Path(path))
    return str(getattr(model.config, "_commit_hash", None) or "unknown")


def _folder_digest(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS)
    return hashlib.sha256("".join(f"{path.name}:{quick_digest(path)}\n" for path in files).encode()).hexdigest()
