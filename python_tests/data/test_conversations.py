"""Conversations as tokens: labels on answers only, pictures counted, padding, orders of training."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from kore_fast.data.conversations import (
    ANSWER,
    IGNORE,
    PICTURE,
    PROMPT,
    ConversationDataset,
    Encoded,
    by_length,
    collate,
    encode,
    encode_sample,
    encode_texts,
    slots,
    tokenizer_of,
    training_order,
)
from kore_fast.data.samples import Sample
from kore_fast.errors import DataError

IMAGE_ID = 3


def text_of(processor: Any, ids: torch.Tensor) -> str:
    return tokenizer_of(processor).decode(ids, skip_special_tokens=False)


def labelled(processor: Any, encoded: Encoded) -> str:
    return text_of(processor, encoded.labels[encoded.labels != IGNORE])


def test_labels_are_the_answers_with_their_end_marks(tiny_processor: Any) -> None:
    encoded = encode(
        tiny_processor, [("user", "Who?"), ("assistant", "Me."), ("user", "Sure?"), ("assistant", "Yes, I am.")]
    )
    assert labelled(tiny_processor, encoded) == "Me.<|im_end|>\nYes, I am.<|im_end|>\n"
    prompt = text_of(tiny_processor, encoded.input_ids[encoded.kinds == PROMPT])
    assert prompt == (
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    )
    whole = tiny_processor.apply_chat_template(
        [
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": "Me."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes, I am."},
        ],
        tokenize=False,
    )
    assert text_of(tiny_processor, encoded.input_ids) == whole
    assert encoded.pixel_values is None


def test_a_system_text_stands_before_the_conversation_and_is_no_answer(tiny_processor: Any, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]
    sample = Sample.model_validate({"id": "s", "conversations": turns, "system": "Be brief."})
    encoded = encode_sample(tiny_processor, sample, tmp_path)
    assert text_of(tiny_processor, encoded.input_ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert labelled(tiny_processor, encoded) == "Me.<|im_end|>\n"


def test_pictures_take_their_tokens(tiny_processor: Any, knowledge_folder: Path) -> None:
    paths = [knowledge_folder / "images" / f"{colour}.png" for colour in ("red", "blue")]
    encoded = encode(tiny_processor, [("user", "<image>\nand <image>\nsay"), ("assistant", "Red, blue.")], paths)
    assert int((encoded.input_ids == IMAGE_ID).sum()) == int((encoded.kinds == PICTURE).sum()) == 8
    assert encoded.pixel_values is not None
    assert encoded.pixel_values.shape == (2, 3, 28, 28)
    assert labelled(tiny_processor, encoded) == "Red, blue.<|im_end|>\n"
    for pixels, path in zip(encoded.pixel_values, paths, strict=True):
        alone = encode(tiny_processor, [("user", "<image>"), ("assistant", "x")], [path]).pixel_values
        assert alone is not None
        assert torch.equal(pixels, alone[0])


def test_prompt_for_generation_is_the_training_prompt(tiny_processor: Any) -> None:
    prompt = encode(tiny_processor, [("user", "Who?")], answer_follows=True)
    trained = encode(tiny_processor, [("user", "Who?"), ("assistant", "Me.")])
    assert torch.equal(prompt.input_ids, trained.input_ids[: len(prompt)])
    assert (trained.kinds[len(prompt) :] == ANSWER).all()
    assert not (prompt.labels != IGNORE).any()


@pytest.mark.parametrize(
    ("text", "pictures", "named"),
    [
        ("<image>\n<image>\nx", 1, "1 picture(s), but more <image> marks"),
        ("<image>\nx", 2, "2 picture(s), but only 1 <image> mark(s)"),
        ("x", 1, "1 picture(s), but only 0 <image>"),
    ],
)
def test_marks_and_pictures_must_agree(
    tiny_processor: Any, knowledge_folder: Path, text: str, pictures: int, named: str
) -> None:
    with pytest.raises(DataError) as caught:
        encode(
            tiny_processor, [("user", text), ("assistant", "y")], [knowledge_folder / "images" / "red.png"] * pictures
        )
    assert named in str(caught.value)


def sample(image: str | list[str], value: str = "<image>\nx") -> Sample:
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "y"}]
    return Sample.model_validate({"id": "s-7", "image": image, "conversations": turns})


def test_errors_name_the_sample(tiny_processor: Any, knowledge_folder: Path, tmp_path: Path) -> None:
    whole = (knowledge_folder / "images" / "red.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:-30])
    (tmp_path / "text.png").write_text("no picture")
    cases: list[tuple[str | list[str], str]] = [
        ("gone.png", r"sample s-7: .*gone\.png: no such picture"),
        ("cut.png", r"sample s-7: .*cut\.png: not a whole picture"),
        ("text.png", r"sample s-7: .*text\.png: not a whole picture"),
        (["cut.png", "cut.png"], r"sample s-7: "),
    ]
    for image, named in cases:
        with pytest.raises(DataError, match=named):
            encode_sample(tiny_processor, sample(image), tmp_path)


def test_template_that_rewrites_earlier_turns_is_refused(tiny_processor: Any, monkeypatch: Any) -> None:
    template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    monkeypatch.setattr(tiny_processor, "chat_template", template)
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    with pytest.raises(DataError, match="changes earlier turns"):
        encode(tiny_processor, turns)


def test_padding_on_either_side(tiny_processor: Any) -> None:
    short = encode(tiny_processor, [("user", "a"), ("assistant", "b")])
    long = encode(tiny_processor, [("user", "a, and more"), ("assistant", "b, and more")])
    for side in ("left", "right"):
        batch = collate([short, long], 99, side=side, labels=True)  # type: ignore[arg-type]
        n, width = len(short), len(long)
        assert batch["input_ids"].shape == (2, width)
        real = slice(width - n, width) if side == "left" else slice(0, n)
        assert torch.equal(batch["input_ids"][0, real], short.input_ids)
        assert torch.equal(batch["labels"][0, real], short.labels)
        assert int(batch["attention_mask"][0].sum()) == int(batch["attention_mask"][0, real].sum()) == n
        assert int((batch["input_ids"][0] == 99).sum()) == width - n
        assert int((batch["labels"][0] != IGNORE).sum()) == int((short.labels != IGNORE).sum())
        assert torch.equal(batch["input_ids"][1], long.input_ids)
        assert batch["attention_mask"][1].all()
    assert "pixel_values" not in batch
    assert "labels" not in collate([short], 0)


def test_pictures_stay_in_the_order_of_their_rows(tiny_processor: Any, knowledge_folder: Path) -> None:
    def shown(colour: str) -> Encoded:
        return encode(
            tiny_processor,
            [("user", "<image>\nx"), ("assistant", "y")],
            [knowledge_folder / "images" / f"{colour}.png"],
        )

    plain = encode(tiny_processor, [("user", "x"), ("assistant", "y")])
    red, blue = shown("red"), shown("blue")
    batch = collate([blue, plain, red], 0)
    assert red.pixel_values is not None
    assert blue.pixel_values is not None
    assert torch.equal(batch["pixel_values"], torch.cat([blue.pixel_values, red.pixel_values]))


def test_position_weights(tiny_processor: Any, knowledge_folder: Path) -> None:
    encoded = encode(
        tiny_processor, [("user", "<image>\nx"), ("assistant", "y")], [knowledge_folder / "images" / "red.png"]
    )
    plain = encode(tiny_processor, [("user", "x"), ("assistant", "y")])
    weights = collate([encoded, plain], 0, position_weights={"picture": 0.25, "prompt": 0})["token_weights"]
    wanted = torch.tensor([0.0, 0.25, 1.0])[encoded.kinds.long()]
    assert torch.equal(weights[0], wanted)
    assert not weights[1, len(plain) :].any()
    assert torch.equal(collate([plain], 0, position_weights={})["token_weights"], torch.ones(1, len(plain)))
    with pytest.raises(DataError, match="anser"):
        collate([plain], 0, position_weights={"anser": 1})  # type: ignore[dict-item]


def test_batches_by_length() -> None:
    lengths = [3, 9, 1, 9, 5, 2, 8]
    batches = by_length(lengths, 3)
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths, reverse=True)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert by_length([], 3) == []


@pytest.mark.parametrize(("count", "size", "steps"), [(10, 5, 20), (7, 3, 21), (5, 8, 5), (200, 4, 100)])
def test_every_epoch_has_every_sample_once(count: int, size: int, steps: int) -> None:
    """Batches of a chunk may cross an epoch's end; counted over the run no sample is ahead by more than one."""
    lengths = [(7 * i) % 13 for i in range(count)]
    order = training_order(lengths, size, steps, seed=1)
    assert len(order) == steps
    assert all(len(batch) == size for batch in order)
    seen = Counter(i for batch in order for i in batch)
    low, extra = divmod(size * steps, count)
    assert set(seen) <= set(range(count))
    assert sorted(seen[i] for i in range(count)) == [low] * (count - extra) + [low + 1] * extra


def test_order_is_fixed_by_seed_and_changes_between_epochs() -> None:
    lengths = [(5 * i) % 11 for i in range(40)]
    order = training_order(lengths, 4, 40, seed=3)
    assert training_order(lengths, 4, 40, seed=3) == order
    assert training_order(lengths, 4, 40, seed=4) != order
    # What a run trains on first does not depend on how long it is, where chunks are whole.
    assert training_order(lengths, 4, 16, seed=3) == order[:16]
    assert {frozenset(b) for b in order[:10]} != {frozenset(b) for b in order[10:20]}


def test_padding_is_small() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 200, (300,), generator=generator).tolist()

    def waste(batches: list[list[int]]) -> float:
        real = sum(lengths[i] for batch in batches for i in batch)
        return sum(max(lengths[i] for i in batch) * len(batch) for batch in batches) / real - 1

    plain = [list(range(start, start + 6)) for start in range(0, 300, 6)]
    assert waste(training_order(lengths, 6, 50, seed=0)) < 0.25 * waste(plain)


def test_dataset_follows_its_order(tiny_processor: Any, knowledge_folder: Path) -> None:
    samples = [sample("images/red.png", f"<image>\n{'x' * n}").model_copy(update={"id": f"s{n}"}) for n in range(3)]
    dataset = ConversationDataset(tiny_processor, samples, knowledge_folder)
    lengths = dataset.lengths()
    assert lengths == [lengths[0], lengths[0] + 1, lengths[0] + 2]
    dataset.order = [2, 0, 2, 1]
    assert [len(dataset[i]) for i in range(len(dataset))] == [lengths[i] for i in dataset.order]


def test_a_mark_in_a_passage_is_no_picture(tiny_processor: Any) -> None:
    (marked,) = encode_texts(tiny_processor, ["A <image>river."], 50)
    (plain,) = encode_texts(tiny_processor, ["A river."], 50)
    assert torch.equal(marked.input_ids, plain.input_ids)


def test_what_fills_a_step_teaches_nothing(tiny_processor: Any, knowledge_folder: Path) -> None:
    samples = [sample("images/red.png", f"<image>\n{'x' * n}").model_copy(update={"id": f"s{n}"}) for n in range(3)]
    dataset = ConversationDataset(tiny_processor, samples, knowledge_folder)
    dataset.order = slots([[2, 1, 0], [0, 2, 1]], dataset.lengths(), 2, 2)
    assert dataset.order == [2, 1, 0, ~0, 0, 2, 1, ~0]
    real, filler = dataset[2], dataset[3]
    assert torch.equal(filler.input_ids, real.input_ids)
    assert not (filler.labels != IGNORE).any()
    assert torch.equal(filler.kinds == PICTURE, real.kinds == PICTURE)
    assert slots([[2, 1, 0]], [1, 2, 3], 3, 1) == [2, 1, 0]
