"""The whole of ``kore-fast augment``: from an items file through a server and a folder of pictures to the samples."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason='needs openai: pip install "kore-fast[augment]"')
pytest.importorskip("json_repair", reason='needs json-repair: pip install "kore-fast[augment]"')

from kore_fast.augmentation.plan import AugmentationPlan
from kore_fast.cli import main
from kore_fast.data.samples import read_samples
from python_tests.augmentation.language.server import Reply, Server, error, task_of
from python_tests.augmentation.world import (
    BRANCHES,
    FOUND,
    answer,
    files,
    make_items,
    model,
    rejects,
    run_augment,
    samples,
)

SECRET = "sk-secret-0123456789abcdef"


def script(body: dict[str, Any], times: int) -> Reply:
    return Reply(answer(body))


def check_whole(run: Path, items: int, root: Path, *, branches: tuple[str, ...] = BRANCHES) -> dict[str, Any]:
    """What must hold of every finished run; its summary."""
    folder = run / "augment"
    made, left_out = samples(run), rejects(run)
    assert len({one["id"] for one in made}) == len(made)
    there = {(one["item"], one["branch"]) for one in made} | {(one["item"], one["branch"]) for one in left_out}
    for n in range(items):
        for branch in branches:
            assert (f"i{n}", branch) in there
    summary = json.loads((folder / "summary.json").read_text())
    card = json.loads((folder / "card.json").read_text())
    counts = Counter(one["branch"] for one in made)
    assert {name: one["samples"] for name, one in summary["branches"].items()} == {
        name: counts[name] for name in summary["branches"]
    }
    assert {name: one["samples"] for name, one in card["branches"].items()} == dict(counts)
    assert summary["samples"] == card["samples"] == len(made)
    assert card["rejects"]["total"] == summary["rejects"]["total"] == len(left_out)
    assert sum(summary["rejects"]["reasons"].values()) == len(left_out)
    read_samples(folder / "samples.json", root)
    assert [one["item"] for one in json.loads((folder / "knowledge.json").read_text())] == [
        f"i{n}" for n in range(items)
    ]
    assert len((folder / "questions.jsonl").read_text().splitlines()) == sum(
        form["questions"] for form in summary["questions"].values()
    )
    assert {"README.md", "contact_sheet.html", "stage.json"} <= {path.name for path in folder.iterdir()}
    assert not list(folder.rglob("*.partial"))
    return summary


def test_by_templates_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = make_items(tmp_path / "data", 6)
    assert run_augment(items, tmp_path / "run") == 0
    summary = check_whole(tmp_path / "run", 6, tmp_path / "data")
    assert summary["writer"] == {"writer": "templates"}
    assert not (tmp_path / "run" / "augment" / "images").exists()
    assert not (tmp_path / "run" / "augment.cache").exists()
    capsys.readouterr()
    assert run_augment(items, tmp_path / "run") == 0
    assert "nothing changed" in capsys.readouterr().err


@pytest.fixture
def searched(tmp_path: Path) -> dict[str, Any]:
    """A plan that searches in a folder beside the items, which have pictures there."""
    make_items(tmp_path / "data", 6, search=tmp_path / "search")
    return {"image_search": {"folder": str(tmp_path / "search")}, "clip": {"unfiltered": True}}


def test_by_a_language_model_with_searched_pictures(
    tmp_path: Path, searched: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOME_KEY", SECRET)
    items, run = tmp_path / "data" / "items.jsonl", tmp_path / "run"
    with Server(script) as server:
        plan = {**searched, "language_model": model(server, api_key_env="SOME_KEY", price_in=1, price_out=10)}
        assert run_augment(items, run, **plan) == 0
        out = capsys.readouterr().out
        assert all(f"Bearer {SECRET}" in head for head in server.headers)
        asked = len(server.requests)
    summary = check_whole(run, 6, run / "augment" / "images")
    # Questions, four answers, summary and quadruplets.
    assert asked == summary["writer"]["requests"] == 6 * 7
    assert summary["writer"]["prompt_tokens"] == 100 * asked
    assert summary["writer"]["completion_tokens"] == 10 * asked
    assert summary["writer"]["cost"] == round(asked * (100 * 1 + 10 * 10) / 1e6, 6)
    card = json.loads((run / "augment" / "card.json").read_text())
    assert card["costs"]["requests"] == asked
    assert f"{asked} requests" in out
    # The invented year is the one thing that the text does not hold.
    dropped = [one for one in rejects(run) if one["branch"] == "dialogue"]
    assert len(dropped) == 6
    assert all("1999" in one["reason"] for one in dropped)
    assert "1999" not in (run / "augment" / "samples.json").read_text()
    pictures = {branch: [one["image"] for one in samples(run) if one["branch"] == branch] for branch in BRANCHES}
    assert all(image.startswith(FOUND) for branch in ("caption", "vqa") for image in pictures[branch])
    assert all(image.startswith("images/") for image in pictures["dialogue"])
    # One of the two pictures that fit best for each branch.
    first = {one["item"]: one["image"] for one in reversed(samples(run)) if one["branch"] == "recognition"}
    assert not set(first.values()) & set(pictures["caption"])
    for name, content in files(run).items():
        assert SECRET.encode() not in content, name


def test_a_changed_plan_asks_only_for_what_is_new(tmp_path: Path, searched: dict[str, Any]) -> None:
    items, run = tmp_path / "data" / "items.jsonl", tmp_path / "run"
    with Server(script) as server:
        assert run_augment(items, run, **searched, language_model=model(server)) == 0
        asked = len(server.requests)
        before = files(run / "augment")
        # Pictures by their names: no request. Speed and prices: none either.
        assert run_augment(items, run, language_model=model(server, concurrency=3, price_in=1, price_out=1)) == 0
        assert not (run / "augment" / "images").exists()
        assert len(server.requests) == asked
        assert run_augment(items, run, **searched, language_model=model(server)) == 0
        assert files(run / "augment") == before
        assert run_augment(items, run, language_model=model(server), vqa=3) == 0
        assert len(server.requests) == asked + 6


def test_a_dry_run_sends_nothing_and_foretells_what_a_run_sends(
    tmp_path: Path, searched: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    items, run = tmp_path / "data" / "items.jsonl", tmp_path / "run"
    with Server(script) as server:
        # Four questions are foretold where four come.
        plan = {**searched, "language_model": model(server, questions=4)}
        assert run_augment(items, run, "--dry-run", **plan) == 0
        said = capsys.readouterr().out
        assert server.requests == []
        assert not (run / "augment").exists()
        assert run_augment(items, run, **plan) == 0
        assert f"{len(server.requests)} requests to send, 0 answered already" in said
        assert "local: 6 searches, 0 known" in said
        capsys.readouterr()
        assert run_augment(items, run, "--dry-run", **plan) == 0
        said = capsys.readouterr().out
        assert f"0 requests to send, {len(server.requests)} answered already" in said
        assert "local: 0 searches, 12 known" in said


FAULTS = (
    error(429, "slow down", **{"Retry-After": "0.01"}),
    error(500, "oops"),
    error(503, "loading"),
    Reply("{}", truncate=True),
    Reply(reset=True),
    Reply("{}", delay=3.0),
    Reply(raw=b'{"choices": [{"mess'),
    Reply(body={"unexpected": True}),
    Reply('{"wrong": ["schema"]}'),
    Reply("{I would rather talk about the weather."),
    Reply(""),
)


def test_a_faulty_server_leads_to_the_same_samples(tmp_path: Path) -> None:
    items = make_items(tmp_path / "data", 8)
    chance = random.Random(5)
    outcomes = {}
    for kind in ("calm", "faulty"):
        sent: list[Reply] = []

        def troubled(body: dict[str, Any], times: int, kind: str = kind, sent: list[Reply] = sent) -> Reply:
            said = answer(body)
            if kind == "calm":
                sent.append(Reply(said))
            elif times >= 2 or chance.random() < 0.4:
                # JSON as small models write it.
                sent.append(Reply(f"Sure!\n```json\n{said[:-1]},}}\n```"))
            else:
                sent.append(chance.choice(FAULTS))
            return sent[-1]

        with Server(troubled) as server:
            plan = model(server, timeout=0.5, attempts=8, asks=6)
            assert run_augment(items, tmp_path / kind, language_model=plan) == 0
        summary = check_whole(tmp_path / kind, 8, tmp_path / "data")
        assert summary["writer"]["answers"] == 8 * 7
        # Every reply that came whole is counted once, used or not.
        whole = [one for one in sent if one.content is not None and not one.truncate and not one.delay]
        assert summary["writer"]["requests"] == len(whole)
        assert len(server.requests) == len(sent)
        assert summary["writer"]["unusable"] == summary["writer"]["not_answered"] == 0
        outcomes[kind] = {
            name: (tmp_path / kind / "augment" / name).read_bytes()
            for name in ("samples.json", "knowledge.json", "questions.jsonl", "rejects.jsonl", "contact_sheet.html")
        }
    assert len(server.requests) > 8 * 7
    assert outcomes["faulty"] == outcomes["calm"]


def test_what_a_server_did_not_answer_is_told_and_asked_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items, run = make_items(tmp_path / "data", 4), tmp_path / "run"
    down = True

    def half_down(body: dict[str, Any], times: int) -> Reply:
        return error(500, "oops") if down and "Gor2" in json.dumps(body) else Reply(answer(body))

    with Server(half_down) as server:
        plan = {"language_model": model(server, attempts=2)}
        assert run_augment(items, run, **plan) == 0
        said = capsys.readouterr().out
        check_whole(run, 4, tmp_path / "data")
        assert {one["branch"] for one in rejects(run) if one["item"] == "i2"} == {"dialogue", "caption", "vqa"}
        assert "3 requests were not answered" in said
        assert "give the same command again" in said
        down = False
        # Nothing has changed but the server.
        assert run_augment(items, run, **plan) == 0
        assert run_augment(items, tmp_path / "calm", **plan) == 0
    assert {one["branch"] for one in rejects(run) if one["item"] == "i2"} == {"dialogue"}
    calm = files(tmp_path / "calm" / "augment")
    assert files(run / "augment") == calm


@pytest.mark.parametrize("action", ["drop", "flag", "off"])
def test_what_the_text_does_not_hold(tmp_path: Path, action: str) -> None:
    items, run = make_items(tmp_path / "data", 3), tmp_path / "run"
    with Server(script) as server:
        assert run_augment(items, run, language_model=model(server), grounding={"action": action}) == 0
    check_whole(run, 3, tmp_path / "data")
    invented = [one["item"] for one in samples(run) if "1999" in json.dumps(one)]
    assert invented == ([] if action == "drop" else ["i0", "i1", "i2"])
    assert len(rejects(run)) == (3 if action == "drop" else 0)
    told = json.loads((run / "augment" / "card.json").read_text())["branches"]["dialogue"]["grounding"]
    assert ("doubted" in told) == (action == "flag")
    assert ("1999" in (run / "augment" / "contact_sheet.html").read_text()) == (action != "drop")


@pytest.mark.parametrize("believes", [True, False])
def test_a_judge_decides_what_the_checks_doubt(tmp_path: Path, believes: bool) -> None:
    items, run = make_items(tmp_path / "data", 3), tmp_path / "run"
    judged: list[str] = []

    def judging(body: dict[str, Any], times: int) -> Reply:
        if task_of(body) != "judge":
            return script(body, times)
        judged.append(body["messages"][1]["content"])
        return Reply(json.dumps({"supported": believes, "reason": "so it is"}))

    plan = {"grounding": {"judge": "doubtful"}}
    with Server(judging) as server:
        assert run_augment(items, run, language_model=model(server, price_in=1.0, price_out=1.0), **plan) == 0
        sent = len(server.requests)
    assert len(judged) == 3
    assert all("1999" in asked for asked in judged)
    assert sum("1999" in json.dumps(one) for one in samples(run)) == (3 if believes else 0)
    assert len(rejects(run)) == (0 if believes else 3)
    summary, card = (json.loads((run / "augment" / f"{name}.json").read_text()) for name in ("summary", "card"))
    assert (summary["judge"]["supported"], summary["judge"]["unsupported"]) == ((3, 0) if believes else (0, 3))
    # What the judge took is in the card's costs.
    assert card["costs"]["requests"] == sent
    assert card["costs"]["money"] == pytest.approx(summary["writer"]["cost"] + summary["judge"]["cost"])
    assert card["models"]["judge"] == "m"


def test_links_and_every_format(tmp_path: Path, searched: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow", reason='needs pyarrow: pip install "kore-fast[parquet]"')
    items, run = tmp_path / "data" / "items.jsonl", tmp_path / "run"
    formats = ["llama-factory", "swift", "messages", "parquet"]
    with Server(script) as server:
        plan = {**searched, "language_model": model(server), "formats": formats}
        assert run_augment(items, run, branches=[*BRANCHES, "links"], **plan) == 0
    summary = check_whole(run, 6, run / "augment" / "images", branches=BRANCHES)
    assert summary["branches"]["links"]["samples"] > 0
    wanted = samples(run)
    for name in formats:
        (made,) = [path for path in (run / "augment" / "formats" / name).iterdir() if path.name.startswith("samples.")]
        capsys.readouterr()
        back = tmp_path / f"{name}.json"
        root = str(run / "augment" / "images")
        more = ["--unpack", str(tmp_path / "unpacked")] if name == "parquet" else ["--images", root]
        assert main(["convert", str(made), str(back), "--format", "llava", *more]) == 0, capsys.readouterr().err
        again = json.loads(back.read_text())
        assert [one["id"] for one in again] == [one["id"] for one in wanted]
        assert [one["conversations"] for one in again] == [one["conversations"] for one in wanted]
    # The samples' own pictures are found beside them.
    capsys.readouterr()
    samples_file = run / "augment" / "samples.json"
    assert main(["convert", str(samples_file), str(tmp_path / "x.jsonl"), "--format", "swift"]) == 0


def test_bad_items_are_left_out_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items, run = make_items(tmp_path / "data", 3), tmp_path / "run"
    with open(items, "a", encoding="utf-8") as file:
        file.write('{"id": "broken"\n')
        file.write(json.dumps({"id": "gone", "name": "Gone", "image": "images/gone.png", "text": "It is gone."}) + "\n")
        file.write(json.dumps({"id": "i1", "name": "Again", "image": "images/1.png", "text": "It is twice."}) + "\n")
    assert run_augment(items, run) == 1
    assert "3 problems" in capsys.readouterr().err
    assert run_augment(items, run, skip_bad_items=True) == 0
    check_whole(run, 3, tmp_path / "data")
    told = [one for one in rejects(run) if one["branch"] == "item"]
    assert [one["item"] for one in told] == ["", "gone", "i1"]
    for one, said in zip(told, ("not valid JSON", "no image 'images/gone.png'", "already used on line 2"), strict=True):
        assert said in one["reason"]


def test_evokes_own_file_yields_the_four_branches_of_kore_74k(tmp_path: Path) -> None:
    from python_tests.data.test_evoke import build

    run = tmp_path / "run"

    def speak(body: dict[str, Any], times: int) -> Reply:
        return Reply()

    with Server(speak) as server:
        plan = {"language_model": model(server), "grounding": {"action": "off"}}
        assert run_augment(build(tmp_path / "data"), run, **plan) == 0
    made = samples(run)
    assert Counter(one["branch"] for one in made) == {"dialogue": 5, "recognition": 5, "caption": 5, "vqa": 25}
    assert [one["id"].split("-")[0] for one in made if one["branch"] == "dialogue"] == ["1", "2", "3", "4", "5"]
    turns = {branch: [one["conversations"] for one in made if one["branch"] == branch] for branch in BRANCHES}
    # A template round and ten of the model's.
    assert {len(one) for one in turns["dialogue"]} == {22}
    assert {one[1]["value"] for one in turns["recognition"]} == {"Yes"}
    for branch, suffix in {
        "recognition": "Answer this question with Yes or No.",
        "caption": "Answer this question in one paragraph.",
        "vqa": "Answer the question using a single word or phrase.",
    }.items():
        assert all(one[0]["value"].endswith(suffix) for one in turns[branch])
    assert all(one[1]["value"].startswith("The image depicts ") for one in turns["caption"])
    read_samples(run / "augment" / "samples.json", tmp_path / "data")


def test_pictures_chosen_by_open_clip(tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason='needs open_clip: pip install "kore-fast[clip]"')
    import open_clip
    import torch
    from safetensors.torch import save_file

    from python_tests.augmentation.test_clip import TINY

    items, run = make_items(tmp_path / "data", 4, search=tmp_path / "search"), tmp_path / "run"
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": {}}))
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(tmp_path / "tiny.json")
    torch.manual_seed(0)
    save_file(open_clip.create_model("tiny").state_dict(), folder / "open_clip_model.safetensors")
    with Server(script) as server:
        plan = {
            "language_model": model(server),
            "image_search": {"folder": str(tmp_path / "search")},
            "clip": {"model": f"local-dir:{folder}", "device": "cpu", "identical": 0.0},
        }
        assert run_augment(items, run, **plan) == 0
        whole = files(run / "augment")
        assert run_augment(items, tmp_path / "again", **plan) == 0
    assert files(tmp_path / "again" / "augment") == whole
    summary = check_whole(run, 4, run / "augment" / "images")
    assert summary["clip"]["filtered"]
    found = json.loads(whole["card.json"])["found_pictures"]
    assert found["clip"]["scored"] == found["pictures"] > 0
    assert str(tmp_path) not in whole["card.json"].decode()


def test_how_the_caches_are_filled_does_not_make_the_samples_again(
    tmp_path: Path, searched: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    items, run = tmp_path / "data" / "items.jsonl", tmp_path / "run"
    monkeypatch.setenv("SOME_KEY", SECRET)
    with Server(script) as server:
        assert run_augment(items, run, **searched, language_model=model(server)) == 0
        before = files(run / "augment")
        other = {
            "api_key_env": "SOME_KEY", "concurrency": 3, "requests_per_minute": 9, "tokens_per_minute": 9,
            "timeout": 9.0, "attempts": 9, "backoff": 9.0, "longest_wait": 9.0, "batch_api": True, "batch_poll": 9.0,
        }  # fmt: skip
        plan = {
            "language_model": model(server, **other),
            "image_search": {**searched["image_search"], "concurrency": 1, "timeout": 9.0, "retries": 0},
            "clip": {**searched["clip"], "batch_size": 7, "device": "cpu"},
            "ray": {"workers": 3},
        }
        capsys.readouterr()
        assert run_augment(items, run, **plan) == 0
        assert "nothing changed" in capsys.readouterr().err
    assert files(run / "augment") == before
    same = AugmentationPlan.model_validate(plan).decisive()
    assert same == AugmentationPlan.model_validate({**searched, "language_model": plan["language_model"]}).decisive()
    # What is written depends on these, and on every option that nobody thought of here.
    for section, change in (
        ("language_model", {"max_tokens": 999}),
        ("language_model", {"asks": 2}),
        ("language_model", {"price_in": 1.0, "price_out": 1.0}),
        ("image_search", {"results": 4}),
        ("clip", {"keep": 1}),
    ):
        assert AugmentationPlan.model_validate({**plan, section: {**plan[section], **change}}).decisive() != same
