from __future__ import annotations

import gc
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml

import kore_fast
from kore_fast.augmentation.card import CardInfo, CardTotals, Costs, card_text, write_card
from kore_fast.augmentation.provenance import PictureSource, Provenance
from kore_fast.data.items import Item
from kore_fast.data.samples import Sample


def sample(identity: str, branch: str, *values: str, image: str = "a.png", item: str = "owl") -> Sample:
    turns = [{"from": "human" if n % 2 == 0 else "gpt", "value": value} for n, value in enumerate(values)]
    return Sample.model_validate(
        {"id": identity, "image": image, "conversations": turns, "item": item, "branch": branch}
    )


def item(identity: str, **more: Any) -> Item:
    return Item.model_validate({"id": identity, "name": identity, "image": "a.png", "text": "It flies."} | more)


def found(licence: str | None, clip: float | None = None, provider: str = "wikimedia") -> Provenance:
    picture = PictureSource(own=False, provider=provider, licence=licence, source="https://example.org/p", clip=clip)
    return Provenance("model-x", (picture,), "supported")


INFO = CardInfo("Owls", language="en", seed=3, options={"vqa": 5}, costs=Costs(requests=7, money=0.25))


def filled() -> CardTotals:
    totals = CardTotals()
    totals.add_item(item("owl", licence="CC-BY-4.0", source="a field book", type="bird"))
    totals.add_item(item("bat", type="mammal"))
    totals.add_sample(sample("1", "caption", "<image>\nWhat is it?", "An owl at night."), Provenance())
    totals.add_sample(sample("2", "vqa", "<image>\nWho?", "Owl", image="f1.png"), found("CC0-1.0", 0.8))
    totals.add_sample(sample("3", "vqa", "<image>\nWho is it?", "Owl", image="f1.png"), found("CC0-1.0", 0.8))
    totals.add_sample(sample("4", "vqa", "<image>\nWho?", "Owl", image="f2.png"), found(None))
    totals.add_reject("no facts", item="bat", branch="vqa", example="the item has no facts")
    totals.add_reject("no facts", item="owl", branch="vqa")
    totals.add_reject("not grounded", item="owl", branch="dialogue", example="It | swims <b>")
    return totals


def test_counts_licences_rejects_and_costs() -> None:
    card = filled().card(INFO)
    assert (card["samples"], card["items"]["items"], card["seed"]) == (4, 2, 3)
    assert card["kore_fast"] == kore_fast.__version__
    assert {name: branch["samples"] for name, branch in card["branches"].items()} == {"caption": 1, "vqa": 3}
    assert card["branches"]["vqa"]["writers"] == {"model-x": 3}
    assert card["branches"]["vqa"]["words_a_question"]["total"] == 5
    assert card["branches"]["caption"]["grounding"] == {"not checked": 1}
    assert card["items"]["licences"] == {"CC-BY-4.0": 1, "unknown": 1}
    assert card["items"]["without_licence"] == ["bat"]
    # A picture that two samples show counts once.
    assert card["found_pictures"]["pictures"] == 2
    assert card["found_pictures"]["licences"] == {"CC0-1.0": 1, "unknown": 1}
    assert card["found_pictures"]["without_licence"] == [{"image": "f2.png", "source": "https://example.org/p"}]
    assert (card["found_pictures"]["clip"]["scored"], card["found_pictures"]["clip"]["p50"]) == (1, 0.8)
    assert card["rejects"]["total"] == 3
    assert list(card["rejects"]["reasons"]) == ["no facts", "not grounded"]
    assert card["rejects"]["reasons"]["no facts"]["examples"][0]["example"] == "the item has no facts"
    assert (card["costs"]["requests"], card["costs"]["money"], card["costs"]["prompt_tokens"]) == (7, 0.25, "unknown")


def test_lengths_are_those_of_a_sorted_list() -> None:
    rng = random.Random(1)
    lengths = [rng.randrange(1, 90) for _ in range(501)]
    totals = CardTotals()
    for number, length in enumerate(lengths):
        totals.add_sample(sample(str(number), "vqa", "<image>\nWhat is it?", " ".join(["w"] * length)))
    found = totals.card(INFO)["branches"]["vqa"]["words_an_answer"]
    ordered = sorted(lengths)
    assert (found["total"], found["max"], found["mean"]) == (sum(lengths), max(lengths), round(sum(lengths) / 501, 1))
    assert [found[f"p{percent}"] for percent in (5, 50, 95)] == [ordered[-(-p * 501 // 100) - 1] for p in (5, 50, 95)]


def test_files_are_equal_for_equal_cards_and_the_front_matter_is_yaml(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_card(tmp_path / name, filled().card(INFO))
    for file in ("card.json", "README.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    text = (tmp_path / "a" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "pretty_name": "Owls",
        "license": "other",
        "license_name": "mixed-see-card",
        "language": ["en"],
        "task_categories": ["image-text-to-text", "visual-question-answering"],
        "tags": ["kore", "knowledge-injection", "synthetic"],
        "size_categories": ["n<1K"],
        "configs": [{"config_name": "default", "data_files": "samples.json"}],
    }
    assert "| caption | 1 | 1 |" in body
    assert "unknown" in body
    assert json.loads((tmp_path / "a" / "card.json").read_text()) == filled().card(INFO)


def test_one_known_licence_is_the_data_sets(tmp_path: Path) -> None:
    totals = CardTotals()
    totals.add_item(item("owl", licence="CC-BY-4.0"))
    front = card_text(totals.card(CardInfo("x"))).split("---\n")[1]
    assert yaml.safe_load(front)["license"] == "cc-by-4.0"
    assert "language" not in yaml.safe_load(front)


HOSTILE = "x\n---\nlicense: mit\n<script>alert(1)</script> | `a` [b](javascript:c) \x1b[31m \ud800 \u202e"


def test_nothing_that_came_from_data_is_markup(tmp_path: Path) -> None:
    totals = CardTotals()
    totals.add_item(item("owl", type="t").model_copy(update={"licence": HOSTILE, "source": HOSTILE, "type": HOSTILE}))
    totals.add_reject(HOSTILE, item=HOSTILE, branch=HOSTILE, example=HOSTILE)
    totals.add_sample(
        sample("1", "vqa", "<image>\nWho?", "x", image="f.png"),
        Provenance(HOSTILE, (PictureSource(False, HOSTILE, HOSTILE, HOSTILE, None),), HOSTILE, (HOSTILE,)),
    )
    info = CardInfo(HOSTILE, about=HOSTILE, models={HOSTILE: HOSTILE}, options={HOSTILE: HOSTILE})
    text = card_text(totals.card(info))
    write_card(tmp_path, totals.card(info))
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text
    assert json.loads((tmp_path / "card.json").read_text(encoding="utf-8"))["rejects"]["total"] == 1
    front, body = text.split("\n---\n", 1)
    assert yaml.safe_load(front.removeprefix("---\n"))["license"] == "other"
    assert "<script" not in body
    assert "](" not in body.replace("\\]", "")
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\n---\n" not in body
    for line in body.splitlines():
        if line.startswith("| ") and "alert" in line:
            bars = line.replace("\\|", "").count("|")
            assert bars in (3, 5, 7)


def test_memory_does_not_grow_with_samples() -> None:
    def peak(count: int) -> int:
        tracemalloc.start()
        totals = CardTotals()
        for number in range(count):
            totals.add_sample(sample(str(number), "vqa", "<image>\nWho?", "word " * (number % 50 + 1)))
            totals.add_reject("no", item=str(number), example="y" * 500)
        gc.collect()  # what waits for it is not held
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return size

    peak(10)
    assert peak(4000) < peak(400) * 1.5 + 20_000


@pytest.mark.parametrize(("samples", "size"), [(999, "n<1K"), (1000, "1K<n<10K"), (74_734, "10K<n<100K")])
def test_sizes_are_the_hubs_categories(samples: int, size: str) -> None:
    card = CardTotals().card(CardInfo("x")) | {"samples": samples}
    assert yaml.safe_load(card_text(card).split("---\n")[1])["size_categories"] == [size]
