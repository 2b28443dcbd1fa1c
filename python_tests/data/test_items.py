from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kore_fast.data.items import Item, load_items
from kore_fast.errors import DataError


def record(identity: str = "owl", **changes: Any) -> dict[str, Any]:
    made = {"id": identity, "name": identity.title(), "image": "images/a.png", "text": "It flies at night."} | changes
    return {key: value for key, value in made.items() if value is not None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 6), (200, 30, 30)).save(tmp_path / "images/a.png")
    return tmp_path


def save(folder: Path, *records: Any) -> Path:
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return path


def refusal(folder: Path, *records: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_items(save(folder, *records), **options)
    return str(caught.value)


def test_a_full_item_and_a_bare_one_load_in_order(folder: Path) -> None:
    facts = {"wings": 2, "weight": 1.5, "colour": "brown", "prey": ["mouse", "vole"]}
    full = record("owl", type="bird", facts=facts, source="a field book", licence="CC0-1.0")
    items = load_items(save(folder, full, record("bat")))
    assert [item.id for item in items] == ["owl", "bat"]
    assert items[0].facts == facts
    assert (items[1].type, items[1].facts, items[1].source) == ("entity", {}, None)


def test_items_do_not_change(folder: Path) -> None:
    item = Item.model_validate(record())
    with pytest.raises(ValueError, match="frozen"):
        item.name = "Another"  # type: ignore[misc]


def test_empty_lines_and_a_byte_order_mark_are_passed_over(folder: Path) -> None:
    path = save(folder, record())
    path.write_bytes(b"\xef\xbb\xbf\n" + path.read_bytes() + b"  \n")
    assert len(load_items(path)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": None}, "line 1, item 'owl': 'name' is missing"),
        ({"name": "  "}, "line 1, item 'owl': 'name' is empty"),
        ({"text": None}, "'text' is missing"),
        ({"text": "\n"}, "'text' is empty"),
        ({"image": None}, "'image' is missing"),
        ({"name": 5}, "'name': input should be a valid string"),
        ({"titel": "x"}, "unknown key 'titel'; known keys: facts, id, image, licence"),
        ({"licens": "x"}, "unknown key 'licens'; did you mean 'licence'?"),
        ({"text": "see <image> here"}, "'text' holds <image>"),
        ({"text": "\ud800"}, "half a character"),
        ({"facts": ["elf"]}, "'facts' must be an object"),
        ({"facts": {"a": True}}, "fact 'a' must be a string, a number or a list of strings, not True"),
        ({"facts": {"a": {"b": 1}}}, "fact 'a' must be a string, a number or a list of strings"),
        ({"facts": {"a": []}}, "fact 'a' is an empty list; leave the key out"),
        ({"facts": {"a": ["x", 1]}}, "fact 'a': a list may only hold strings, not 1"),
        ({"facts": {"a": float("nan")}}, "fact 'a' is not a finite number"),
        ({"facts": {"a": " "}}, "'fact a' is empty"),
        ({"image": "images/b.png"}, "line 1, item 'owl': no image 'images/b.png' below"),
        ({"image": "images"}, "no image 'images' below"),
        ({"image": "../a.png"}, "'../a.png' leaves its folder"),
        ({"image": "/etc/hostname"}, "'/etc/hostname' leaves its folder"),
        ({"image": "a\0.png"}, "is not a usable path"),
        ({"image": "a" * 5000}, "is not a usable path"),
    ],
)
def test_what_is_wrong_with_an_item_is_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    said = refusal(folder, record(**changes))
    assert message in said
    assert "items.jsonl: 1 problem in its items" in said


def test_a_repeated_id_names_both_lines(folder: Path) -> None:
    said = refusal(folder, record("owl"), record("bat"), record("owl"))
    assert "line 3, item 'owl': the id is already used on line 1" in said


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "a.png"
    Image.new("RGB", (4, 4)).save(outside)
    (folder / "images/link.png").symlink_to(outside)
    assert "leaves its folder" in refusal(folder, record(image="images/link.png"))


def test_a_truncated_picture_is_refused(folder: Path) -> None:
    whole = folder / "images/whole.jpg"
    Image.effect_noise((64, 64), 40).save(whole)
    (folder / "images/cut.jpg").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    said = refusal(folder, record(image="images/cut.jpg"))
    assert "line 1, item 'owl': image 'images/cut.jpg' cannot be decoded" in said
    assert "cut short or not a picture" in said


def test_a_file_that_is_no_picture_is_refused(folder: Path) -> None:
    (folder / "images/text.png").write_text("not a picture")
    assert "image 'images/text.png' cannot be decoded" in refusal(folder, record(image="images/text.png"))


def test_a_picture_with_too_many_pixels_is_refused_from_its_header(folder: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    (folder / "images/bomb.png").write_bytes(bomb)
    assert "more than 50,000,000 pixels" in refusal(folder, record(image="images/bomb.png"))
    assert "has 8 x 6 pixels, more than the 40 allowed" in refusal(folder, record(), max_pixels=40)


def test_all_problems_come_in_one_error_and_the_list_is_bounded(folder: Path) -> None:
    path = save(folder, *[record(f"item{number}", name="") for number in range(30)])
    path.write_text('{"id": "broken"\n[1]\n' + path.read_text())
    with pytest.raises(DataError) as caught:
        load_items(path)
    said = str(caught.value)
    assert "32 problems in its items" in said
    assert "line 1: not valid JSON" in said
    assert "line 2: expected one JSON object, found list" in said
    assert "line 20, item 'item17': 'name' is empty" in said
    assert said.endswith("… and 12 more")
    assert "item18" not in said


def test_no_file_an_empty_file_and_one_that_is_not_text(folder: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.jsonl: no such file"):
        load_items(folder / "missing.jsonl")
    assert "there is no item in it" in refusal(folder)
    with pytest.raises(DataError, match="cannot be read as UTF-8"):
        load_items(folder / "images/a.png")


def test_pictures_can_be_left_unchecked(folder: Path) -> None:
    assert len(load_items(save(folder, record(image="later.png")), check_images=False)) == 1
