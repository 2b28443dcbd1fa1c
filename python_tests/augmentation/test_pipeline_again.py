"""A further run with answers in the cache: what is kept is used, and never taken for what has changed."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason='needs openai: pip install "kore-fast[augment]"')
pytest.importorskip("json_repair", reason='needs json-repair: pip install "kore-fast[augment]"')

from kore_fast.augmentation import basis, grounding
from kore_fast.augmentation.grounding import Grounding, GroundingOptions
from kore_fast.augmentation.language import RequestCache
from kore_fast.augmentation.pipeline import produce
from kore_fast.augmentation.plan import AugmentationPlan
from kore_fast.data import images
from kore_fast.data.items import Item, load_items
from kore_fast.errors import DataError
from python_tests.augmentation.language.server import Reply, Server, task_of
from python_tests.augmentation.world import answer, files, make_items, model

NOWHERE = "http://127.0.0.1:9/v1"
Run = Callable[..., dict[str, bytes]]


def script(body: dict[str, Any], times: int) -> Reply:
    return Reply(answer(body))


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("this was to come from the cache")


@pytest.fixture
def again(tmp_path: Path) -> Run:
    """Runs over eight items with one cache, the first of which has asked."""
    items = make_items(tmp_path / "data", 8)
    count = 0

    def run(url: str = NOWHERE, **plan: Any) -> dict[str, bytes]:
        nonlocal count
        count += 1
        section = {"model": "m", "base_url": url, "backoff": 0.01, "attempts": 1, **plan.pop("language_model", {})}
        whole = AugmentationPlan.model_validate({"language_model": section, **plan})
        produce(items, whole, tmp_path / f"out{count}", tmp_path / "cache", name="world")
        return files(tmp_path / f"out{count}")

    with Server(script) as server:
        run(server.url)
    return run


@pytest.fixture
def everything_again(tmp_path: Path) -> Callable[[], None]:
    """Forgets all but answers."""

    def forget() -> None:
        with sqlite3.connect(tmp_path / "cache" / "requests.sqlite") as base:
            base.execute("delete from derived")

    return forget


def test_a_further_run_neither_reads_answers_nor_checks_nor_decodes(
    tmp_path: Path, again: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    derived = RequestCache.derived

    def counted(self: RequestCache, kind: str, item: str, basis: str) -> str | None:
        looked.append(kind)
        return derived(self, kind, item, basis)

    monkeypatch.setattr(RequestCache, "derived", counted)
    monkeypatch.setattr(RequestCache, "answer", never)
    monkeypatch.setattr(grounding, "check_answer", never)
    with monkeypatch.context() as only_items:
        only_items.setattr("kore_fast.augmentation.pipeline.ContactSheet.write", lambda *_, **__: 0)
        only_items.setattr(images, "decode_image", never)
        made = again()
    # Texts when preparing and when writing.
    assert {kind: looked.count(kind) for kind in sorted(set(looked))} == {"picture": 8, "samples": 8, "texts": 16}
    first = files(tmp_path / "out1")
    assert {name: data for name, data in first.items() if name != "contact_sheet.html"} == made
    assert first == again()


@pytest.mark.parametrize(
    "plan",
    [
        {"negatives": False},
        {"dialogues": 1, "rounds": 3},
        {"natural_answers": False, "language_model": {"questions": 8}},
        {"grounding": {"action": "flag"}},
        {"grounding": {"checks": ["words"]}},
        {"branches": ["caption", "links", "dialogue"]},
        {"language_model": {"asks": 1, "price_in": 1.0, "price_out": 2.0}},
        {"seed": 1},
    ],
    ids=str,
)
def test_what_is_kept_never_stands_for_other_options(
    plan: dict[str, Any], again: Run, everything_again: Callable[[], None]
) -> None:
    with Server(script) as server:
        changed = again(server.url, **plan)
        everything_again()
        assert again(server.url, **plan) == changed
    assert again(**plan) == changed


def test_a_text_that_changes_changes_the_verdict(tmp_path: Path) -> None:
    told = {"id": "a", "name": "Gor", "image": "a.png"}
    old = Item(text="The Gor was first seen in 1907.", **told)
    new = Item(text="The Gor was first seen in 1950.", **told)
    said = ("When was Gor first seen?", "Gor was first seen in 1907.")
    path = tmp_path / "requests.sqlite"
    for item, checks, supported in (
        (old, ("numbers",), True),
        (new, ("numbers",), False),
        (new, ("words",), True),
        (old, ("numbers",), True),
        (new.model_copy(update={"facts": {"seen": 1907}}), ("numbers",), True),
        (new, ("numbers",), False),
    ):
        with RequestCache(path) as cache:
            for _ in range(2):
                check = Grounding(GroundingOptions(checks=checks), memory=cache)
                assert check.check(item, *said).supported is supported
                check.flush()


def test_other_code_begins_anew(again: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grounding, "check_answer", lambda *_: grounding.Verdict(False, ("it is Tuesday",)))
    assert b"it is Tuesday" not in again()["rejects.jsonl"]
    for module in (grounding, __import__("kore_fast.augmentation.augment", fromlist=["x"])):
        monkeypatch.setattr(module, "code_mark", lambda *modules: "other code")
    assert b"it is Tuesday" in again()["rejects.jsonl"]


def test_the_mark_of_code_is_that_of_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "marked").mkdir()
    (tmp_path / "marked" / "__init__.py").touch()
    (tmp_path / "marked" / "one.py").write_text("a = 1\n")
    marks = set()
    for text in ("a = 1\n", "a = 2\n", "a = 1\n"):
        (tmp_path / "marked" / "one.py").write_text(text)
        basis.code_mark.cache_clear()
        marks.add(basis.code_mark("marked"))
    assert len(marks) == 2


def test_an_answer_deleted_by_hand_is_asked_for_again(tmp_path: Path, again: Run) -> None:
    with sqlite3.connect(tmp_path / "cache" / "requests.sqlite") as base:
        assert base.execute("delete from answers where task = 'summary'").rowcount == 8

    def other(body: dict[str, Any], times: int) -> Reply:
        assert task_of(body) == "summary"
        return Reply(json.dumps({"summary": "Something else."}))

    with Server(other) as server:
        made = again(server.url)
        assert len(server.requests) == 8
    assert made["samples.json"].count(b"Something else.") == 8
    assert again() == made


def test_an_answer_changed_by_hand_is_read_again(tmp_path: Path, again: Run) -> None:
    with sqlite3.connect(tmp_path / "cache" / "requests.sqlite") as base:
        base.execute("update answers set answer = '{\"summary\": \"By hand.\"}' where task = 'summary'")
    assert again()["samples.json"].count(b"By hand.") == 8


def test_a_final_refusal_is_kept_until_there_is_another_reply(tmp_path: Path) -> None:
    items = make_items(tmp_path / "data", 2)

    def run(server: Server, folder: str, asks: int) -> dict[str, bytes]:
        plan = AugmentationPlan.model_validate({"language_model": model(server, asks=asks)})
        produce(items, plan, tmp_path / folder, tmp_path / "cache", name="world")
        return files(tmp_path / folder)

    def refusing(body: dict[str, Any], times: int) -> Reply:
        return Reply("{}") if task_of(body) == "summary" and times < 1 else script(body, times)

    with Server(refusing) as server:
        first = run(server, "a", 2)
        sent = len(server.requests)
        assert run(server, "b", 2) == first
        assert len(server.requests) == sent
        assert first["rejects.jsonl"].count(b"caption") == 2
        # More asks allowed: an answer comes, and from then on counts for fewer asks too.
        more = run(server, "c", 3)
        assert b"caption" not in more["rejects.jsonl"]
        assert run(server, "d", 2)["samples.json"] == more["samples.json"]


def test_a_picture_that_broke_since_is_noticed(tmp_path: Path, again: Run) -> None:
    picture = tmp_path / "data" / "images" / "3.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:-40])
    with pytest.raises(DataError, match=r"3\.png"):
        again()
    picture.write_bytes(whole)
    assert again() == files(tmp_path / "out1")


def test_items_that_share_names_or_pictures_get_the_next_other_one() -> None:
    """By the plain search along the ring."""
    import random
    from bisect import bisect_right

    from kore_fast.augmentation.chance import rank

    others = __import__("kore_fast.augmentation.augment", fromlist=["x"])._Others
    for seed in range(30):
        chance = random.Random(seed)
        items = [
            Item(id=f"i{n}", name=f"N{chance.randrange(4)}", image=f"{chance.randrange(4)}.png", text="A.",
                 type=chance.choice("ab"))
            for n in range(chance.randrange(1, 30))
        ]  # fmt: skip
        made = others(items, seed)
        for item in items:
            expected = None
            for ring in ([one for one in items if one.type == item.type], items):
                places = sorted((rank(seed, "ring", one.id), one.id, one) for one in ring)
                start = bisect_right([place[0] for place in places], rank(seed, item.id, "other"))
                turned = [one for *_, one in places[start:] + places[:start]]
                expected = next((one for one in turned if one.image != item.image and one.name != item.name), None)
                if expected is not None:
                    break
            assert made.of(item) is expected


def test_each_picture_is_looked_at_by_what_is_given(tmp_path: Path) -> None:
    items = make_items(tmp_path / "data", 3)
    assert len(load_items(items, picture_problem=lambda root, name: None)) == 3
    with pytest.raises(DataError, match="no such colour"):
        load_items(items, picture_problem=lambda root, name: "no such colour" if "1" in name else None)
