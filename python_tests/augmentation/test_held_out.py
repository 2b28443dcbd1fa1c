from __future__ import annotations

import pytest

from kore_fast.augmentation import AugmentationOptions, Wordings
from kore_fast.augmentation.held_out import contains, held_out_questions
from kore_fast.augmentation.wordings import FactWordings
from kore_fast.data.items import FactValue, Item

OPTIONS = AugmentationOptions()


def item(identity: str = "owl", name: str = "Great Owl", **facts: FactValue) -> Item:
    return Item(id=identity, name=name, type="bird", image=f"{identity}.png", text="Prose.", facts=facts)


def test_each_fact_is_asked_by_name_and_some_by_picture() -> None:
    questions, left_out = held_out_questions([item(colour="brown", wings=2, prey=["mouse"])], Wordings(), OPTIONS)
    by_name = [question for question in questions if question.form == "by_name"]
    by_picture = [question for question in questions if question.form == "by_picture"]
    assert {(question.type, question.answer) for question in by_name} == {
        ("colour", "brown"),
        ("wings", "2"),
        ("prey", "mouse"),
    }
    assert all("Great Owl" in question.text for question in by_name)
    assert len(by_picture) == 2
    assert all("Owl" not in question.text and "the bird in the picture" in question.text for question in by_picture)
    assert all((question.image, question.item) == ("owl.png", "owl") for question in questions)
    assert left_out == {}


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("Great Owl", ["mouse", "vole"], "several answers are right"),
        ("Great Owl", "owl", "the answer stands in the question"),
        ("Great Owl", "one two three four five six seven", "the answer has more than 6 words"),
        ("Great Owl", "$5", "the answer cannot be matched in a text"),
        ("Great Owl", "'Bubo'", "the answer cannot be matched in a text"),
        ("Great Owl", "…", "the answer cannot be matched in a text"),
        ("Great Owl", "the", "the answer cannot be matched in a text"),
    ],
)
def test_a_question_that_would_prove_nothing_is_left_out_and_counted(name: str, value: FactValue, reason: str) -> None:
    questions, left_out = held_out_questions([item(name=name, fact=value)], Wordings(), OPTIONS)
    assert not [question for question in questions if question.form == "by_name"]
    assert left_out[f"by_name: {reason}"] == 1


def test_an_answer_inside_a_longer_word_of_the_name_is_fine() -> None:
    questions, _ = held_out_questions([item(name="Elvish Owlet", race="elvis")], Wordings(), OPTIONS)
    assert [question.form for question in questions] == ["by_name", "by_picture"]
    assert contains("An Owl.", "owl")
    assert not contains("An Owlet.", "owl")


def test_a_fact_without_held_out_wordings_is_not_asked() -> None:
    wordings = Wordings(facts={"colour": FactWordings(held_out=())})
    assert held_out_questions([item(colour="brown")], wordings, OPTIONS) == ([], {})


def test_a_picture_of_several_items_is_not_asked_by_picture() -> None:
    twins = [item("a", "A", colour="red"), item("b", "B", colour="blue").model_copy(update={"image": "a.png"})]
    questions, left_out = held_out_questions(twins, Wordings(), OPTIONS)
    assert {question.form for question in questions} == {"by_name"}
    assert left_out == {"by_picture: the picture belongs to several items": 2}


def test_the_count_by_picture_is_an_option() -> None:
    facts: dict[str, FactValue] = {f"key{number}": f"value{number}" for number in range(5)}
    for count in (0, 3, 9):
        questions, _ = held_out_questions([item(**facts)], Wordings(), AugmentationOptions(by_picture=count))
        assert sum(question.form == "by_picture" for question in questions) == min(count, 5)
