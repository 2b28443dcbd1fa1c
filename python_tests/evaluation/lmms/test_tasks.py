"""Our own tasks, by hand: what is asked, turn by turn, and what an answer is worth."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from kore_fast.evaluation.lmms.tasks.evoke import evoke
from kore_fast.evaluation.lmms.tasks.mmdu import mmdu
from kore_fast.evaluation.lmms.tasks.ocrvqa import ocrvqa


def test_evoke() -> None:
    doc = {"text": "Who built it?", "answer": "Ada Orrery", "image": Image.new("L", (2, 2))}
    assert evoke.doc_to_text(doc) == "Who built it?"
    assert [image.mode for image in evoke.doc_to_visual(doc)] == ["RGB"]
    # Two of four words are right, and both of the truth's are said: 2 · 2 / (4 + 2).
    found = evoke.process_results(doc, ["Ada Orrery built it."])
    assert found == {"cem": 1.0, "cem_corrected": 1.0, "f1": pytest.approx(2 / 3)}
    assert evoke.process_results(doc, ["Adam"]) == {"cem": 0.0, "cem_corrected": 0.0, "f1": 0.0}
    # With a sign at its edge a truth does not match even itself in the reference, and one of nothing matches all.
    for truth, said, cem, corrected in (("$5", "$5", 0.0, 1.0), ("the", "no idea", 1.0, 0.0)):
        found = evoke.process_results({**doc, "answer": truth}, [said])
        assert (found["cem"], found["cem_corrected"]) == (cem, corrected)


@pytest.mark.parametrize(
    ("answer", "said", "right"),
    [
        ("Travel", " travel ", True),
        ("Travel", "Travel.", False),
        ("['Ann Reed', 'A. Reed']", "a. reed", True),
        ("[Untitled]", "[untitled]", True),
        ("No", "No, it is new", False),
    ],
)
def test_ocrvqa(answer: str, said: str, right: bool) -> None:
    assert ocrvqa.process_results({"answer": answer}, [said]) == {"exact_match": float(right)}


def test_ocrvqa_asks_for_a_phrase() -> None:
    found = ocrvqa.doc_to_text({"question": "Who?"}, {"post_prompt": "\nIn a word."})
    assert found == "Who?\nIn a word."


@pytest.fixture
def doc() -> dict[str, Any]:
    return {
        "questions": ["What are <ImageHere> and <ImageHere>?", "And then?", "And <ImageHere>?"],
        "answers": ["r1", "r2", "r3"],
        "images": [Image.new("RGB", (n, 1)) for n in (1, 2, 3)],
    }


def test_mmdu_goes_on_with_the_conversation(doc: dict[str, Any]) -> None:
    assert mmdu.doc_to_text(doc) == "What are <image> and <image>?"
    assert [image.width for image in mmdu.doc_to_visual(doc)] == [1, 2]
    images, turns, ended, _, _ = mmdu.doc_to_text(doc, round_idx=1, previous_output=["a1"])
    assert [image.width for image in images] == [1, 2]
    assert turns == [("user", "What are <image> and <image>?"), ("assistant", "a1"), ("user", "And then?")]
    assert not ended
    images, turns, ended, _, _ = mmdu.doc_to_text(doc, round_idx=2, previous_output=["a1", "an <image>"])
    assert [image.width for image in images] == [1, 2, 3]
    assert turns[-2:] == [("assistant", "an "), ("user", "And <image>?")]
    assert sum(text.count("<image>") for _, text in turns) == len(images)
    assert mmdu.doc_to_text(doc, round_idx=3, previous_output=["a1", "a2", "a3"])[2:4] == (True, ["a1", "a2", "a3"])


def test_mmdu_scores_every_turn(doc: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(['Good.\n{"Creativity": 3, "Overall Score": 8}', "{'Overall Score': 12}", "I cannot say."])
    tasks: list[str] = []

    def judge(task: str) -> str:
        tasks.append(task)
        return next(said)

    monkeypatch.setattr(mmdu, "_judge", judge)
    found = mmdu.process_results(doc, [["a1", "a2", "a3"]])
    assert found["overall_score"] == [80.0, 100.0, None]
    assert found["creativity"] == [30.0, None, None]
    assert "<reference>\nr2\n</reference>\n\n<answer>\na2\n</answer>" in tasks[1]
    # Of (80, 100) and a conversation of one turn with 0: over the turns, not over the conversations.
    assert mmdu.mean_of_turns([found["overall_score"], [0.0]]) == 60
    assert mmdu.mean_of_turns([[None]]) is None
