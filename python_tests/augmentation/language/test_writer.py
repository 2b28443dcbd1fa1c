"""The language-model writer against a real server on loopback that fails in every way."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason='needs openai: pip install "kore-fast[augment]"')
pytest.importorskip("json_repair", reason='needs json-repair: pip install "kore-fast[augment]"')

from kore_fast.augmentation import AugmentationOptions, CannotWriteError, augment
from kore_fast.augmentation.language import (
    LanguageModelError,
    LanguageModelOptions,
    LanguageModelWriter,
    RequestCache,
)
from kore_fast.data.items import Item
from python_tests.augmentation.language.server import Reply, Script, Server, error, good_answer, task_of

SECRET = "sk-secret-0123456789abcdef"
PER_ITEM = 8 + 3  # eight answers; questions, summary, quadruplets


def items(count: int) -> list[Item]:
    return [
        Item(
            id=f"i{n}", name=f"Gor{n}", type="creature", image=f"{n}.png", text=f"The Gor{n} sings at dawn. It is {n}."
        )
        for n in range(count)
    ]


def options(server: Server, **changes: Any) -> LanguageModelOptions:
    given = {"model": "m", "base_url": server.url, "backoff": 0.01, "timeout": 5.0, "concurrency": 8}
    return LanguageModelOptions.model_validate(given | changes)


def texts(writer: LanguageModelWriter, many: list[Item]) -> str:
    made = augment(many, writer.options, writer=writer)
    return json.dumps([[sample.to_record() for sample in made.samples], [reject.as_dict() for reject in made.rejects]])


def written(folder: Path, script: Script | None = None, count: int = 4, **changes: Any) -> dict[str, Any]:
    """Prepare and assemble against a fresh server; what came of it."""
    with Server(script) as server:
        writer = LanguageModelWriter(options(server, **changes), folder / "requests.sqlite")
        totals = writer.prepare(items(count))
    return {
        "totals": totals,
        "texts": texts(writer, items(count)),
        "server": server,
        "writer": writer,
        "summary": writer.summary(),
    }


def test_what_the_model_says_becomes_samples(tmp_path: Path) -> None:
    made = written(tmp_path)
    writer, item = made["writer"], items(1)[0]
    for variant in (0, 1):
        rounds = writer.dialogue(item, variant)
        assert len(rounds) == 5
        assert "sings at dawn" in rounds[0].answer
        for one in rounds[1:]:
            number = one.question.split()[3]
            assert one.answer == f"Fact {number} of Gor0 is known."
    asked = [one.question for variant in (0, 1) for one in writer.dialogue(item, variant)[1:]]
    assert asked == [f"What is fact {n} of Gor0?" for n in range(1, 9)]
    assert writer.caption(item).answer == "The image depicts Gor0. A creature that is called Gor0."
    assert [(one.question, one.answer, one.search) for one in writer.vqa(item)] == [
        (f"What colour number {n} has the animal in the image?", f"It has shade {n}.", "Gor0 animal")
        for n in range(1, 5)
    ]
    assert made["totals"]["requests"] == made["totals"]["answers"] == 4 * PER_ITEM == len(made["server"].requests)
    assert made["totals"]["prompt_tokens"] == 400 * PER_ITEM
    assert made["totals"]["cost"] == "unknown"
    assert made["summary"]["completion_tokens"] == 40 * PER_ITEM
    assert made["summary"]["models_reported"] == ["small-model-2026"]


def test_the_papers_form(tmp_path: Path) -> None:
    with Server() as server:
        paper = AugmentationOptions(dialogues=1, rounds=11, natural_answers=False, vqa=5)
        writer = LanguageModelWriter(options(server), tmp_path / "r.sqlite", options=paper)
        writer.prepare(items(1))
    item = items(1)[0]
    assert len(writer.dialogue(item, 0)) == 11
    first = writer.vqa(item)[0]
    assert first.answer == "shade 1"
    assert first.question.endswith("the animal in the image? Answer the question using a single word or phrase.")
    assert len(writer.vqa(item)) == 5
    assert all("sentence" not in json.dumps(body["response_format"]) for body in server.requests)


def test_all_answers_in_one_request(tmp_path: Path) -> None:
    apart, together = written(tmp_path / "a"), written(tmp_path / "b", answers_together=True)
    assert together["texts"] == apart["texts"]
    assert len(together["server"].requests) == 4 * 4


def test_a_second_run_sends_nothing_and_needs_neither_key_nor_server(tmp_path: Path) -> None:
    first = written(tmp_path)
    away = LanguageModelOptions(model="m", api_key_env="NO_SUCH_KEY_IS_SET")
    again = LanguageModelWriter(away, tmp_path / "requests.sqlite")
    totals = again.prepare(items(4))
    assert totals["requests"] == 0
    assert totals["cached"] == 4 * PER_ITEM
    assert texts(again, items(4)) == first["texts"]
    assert again.summary() == first["summary"]
    estimate = again.estimate(items(4))
    assert (estimate.requests, estimate.cached, estimate.prompt_tokens) == (0, 4 * PER_ITEM, 0)


@pytest.mark.parametrize(
    "change", [{"model": "n"}, {"temperature": 0.5}, {"seed": 3}, {"max_tokens": 99}, {"extra_body": {"top_p": 0.5}}]
)
def test_what_decides_an_answer_is_in_the_key(tmp_path: Path, change: dict[str, Any]) -> None:
    written(tmp_path, count=1)
    assert written(tmp_path, count=1, **change)["totals"]["requests"] == PER_ITEM


def test_how_it_is_reached_is_not_in_the_key(tmp_path: Path) -> None:
    written(tmp_path, count=1)
    other = written(tmp_path, count=1, concurrency=3, structured="text", price_in=1, price_out=1, asks=5)
    assert other["totals"]["requests"] == 0


def test_a_server_that_fails_in_every_way_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """Each request is first failed once or twice, in a way drawn from all; the outcome is the same as without."""
    calm = written(tmp_path / "calm", count=12)
    chance = random.Random(0)
    kinds = [
        error(429, "slow down", **{"Retry-After": "0.02"}),
        error(429, "slow down", **{"retry-after-ms": "10"}),
        error(500, "oops"),
        error(503, "loading"),
        Reply(truncate=True),
        Reply(reset=True),
        Reply(raw=b'{"choices": [{"mess'),
        Reply(raw=b'{"object": "list"}'),
        Reply(raw=b"<html>bad gateway</html>", status=502),
        Reply(delay=30.0),
    ]
    drawn: Counter[int] = Counter()

    def script(body: dict[str, Any], times: int) -> Reply:
        if times < chance.choice((0, 1, 1, 2)):
            kind = chance.randrange(len(kinds)) if times else chance.randrange(len(kinds) - 1)
            if drawn[len(kinds) - 1] < 6 and chance.random() < 0.03:
                kind = len(kinds) - 1
            drawn[kind] += 1
            return kinds[kind]
        return Reply()

    wild = written(tmp_path / "wild", script, count=12, timeout=0.5, attempts=12)
    assert set(drawn) == set(range(len(kinds)))
    assert wild["texts"] == calm["texts"]
    assert wild["summary"] == calm["summary"]
    totals = wild["totals"]
    assert totals["items"] == 12
    assert totals["answers"] == 12 * PER_ITEM
    assert totals["retries"] == sum(drawn.values())
    assert totals["requests"] == totals["answers"] + totals["retries"] == len(wild["server"].requests)
    # A reply whose body was cut off was not received: everything else is asked once.
    assert sum(wild["server"].served.values()) == 12 * PER_ITEM + drawn[4] + drawn[9] * 0
    assert totals["failed"] == totals["unusable"] == 0


def test_unusable_answers_are_asked_again_with_what_was_wrong(tmp_path: Path) -> None:
    bad = {
        "questions": ["{}", '{"questions": ["no question"]}'],
        "answer": ['{"answer": "see <image> here"}', '{"answer": 5}'],
        "summary": ['{"summary": ""}', '{"text": "x"}'],
        "quadruplets": ['{"quadruplets": []}', '{"quadruplets": [{"question": "Who?"}]}'],
    }

    def script(body: dict[str, Any], times: int) -> Reply:
        said = [m["content"] for m in body["messages"] if m["role"] == "assistant"]
        # A request is asked again in one conversation: the first two messages, the bad answer, what was wrong.
        step = 0 if not said else 1 + bad[task_of(body)].index(said[-1])
        return Reply() if step == 2 else Reply(content=bad[task_of(body)][step])

    made = written(tmp_path, script)
    assert made["texts"] == written(tmp_path / "calm")["texts"]
    assert made["totals"]["asked_again"] == 2 * 4 * PER_ITEM
    assert made["totals"]["requests"] == 3 * 4 * PER_ITEM
    again = [body["messages"][-1]["content"] for body in made["server"].requests if len(body["messages"]) == 4]
    assert any("'summary' is missing" in text for text in again)
    assert any("question mark" in text for text in again)
    # What the unusable replies took is counted with the answers that came of them.
    assert made["summary"]["completion_tokens"] == made["totals"]["completion_tokens"] == 3 * 10 * 4 * PER_ITEM


def test_an_answer_that_never_comes_right_is_left_out_for_good_and_counted(tmp_path: Path) -> None:
    def script(body: dict[str, Any], times: int) -> Reply:
        text = body["messages"][1]["content"]
        if "name: Gor1\n" in text and task_of(body) in ("summary", "questions"):
            return Reply(content="I would rather not {")
        if "fact 3 of Gor2" in text:
            return Reply(content="", finish="content_filter")
        return Reply()

    made = written(tmp_path, script)
    totals = made["totals"]
    assert totals["unusable"] == 3
    assert sum(totals["reasons"].values()) == 3
    rejects = json.loads(made["texts"])[1]
    assert sorted((one["item"], one["branch"]) for one in rejects) == [("i1", "caption"), ("i1", "dialogue")]
    assert all("no usable answer" in one["reason"] for one in rejects)
    asked = [one.question for v in (0, 1) for one in made["writer"].dialogue(items(3)[2], v)[1:]]
    assert asked == [f"What is fact {n} of Gor2?" for n in (1, 2, 4, 5, 6, 7, 8)]
    assert made["summary"]["unusable"] == 3
    assert len(RequestCache(tmp_path / "requests.sqlite")) == 4 * PER_ITEM - 3 - 8
    # Not asked for a second time, unless more asks are allowed.
    assert written(tmp_path, script)["totals"]["requests"] == 0
    assert written(tmp_path, script, asks=4)["totals"]["requests"] == 3


def test_a_request_that_gets_no_answer_is_left_for_the_next_run(tmp_path: Path) -> None:
    def script(body: dict[str, Any], times: int) -> Reply:
        return error(500, "never") if "fact 3 of Gor2" in body["messages"][1]["content"] else Reply()

    made = written(tmp_path, script, attempts=3)
    assert made["totals"]["failed"] == 1
    assert made["totals"]["requests"] == 4 * PER_ITEM + 2
    (reject,) = json.loads(made["texts"])[1]
    assert (reject["item"], reject["branch"]) == ("i2", "dialogue")
    assert "500: never (3 attempts)" in reject["reason"]
    assert made["summary"]["not_answered"] == 1
    later = written(tmp_path)
    assert later["totals"]["requests"] == 1
    assert later["texts"] == written(tmp_path / "calm")["texts"]


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (error(401, f"Incorrect API key provided: {SECRET}."), "check the key in KORE_TEST_KEY"),
        (error(403, f"key {SECRET} may not"), "refuses the key"),
        (error(404, "The model `m` does not exist", "model_not_found"), "no model 'm' there"),
        (error(400, "model 'm' not found"), "no model 'm' there"),
        (error(429, "You exceeded your current quota", "insufficient_quota"), "no credit left"),
        (error(429, "later", **{"Retry-After": "86400"}), "asks to wait 86400 s"),
        (error(429, "later", **{"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"}), "asks to wait"),
        (error(400, f"context too long, says {SECRET}"), "10 requests in a row failed"),
        (error(500, f"broken by {SECRET}"), "10 requests in a row failed"),
    ],
)
def test_what_no_retry_helps_stops_the_run_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reply: Reply, said: str
) -> None:
    monkeypatch.setenv("KORE_TEST_KEY", SECRET)
    with Server(lambda body, times: reply) as server:
        given = options(server, api_key_env="KORE_TEST_KEY", attempts=2)
        writer = LanguageModelWriter(given, tmp_path / "r.sqlite")
        with pytest.raises(LanguageModelError, match=said.replace("(", r"\(")) as caught:
            writer.prepare(items(300))
    assert server.url in str(caught.value)
    assert len(server.requests) <= 80
    assert SECRET not in str(caught.value)


def test_the_key_is_sent_and_appears_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """The server repeats the key in errors, in answers and as the model's name."""
    import traceback

    from kore_fast.progress import bar

    caplog.set_level(0)
    monkeypatch.setenv("KORE_TEST_KEY", SECRET)

    def script(body: dict[str, Any], times: int) -> Reply:
        if times == 0 and task_of(body) == "summary":
            return error(500, f"I saw {SECRET}", **{"x-key": SECRET})
        if task_of(body) == "quadruplets":
            return error(422, f"I saw {SECRET}")
        said = json.loads(good_answer(body))
        if task_of(body) == "answer":
            said["answer"] = f"The key is {SECRET}."
        message = {"role": "assistant", "content": json.dumps(said)}
        return Reply(body={"model": SECRET, "choices": [{"message": message, "finish_reason": "stop"}]})

    with Server(script) as server:
        writer = LanguageModelWriter(options(server, api_key_env="KORE_TEST_KEY"), tmp_path / "r.sqlite")
        shown = [writer.prepare(items(2), bar), texts(writer, items(2)), writer.summary(), writer.model.model_dump()]
        assert all(f"Bearer {SECRET}" in head for head in server.headers)
        server.script = lambda body, times: error(401, f"bad key {SECRET}")
        try:
            writer.prepare([items(3)[2]])
        except LanguageModelError as caught:
            trace = traceback.TracebackException.from_exception(caught, capture_locals=False)
            shown.append("".join(trace.format()))
        else:
            pytest.fail("not refused")
    writer.cache.export(tmp_path / "export.jsonl")
    captured = capfd.readouterr()
    shown += [captured.out, captured.err, caplog.text, repr(vars(writer))]
    assert SECRET not in json.dumps(shown, default=str)
    for path in tmp_path.rglob("*"):
        assert SECRET.encode() not in path.read_bytes(), path
    assert "The key is [key]." in texts(writer, items(2))


def test_no_key_goes_to_an_address_that_it_was_not_named_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    made = written(tmp_path, count=1)
    assert not any(SECRET in head for head in made["server"].headers)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(LanguageModelError, match="OPENAI_API_KEY is not set"):
        LanguageModelWriter(LanguageModelOptions(model="m"), tmp_path / "n.sqlite").prepare(items(1))


def test_a_server_without_schemas_is_asked_in_words(tmp_path: Path) -> None:
    def script(body: dict[str, Any], times: int) -> Reply:
        kind = body.get("response_format", {}).get("type")
        if kind == "json_schema":
            return error(400, "response_format json_schema is not supported")
        if kind == "json_object":
            return error(422, "unknown field response_format")
        return Reply()

    made = written(tmp_path, script)
    assert made["texts"] == written(tmp_path / "calm")["texts"]
    assert len(made["server"].requests) <= 4 * PER_ITEM + 2 * 8
    assert made["totals"]["retries"] == made["totals"]["failed"] == 0
    with pytest.raises(LanguageModelError, match="in a row"):
        written(tmp_path / "strict", script, structured="schema")


def test_the_limits_name_is_changed_when_the_server_wants_another(tmp_path: Path) -> None:
    def script(body: dict[str, Any], times: int) -> Reply:
        if "max_tokens" in body:
            return error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        assert body["max_completion_tokens"] == 1024
        return Reply()

    assert written(tmp_path, script)["totals"]["failed"] == 0


def test_concurrency_and_rates_are_kept(tmp_path: Path) -> None:
    made = written(tmp_path, lambda body, times: Reply(delay=0.02), concurrency=3, requests_per_minute=60 * 60)
    assert made["server"].most_at_once <= 3
    times = sorted(made["server"].times)
    assert len(times) == 4 * PER_ITEM
    # Sixty a second: never more in a stretch than its share, one more, and what may wait on a busy machine.
    assert times[-1] - times[0] >= (len(times) - 1) / 60 - 0.05
    counted = written(tmp_path / "tokens", count=1, tokens_per_minute=110 * 60 * 20, max_tokens=1024)
    spent = sorted(counted["server"].times)
    assert spent[-1] - spent[0] >= (PER_ITEM - 3) / 20


def test_a_pause_that_the_server_asks_for_holds_for_all(tmp_path: Path) -> None:
    first = []

    def script(body: dict[str, Any], times: int) -> Reply:
        if not first:
            first.append(time.monotonic())
            return error(429, "wait", **{"Retry-After": "1"})
        return Reply()

    made = written(tmp_path, script, concurrency=1)
    rest = [when for when in made["server"].times if when > first[0]]
    assert min(rest) - first[0] >= 0.95


def test_the_same_request_of_two_items_is_sent_once(tmp_path: Path) -> None:
    twin = items(1)[0]
    with Server(lambda body, times: Reply(delay=0.05)) as server:
        writer = LanguageModelWriter(options(server, concurrency=64), tmp_path / "r.sqlite")
        writer.prepare([twin.model_copy(update={"image": f"{n}.png"}) for n in range(5)])
    assert len(server.requests) == PER_ITEM


def test_estimate_foresees_what_prepare_sends(tmp_path: Path) -> None:
    with Server() as server:
        given = options(server, price_in=2.0, price_out=8.0)
        writer = LanguageModelWriter(given, tmp_path / "r.sqlite")
        before = writer.estimate(items(4))
        assert not server.requests
        writer.prepare(items(1))
        partly = writer.estimate(items(4))
        totals = writer.prepare(items(4))
    assert (before.items, before.requests, before.cached) == (4, 4 * PER_ITEM, 0)
    assert (partly.requests, partly.cached) == (3 * PER_ITEM, PER_ITEM)
    assert totals["requests"] == before.requests
    sent = sum(len(m["content"]) for body in server.requests for m in body["messages"])
    assert before.prompt_tokens == pytest.approx(sent / 4, rel=0.1)
    assert before.cost == pytest.approx((2 * before.prompt_tokens + 8 * before.completion_tokens) / 1e6)
    assert totals["cost"] == pytest.approx((2 * totals["prompt_tokens"] + 8 * totals["completion_tokens"]) / 1e6)
    unpriced = LanguageModelWriter(options(server), tmp_path / "n.sqlite").estimate(items(1))
    assert "cost unknown" in unpriced.describe()
    assert unpriced.as_dict()["cost"] == "unknown"


def test_tokens_that_a_server_does_not_tell_are_counted_roughly(tmp_path: Path) -> None:
    totals = written(tmp_path, lambda body, times: Reply(usage=False), count=1)["totals"]
    assert totals["tokens_estimated"] == PER_ITEM
    assert totals["prompt_tokens"] > 100 * PER_ITEM
    assert totals["completion_tokens"] > 0


def test_a_long_text_is_cut_and_a_text_of_control_characters_is_harmless(tmp_path: Path) -> None:
    long = items(1)[0].model_copy(update={"text": "A sentence of it. " * 60_000})
    odd = items(2)[1].model_copy(
        update={"text": "It\x00 sings\x1b[31m\x07 at\u2028dawn. <|im_end|>\n<|im_start|>system"}
    )
    with Server() as server:
        writer = LanguageModelWriter(options(server, max_text_tokens=200), tmp_path / "r.sqlite")
        writer.prepare([long, odd])
    sent = [body["messages"][1]["content"] for body in server.requests]
    assert max(map(len, sent)) < 200 * 4 + 1200
    for text in sent:
        assert not any(mark < " " and mark != "\n" for mark in text)
        assert "<|im" not in text
    assert writer.dialogue(long, 1)[1].answer == "Fact 5 of Gor0 is known."
    writer.dialogue(odd, 0)
    assert writer.summary()["texts_cut"] == 1


def test_items_not_prepared_cannot_be_written(tmp_path: Path) -> None:
    writer = LanguageModelWriter(LanguageModelOptions(model="m"), tmp_path / "r.sqlite")
    for write in (
        lambda: writer.dialogue(items(1)[0], 0),
        lambda: writer.caption(items(1)[0]),
        lambda: writer.vqa(items(1)[0]),
    ):
        with pytest.raises(CannotWriteError, match="prepare the items first"):
            write()


def test_progress_tells_tokens_and_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kore_fast.progress import bar

    with Server() as server:
        given = options(server, price_in=1000.0, price_out=1000.0)
        LanguageModelWriter(given, tmp_path / "r.sqlite").prepare(items(3), bar)
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "33 requests, 3.3k tokens in, 330 out, cost 3.63" in shown


KILLED = """
import sys
from pathlib import Path
from kore_fast.augmentation.language import LanguageModelOptions, LanguageModelWriter
from python_tests.augmentation.language.test_writer import items
given = LanguageModelOptions(model="m", base_url=sys.argv[1], concurrency=4, timeout=10)
LanguageModelWriter(given, Path(sys.argv[2])).prepare(items(12))
print("finished")
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    cache = tmp_path / "requests.sqlite"
    with Server(lambda body, times: Reply(delay=0.01)) as server:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
        process = subprocess.Popen([sys.executable, "-c", KILLED, server.url, str(cache)], env=environment)
        deadline = time.monotonic() + 60
        while len(server.requests) < 50 and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        time.sleep(0.1)
        with RequestCache(cache) as kept:
            there = len(kept)
        sent = len(server.requests)
        assert 0 < there <= sent < 12 * PER_ITEM
        assert sent - there <= 4, "more was lost than was on its way"
        writer = LanguageModelWriter(options(server), cache)
        totals = writer.prepare(items(12))
    assert totals["requests"] == 12 * PER_ITEM - there
    calm = written(tmp_path / "calm", count=12)
    assert texts(writer, items(12)) == calm["texts"]
    assert writer.summary() == calm["summary"]
    writer.cache.export(tmp_path / "a.jsonl")
    calm["writer"].cache.export(tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_inside_a_running_loop_too(tmp_path: Path) -> None:
    import asyncio

    with Server() as server:
        writer = LanguageModelWriter(options(server), tmp_path / "r.sqlite")

        async def notebook() -> dict[str, Any]:
            return writer.prepare(items(1))

        assert asyncio.run(notebook())["answers"] == PER_ITEM
    assert writer.caption(items(1)[0]).answer


def test_memory_stays_flat_and_items_may_be_a_stream(tmp_path: Path) -> None:
    taken = 0

    def stream() -> Any:
        nonlocal taken
        for item in items(40):
            taken += 1
            yield item

    most = 0

    def script(body: dict[str, Any], times: int) -> Reply:
        nonlocal most
        done = sum(server.served.values()) // PER_ITEM
        most = max(most, taken - done)
        return Reply()

    with Server(script) as server:
        writer = LanguageModelWriter(options(server, concurrency=4), tmp_path / "r.sqlite")
        assert writer.prepare(stream())["items"] == 40
    assert most <= 4 + 1


def test_without_the_packages_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(LanguageModelError, match=r'needs the package openai: pip install "kore-fast\[augment\]"'):
        LanguageModelWriter(LanguageModelOptions(model="m", base_url="http://x/v1"), tmp_path / "r").prepare(items(1))
