from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from kore_fast.augmentation import AugmentationOptions, augment, load_wordings
from kore_fast.augmentation.generic import SEVERAL_ASK
from kore_fast.augmentation.wordings import plain, wordings_beside
from kore_fast.data import load_items

QUICKSTART = Path(__file__).parents[2] / "recipes/quickstart"
DATA = QUICKSTART / "data"

UNIT = r"""#textdomain units
#define PLACE
units/owls/#enddef
[unit_type]
    id=Owl
    name= _ "female^Great “Owl”"   # a comment
    race=bird
    image="{PLACE}owl.png~RIGHT()"
    level=1
    alignment=neutral
    hitpoints=12
    cost=9
    movement=5
#ifndef WEB
    advances_to=Elder Owl,null
#else
    advances_to=Nothing
#endif
    {ANIMATION "a.png" {SOUND x} 3}
    description= _ "It says ""hoo""
and flies." + _ " Then it sleeps # soundly."
    [attack]
        name=talon
        description=_"Talon"
        range=melee
    [/attack]
    [+abilities]
        {HIDES}
    [/abilities]
[/unit_type]
"""


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(QUICKSTART))
    spec = importlib.util.spec_from_file_location(name, QUICKSTART / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_the_committed_items_are_valid_and_their_licence_is_beside_them() -> None:
    items = load_items(DATA / "items.jsonl")
    assert len(items) == 64
    assert len({item.name.casefold() for item in items}) == 64
    assert len({item.image for item in items}) == 64
    assert {item.licence for item in items} == {"GPL-2.0-or-later"}
    assert all(item.source for item in items)
    assert "GNU GENERAL PUBLIC LICENSE" in (DATA / "LICENSE").read_text()
    assert "GNU General Public License" in (DATA / "README.md").read_text()
    assert len({item.facts["race"] for item in items}) >= 12


def test_the_committed_pictures_are_small_and_each_belongs_to_an_item() -> None:
    pictures = sorted((DATA / "images").iterdir())
    assert [f"images/{path.name}" for path in pictures] == sorted(
        item.image for item in load_items(DATA / "items.jsonl", check_images=False)
    )
    for path in pictures:
        with Image.open(path) as image:
            assert max(image.size) <= 160
    assert sum(path.stat().st_size for path in pictures) < 1_500_000


def test_the_committed_wordings_are_many_and_none_is_both_trained_and_held_out() -> None:
    wordings = load_wordings(DATA / "wordings.yaml")
    facts = {key for item in load_items(DATA / "items.jsonl", check_images=False) for key in item.facts}
    assert facts == wordings.facts.keys()
    trained, held_out = {plain(wording) for wording in SEVERAL_ASK}, set()
    for key in wordings.facts:
        fact = wordings.fact(key)
        assert len({plain(wording) for wording in fact.ask}) >= 13
        assert len({plain(wording) for wording in fact.tell}) >= 6
        trained |= {plain(wording) for wording in fact.ask}
        held_out |= {plain(wording) for wording in fact.held_out}
    assert len(held_out) == 15
    assert not trained & held_out


def test_the_quickstarts_samples_are_compact_and_its_questions_are_not_trained_on() -> None:
    path = DATA / "items.jsonl"
    made = augment(load_items(path, check_images=False), wordings=wordings_beside(path))
    assert 450 <= len(made.samples) <= 600
    assert 240 <= made.summary["questions"]["by_name"]["questions"] <= 300
    assert made.summary["questions"]["by_picture"]["questions"] == 128
    assert made.rejects == []
    turns = [turn for sample in made.samples for turn in sample.conversations]
    asked = {turn.value.replace("<image>\n", "") for turn in turns if turn.speaker == "human"}
    assert not asked & {question.text for question in made.questions}
    for sample in made.samples:
        # About 220 tokens of text at 0.75 words a token.
        assert sum(len(turn.value.split()) for turn in sample.conversations) <= 175
    answers = [turn.value for turn in turns if turn.speaker == "gpt"]
    assert all(len(answer.split()) >= 3 for answer in answers)


def test_each_evaluated_fact_is_taught() -> None:
    path = DATA / "items.jsonl"
    items = load_items(path, check_images=False)
    made = augment(items, AugmentationOptions(seed=3), wordings=wordings_beside(path))
    told: dict[str | None, str] = {}
    for sample in made.samples:
        if sample.branch in ("dialogue", "vqa"):
            answers = " ".join(turn.value for turn in sample.conversations if turn.speaker == "gpt")
            told[sample.item] = told.get(sample.item, "") + " " + answers.lower()
    for question in made.questions:
        assert question.answer.lower() in told[question.item]


def test_the_game_files_are_read_as_the_game_does(monkeypatch: pytest.MonkeyPatch) -> None:
    wml = script("wml", monkeypatch)
    (unit,) = wml.parse(UNIT).all("unit_type")
    assert unit.keys["name"] == "female^Great “Owl”"
    assert unit.keys["image"] == "units/owls/owl.png~RIGHT()"
    assert unit.keys["advances_to"] == "Elder Owl,null"
    assert unit.keys["description"] == 'It says "hoo"\nand flies. Then it sleeps # soundly.'
    (attack,) = unit.all("attack")
    assert attack.keys == {"name": "talon", "description": "Talon", "range": "melee"}
    with pytest.raises(ValueError, match="is not closed"):
        wml.parse("[a]\nb=1\n")
    with pytest.raises(ValueError, match=r"\[/b\] closes \[a\]"):
        wml.parse("[a]\n[/b]\n")


def test_items_are_prepared_from_an_unpacked_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = script("prepare_items", monkeypatch)
    core = tmp_path / "package" / prepare.GAME / "data/core"
    for folder in ("units/birds", "images/units/owls", "images/portraits"):
        (core / folder).mkdir(parents=True)
    prose = "It says hoo and flies by night over the old trees of the far north in search of small mice."
    unit = UNIT.replace('It says ""hoo""\nand flies.', prose)
    (core / "units/birds/Owl.cfg").write_text(unit)
    young = (
        '[unit_type]\n id=Owlet\n name=_"Owlet"\n [base_unit]\n id=Owl\n [/base_unit]\n image=none.png\n[/unit_type]\n'
    )
    elder = '[unit_type]\n id=Elder Owl\n name=_"Elder Owl"\n[/unit_type]\n'
    (core / "units/birds/Others.cfg").write_text(young + elder)
    (core / "units.cfg").write_text('[units]\n[race]\n id=bird\n male_name= _ "race^Bird"\n[/race]\n[/units]\n')
    (core / "images/portraits/ARTISTS").write_text("Current:\n")
    Image.new("RGBA", (30, 20), (9, 9, 9, 255)).save(core / "images/units/owls/owl.png")
    (core.parent / "COPYING.txt").write_text("the licence")
    out = tmp_path / "out"
    (out / "images").mkdir(parents=True)
    for name in ("earlier", "mine"):
        Image.new("RGB", (4, 4)).save(out / f"images/{name}.jpg")
    earlier = {"id": "e", "name": "E", "image": "images/earlier.jpg", "text": "From an earlier preparation."}
    (out / "items.jsonl").write_text(json.dumps(earlier) + "\n")

    monkeypatch.setattr(
        sys, "argv", ["prepare_items", "--from", str(tmp_path / "package"), "--out", str(tmp_path / "out"), "--all"]
    )
    prepare.main()
    (item,) = load_items(tmp_path / "out/items.jsonl")
    assert (item.id, item.name) == ("great_owl", 'Great "Owl"')
    assert item.text == f"{prose} Then it sleeps # soundly."
    assert item.facts == {
        "race": "bird",
        "level": 1,
        "alignment": "neutral",
        "hit_points": 12,
        "cost": 9,
        "movement": 5,
        "melee_weapon": "talon",
        "advances_to": ["Elder Owl"],
    }
    assert (out / "LICENSE").read_text() == "the licence"
    assert (out / "wordings.yaml").read_text() == (DATA / "wordings.yaml").read_text()
    assert sorted(path.name for path in (out / "images").iterdir()) == ["great_owl.jpg", "mine.jpg"]
    with Image.open(out / item.image) as image:
        assert image.size == (160, 160)

    monkeypatch.setattr(sys, "argv", ["prepare_items", "--from", str(tmp_path), "--out", str(out)])
    with pytest.raises(SystemExit, match="give the folder that"):
        prepare.main()


def test_a_portraits_painter_is_found_in_the_games_list(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = script("prepare_items", monkeypatch)
    artists = (
        "Portrait Credits:\n\n\nCurrent:\n\n\nAnn/A. One:\nElves:\n    High Lord\n    Archer male and female\n"
        "Others:\n    Naga Fighter\n\n\nBob\n    Ogre\n\nOutdated versions:\n\nCy Old:\nElves:\n    Scout\n"
    )
    credits = prepare.read_credits(artists)
    key = prepare._portrait_key
    assert credits[key("elves", "high-lord")] == "Ann/A. One"
    assert credits[key("elves", "archer+female")] == "Ann/A. One"
    assert credits[key("nagas", "fighter")] == "Ann/A. One"
    assert key("elves", "fighter") not in credits
    assert key("elves", "scout") not in credits
