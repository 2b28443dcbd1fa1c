"""The suite: figures follow from the kept rows, and what is kept is not measured again."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kore_fast.data.old_knowledge import PlainQuestion, Text, read_pictures, read_texts, sample
from kore_fast.data.questions import Question
from kore_fast.errors import KoreError
from kore_fast.evaluation import answering
from kore_fast.evaluation import suite as module
from kore_fast.evaluation.metrics import cover_exact_match, cover_exact_match_corrected, token_f1
from kore_fast.evaluation.suite import Suite, evaluate
from kore_fast.files import read_jsonl, write_jsonl
from kore_fast.journal import Journal

PARTS = {
    "questions.jsonl",
    "capitals.jsonl",
    "drift_chat.jsonl",
    "drift_text.jsonl",
    "pictures.jsonl",
    "descriptions.jsonl",
    "drift_pictures.jsonl",
}


@pytest.fixture
def wanted(knowledge_folder: Path) -> Suite:
    questions = [
        Question(
            question_id=f"q{n}-{form}",
            image="images/red.png",
            text="Where does it live?",
            answer="hills",
            type="home",
            item=f"item-{n}",
            form=form,
        )
        for n in range(3)
        for form in ("by_name", "by_picture")
    ]
    return Suite(
        questions=questions,
        image_root=knowledge_folder,
        capitals=[PlainQuestion("FRA", "What is the capital of France?", "Paris")],
        texts=read_texts(knowledge_folder / "texts.jsonl", held_out=True)[:3],
        text_tokens=16,
        pictures=read_pictures(knowledge_folder / "held_out.jsonl"),
        drift_samples=2,
        max_new_tokens=5,
        batch_size=4,
    )


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(folder / name)]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_figures_follow_from_the_rows(
    tiny_model: nn.Module, tiny_processor: Any, wanted: Suite, tmp_path: Path
) -> None:
    base = copy.deepcopy(tiny_model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    of_base = evaluate(base, base, tiny_processor, wanted, tmp_path / "base")
    found = evaluate(tiny_model, base, tiny_processor, wanted, tmp_path / "m", base_folder=tmp_path / "base")
    assert {p.name for p in (tmp_path / "base").iterdir()} == PARTS
    assert {p.name for p in (tmp_path / "m").iterdir()} == {*PARTS, "held_out_leak.jsonl"}
    changes = rows(tmp_path / "m", "held_out_leak.jsonl")
    assert found["held_out_leak"]["value"] == pytest.approx(mean([row["leak"] for row in changes]))
    assert found["outputs_moved"]["value"] == pytest.approx(mean([row["moved"] for row in changes]))
    for metrics, folder in ((of_base, tmp_path / "base"), (found, tmp_path / "m")):
        answered = rows(folder, "questions.jsonl")
        for row in answered:
            assert row["cem"] == cover_exact_match(row["prediction"], row["answer"])
            assert row["f1"] == token_f1(row["prediction"], row["answer"])
        for form, prefix in (("by_name", "adaptation"), ("by_picture", "by_picture")):
            chosen = [row for row in answered if row["form"] == form]
            assert metrics[f"{prefix}_cem"]["value"] == mean([row["cem"] for row in chosen])
            corrected = [cover_exact_match_corrected(row["prediction"], row["answer"]) for row in chosen]
            assert metrics[f"{prefix}_cem_corrected"]["value"] == mean(corrected)
            assert metrics[f"{prefix}_f1"]["value"] == pytest.approx(mean([row["f1"] for row in chosen]))
            assert metrics[f"{prefix}_cem"]["count"] == 3
        named = rows(folder, "pictures.jsonl")
        assert metrics["picture_naming"]["value"] == mean([row["chosen"] == row["name"] for row in named])
        for row in named:
            assert row["scores"][row["chosen"]] == max(row["scores"].values())
        text = rows(folder, "drift_text.jsonl")
        assert metrics["wikipedia_loss"]["value"] == pytest.approx(mean([row["loss"] for row in text]))
        for name, part in (("kl_text", "text"), ("kl_chat", "chat"), ("kl_picture", "pictures")):
            kept = rows(folder, f"drift_{part}.jsonl")
            assert metrics[name]["value"] == pytest.approx(mean([row["kl"] for row in kept]))
            assert metrics[name]["count"] == len(kept)
            hidden = metrics[name.replace("kl", "hidden")]["value"]
            assert hidden == pytest.approx(mean([row["hidden"] for row in kept]))
        for metric in metrics.values():
            if metric["low"] is not None and metric["high"] is not None:
                assert metric["low"] <= metric["value"] <= metric["high"]  # type: ignore[operator]
    assert [of_base[name]["value"] for name in ("kl_text", "kl_chat", "kl_picture")] == [0, 0, 0]
    assert all(found[name]["value"] > 0 for name in ("kl_text", "kl_chat", "kl_picture"))  # type: ignore[operator]


def test_what_is_kept_is_not_measured_again(
    tiny_model: nn.Module,
    tiny_processor: Any,
    wanted: Suite,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = evaluate(tiny_model, tiny_model, tiny_processor, wanted, tmp_path)
    (tmp_path / "pictures.jsonl").unlink()
    monkeypatch.setattr(answering, "stream_answers", lambda *_, **__: pytest.fail("answered again"))
    monkeypatch.setattr(module, "measure_drift", lambda *_, **__: pytest.fail("measured again"))
    assert evaluate(tiny_model, tiny_model, tiny_processor, wanted, tmp_path) == first
    edited = [{**row, "cem": True} for row in rows(tmp_path, "questions.jsonl")]
    write_jsonl(tmp_path / "questions.jsonl", edited)
    assert evaluate(tiny_model, tiny_model, tiny_processor, wanted, tmp_path)["adaptation_cem"]["value"] == 1


def test_a_failing_part_keeps_those_before(
    tiny_model: nn.Module, tiny_processor: Any, wanted: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "score_choices", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_model, tiny_model, tiny_processor, wanted, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "questions.jsonl",
        "capitals.jsonl",
        "drift_chat.jsonl",
        "drift_text.jsonl",
    }


def test_a_part_that_was_being_answered_keeps_its_batches(
    tiny_model: nn.Module, tiny_processor: Any, wanted: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(wanted, batch_size=2, capitals=(), texts=(), pictures=())
    calm = evaluate(tiny_model, tiny_model, tiny_processor, small, tmp_path / "calm")
    stream = answering.stream_answers

    def stop_after_two(*given: Any, **options: Any) -> Any:
        batches = iter(stream(*given, **options))
        yield next(batches)
        yield next(batches)
        raise KeyboardInterrupt

    monkeypatch.setattr(answering, "stream_answers", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_model, tiny_model, tiny_processor, small, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["questions.partial.jsonl"]
    assert len(rows(tmp_path / "run", "questions.partial.jsonl")) == 4
    answered = []

    def counting(*given: Any, **options: Any) -> Any:
        for batch in stream(*given, **options):
            answered.extend(batch)
            yield batch

    monkeypatch.setattr(answering, "stream_answers", counting)
    assert evaluate(tiny_model, tiny_model, tiny_processor, small, tmp_path / "run") == calm
    assert len(answered) == 2
    names = [path.name for path in (tmp_path / "run").iterdir()]
    assert names == ["questions.jsonl"]
    assert (tmp_path / "run" / names[0]).read_bytes() == (tmp_path / "calm" / names[0]).read_bytes()


@pytest.fixture
def larger(wanted: Suite) -> Suite:
    """Three batches and more of everything."""
    texts = [Text(f"text {n}", "A river is long. " * (1 + n % 3) + str(n)) for n in range(20)]
    pictures = [replace(picture, id=f"{n} {picture.id}") for n in range(20) for picture in wanted.pictures[:2]]
    capitals = [PlainQuestion(f"C{n}", f"What is the capital of country {n}?", "Paris") for n in range(20)]
    return replace(
        wanted, questions=(), texts=texts, text_tokens=64, pictures=pictures, capitals=capitals, drift_samples=20
    )


@pytest.mark.parametrize(
    "part", ["drift_chat.jsonl", "drift_text.jsonl", "pictures.jsonl", "drift_pictures.jsonl", "held_out_leak.jsonl"]
)
def test_a_part_that_was_being_measured_goes_on_and_ends_with_the_same_bytes(
    loud_model: nn.Module,
    tiny_processor: Any,
    larger: Suite,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
) -> None:
    base = copy.deepcopy(loud_model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in loud_model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    evaluate(base, base, tiny_processor, larger, tmp_path / "base")
    append, batches, most = Journal.append, [], 1000

    def counting(journal: Journal, rows: Any) -> None:
        rows = list(rows)
        if rows and journal.path == tmp_path / folder / part.replace(".jsonl", ".partial.jsonl"):
            if len(batches) == most:
                with open(journal.path, "a") as file:
                    file.write('{"asked": "')  # killed while it wrote
                raise KeyboardInterrupt
            batches.append(rows)
        append(journal, rows)

    monkeypatch.setattr(Journal, "append", counting)

    def measure() -> Any:
        return evaluate(loud_model, base, tiny_processor, larger, tmp_path / folder, base_folder=tmp_path / "base")

    folder = "calm"
    calm = measure()
    whole, folder, batches, most = batches, "run", [], 2
    assert len(whole) >= 3
    with pytest.raises(KeyboardInterrupt):
        measure()
    assert not (tmp_path / folder / part).exists()
    before, batches, most = batches, [], 1000
    assert measure() == calm
    assert before + batches == whole
    files = {name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("calm", "run")}
    assert files["run"] == files["calm"]


@pytest.mark.parametrize(
    ("broken", "part"),
    [
        ("language_model.layers.1.mlp.down_proj", "drift_chat"),
        ("vision_tower", "pictures"),
    ],
)
def test_a_diverged_model_is_told_with_its_part(
    tiny_model: nn.Module, tiny_processor: Any, wanted: Suite, tmp_path: Path, broken: str, part: str
) -> None:
    base = copy.deepcopy(tiny_model)
    evaluate(base, base, tiny_processor, wanted, tmp_path / "base")
    # A base that says something, whatever the random one says.
    said = [{**row, "prediction": "Paris."} for row in rows(tmp_path / "base", "capitals.jsonl")]
    write_jsonl(tmp_path / "base" / "capitals.jsonl", said)
    with torch.no_grad():
        for name, parameter in tiny_model.named_parameters():
            if broken in name:
                parameter.fill_(float("nan"))
    with pytest.raises(KoreError, match=rf"kore/{part}\..*not a finite number.*lower learning rate"):
        evaluate(tiny_model, base, tiny_processor, wanted, tmp_path / "kore", base_folder=tmp_path / "base")
    assert not (tmp_path / "kore" / f"{part}.jsonl").exists()


def test_an_empty_part_is_left_out(tiny_model: nn.Module, tiny_processor: Any, wanted: Suite, tmp_path: Path) -> None:
    only_texts = replace(wanted, questions=(), capitals=(), pictures=())
    assert set(evaluate(tiny_model, tiny_model, tiny_processor, only_texts, tmp_path)) == {
        "wikipedia_loss",
        "kl_text",
        "hidden_text",
    }
    assert evaluate(tiny_model, tiny_model, tiny_processor, Suite(), tmp_path / "none") == {}


def test_a_base_that_says_nothing_has_no_drift_on_its_answers(
    tiny_model: nn.Module, tiny_processor: Any, wanted: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        answering, "stream_answers", lambda _, __, prompts, **___: [dict.fromkeys(range(len(prompts)), "")]
    )
    found = evaluate(tiny_model, tiny_model, tiny_processor, wanted, tmp_path)
    assert found["capitals"]["value"] == 0
    assert "kl_chat" not in found
    assert "kl_picture" not in found
    assert "kl_text" in found


def test_sample_keeps_order_and_is_fixed_by_seed() -> None:
    values = list(range(100))
    chosen = sample(values, 10, seed=1)
    assert chosen == sorted(chosen)
    assert len(set(chosen)) == 10
    assert sample(values, 10, seed=1) == chosen
    assert sample(values, 10, seed=2) != chosen
    assert sample(values, None, 1) == sample(values, 100, 1) == sample(values, 101, 1) == values
    assert sample(values, 0, 1) == []
