from __future__ import annotations

from pathlib import Path

import pytest

from kore_fast.augmentation import generic
from kore_fast.augmentation.wordings import (
    FactWordings,
    Wordings,
    fill,
    load_wordings,
    plain,
    with_possessive,
    wordings_beside,
)
from kore_fast.data.items import Item
from kore_fast.errors import DataError


def save(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "wordings.yaml"
    path.write_text(text)
    return path


def test_a_key_without_wordings_gets_the_generic_ones() -> None:
    fact = Wordings().fact("hit_points")
    assert fact.label == "hit points"
    assert (fact.ask, fact.tell, fact.held_out) == (
        generic.GENERIC_ASK,
        generic.GENERIC_TELL,
        generic.GENERIC_HELD_OUT,
    )


def test_what_a_file_leaves_out_is_generic_and_an_empty_held_out_list_stays_empty(tmp_path: Path) -> None:
    wordings = load_wordings(save(tmp_path, "facts:\n  race: {label: kind, held_out: []}\n  size: {join: or}\n"))
    assert wordings.fact("race").ask == generic.GENERIC_ASK
    assert (wordings.fact("race").label, wordings.fact("race").held_out) == ("kind", ())
    assert wordings.fact("size").held_out == generic.GENERIC_HELD_OUT
    assert wordings.fact("size").spoken(["a", "b", "c"]) == "a, b or c"
    assert wordings.fact("race").spoken(["a", "b"]) == "a and b"
    assert [wordings.fact("race").spoken(value) for value in (["a"], 3, 2.5)] == ["a", "3", "2.5"]


def test_the_file_beside_the_items_is_found(tmp_path: Path) -> None:
    assert wordings_beside(tmp_path / "items.jsonl") == Wordings()
    save(tmp_path, "refer: the {name}\n")
    assert wordings_beside(tmp_path / "items.jsonl").refer == "the {name}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fact: {}", "unknown key 'fact'; did you mean 'facts'?"),
        ("facts: {race: {asks: ['What is {it}?']}}", "facts.race: unknown key 'asks'; did you mean 'ask'?"),
        ("facts: {race: {ask: ['What is {item}?']}}", "facts.race: 'ask': unknown placeholder {item}"),
        ("facts: {race: {ask: ['What is {lable} of {it}?']}}", "did you mean {label}?"),
        ("facts: {race: {ask: ['What is the race of {name}?']}}", "must speak of the item as {it}"),
        ("facts: {race: {ask: ['What race?']}}", "must speak of the item as {it}"),
        ("facts: {race: {ask: ['Is {it} {value}?']}}", "holds the answer"),
        ("facts: {race: {ask: []}}", "'ask' is an empty list"),
        ("facts: {race: {ask: 'What is {it}?'}}", "'facts.race.ask': input should be a valid tuple"),
        ("facts: {race: {tell: ['{it} is one.']}}", "does not hold {value}"),
        ("facts: {race: {tell: ['{it is one.']}}", "for braces"),
        ("facts: {race: {join: nor}}", "'facts.race.join': input should be 'and' or 'or'"),
        ("refer: the one", "'refer' must hold {name}"),
        ("[1, 2]", "expected keys such as"),
        ("facts: {race: [", "not valid YAML"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_wordings(save(tmp_path, text))
    assert message in str(caught.value)
    assert "wordings.yaml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"wordings\.yaml: no such file"):
        load_wordings(tmp_path / "wordings.yaml")


def test_a_wording_cannot_be_trained_on_and_held_out(tmp_path: Path) -> None:
    path = save(tmp_path, "facts: {race: {ask: ['What race is {it}?'], held_out: ['what race is {it}']}}")
    with pytest.raises(DataError, match=r"held-out wording 'what race is \{it\}' is also used for training"):
        load_wordings(path)


def test_a_worded_key_that_misspells_a_fact_is_refused() -> None:
    item = Item(id="a", name="A", image="a.png", text="x", facts={"alignment": "lawful"})
    with pytest.raises(DataError, match=r"no item has the fact 'aligment'; did you mean 'alignment'\?"):
        Wordings(facts={"aligment": FactWordings()}).check_keys([item])
    Wordings(facts={"alignment": FactWordings(), "cost": FactWordings()}).check_keys([item])


def test_built_in_wordings_are_many_valid_and_apart_from_the_held_out_ones() -> None:
    FactWordings(ask=generic.GENERIC_ASK, tell=generic.GENERIC_TELL, held_out=generic.GENERIC_HELD_OUT)
    assert len(generic.GENERIC_ASK) >= 13
    assert len(generic.GENERIC_TELL) >= 6
    trained = {plain(wording) for wording in (*generic.GENERIC_ASK, *generic.SEVERAL_ASK, *generic.SHORT_ASK)}
    assert not trained & {plain(wording) for wording in generic.GENERIC_HELD_OUT}
    assert len({plain(wording) for wording in generic.GENERIC_ASK}) == len(generic.GENERIC_ASK)


def test_filling_begins_with_a_capital_and_finds_the_article() -> None:
    assert fill("{it} is {a_value}.", it="the owl", value="animal") == "The owl is an animal."
    assert fill("{it} is {a_value}.", it="{odd}", value="bird") == "{odd} is a bird."


def test_a_pronoun_owns_things_by_its_possessive() -> None:
    assert with_possessive("What is the race of {it}?", "its") == "What is its race?"
    assert with_possessive("The {label} of {it} is {value}.", "her") == "her {label} is {value}."
    assert with_possessive("Of which race is {it}?", "its") == "Of which race is {it}?"
