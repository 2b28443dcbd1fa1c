"""What is asked about one item: five tasks, each a request with its key, its form and what of an answer is usable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import BaseModel

from kore_fast.augmentation.language.options import LanguageModelOptions
from kore_fast.augmentation.language.prompting import Chosen, Material, Prompt, harmless, material, quote
from kore_fast.augmentation.language.repair import read_answer
from kore_fast.augmentation.language.schemas import (
    Answer,
    Answers,
    Quadruplets,
    Questions,
    SpokenQuadruplets,
    Summary,
    usable_answer,
    usable_answers,
    usable_quadruplets,
    usable_questions,
    usable_summary,
)
from kore_fast.augmentation.options import AugmentationOptions
from kore_fast.data.items import Item
from kore_fast.endpoint.cache import request_key, request_rest
from kore_fast.endpoint.forms import json_schema
from kore_fast.endpoint.tokens import count_message_tokens

# About what each answer takes, for an estimate before the first request: words at 1.4 tokens, with the JSON around.
_QUESTION_TOKENS = 22
_QUADRUPLET_TOKENS = 55
_SENTENCE_TOKENS = 25


@dataclass(frozen=True)
class Request:
    """One question to the model."""

    task: str
    item: str
    prompt: str
    """The prompt's name and version."""
    messages: list[dict[str, str]]
    form: type[BaseModel]
    key: str
    expected_tokens: int
    """Of the answer, roughly."""
    use: Callable[[Any], Any]
    """The usable part of an answer of that form; raises `UnusableError`."""

    def read(self, answer: str, finish: str) -> Any:
        """What can be used of a raw answer.

        Raises:
            UnusableError: nothing; says why.
        """
        return self.use(read_answer(answer, self.form, cut=finish == "length"))

    @property
    def prompt_tokens(self) -> int:
        """Of the prompt, roughly."""
        return count_message_tokens(self.messages)


class ItemRequests:
    """Makes the requests of one item; same item and options, same requests."""

    def __init__(
        self, item: Item, model: LanguageModelOptions, augmentation: AugmentationOptions, prompts: dict[str, Prompt]
    ) -> None:
        self.item, self.model, self.augmentation, self.prompts = item, model, augmentation, prompts
        self._parameters = model.parameters
        self._same: dict[str, tuple[Chosen, str, str]] = {}

    @cached_property
    def material(self) -> Material:
        """The item as the model sees it."""
        return material(self.item, self.model.max_text_tokens, self.model.include_facts)

    @property
    def question_count(self) -> int:
        """How many questions the dialogues take."""
        return min(self.model.questions, self.augmentation.dialogues * (self.augmentation.rounds - 1))

    def questions(self) -> Request:
        """Up to so many questions for the dialogues."""
        count = self.question_count
        return self._request(
            "questions", Questions, count * _QUESTION_TOKENS, lambda form: usable_questions(form, count), count=count
        )

    def answer(self, question: str) -> Request:
        """The answer to one question."""
        words = self.augmentation.prose_words
        asked = quote("question", harmless(question))
        return self._request(
            "answer",
            Answer,
            words + 10,
            lambda form: usable_answer(form.answer, question, words),
            words=words,
            question=asked.text,
            question_fence=asked.fence,
        )

    def answers(self, questions: list[str]) -> Request:
        """The answers to all questions in one reply."""
        words = self.augmentation.prose_words
        numbered = "\n".join(f"{place}. {harmless(question)}" for place, question in enumerate(questions, start=1))
        asked = quote("questions", numbered)
        return self._request(
            "answers",
            Answers,
            len(questions) * (words + 18),
            lambda form: usable_answers(form, questions, words),
            words=words,
            count=len(questions),
            question=asked.text,
            question_fence=asked.fence,
        )

    def summary(self) -> Request:
        """The caption's summary."""
        words = self.augmentation.summary_words
        return self._request("summary", Summary, words * 2, lambda form: usable_summary(form, words), words=words)

    def quadruplets(self) -> Request:
        """Short questions for VQA, with spoken answers where answers are natural."""
        count = self.augmentation.vqa
        spoken = self.augmentation.natural_answers
        return self._request(
            "spoken_quadruplets" if spoken else "quadruplets",
            SpokenQuadruplets if spoken else Quadruplets,
            count * (_QUADRUPLET_TOKENS + (_SENTENCE_TOKENS if spoken else 0)),
            lambda form: usable_quadruplets(form, self.item.name, count),
            count=count,
        )

    def _request(
        self, task: str, form: type[BaseModel], expected: int, use: Callable[[Any], Any], **words: str | int
    ) -> Request:
        if task not in self._same:
            prompt = self.prompts[task]
            name = f"{task}/{prompt.version}"
            rest = request_rest(self.model.model, self._parameters, json_schema(form), name)
            self._same[task] = prompt.chosen(self.augmentation.seed, self.item.id, task), name, rest
        chosen, name, rest = self._same[task]
        quoted = self.material.quoted
        filled = {key: str(value) for key, value in words.items()}
        messages = chosen.messages({"fence": quoted.fence, "material": quoted.text, **filled})
        key = request_key(messages, rest)
        return Request(task, self.item.id, name, messages, form, key, min(expected, self.model.max_tokens), use)
