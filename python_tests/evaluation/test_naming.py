"""Picture naming: the cached scoring against the plain one, the tie rule, and what a broken question file gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kore_fast.errors import DataError, KoreError
from kore_fast.evaluation import naming
from kore_fast.evaluation.naming import (
    OPENING,
    QUESTION,
    name_phrase,
    naming_accuracy,
    score_choices,
)

CHOICES = [["cat", "apple tree", "boots"], ["dog", "owl"], ["key"], ["flag of Peru", "glass", "red car", "pen"]]


@pytest.fixture
def pictures() -> list[Image.Image]:
    colours = ["red", "green", "blue", "black"]
    return [Image.new("RGB", (28, 28), colour) for colour in colours]


def plain_score(model: Any, processor: Any, picture: Image.Image, name: str) -> float:
    """One forward pass over the whole sequence, without a cache."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    before = processor(images=[picture], text=[prompt + OPENING], return_tensors="pt")
    whole = processor(images=[picture], text=[f"{prompt}{OPENING} {name_phrase(name)}."], return_tensors="pt")
    with torch.inference_mode():
        logits = model(**whole).logits[0].double().log_softmax(-1)
    tokens = whole["input_ids"][0]
    start = before["input_ids"].shape[1]
    return float(sum(logits[place - 1, tokens[place]] for place in range(start, len(tokens))))


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_equal_uncached_likelihoods(
    tiny_model: Any, tiny_processor: Any, pictures: list[Image.Image], batch_size: int
) -> None:
    scores = score_choices(
        tiny_model, tiny_processor, pictures, CHOICES, against_blank=False, batch_size=batch_size, bfloat16=False
    )
    for picture, names, row in zip(pictures, CHOICES, scores, strict=True):
        expected = [plain_score(tiny_model, tiny_processor, picture, name) for name in names]
        assert row == pytest.approx(expected, abs=1e-4)


def test_pictures_that_are_too_many_are_halved(
    tiny_model: Any, tiny_processor: Any, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, real = score_choices(tiny_model, tiny_processor, pictures, CHOICES, bfloat16=False), naming._score

    def small(model: Any, processor: Any, images: Any, choices: Any) -> Any:
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, processor, images, choices)

    monkeypatch.setattr(naming, "_score", small)
    told: list[int] = []
    halved = score_choices(tiny_model, tiny_processor, pictures, CHOICES, bfloat16=False, progress=told.append)
    assert told == [2, 2]
    for row, wanted in zip(halved, whole, strict=True):
        assert row == pytest.approx(wanted, abs=1e-4)


def test_the_white_pictures_names_go_in_chunks_which_are_halved_too(
    tiny_model: Any, tiny_processor: Any, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, real = score_choices(tiny_model, tiny_processor, pictures, CHOICES, bfloat16=False), naming._score
    tried: list[list[int]] = []
    room = 4

    def small(model: Any, processor: Any, images: Any, choices: Any) -> Any:
        tried.append([len(names) for names in choices])
        if sum(tried[-1]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, processor, images, choices)

    monkeypatch.setattr(naming, "_score", small)
    halved = score_choices(tiny_model, tiny_processor, pictures, CHOICES, bfloat16=False, batch_size=2)
    # Ten names: no more at once than two pictures may have, and then half as many. The pictures' batches are their own.
    assert tried == [[8], [4], [4], [2], [3, 2], [3], [2], [1], [4]]
    for row, wanted in zip(halved, whole, strict=True):
        assert row == pytest.approx(wanted, abs=1e-4)
    room = 0
    with pytest.raises(KoreError, match="'apple tree' for a white picture: not enough memory"):
        score_choices(tiny_model, tiny_processor, pictures, CHOICES, bfloat16=False)


def test_a_killed_scoring_goes_on_after_its_last_batch(
    tiny_model: Any, tiny_processor: Any, pictures: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(shown: list[Any]) -> list[list[float]]:
        options = {**plain, "progress": told.append, "journal": tmp_path / "pictures.partial.jsonl"}
        return score_choices(tiny_model, tiny_processor, shown, CHOICES, **options)

    told: list[int] = []
    plain: dict[str, Any] = {"bfloat16": False, "batch_size": 1}
    calm = score_choices(tiny_model, tiny_processor, pictures, CHOICES, **plain)
    real, most, done = naming._score, 0, 0

    def killed(*given: Any) -> Any:
        nonlocal done
        if done == most:
            raise KeyboardInterrupt
        done += 1
        return real(*given)

    monkeypatch.setattr(naming, "_score", killed)
    # Ten names in chunks of four, and four pictures: each is scored once, wherever the calls before were killed.
    for stop in (1, 2, 5):
        most = stop
        told.clear()
        with pytest.raises(KeyboardInterrupt):
            score(pictures)
    assert told == [1, 1]
    most = 7
    assert score(pictures) == calm
    assert done == 7
    files = [tmp_path / f"{n}.png" for n in range(4)]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    done, most = 0, 100
    assert score(files) == calm
    assert done == 7  # a journal of other pictures is not taken
    pictures[1].save(files[0])
    changed = score(files)
    assert (changed[0] == calm[0], changed[1:]) == (False, calm[1:])


def test_blank_picture_scores_zero_against_itself(tiny_model: Any, tiny_processor: Any) -> None:
    white = Image.new("RGB", (112, 112), "white")
    (row,) = score_choices(tiny_model, tiny_processor, [white], [["cat", "long name"]], bfloat16=False)
    assert row == pytest.approx([0.0, 0.0], abs=1e-4)


def test_pictures_change_the_scores(tiny_model: Any, tiny_processor: Any, pictures: list[Image.Image]) -> None:
    first, second = score_choices(tiny_model, tiny_processor, pictures[:2], [["cat"], ["cat"]], bfloat16=False)
    assert first != second


def test_model_mode_comes_back_and_progress_counts(
    tiny_model: Any, tiny_processor: Any, pictures: list[Image.Image]
) -> None:
    tiny_model.train()
    finished: list[int] = []
    score_choices(tiny_model, tiny_processor, pictures, CHOICES, batch_size=3, progress=finished.append)
    assert tiny_model.training
    assert finished == [3, 1]


def test_unreadable_picture_and_missing_choices_are_named(
    tiny_model: Any, tiny_processor: Any, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n")
    with pytest.raises(DataError, match=r"broken\.png"):
        score_choices(tiny_model, tiny_processor, [broken], [["cat"]])
    with pytest.raises(DataError, match="picture 1"):
        score_choices(tiny_model, tiny_processor, pictures[:2], [["cat"], []])


def test_naming_accuracy_counts_ties_in_part() -> None:
    assert naming_accuracy([[1.0, 0.0], [0.0, 1.0]], [0, 0]) == 0.5
    assert naming_accuracy([[2.0, 2.0, 2.0, 2.0]], [1]) == 0.25
    assert naming_accuracy([[0.0, 0.0], [3.0, 1.0]], [1, 0]) == 0.75
    with pytest.raises(ValueError, match="no pictures"):
        naming_accuracy([], [])
    with pytest.raises(ValueError):
        naming_accuracy([[1.0]], [])


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("cat", "a cat"),
        ("apple tree", "an apple tree"),
        ("boots", "boots"),
        ("glass", "a glass"),
        ("umbrella", "an umbrella"),
        ("unicorn", "a unicorn"),
        ("flag of Peru", "the flag of Peru"),
    ],
)
def test_name_phrase(name: str, phrase: str) -> None:
    assert name_phrase(name) == phrase
