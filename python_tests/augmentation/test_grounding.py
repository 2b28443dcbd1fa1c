"""The grounding check: numbers, dates, names, roles, negation, quotes; and what it reaches on committed answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from kore_fast.augmentation import TemplateWriter
from kore_fast.augmentation.grounding import (
    Embedding,
    Grounding,
    GroundingOptions,
    Verdict,
    check_answer,
)
from kore_fast.augmentation.measure_grounding import check_file, main, score
from kore_fast.augmentation.wordings import load_wordings
from kore_fast.augmentation.writer import Round
from kore_fast.data.items import Item, load_items
from kore_fast.errors import DataError

ANSWERS = Path(__file__).parent / "data" / "grounding" / "answers.jsonl"
QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart" / "data"

TEXT = (
    "The Korvan Ferry sank on 12 March 2024 with 1,240 passengers on board. Captain Anna Lind, 52, was not on the "
    'bridge. "We heard a bang," said cook Emil Sørby. The World Harbour Organisation will pay 3.5 million euros by '
    "May. The wreck lies 85 metres deep, north of Cape Hald, and 14 sailors are missing. It was the second accident "
    "since 1987."
)


def check(answer: str, question: str = "What happened?", **facts: Any) -> Verdict:
    return check_answer(TEXT, "Korvan Ferry", facts, question, answer)


@pytest.mark.parametrize(
    "answer",
    [
        "It sank on March 12, 2024.",
        "It sank on 2024-03-12.",
        "It sank in March 2024.",
        "It sank in March.",
        "It sank in 2024.",
        "It sank in the 2020s.",
        "There were 1240 passengers on board.",
        "There were one thousand two hundred and forty passengers on board.",
        "There were about 1,200 passengers.",
        "There were more than 1,200 passengers.",
        "Nearly 1,300 passengers were on board.",
        "Lind is fifty-two.",
        "The captain, A. Lind, was not on the bridge.",
        "Captain Lind's place was not on the bridge.",
        "The WHO will pay €3.5 million.",
        "The World Harbour Organisation pays 3,500,000 euros.",
        "The wreck lies at a depth of 0.085 km.",
        "It was the 2nd accident since 1987.",
        "It lies north of Cape Hald.",
        "Emil Sorby said: “We heard a bang”.",
        "Fourteen sailors are missing.",
        "Yes, it sank.",
    ],
)
def test_what_the_text_says_in_other_words_is_supported(answer: str) -> None:
    assert check(answer) == Verdict(True)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("It sank on 13 March 2024.", "date '13 March 2024'"),
        ("It sank in May 2024.", "date 'May 2024'"),
        ("It sank in 2023.", "number '2023'"),
        ("It sank in the 1990s.", "no year of the text is in that decade"),
        ("It sank in the 19th century.", "no year of the text is in that century"),
        ("There were 1,420 passengers.", "whose numbers are 1,240 passengers"),
        ("There were about 1,500 passengers.", "number '1,500 passengers'"),
        ("There were more than 1,300 passengers.", "number '1,300 passengers'"),
        ("There were 14 passengers on board.", "the text has 1,240 passengers"),
        ("The wreck lies 85 feet deep.", "the text has 85 metres"),
        ("The wreck lies 85 km deep.", "the text has 85 metres"),
        ("They will pay 3.5 million dollars.", "the text has 3.5 million euros"),
        ("Captain Maria Lind was not on the bridge.", "name 'Captain Maria Lind': 'maria' not in the text"),
        ("Anna Sørby is the captain.", "the text has these words, but not together"),
        ("Emil Sørby was the captain.", "says of 'emil sorby' what the text says of 'anna lind'"),
        ("Captain Anna Lind was on the bridge.", "which the text denies"),
        ("Sailors are not missing.", "denies 'miss'"),
        ('The cook said: "We saw a light".', "quotation 'We saw a light'"),
        ("It lies south of the cape.", "says 'south' where the text says 'north'"),
        ("It was the third accident.", "number 'third accident'"),
        ("Rescue helicopters circled above burning lifeboats.", "says much that the text does not"),
    ],
)
def test_what_the_text_does_not_say_is_doubted_with_the_reason(answer: str, reason: str) -> None:
    verdict = check(answer)
    assert not verdict.supported
    assert any(reason in one for one in verdict.reasons), verdict.reasons


def test_the_questions_own_words_may_be_said_again_but_not_turned_into_a_yes() -> None:
    question = "Was the Nordstern in the harbour in 1999?"
    assert check("The text tells nothing of the Nordstern in 1999.", question).supported
    assert not check("Yes.", question).supported
    assert not check("Yes.", "Was Captain Anna Lind on the bridge?").supported
    assert check("No.", "Was Captain Anna Lind on the bridge?").supported
    assert check("Yes.", "Are 14 sailors missing?").supported
    assert not check("No.", "Are 14 sailors missing?").supported
    assert not check("Yes.", "Are 15 sailors missing?").supported


def test_facts_and_the_name_are_evidence_too() -> None:
    assert not check("It cost 90 million crowns and was built in Gdynia.").supported
    assert check(
        "It cost 90 million crowns and was built in Gdynia.", cost="90 million crowns", yard=["Gdynia"]
    ).supported
    assert check("This is the Korvan Ferry.").supported


def test_checks_can_be_chosen() -> None:
    options = GroundingOptions(checks=("dates",))
    assert check_answer(TEXT, "Korvan Ferry", {}, "When?", "Maria Roth counted 99 passengers.", options).supported
    assert not check_answer(TEXT, "Korvan Ferry", {}, "When?", "On 1 May 2020.", options).supported


ITEM = Item(id="ferry", name="Korvan Ferry", image="ferry.png", text=TEXT)
ROUNDS = [
    Round("When did it sink?", "It sank in March 2024."),
    Round("How deep is it?", "It lies 95 metres deep."),
    Round("Who was the captain?", "Anna Lind was the captain."),
]


def test_unsupported_rounds_are_dropped_or_flagged_or_left_alone() -> None:
    dropped = Grounding().ground(ITEM, ROUNDS)
    assert dropped.rounds == [ROUNDS[0], ROUNDS[2]]
    (finding,) = dropped.findings
    assert (finding.item, finding.answer, finding.dropped) == ("ferry", ROUNDS[1].answer, True)
    assert "95 metres" in finding.reasons[0]
    flagged = Grounding(GroundingOptions(action="flag")).ground(ITEM, ROUNDS)
    assert flagged.rounds == ROUNDS
    assert [one.dropped for one in flagged.findings] == [False]
    assert Grounding(GroundingOptions(action="off")).ground(ITEM, ROUNDS).findings == []


class Says:
    """A judge that knows its answers beforehand."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        self.asked: list[tuple[str, str]] = []

    def supports(self, text: str, question: str, answer: str) -> Verdict:
        assert "Korvan Ferry" in text
        self.asked.append((question, answer))
        return self.verdict


def test_a_judge_is_asked_about_doubts_alone_or_about_everything() -> None:
    mild = Says(Verdict(True))
    assert Grounding(GroundingOptions(judge="doubtful"), judge=mild).ground(ITEM, ROUNDS).rounds == ROUNDS
    assert [answer for _, answer in mild.asked] == [ROUNDS[1].answer]
    strict = Says(Verdict(False, ("another captain",)))
    found = Grounding(GroundingOptions(judge="all"), judge=strict).ground(ITEM, ROUNDS)
    assert found.rounds == []
    assert found.findings[0].reasons == ("another captain",)
    assert len(strict.asked) == 3
    with pytest.raises(DataError, match="no judge"):
        Grounding(GroundingOptions(judge="all"))


@pytest.mark.parametrize("wrong", [{"action": "delete"}, {"check": ()}, {"words": 2}, {"checks": ["number"]}])
def test_options_refuse_unknown_keys_and_values(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GroundingOptions.model_validate(wrong)


def test_a_sentence_embedding_doubts_what_is_like_nothing_in_the_text(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"no config\.json there"):
        Embedding(tmp_path)

    def closest(self: Embedding, said: Sequence[str], told: Sequence[str]) -> list[float]:
        return [0.9 if "sank" in sentence else 0.1 for sentence in said]

    monkeypatch.setattr(Embedding, "__init__", lambda self, folder: None)
    monkeypatch.setattr(Embedding, "closest", closest)
    grounding = Grounding(GroundingOptions(embedding="somewhere", checks=()))
    assert grounding.check(ITEM, "What?", "The ferry sank one day. Oh no.").supported
    verdict = grounding.check(ITEM, "What?", "The ferry sank one day. People like to eat cake.")
    assert verdict.reasons == ("'People like to eat cake.' is like no sentence of the text (similarity 0.10)",)


def test_an_embedding_compares_sentences_by_their_mean(tmp_path: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["[UNK]", "[PAD]", "the", "ferry", "sank", "cake", "bakes"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(tmp_path)
    torch.manual_seed(0)
    BertModel(
        BertConfig(vocab_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).save_pretrained(tmp_path)
    embedding = Embedding(tmp_path)
    same, other = embedding.closest(["the ferry sank", "cake bakes"], ["the ferry sank", "sank ferry"])
    assert same == pytest.approx(1, abs=1e-5)
    assert other < 0.999
    assert embedding.closest([], ["the"]) == []
    assert embedding.closest(["the"], []) == [1.0]


def test_precision_and_recall_on_the_committed_answers() -> None:
    checked = check_file(ANSWERS, Grounding())
    assert len({one.split for one in checked}) == 2
    assert len(checked) == 620
    # The check was adjusted on "tuning" and never on "test". Floors are just under what is reached.
    on_test = score(one for one in checked if one.split == "test")
    assert (on_test.good, on_test.corrupted) == (160, 159)
    assert on_test.precision >= 0.925
    assert on_test.recall >= 0.855
    assert on_test.kept >= 0.93
    tuned = score(one for one in checked if one.split == "tuning")
    assert tuned.precision >= 0.96
    assert tuned.recall >= 0.96


def test_scores_are_counted_as_they_should_be() -> None:
    def one(good: bool, supported: bool) -> Any:
        from kore_fast.augmentation.measure_grounding import Checked

        return Checked("test", "plain", good, "?", "!", Verdict(supported))

    rows = [one(True, True)] * 6 + [one(True, False)] * 2 + [one(False, False)] * 3 + [one(False, True)]
    counted = score(rows)
    assert (counted.precision, counted.recall, counted.kept) == (3 / 5, 3 / 4, 6 / 8)
    assert score([]).precision == 1.0


def test_the_table_names_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(ANSWERS)])
    told = capsys.readouterr().out
    for kind in ("| role |", "| negation |", "| partial_date |", "| test | 160 | 159 |"):
        assert kind in told


def test_the_template_writers_own_answers_are_nearly_all_supported() -> None:
    items = load_items(QUICKSTART / "items.jsonl", check_images=False)
    writer, grounding = TemplateWriter(load_wordings(QUICKSTART / "wordings.yaml")), Grounding()
    rounds = kept = 0
    for item in items:
        written = [one for variant in range(2) for one in writer.dialogue(item, variant)] + writer.vqa(item)
        rounds += len(written)
        kept += len(grounding.ground(item, written).rounds)
    assert rounds > 600
    assert kept >= 0.97 * rounds
