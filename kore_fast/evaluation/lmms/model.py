"""The model in memory as lmms-eval wants it; needs lmms-eval."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.model import lmms
from PIL import Image
from torch import nn

from kore_fast.data.conversations import ANSWER, IMAGE, Encoded, by_length, collate, encode, tokenizer_of
from kore_fast.evaluation.batches import BatchSize
from kore_fast.evaluation.generation import stream_answers
from kore_fast.evaluation.lmms.prompts import pictures_first
from kore_fast.journal import Journal
from kore_fast.progress import Progress, silent

# So many batches are encoded together, and put into an order of like length.
_BATCHES_AT_ONCE = 16
Limits = tuple[int, tuple[str, ...]]
"""The most new tokens, and the texts before which an answer ends."""


class ModelInMemory(lmms):
    """A model and its processor, PEFT adapter and all, behind lmms-eval's interface.

    Answers are greedy whatever a task asks for, in batches of like length. Each batch is written to ``journal`` when it
    is done, a conversation's turn by turn, so that an interrupted benchmark goes on where it stopped. No answer gets
    longer than ``max_new_tokens``.
    """

    is_simple = True

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        journal: Path,
        max_new_tokens: int = 1024,
        batch_size: int = 32,
        bf16: bool = False,
        progress: Progress = silent,
        label: str = "answer",
    ) -> None:
        super().__init__()
        self.accelerator = None  # lmms-eval would make one
        self._network, self._processor = model, processor
        self._journal, self._most_tokens = Journal(journal), max_new_tokens
        self._batch_size, self._bf16, self._progress, self._label = BatchSize(batch_size), bf16, progress, label
        self._at_once = batch_size * _BATCHES_AT_ONCE
        rows = self._journal.rows("request", "turn", "answer")
        self._known = {(str(row["request"]), int(row["turn"])): str(row["answer"]) for row in rows}

    def clean(self) -> None:
        """lmms-eval drops the model before it scores; it is the caller's, and stays."""

    def generate_until(self, requests: list[Any]) -> list[str]:
        return self._answers(
            [partial(self._question, request) for request in requests],
            [(_name(request), 0) for request in requests],
            [self._limits(request.args[1]) for request in requests],
        )

    def generate_until_multi_round(self, requests: list[Any]) -> list[list[str]]:
        """Each round's answers go back to the task, which gives the next round's text, pictures or its end.

        A round's text may be a conversation so far, as (role, text) turns.
        """
        results: list[list[str]] = [[] for _ in requests]
        names = [_name(request) for request in requests]
        limits = [self._limits(request.args[1]) for request in requests]
        asked = [(request.args[0], self._visuals(request, 2)) for request in requests]
        told: dict[int, Any] = {}
        running = list(range(len(requests)))
        turn = 0
        while running:
            answers = self._answers(
                [partial(self._conversation, *asked[number]) for number in running],
                [(names[number], turn) for number in running],
                [limits[number] for number in running],
            )
            turn += 1
            going_on = []
            for number, answer in zip(running, answers, strict=True):
                results[number].append(answer)
                _, _, _, doc_to_text, doc_id, task, split = requests[number].args
                visuals, text, ended, outputs, told[number] = doc_to_text(
                    self.task_dict[task][split][doc_id],
                    previous_output=list(results[number]),
                    round_idx=turn,
                    previous_round_info=told.get(number),
                )
                if ended:
                    results[number] = list(outputs)
                else:
                    asked[number] = (text, list(visuals))
                    going_on.append(number)
            running = going_on
        return results

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy decoding gives it) of each continuation after its question."""
        tokenizer = tokenizer_of(self._processor)
        encoded, counts = [], []
        for request in requests:
            text, continuation, _, doc_id, task, split = request.args
            if callable(continuation):
                continuation = continuation(self.task_dict[task][split][doc_id])
            visuals = self._visuals(request, 2)
            turns = [("user", pictures_first(text, len(visuals))), ("assistant", str(continuation))]
            encoded.append(encode(self._processor, turns, visuals))
            counts.append(len(tokenizer(str(continuation), add_special_tokens=False)["input_ids"]))
        device = next(self._network.parameters()).device

        def score(rows: Sequence[int]) -> list[tuple[float, bool]]:
            inputs = collate([encoded[i] for i in rows], tokenizer.pad_token_id)
            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
                logits = self._network(**inputs).logits
            found = []
            for row, i in enumerate(rows):
                places = (encoded[i].kinds == ANSWER).nonzero().flatten()[: counts[i]].to(device)
                log_p = logits[row, places - 1].float().log_softmax(-1)
                tokens = inputs["input_ids"][row, places]
                chosen = log_p.gather(-1, tokens[:, None]).squeeze(-1)
                found.append((float(chosen.sum()), bool((log_p.argmax(-1) == tokens).all())))
            return found

        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for plain in (False, True):
            group = [i for i, e in enumerate(encoded) if (e.pixel_values is None) == plain]
            for batch in by_length([len(encoded[i]) for i in group], self._batch_size.size):
                rows = [group[i] for i in batch]
                for part, scores in self._batch_size.run(rows, score, lambda i: f"{self._label}, request {i}"):
                    for i, one in zip(part, scores, strict=True):
                        results[i] = one
        return results

    def _limits(self, asked: dict[str, Any]) -> Limits:
        until = asked.get("until") or ()
        stops = (until,) if isinstance(until, str) else tuple(until)
        return min(int(asked.get("max_new_tokens", self._most_tokens)), self._most_tokens), stops

    def _visuals(self, request: Any, place: int) -> list[Image.Image]:
        doc_to_visual, (doc_id, task, split) = request.args[place], request.args[-3:]
        return [] if doc_to_visual is None else list(doc_to_visual(self.task_dict[task][split][doc_id]) or [])

    def _question(self, request: Any) -> Encoded:
        visuals = self._visuals(request, 2)
        turns = [("user", pictures_first(request.args[0], len(visuals)))]
        return encode(self._processor, turns, visuals, answer_follows=True)

    def _conversation(self, text: str | Sequence[tuple[str, str]], visuals: Sequence[Image.Image]) -> Encoded:
        """With the pictures at their marks; before everything where their number is not that of the marks."""
        turns = [("user", text)] if isinstance(text, str) else list(text)
        if sum(said.count(IMAGE) for _, said in turns) != len(visuals):
            turns = [(role, pictures_first(said, 0 if i else len(visuals))) for i, (role, said) in enumerate(turns)]
        return encode(self._processor, turns, visuals, answer_follows=True)

    def _answers(
        self, asked: Sequence[Callable[[], Encoded]], names: Sequence[tuple[str, int]], limits: Sequence[Limits]
    ) -> list[str]:
        """Answers in the order of ``asked``: those that are kept, and the others, each batch kept as it is done.

        What is encoded together does not depend on what is kept: a run that continues has the batches of one that was
        not interrupted.
        """
        alike: dict[Limits, list[int]] = defaultdict(list)
        for number, limit in enumerate(limits):
            alike[limit].append(number)
        for (most_tokens, stops), numbers in alike.items():
            for start in range(0, len(numbers), self._at_once):
                chosen = numbers[start : start + self._at_once]
                wanted = {place for place, number in enumerate(chosen) if names[number] not in self._known}
                if not wanted:
                    continue
                for answers in stream_answers(
                    self._network,
                    self._processor,
                    [asked[number]() for number in chosen],
                    wanted=wanted,
                    max_new_tokens=most_tokens,
                    batch_size=self._batch_size,
                    bf16=self._bf16,
                    progress=self._progress,
                    label=self._label,
                ):
                    self._keep({names[chosen[i]]: _cut(text, stops) for i, text in answers.items() if i in wanted})
        return [self._known[name] for name in names]

    def _keep(self, answers: Mapping[tuple[str, int], str]) -> None:
        self._journal.append(
            {"request": request, "turn": turn, "answer": answer} for (request, turn), answer in answers.items()
        )
        self._known |= answers


def _name(request: Any) -> str:
    doc_id, task, split = request.args[-3:]
    asked = json.dumps([task, split, doc_id, request.args[0]], ensure_ascii=False)
    return f"{doc_id}-{hashlib.sha256(asked.encode()).hexdigest()[:16]}"


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text.strip()
