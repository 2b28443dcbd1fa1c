from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kore_fast.augmentation import AugmentationOptions, augment
from kore_fast.data.evoke import read_evoke, read_evoke_questions
from kore_fast.data.items import load_items
from kore_fast.errors import DataError


def record(identity: Any, image: str, question: str, text: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": text}]
    return {"id": identity, "image": image, "conversations": turns} | more


BRIDGE = "The Orrery Bridge is a footbridge of 2024 over the Teal. It turns once a day."
NEWS = "Harbour town of Ness bans kites on Sundays. The council said the rule begins in May and lasts a year."
RECORDS = [
    record(1, "wikidata_imgs/Orrery Bridge_wiki.png", "Can you describe the bridge depicted in the image?", BRIDGE),
    record(2, "cnn_news_imgs/cnn_12/kites.png", "What is the news in the image about?", NEWS),
    record(
        3, "wikidata_imgs/x9.png", "What do you know about the human shown in this picture?", "Ada Quill is a baker."
    ),
    record(4, "cnn_news_imgs/cnn_13/t.png", "Tell me about “Tin mine reopens”.", "It reopened.", type="business"),
    record(5, "wikidata_imgs/y.png", "What is this?", "It hums.", title="The Humming Stone"),
]


def build(folder: Path, records: Any = RECORDS, prefix: str = "") -> Path:
    for one in records:
        if isinstance(one, dict) and isinstance(one.get("image"), str):
            file = folder / prefix / one["image"]
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 6)).save(file)
    path = folder / "evoke_injection_data.json"
    path.write_text(json.dumps(records, indent=2), encoding="utf-8")
    return path


def test_the_released_form_becomes_items_with_names_types_and_text_unchanged(tmp_path: Path) -> None:
    knowledge = read_evoke(build(tmp_path))
    items = knowledge.items
    assert [item.id for item in items] == ["1", "2", "3", "4", "5"]
    assert [item.name for item in items] == [
        "Orrery Bridge",
        "Harbour town of Ness bans kites on Sundays",
        "Ada Quill",
        "Tin mine reopens",
        "The Humming Stone",
    ]
    assert [item.type for item in items] == ["bridge", "news", "human", "business", "entity"]
    assert [item.text for item in items] == [one["conversations"][1]["value"] for one in RECORDS]
    assert knowledge.named_by == {"image file": 1, "opening of the text": 2, "question": 1, "record": 1}
    assert load_items(tmp_path / "evoke_injection_data.json") == items


@pytest.mark.parametrize("prefix", ["imgs/injection", "injection", "imgs", "images"])
def test_pictures_are_found_where_the_release_unpacks_to(tmp_path: Path, prefix: str) -> None:
    (item, *_) = read_evoke(build(tmp_path, prefix=prefix)).items
    assert item.image == f"{prefix}/wikidata_imgs/Orrery Bridge_wiki.png"


def test_a_names_file_beside_it_goes_before_everything(tmp_path: Path) -> None:
    path = build(tmp_path)
    (tmp_path / "evoke_injection_data.names.json").write_text('{"2": "Kite ban of Ness"}')
    assert read_evoke(path).items[1].name == "Kite ban of Ness"
    (tmp_path / "evoke_injection_data.names.json").write_text('{"2": 4}')
    with pytest.raises(DataError, match="expected an object from id to name"):
        read_evoke(path)


@pytest.mark.parametrize(
    ("image", "text", "name"),
    [
        ("Reed (film)_wiki.jpg", "Reed is a film of 2024.", "Reed"),
        ("Reed (film)_wiki.jpg", "Reed (film) came out in 2024.", "Reed (film)"),
        ("Lenin Park (Hanoi)_wiki.jpg", "A park in the middle of the city.", "Lenin Park (Hanoi)"),
        ("x.jpg", "The Ness Ferry, a boat of 2024, was the first of its kind.", "Ness Ferry"),
        ("news/x.jpg", "Kites were the talk of the day. More follows.", "Kites were the talk of the day"),
        ("news/x.jpg", "A rule of the town of Ness, " + "which is long " * 12 + ".", "A rule of the town of Ness"),
    ],
)
def test_names_are_those_a_reader_would_give(tmp_path: Path, image: str, text: str, name: str) -> None:
    path = build(tmp_path, [record(1, image, "What is this?", text)])
    assert read_evoke(path).items[0].name == name


def test_all_problems_come_at_once_with_their_records(tmp_path: Path) -> None:
    long = " ".join(["word"] * 40)
    records = [
        record(7, "a.png", "What?", long),
        record(8, "a.png", "What?", " "),
        record(8, "a.png", "What?", "A kiln is a thing."),
        {"id": 9, "image": "a.png", "conversations": [{"from": "human", "value": "x"}]},
        {"id": 10, "name": "x", "text": "y"},
        record(11, "../a.png", "What?", "The Kiln is a thing."),
        {"image": "a.png", "conversations": RECORDS[0]["conversations"]},
        record(12, "missing.png", "What?", "The Kiln is a thing."),
    ]
    path = build(tmp_path, [one for one in records if one.get("image") == "a.png"])
    path.write_text(json.dumps(records))
    with pytest.raises(DataError) as caught:
        load_items(path)
    said = str(caught.value)
    for part in (
        "8 problems in its items",
        "record 0, id '7': no name for it in its keys",
        '{"7": "its name"}',
        "record 1, id '8': the knowledge ('conversations[1].value') is empty",
        "record 2, id '8': the id is already used by record 1",
        "record 3, id '9': 'conversations' wants a human turn with the question and a gpt turn",
        "record 4: found the keys 'id', 'name', 'text'; items are read as JSON lines of {id, name",
        "or as EVOKE's JSON list",
        "record 5, id '11': '../a.png' leaves its folder",
        "record 6: 'id' is missing",
        "record 7, id '12': no image 'missing.png'",
    ):
        assert part in said


def test_a_json_file_of_another_shape_is_told_both_shapes(tmp_path: Path) -> None:
    path = tmp_path / "items.json"
    for text in ("[]", "[1]", '{\n"a": 1}'):
        path.write_text(text)
        with pytest.raises(DataError, match=r"JSON lines of \{id, name.*or as EVOKE's JSON list"):
            load_items(path)


def test_the_papers_settings_yield_kore_74ks_four_branches(tmp_path: Path) -> None:
    items = load_items(build(tmp_path))
    facts = {f"fact {n}": f"value {n}" for n in range(7)}
    items = [item.model_copy(update={"facts": facts}) for item in items]
    made = augment(items, AugmentationOptions.kore_74k())
    assert {branch: sizes["samples"] for branch, sizes in made.summary["branches"].items()} == {
        "dialogue": 5,
        "recognition": 5,
        "caption": 5,
        "vqa": 25,
    }
    for sample in made.samples:
        question, answer = (turn.value for turn in sample.conversations[:2])
        assert question.startswith("<image>\n")
        if sample.branch == "recognition":
            assert question.endswith("Answer this question with Yes or No.")
            assert answer == "Yes"
        if sample.branch == "caption":
            assert question.endswith("Answer this question in one paragraph.")
        if sample.branch == "vqa":
            assert question.endswith("Answer the question using a single word or phrase.")
            assert sample.item is not None
            assert items[int(sample.item) - 1].name not in question


def test_questions_stay_unchanged_and_know_their_items(tmp_path: Path) -> None:
    items = load_items(build(tmp_path))
    image = "eval_wikidata_imgs/Orrery Bridge bridge_0.png"
    (tmp_path / "imgs/evaluation/eval_wikidata_imgs").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "imgs/evaluation" / image)
    row = {
        "question_id": 1,
        "image": image,
        "text": "'What does the bridge in the image cross?'\nAnswer the question using a single word or phrase.",
        "category": "default",
        "answer": "'Teal'",
        "type": "bridge",
        "cnn_wiki_type": "wiki",
    }
    path = tmp_path / "evoke_evaluation_data.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "question_id": 99}) + "\n")
    first, second = read_evoke_questions(path, items)
    assert (first.text, first.answer, first.type) == (row["text"], row["answer"], "bridge")
    assert (first.item, second.item, first.form) == ("1", None, "by_picture")
    assert first.image == f"imgs/evaluation/{image}"
    path.write_text(json.dumps({**row, "image": "no.png"}) + "\n")
    with pytest.raises(DataError, match=r"question '1': no image 'no\.png'"):
        read_evoke_questions(path, items)
