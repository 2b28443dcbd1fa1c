from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic import ValidationError

from kore_fast.augmentation import AugmentationOptions, Round, TemplateWriter, Wordings, augment
from kore_fast.augmentation.augment import Reject
from kore_fast.augmentation.provenance import PictureSource
from kore_fast.augmentation.wordings import FactWordings
from kore_fast.data import read_samples, write_samples
from kore_fast.data.items import Item
from kore_fast.data.samples import Sample
from kore_fast.errors import DataError


def items(count: int = 6, *, kind: str = "bird") -> list[Item]:
    return [
        Item(
            id=f"bird{number}",
            name=f"Bird{number} Mag{number}",
            type=kind,
            image=f"images/bird{number}.png",
            text=f"Bird {number} lives in the trees. It sings in the morning, and it is shy.",
            facts={"colour": f"colour{number}", "size": number, "food": ["seeds", "worms"]},
        )
        for number in range(count)
    ]


def by_item(samples: Sequence[Sample], branch: str) -> dict[str | None, list[Sample]]:
    found: dict[str | None, list[Sample]] = {}
    for sample in samples:
        if sample.branch == branch:
            found.setdefault(sample.item, []).append(sample)
    return found


def test_every_item_gets_all_branches_and_the_raw_form() -> None:
    made = augment(items())
    counts = {branch: made.summary["branches"][branch]["samples"] for branch in made.summary["branches"]}
    assert counts == {"dialogue": 12, "recognition": 12, "caption": 6, "vqa": 18}
    assert made.summary["samples"] == len(made.samples) == 48
    assert [sample.branch for sample in made.knowledge] == ["knowledge"] * 6
    assert made.knowledge[0].conversations[1].value == items()[0].text
    for sample in [*made.samples, *made.knowledge]:
        assert sample.conversations[0].value.startswith("<image>\n")
    assert made.summary["questions"]["by_name"] == {"questions": 12, "by_fact": {"colour": 6, "size": 6}}
    assert len(made.questions) == 24
    assert made.rejects == []
    json.dumps(made.summary)


def test_what_is_made_is_valid_and_the_same_every_time(tmp_path: Path) -> None:
    first, second = augment(items()), augment(items())
    assert first == second
    write_samples(tmp_path / "samples.json", first.samples)
    assert read_samples(tmp_path / "samples.json") == first.samples


def test_the_order_of_items_does_not_matter() -> None:
    straight, turned = augment(items()), augment(items()[::-1])
    assert sorted(straight.samples, key=lambda one: one.id) == sorted(turned.samples, key=lambda one: one.id)
    assert sorted(straight.questions, key=lambda one: one.question_id) == sorted(
        turned.questions, key=lambda one: one.question_id
    )


def test_but_for_recognition_an_item_does_not_depend_on_the_others() -> None:
    alone = [one for one in augment(items(1)).samples if one.branch != "recognition"]
    among = [one for one in augment(items(5)).samples if one.item == "bird0" and one.branch != "recognition"]
    assert alone == among


def test_a_no_example_pairs_a_name_with_another_items_picture() -> None:
    made = augment(items(12))
    own_picture = 0
    for identity, (yes, no) in by_item(made.samples, "recognition").items():
        assert yes.conversations[1].value.startswith("Yes")
        assert no.conversations[1].value.startswith("No")
        assert yes.image == f"images/{identity}.png"
        shown = str(no.image).removeprefix("images/").removesuffix(".png")
        assert f"Mag{shown.removeprefix('bird')}" not in no.conversations[0].value
        assert f"Mag{shown.removeprefix('bird')}" in no.conversations[1].value
        own_picture += no.image == yes.image
    assert 0 < own_picture < 12


def test_no_examples_prefer_the_same_kind_and_need_another_item() -> None:
    mixed = [*items(2), items(9, kind="fish")[8]]
    for seed in range(10):
        (_, no) = by_item(augment(mixed, AugmentationOptions(seed=seed)).samples, "recognition")["bird0"]
        assert "Mag8" not in no.conversations[0].value + no.conversations[1].value
    assert len(by_item(augment(items(1)).samples, "recognition")["bird0"]) == 1
    namesake = items(2)[1].model_copy(update={"name": items(1)[0].name})
    same_picture = items(3)[2].model_copy(update={"image": items(1)[0].image})
    made = augment([items(1)[0], namesake, same_picture])
    assert len(by_item(made.samples, "recognition")["bird0"]) == 1


def test_negatives_off_and_fewer_branches() -> None:
    made = augment(items(), AugmentationOptions(negatives=False, branches=("recognition", "caption")))
    assert {sample.branch for sample in made.samples} == {"recognition", "caption"}
    assert all(s.conversations[1].value.startswith("Yes") for s in made.samples if s.branch == "recognition")


def test_held_out_wordings_never_come_in_training() -> None:
    made = augment(items(12), AugmentationOptions(dialogues=6, rounds=5, vqa=5))
    trained = {
        turn.value.replace("<image>\n", "")
        for sample in [*made.samples, *made.knowledge]
        for turn in sample.conversations
        if turn.speaker == "human"
    }
    assert len(trained) > 200
    assert not trained & {question.text for question in made.questions}


def test_what_cannot_be_written_is_counted_with_its_reason() -> None:
    bare = items(2)[1].model_copy(update={"facts": {}})
    made = augment([items(1)[0], bare])
    assert made.rejects == [Reject("bird1", "vqa", "the item has no facts to ask for")]
    assert not [sample for sample in made.samples if sample.item == "bird1" and sample.branch == "vqa"]


def test_a_writer_and_an_image_source_of_ones_own_are_used() -> None:
    class Search:
        def find(self, item: Item, search: str, branch: str) -> tuple[str, PictureSource]:
            return f"found/{search}.png", PictureSource(own=False)

    class Terse(TemplateWriter):
        def caption(self, item: Item) -> Round:
            return Round("What?", item.name, f"{item.id} caption")

    options = AugmentationOptions(branches=("caption", "vqa"))
    made = augment(items(1), options, writer=Terse(), images=Search())
    assert made.samples[0].image == "found/bird0 caption.png"
    assert made.samples[0].conversations[1].value == "Bird0 Mag0"
    assert made.samples[1].image == "found/Bird0 Mag0 bird.png"


def test_a_misspelt_worded_fact_is_refused() -> None:
    with pytest.raises(DataError, match=r"no item has the fact 'color'; did you mean 'colour'\?"):
        augment(items(), wordings=Wordings(facts={"color": FactWordings()}))


@pytest.mark.parametrize("wrong", [{"negative": True}, {"branches": ["captions"]}, {"dialogues": 0}, {"vqa": -1}])
def test_options_refuse_unknown_keys_and_values(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AugmentationOptions.model_validate(wrong)
