"""Links between items and the questions made of them."""

from __future__ import annotations

import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from kore_fast.augmentation import AugmentationOptions, Wordings, augment
from kore_fast.augmentation.links import Link, LinkOptions, find_links, link_samples
from kore_fast.augmentation.wordings import FactWordings, load_wordings, plain
from kore_fast.data import read_samples, write_samples
from kore_fast.data.items import Item, load_items
from kore_fast.data.samples import Sample, validate_sample

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart" / "data"


def item(identity: str, name: str, text: str = "Nothing is known.", **facts: Any) -> Item:
    return Item(id=identity, name=name, image=f"{identity}.png", text=text, type="thing", facts=facts)


def told(sample: Sample) -> tuple[str, str]:
    return sample.conversations[0].value.replace("<image>\n", ""), sample.conversations[1].value


def only(items: list[Item], kind: str, **options: Any) -> list[Link]:
    return [link for link in find_links(items, LinkOptions(per_item=9, **options)) if link.kind == kind]


def test_a_fact_that_is_another_items_name_is_a_reference_and_gives_a_hop() -> None:
    items = [item("a", "Young Elk", becomes="Old Elk", food="moss"), item("b", "Old Elk", food="bark", herd=40)]
    assert only(items, "reference") == [Link("reference", "a", "b", "becomes", "Old Elk")]
    (sample,) = link_samples(items, only(items, "reference"))
    question, answer = told(sample)
    assert (sample.id, sample.item, sample.branch, sample.image) == ("a-links-0", "a", "links", "a.png")
    assert "Young Elk" in question
    assert "Old Elk" not in question
    assert "Old Elk" in answer
    assert ("bark" in answer) == ("food" in question)
    assert ("40" in answer) == ("herd" in question)


def test_several_ways_to_go_give_no_hop() -> None:
    items = [item("a", "Young Elk", becomes=["Old Elk", "Grey Elk"]), item("b", "Old Elk", herd=40)]
    links = only(items, "reference")
    assert [link.value for link in links] == ["Old Elk"]
    assert list(link_samples(items, links)) == []


def test_prose_that_names_one_other_item_is_a_mention() -> None:
    items = [
        item("a", "Mill", "The mill grinds corn for the Red Bakery and no one else."),
        item("b", "Red Bakery", "It bakes flat loaves. They keep for a month."),
        item("c", "Bakery", "A word that begins no name here."),
        item("d", "Tower", "From it one sees the Mill and the Red Bakery."),
        item("e", "Moss", "Moss Mill is not it. Mill is a word that begins this sentence."),
    ]
    assert only(items, "mention") == [Link("mention", "a", "b", None, "Red Bakery")]
    (sample,) = link_samples(items, only(items, "mention"))
    question, answer = told(sample)
    assert "Red Bakery" not in question
    assert answer.endswith("It bakes flat loaves. They keep for a month.")


def test_a_name_shared_by_two_items_links_nothing() -> None:
    items = [item("a", "Mill", "Near the Red Bakery."), item("b", "Red Bakery"), item("c", "Red Bakery")]
    assert only(items, "mention") == []


def test_a_rare_name_in_both_texts_links_and_a_common_one_does_not() -> None:
    items = [
        item("a", "Mill", "It was sold to Berta Kranz in spring. On Monday it rests."),
        item("b", "Tower", "The painter Berta Kranz lived here. Open on Monday."),
        *[item(f"n{number}", f"House {number}", "It stands in Lorn.") for number in range(6)],
    ]
    (link,) = only(items, "entity", common=5)
    assert {link.first, link.second} == {"a", "b"}
    assert link.value == "Berta Kranz"
    question, answer = told(next(link_samples(items, [link])))
    assert "Berta Kranz" in question
    assert "It was sold to Berta Kranz in spring." in answer
    assert "The painter Berta Kranz lived here." in answer


def test_a_shared_fact_asks_what_is_common_and_names_only_what_is() -> None:
    items = [item("a", "Mill", colour="red", age=3, owner="Ada"), item("b", "Tower", colour="red", age=3, owner="Bo")]
    (link,) = only(items, "fact")
    _, answer = told(next(link_samples(items, [link])))
    assert "the colour red" in answer
    assert "the age 3" in answer
    assert "owner" not in answer


def test_numbers_are_compared_the_right_way_round() -> None:
    items = [item("a", "Mill", age=3), item("b", "Tower", age=70), item("c", "Gate", age=3)]
    for sample in link_samples(items, [Link("number", "a", "b", "age"), Link("number", "b", "a", "age")]):
        _, answer = told(sample)
        assert re.search(r"Tower.*70.*", answer)
        assert answer.index("Tower") < answer.index("Mill")
    assert list(link_samples(items, [Link("number", "a", "c", "age")])) == []
    pairs = only(items, "number")
    assert all({link.first, link.second} != {"a", "c"} for link in pairs)
    assert pairs


def test_both_pictures_have_their_marks(tmp_path: Path) -> None:
    items = [item("a", "Mill", age=3), item("b", "Tower", age=70)]
    links = [Link("number", "b", "a", "age")]
    (sample,) = link_samples(items, links, options=LinkOptions(pictures="both"))
    assert sample.images == ("b.png", "a.png")
    assert sample.conversations[0].value.startswith("<image>\n<image>\n")
    validate_sample(sample)
    (other,) = link_samples(items, links, image=lambda one: f"found/{one.id}.png")
    assert other.image == "found/b.png"


def quickstart() -> list[Item]:
    return load_items(QUICKSTART / "items.jsonl", check_images=False)


@pytest.mark.parametrize("most", [1, 3])
def test_links_are_bounded_the_same_for_any_order_and_of_many_kinds(most: int) -> None:
    items = quickstart()
    options = LinkOptions(per_item=most)
    links = find_links(items, options)
    assert links == find_links(items[::-1], options)
    assert links != find_links(items, LinkOptions(per_item=most, seed=1))
    taken = Counter(end for link in links for end in (link.first, link.second))
    assert max(taken.values()) == most
    assert all(link.first != link.second for link in links)
    assert len({frozenset((link.first, link.second)) for link in links}) == len(links)
    if most > 1:
        assert {"fact", "number", "reference"} <= {link.kind for link in links}


def test_every_answer_is_what_the_facts_say() -> None:
    items = quickstart()
    by_id = {one.id: one for one in items}
    links = find_links(items, LinkOptions(per_item=4))
    wordings = load_wordings(QUICKSTART / "wordings.yaml")
    seen = 0
    for link in links:
        for sample in link_samples(items, [link], wordings):
            question, answer = told(sample)
            first, second = by_id[link.first], by_id[link.second]
            assert first.name in question
            if link.kind == "number" and link.key:
                one, other = first.facts[link.key], second.facts[link.key]
                assert isinstance(one, int)
                assert isinstance(other, int)
                more, less = (first, second) if one > other else (second, first)
                assert answer.lower().index(more.name.lower()) < answer.lower().rindex(less.name.lower())
            if link.kind == "fact":
                assert link.value is not None
                assert link.value in answer
            seen += 1
    assert seen > 60


def test_no_link_question_holds_a_held_out_question() -> None:
    items = [item("a", "Mill", age=3), item("b", "Tower", age=70)]
    links = [Link("number", "a", "b", "age")]
    # Every way of asking holds one of these held-out questions.
    taken = ("Set {it} beside", "{it} and Tower", "has the higher age {it}", "Between {it}")
    wordings = Wordings(facts={"age": FactWordings(held_out=taken)})
    assert list(link_samples(items, links, wordings)) == []
    for left_out in range(len(taken)):
        some = Wordings(facts={"age": FactWordings(held_out=taken[:left_out] + taken[left_out + 1 :])})
        for sample in link_samples(items, links, some):
            assert not any(plain(one.format(it="Mill")) in plain(told(sample)[0]) for one in some.fact("age").held_out)


def test_the_branch_is_optional_and_its_samples_are_valid(tmp_path: Path) -> None:
    items = quickstart()[:20]
    wordings = load_wordings(QUICKSTART / "wordings.yaml")
    without = augment(items, wordings=wordings)
    assert not [sample for sample in without.samples if sample.branch == "links"]
    branches = ("dialogue", "recognition", "caption", "vqa", "links")
    made = augment(items, AugmentationOptions(branches=branches), wordings=wordings)
    links = [sample for sample in made.samples if sample.branch == "links"]
    assert [sample for sample in made.samples if sample.branch != "links"] == without.samples
    assert made.summary["branches"]["links"]["samples"] == len(links) > 5
    assert made.questions == without.questions
    asked = {plain(question.text) for question in made.questions}
    assert not asked & {plain(told(sample)[0]) for sample in links}
    write_samples(tmp_path / "samples.json", made.samples)
    assert read_samples(tmp_path / "samples.json") == made.samples


def test_four_times_the_items_take_about_four_times_as_long() -> None:
    def many(count: int) -> list[Item]:
        return [
            item(
                f"i{n:05}",
                f"Thing{n} Mar{n % 977}",
                f"Near Port Arl{n % 70} by Anna Berg{n % 40}, sold to Thing{n * 7 % count} Mar{n * 7 % count % 977}.",
                colour=f"c{n % 4}",
                size=n % 50,
            )
            for n in range(count)
        ]

    def seconds(items: list[Item]) -> float:
        started = time.process_time()
        assert len(find_links(items)) > len(items) / 2
        return time.process_time() - started

    few, more = many(500), many(2000)
    # Going over all pairs would take sixteen times as long.
    assert min(seconds(more) for _ in range(2)) < 10 * min(seconds(few) for _ in range(3)) + 0.2


@pytest.mark.parametrize("wrong", [{"per_item": 0}, {"common": 1}, {"pictures": "none"}, {"links": 3}])
def test_options_refuse_unknown_keys_and_values(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LinkOptions.model_validate(wrong)
