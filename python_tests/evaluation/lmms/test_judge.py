"""The judge's endpoint behind the loopback server: asked once, for its own model, its key kept, its failures seen."""

from __future__ import annotations

import json
import os
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from kore_fast.errors import DataError
from kore_fast.evaluation.lmms.judge import Judge, judging
from kore_fast.evaluation.lmms.readable import holds


def ask(text: str, path: str = "", model: str = "gpt-4") -> str:
    """As lmms-eval's tasks do: by what the environment says."""
    payload = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 16}
    headers = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}", "Content-Type": "application/json"}
    request = urllib.request.Request(os.environ["OPENAI_API_URL"] + path, json.dumps(payload).encode(), headers)
    with urllib.request.urlopen(request, timeout=10) as response:
        return str(json.loads(response.read())["choices"][0]["message"]["content"])


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "bench/judge.jsonl"


def test_asks_once_for_the_model_that_was_named(
    loopback_judge: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    monkeypatch.setenv("OPENAI_API_URL", "http://elsewhere")
    monkeypatch.delenv("MODEL_VERSION", raising=False)
    loopback_judge.script = lambda prompt: f"correct: {prompt}"
    judge = loopback_judge.options(api_key_env="JUDGE_KEY")
    with judging(judge, holds("correct"), cache) as record:
        assert os.environ["MODEL_VERSION"] == "teacher"
        assert ask("one") == "correct: one"
        assert ask("two", path="/chat/completions") == "correct: two"
        assert ask("one") == "correct: one"
        assert "secret" not in str(dict(os.environ) | {"JUDGE_KEY": ""})
    assert (record.asked, record.unreadable, record.problem) == (3, 0, None)
    assert [request["model"] for request in loopback_judge.requests] == ["teacher"] * 2
    assert loopback_judge.keys == {"Bearer sk-very-secret"}
    assert os.environ["OPENAI_API_URL"] == "http://elsewhere"
    assert "MODEL_VERSION" not in os.environ
    assert "secret" not in cache.read_text()
    # What was answered is not asked again; a line that was being written when the process was killed is passed over.
    cache.write_text(cache.read_text() + '{"request": "ab')
    with judging(judge, holds("correct"), cache):
        assert ask("two") == "correct: two"
    assert len(loopback_judge.requests) == 2


def test_an_endpoint_that_fails_is_seen_and_not_asked_on(
    loopback_judge: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    loopback_judge.script = lambda prompt: 503
    judge = loopback_judge.options(api_key_env="JUDGE_KEY", attempts=3)
    with judging(judge, holds("."), cache) as record:
        ask("one")
        assert len(loopback_judge.requests) == 3
        ask("two")
        assert len(loopback_judge.requests) == 3
    assert record.problem is not None
    assert "HTTP 503" in record.problem
    assert "secret" not in record.problem
    assert not cache.exists()


def test_one_answer_after_a_failed_attempt(loopback_judge: Any, cache: Path) -> None:
    said = iter([429, "fine"])
    loopback_judge.script = lambda prompt: next(said)
    with judging(loopback_judge.options(), holds("fine"), cache) as record:
        assert ask("one") == "fine"
    assert record.problem is None


def test_a_wrong_key_is_not_tried_again(loopback_judge: Any, cache: Path) -> None:
    loopback_judge.script = lambda prompt: 401
    with judging(loopback_judge.options(), holds("."), cache) as record:
        ask("one")
    assert len(loopback_judge.requests) == 1
    assert "HTTP 401" in str(record.problem)


def test_no_endpoint_there(cache: Path) -> None:
    judge = Judge(base_url="http://127.0.0.1:9/v1", model="m", attempts=1)
    with judging(judge, holds("."), cache) as record:
        ask("one")
    assert "http://127.0.0.1:9/v1/chat/completions, model m" in str(record.problem)


def test_answers_that_cannot_be_read(loopback_judge: Any, cache: Path) -> None:
    loopback_judge.script = lambda prompt: "correct" if "good" in prompt else "banana"
    with judging(loopback_judge.options(), holds("correct"), cache) as record:
        for number in range(9):
            ask(f"good {number}")
        ask("bad")
        assert record.problem is None
        ask("bad too")
    assert record.problem == "2 of 11 answers of the judge could not be read; take a stronger judge"


def test_half_an_emoji(loopback_judge: Any, cache: Path) -> None:
    """An answer that was cut off inside a surrogate pair is kept, and whole pairs stay as they are."""
    loopback_judge.script = lambda prompt: "correct \U0001f600 \ud83d"
    for _ in range(2):
        with judging(loopback_judge.options(), holds("correct"), cache) as record:
            assert ask("one") == "correct \U0001f600 \ufffd"
        assert (record.asked, record.unreadable, record.problem) == (1, 0, None)
    assert len(loopback_judge.requests) == 1
    assert json.loads(cache.read_text(encoding="utf-8"))["answer"]["choices"][0]["message"]["content"][-1] == "\ufffd"


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(DataError, match="NO_SUCH_KEY is not set"):
        Judge(base_url="https://x/v1", model="m", api_key_env="NO_SUCH_KEY").key()
    assert Judge(base_url="https://x/v1", model="m").key() is None
    with pytest.raises(ValidationError):
        Judge(base_url="x/v1", model="m")
    with pytest.raises(ValidationError):
        Judge(base_url="https://x/v1", model="m", api_key="sk")  # type: ignore[call-arg]
