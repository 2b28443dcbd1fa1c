from __future__ import annotations

import pytest

from kore_fast.augmentation import AugmentationOptions, CannotWriteError, TemplateWriter, Wordings
from kore_fast.augmentation.wordings import FactWordings
from kore_fast.data.items import Item

PROSE = (
    "Owls hunt at night and sleep by day. They hear very well, and they turn their heads far. "
    "Old tales call them wise. Mice think otherwise."
)


def owl(**changes: object) -> Item:
    facts = {"wings": 2, "colour": "brown", "prey": ["mouse", "vole"], "family": "owls", "range": "north", "age": 9}
    made = {"id": "owl", "name": "Great Owl", "type": "bird", "image": "owl.png", "text": PROSE, "facts": facts}
    return Item.model_validate(made | changes)


def texts(writer: TemplateWriter, item: Item) -> list[str]:
    rounds = [one for variant in range(4) for one in writer.dialogue(item, variant)]
    rounds += [writer.knowledge(item), writer.caption(item), *writer.vqa(item), writer.recognition(item, item)]
    return [text for one in rounds for text in (one.question, one.answer)]


def test_the_same_seed_writes_the_same_and_another_seed_differs() -> None:
    first = texts(TemplateWriter(options=AugmentationOptions(seed=1)), owl())
    assert texts(TemplateWriter(options=AugmentationOptions(seed=1)), owl()) == first
    assert texts(TemplateWriter(options=AugmentationOptions(seed=2)), owl()) != first


def test_no_placeholder_is_left_and_no_text_begins_small() -> None:
    for seed in range(30):
        wordings = Wordings(refer="the {name}")
        for text in texts(TemplateWriter(wordings, AugmentationOptions(seed=seed)), owl()):
            assert "{" not in text
            assert not text[0].islower(), text
            assert text[-1] in ".?!'", text


def test_a_dialogue_is_bounded_and_opens_with_the_prose_or_the_name() -> None:
    writer = TemplateWriter(options=AugmentationOptions(rounds=4, prose_words=10))
    about, introduced = writer.dialogue(owl(), 0), writer.dialogue(owl(), 1)
    assert len(about) == len(introduced) == 4
    assert "Great Owl" in about[0].question
    assert about[0].answer == "Owls hunt at night and sleep by day."
    assert "Great Owl" not in introduced[0].question
    assert "Great Owl. Owls hunt at night" in introduced[0].answer


def test_two_dialogues_take_up_all_facts() -> None:
    answers = " ".join(one.answer for variant in (0, 1) for one in TemplateWriter().dialogue(owl(), variant))
    for value in ("2", "brown", "mouse and vole", "owls", "north", "9"):
        assert value in answers


def test_no_fact_comes_twice_in_a_dialogue_and_more_rounds_take_more_facts() -> None:
    few = owl(facts={"colour": "brown", "wings": 2})
    for variant in range(4):
        answers = " ".join(
            one.answer for one in TemplateWriter(options=AugmentationOptions(rounds=9)).dialogue(few, variant)
        )
        assert answers.count("brown") == answers.count("2") == 1
    long = TemplateWriter(options=AugmentationOptions(rounds=9)).dialogue(owl(), 0)
    assert len(long) == 1 + 5
    assert len(TemplateWriter(options=AugmentationOptions(rounds=1)).dialogue(owl(), 0)) == 1


def test_a_follow_up_that_does_not_name_the_item_has_an_answer_that_does() -> None:
    for seed in range(40):
        for one in TemplateWriter(options=AugmentationOptions(seed=seed, rounds=2)).dialogue(owl(), 0)[1:]:
            named = "Great Owl" in one.question
            assert named or "Great Owl" in one.answer or " it" not in one.question.lower()


def test_more_is_told_that_was_not_in_the_introduction() -> None:
    introduced = TemplateWriter(options=AugmentationOptions(summary_words=12)).dialogue(owl(), 1)
    assert "They hear very well" not in introduced[0].answer
    assert any(one.answer.startswith("They hear very well") for one in introduced)


def test_items_without_facts_still_get_dialogues_and_no_vqa() -> None:
    bare = owl(facts={}, text="Owls hunt at night.")
    writer = TemplateWriter()
    assert [len(writer.dialogue(bare, variant)) for variant in range(2)] == [2, 2]
    with pytest.raises(CannotWriteError, match="no facts"):
        writer.vqa(bare)


def test_vqa_speaks_of_the_picture_and_puts_evaluated_facts_first() -> None:
    silent = FactWordings(held_out=())
    wordings = Wordings(facts=dict.fromkeys(("wings", "prey", "age", "range"), silent))
    for seed in range(20):
        rounds = TemplateWriter(wordings, AugmentationOptions(seed=seed, vqa=4)).vqa(owl())
        assert len(rounds) == 4
        for one in rounds:
            assert "Great Owl" not in one.question
            assert "bird" in one.question
            assert one.search == "Great Owl bird"
        assert {"brown", "owls"} <= {word.strip(".,") for one in rounds[:2] for word in one.answer.lower().split()}
        assert " and " in rounds[3].question


def test_natural_answers_are_sentences_and_the_papers_are_single_words() -> None:
    natural = TemplateWriter(options=AugmentationOptions(vqa=6))
    assert all(len(one.answer.split()) >= 4 for one in natural.vqa(owl()))
    paper = TemplateWriter(options=AugmentationOptions(natural_answers=False, vqa=6))
    assert {one.answer for one in paper.vqa(owl())} == {"2", "brown", "mouse and vole", "owls", "north", "9"}
    for one in paper.vqa(owl()):
        assert one.question.endswith("Answer the question using a single word or phrase.")
    assert paper.recognition(owl(), owl()).answer == "Yes"
    assert paper.recognition(owl(), owl(id="bat", name="Bat")).answer == "No"


def test_recognition_says_what_is_seen() -> None:
    bat = owl(id="bat", name="Bat")
    for seed in range(20):
        writer = TemplateWriter(options=AugmentationOptions(seed=seed))
        yes, no = writer.recognition(owl(), owl()), writer.recognition(owl(), bat)
        assert yes.answer.startswith("Yes, ")
        assert "Great Owl" in yes.answer
        assert no.answer.startswith("No, ")
        assert "Bat" in no.answer
        assert yes.question.endswith("Answer this question with Yes or No.")


def test_a_caption_has_the_papers_form() -> None:
    caption = TemplateWriter(Wordings(refer="the {name}"), AugmentationOptions(summary_words=8)).caption(owl())
    assert caption.answer == "The image depicts the Great Owl. Owls hunt at night and sleep by day."
    assert caption.question.endswith("Answer this question in one paragraph.")


def test_knowledge_is_the_whole_prose() -> None:
    assert TemplateWriter(options=AugmentationOptions(prose_words=8)).knowledge(owl()).answer == PROSE
