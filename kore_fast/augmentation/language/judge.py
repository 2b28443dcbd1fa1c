"""A language model as the judge of the grounding check: does an item's text support an answer?

`LanguageModelJudge.prepare` asks the model about cases (`Grounding.to_judge` names them) and fills the request cache;
`supports` then reads that cache only.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kore_fast.augmentation.grounding import Case, Verdict
from kore_fast.augmentation.language.asking import Account, Asker, Missing, Outstanding
from kore_fast.augmentation.language.item_requests import Request
from kore_fast.augmentation.language.options import LanguageModelOptions
from kore_fast.augmentation.language.prompting import bounded, harmless, quote
from kore_fast.augmentation.language.schemas import REASON_WORDS, Judgement, usable_judgement
from kore_fast.endpoint.cache import RequestCache, canonical, request_key, request_rest
from kore_fast.endpoint.forms import json_schema
from kore_fast.errors import DataError

TASK = "judge"


class LanguageModelJudge(Asker[Case]):
    """Decides by a language model whether a text supports an answer; a `Judge` for `Grounding`.

    A case that the model was asked about without a usable answer, or that the server did not answer, is not supported,
    and its reason begins with "not judged": nobody has confirmed it. The latter is asked again by the next run's
    `prepare`. `summary` counts these cases apart.
    """

    label = "judge by"

    def __init__(self, model: LanguageModelOptions, cache: RequestCache | str | Path, *, seed: int = 0) -> None:
        """``cache`` is the request cache or its file (the writer's will do); ``seed`` chooses the prompts' wordings.

        Raises:
            DataError: the cache or a prompt of one's own cannot be used.
        """
        super().__init__(model, cache)
        self.seed = seed
        self._prompt = self.prompts[TASK]
        self._name = f"{TASK}/{self._prompt.version}"
        self._rest = request_rest(model.model, model.parameters, json_schema(Judgement), self._name)
        self._used = Account()
        # Of cases told in the summary; on the disk when there are many.
        self._counted = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._counted.execute("create table counted (key blob primary key) without rowid")

    def supports(self, text: str, question: str, answer: str) -> Verdict:
        """What the model has decided; nothing is sent.

        Raises:
            DataError: the model has not been asked about this case.
        """
        request = self.request((text, question, answer))
        found, entry = self.look_up(request)
        if entry is None and not self.failed(request):
            raise DataError(
                f"the judge {self.model.model!r} has not been asked about the answer {answer[:80]!r} to "
                f"{question[:80]!r}; give the judge's 'prepare' all that 'Grounding.to_judge' names first"
            )
        if isinstance(found, Missing):
            verdict = Verdict(False, (f"not judged: {found.reason}",))
        elif found.supported:
            verdict = Verdict(True)
        else:
            verdict = Verdict(False, (f"the judge says: {found.reason or 'it is not supported'}",))
        key = bytes.fromhex(request.key)
        if self._counted.execute("insert or ignore into counted values (?)", (key,)).rowcount:
            self._count(request, entry, text, "not_judged" if isinstance(found, Missing) else verdict.supported)
        return verdict

    def _count(self, request: Request, entry: Any, text: str, outcome: str | bool) -> None:
        if entry is not None:
            self._used.add(request, entry)
        named = outcome if isinstance(outcome, str) else "supported" if outcome else "unsupported"
        self._used.counts.update({"cases": 1, named: 1, "texts_cut": bounded(text, self.model.max_text_tokens)[1]})

    def summary(self) -> dict[str, Any]:
        """What the verdicts given so far rest on, for the data card: the same after any number of interruptions.

        A case that came several times is counted once. Requests, tokens and cost are those that the answers took,
        whenever they were paid.
        """
        keys = (
            "cases", "supported", "unsupported", "not_judged", "requests", "answers", "unusable", "texts_cut",
            "prompt_tokens", "completion_tokens",
        )  # fmt: skip
        return {"judge": "language model", **self._used.summary(self.model, {TASK: self._prompt.version}, keys)}

    def request(self, case: Case) -> Request:
        """The request for one case: same case and options, same request."""
        shown, _ = bounded(case[0], self.model.max_text_tokens)
        material = quote("material", harmless(shown))
        question, answer = quote("question", harmless(case[1])), quote("answer", harmless(case[2]))
        identity = hashlib.sha256(canonical(list(case)).encode("ascii")).hexdigest()
        messages = self._prompt.chosen(self.seed, identity, TASK).messages(
            {
                "fence": material.fence,
                "material": material.text,
                "question_fence": question.fence,
                "question": question.text,
                "answer_fence": answer.fence,
                "answer": answer.text,
            }
        )
        key = request_key(messages, self._rest)
        return Request(TASK, "", self._name, messages, Judgement, key, REASON_WORDS, usable_judgement)

    def look(self, unit: Case) -> Callable[[], Outstanding]:
        """The case's one request, and whether it is missing."""
        request = self.request(unit)

        def outstanding() -> Outstanding:
            _, entry = self.look_up(request, read=False)
            missing = entry is None and not self.failed(request)
            return Outstanding([request] if missing else [], entry is not None)

        return outstanding
