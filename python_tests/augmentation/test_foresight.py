"""What a dry run foretells, held against what a run then sends."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason='needs openai: pip install "kore-fast[augment]"')
pytest.importorskip("json_repair", reason='needs json-repair: pip install "kore-fast[augment]"')

from kore_fast.augmentation.foresight import describe_time, least_seconds, rough_seconds
from kore_fast.augmentation.language.options import LanguageModelOptions
from kore_fast.augmentation.plan import AugmentationPlan
from python_tests.augmentation.language.server import Reply, Server, task_of
from python_tests.augmentation.world import answer, make_items, model, run_augment

ITEMS = 4


def speak(body: dict[str, Any], times: int) -> Reply:
    if task_of(body) == "judge":
        return Reply(json.dumps({"supported": True, "reason": "so it is"}))
    return Reply(answer(body))


def numbers(line: str) -> list[int]:
    return [int(found.replace(",", "")) for found in re.findall(r"\d[\d,]*", line.partition(": ")[2])]


def dry(capsys: pytest.CaptureFixture[str], items: Path, run: Path, **plan: Any) -> dict[str, str]:
    """The lines of a dry run, by how they begin."""
    capsys.readouterr()
    assert run_augment(items, run, "--dry-run", **plan) == 0
    return {line.partition(":")[0]: line for line in capsys.readouterr().out.splitlines()}


@pytest.mark.parametrize("mode", ["doubtful", "all"])
def test_the_judges_requests_are_bounded_before_and_counted_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    items, run = make_items(tmp_path / "data", ITEMS), tmp_path / "run"
    with Server(speak) as server:
        plan = {
            "language_model": model(server, questions=4, price_in=1, price_out=2),
            "grounding": {"judge": mode},
            "vqa": 2,
        }
        before = dry(capsys, items, run, **plan)
        assert server.requests == []
        assert ("if the rules doubt all" in before["judge"]) == (mode == "doubtful")
        # Two openings, four answers, a caption and two questions of VQA.
        assert numbers(before["judge"])[:3] == [0, 0, ITEMS * (2 + 4 + 1 + 2)]
        assert numbers(before["together"])[0] == ITEMS * 7 + ITEMS * 9
        assert "time: not known" in before["time"]
        assert f"{ITEMS * 16} requests, 8 at a time, take {ITEMS * 2} times" in before["time"]
        assert run_augment(items, run, **plan) == 0
        asked = [body for body in server.requests if task_of(body) == "judge"]
        assert len(asked) == ITEMS * (9 if mode == "all" else 1)
        after = dry(capsys, items, run, **plan)
        assert numbers(after["judge"])[:2] == [0, len(asked)]
        assert "more" not in after["judge"]
        assert numbers(after["together"])[:2] == [0, 0]
        assert "time" not in after
        # Written, but not judged.
        unjudged = tmp_path / "unjudged"
        assert run_augment(items, unjudged, language_model=plan["language_model"], vqa=2) == 0
        exact = dry(capsys, items, unjudged, **plan)
        assert numbers(exact["judge"])[:2] == [len(asked), 0]
        assert "at most" not in exact["judge"]
        sent = len(server.requests)
        assert run_augment(items, unjudged, **plan) == 0
        assert len(server.requests) - sent == len(asked)


def test_no_judge_no_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = make_items(tmp_path / "data", 2)
    for grounding in ({}, {"action": "off", "judge": "all"}):
        said = dry(capsys, items, tmp_path / "run", language_model={"model": "m"}, grounding=grounding)
        assert not {"judge", "together"} & said.keys()


def options(**changes: Any) -> LanguageModelOptions:
    return LanguageModelOptions(model="m", **changes)


def test_time_follows_from_the_rates() -> None:
    assert least_seconds(options(), 1000, 10**6) is None
    assert least_seconds(options(requests_per_minute=50), 1000, 10**6) == 20 * 60
    assert least_seconds(options(requests_per_minute=50, tokens_per_minute=10_000), 1000, 10**6) == 100 * 60
    assert least_seconds(options(requests_per_minute=50, batch_api=True), 1000, 10**6) is None
    assert "time: about 20 min by the rates set" in describe_time(options(requests_per_minute=50), 1000, 10**6)
    assert "63 times as long as one" in describe_time(options(concurrency=16), 1000, 10**6)
    assert "24 hours for each of 2 rounds" in describe_time(options(batch_api=True), 1000, 10**6, rounds=2)


def test_the_stages_time(tmp_path: Path) -> None:
    items = make_items(tmp_path / "data", 60)

    def seconds(**plan: Any) -> float | None:
        return rough_seconds(items, AugmentationPlan.model_validate(plan))

    templates = seconds()
    assert templates is not None
    assert templates < 10
    assert seconds(language_model={"model": "m"}) is None
    # Questions, eight answers, summary and quadruplets: 11 requests an item, at one a second.
    assert seconds(language_model={"model": "m", "requests_per_minute": 60}) == templates + 60 * 11
    together = {"model": "m", "requests_per_minute": 60, "answers_together": True}
    assert seconds(language_model=together) == templates + 60 * 4
    by_tokens = seconds(language_model={"model": "m", "tokens_per_minute": 60_000})
    assert by_tokens is not None
    # Between 300 and 700 tokens a request, a thousand a second.
    assert 60 * 11 * 0.3 < by_tokens - templates < 60 * 11 * 0.7
    clip = {"unfiltered": True}
    commons = {"provider": "wikimedia", "contact": "a@example.org", "requests_per_minute": 30}
    assert seconds(image_search=commons, clip=clip) == templates + 60 * 2
    assert seconds(image_search={"folder": str(tmp_path)}, clip=clip) == templates
    broken = tmp_path / "none.jsonl"
    assert rough_seconds(broken, AugmentationPlan(language_model=options(requests_per_minute=1))) == templates
