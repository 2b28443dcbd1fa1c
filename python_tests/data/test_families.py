"""LLaVA-1.5's and Qwen2.5-VL's chat formats and pictures: tokens, labels, batches, and what the model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kore_fast.data.conversations import (
    ANSWER,
    IGNORE,
    PICTURE,
    PROMPT,
    collate,
    encode,
    encode_texts,
    tokenizer_of,
)
from kore_fast.evaluation.generation import Prompt, generate_answers
from kore_fast.modules.loading import load_model, load_processor
from python_tests import families


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.build_llava(tmp_path_factory.mktemp("families") / "llava")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.build_qwen(tmp_path_factory.mktemp("families") / "qwen")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of different sizes: 2 × 2 and 2 × 4 tokens in Qwen."""
    folder = tmp_path_factory.mktemp("pictures")
    sizes = {"red": (56, 56), "green": (112, 56)}
    for colour, size in sizes.items():
        Image.new("RGB", size, colour).save(folder / f"{colour}.png")
    return [folder / f"{colour}.png" for colour in sizes]


def shown(processor: Any, encoded: Any, kind: int) -> str:
    return tokenizer_of(processor).decode(encoded.input_ids[encoded.kinds == kind], skip_special_tokens=False)


def test_llava_s_template_gets_lists_and_closes_its_answers(llava: Path, pictures: list[Path]) -> None:
    processor = load_processor(llava)
    turns = [("user", "<image>\nWhat?"), ("assistant", "Red."), ("user", "Sure?"), ("assistant", "Yes.")]
    encoded = encode(processor, turns, pictures[:1])
    tokenizer = tokenizer_of(processor)
    assert int((encoded.kinds == PICTURE).sum()) == 4
    learned = encoded.labels[encoded.labels != IGNORE].tolist()
    # What follows "ASSISTANT:" in the whole text: a space's mark with its letter, and the end of the sequence.
    end, R = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("▁R")
    assert learned[:2] == [R, tokenizer.convert_tokens_to_ids("e")]
    assert learned.count(end) == 2
    assert learned[-1] == end
    whole = tokenizer("USER: What? ASSISTANT: Red.")["input_ids"]
    alone = encode(processor, [("user", "What?"), ("assistant", "Red.")]).input_ids.tolist()
    assert alone == [*whole, end]
    prompt = encode(processor, [("user", "<image>\nWhat?")], pictures[:1], answer_follows=True)
    assert torch.equal(prompt.input_ids, encoded.input_ids[: len(prompt)])
    assert prompt.input_ids[0] == tokenizer.bos_token_id
    assert (encoded.input_ids == tokenizer.bos_token_id).sum() == 1
    # Llama's tokenizer puts a space's mark after every special token.
    assert "USER: <image><image><image><image> \nWhat? ASSISTANT:" in tokenizer.decode(prompt.input_ids)
    (text,) = encode_texts(processor, ["A river."], 4)
    assert text.input_ids.tolist() == tokenizer("A river.")["input_ids"][:4]


def test_qwen_s_pictures_keep_their_size(qwen: Path, pictures: list[Path]) -> None:
    processor = load_processor(qwen)
    first, second = (
        encode(processor, [("user", "<image>\nWhat?"), ("assistant", "Red.")], [path]) for path in pictures
    )
    assert shown(processor, first, ANSWER) == "Red.<|im_end|>\n"
    assert shown(processor, first, PROMPT) == (
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n<|vision_start|><|vision_end|>What?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert [int((e.kinds == PICTURE).sum()) for e in (first, second)] == [4, 8]
    batch = collate([first, second], 0, labels=True)
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 8]]
    assert batch["pixel_values"].shape[0] == 16 + 32
    if "mm_token_type_ids" in batch:
        assert torch.equal(batch["mm_token_type_ids"], (batch["input_ids"] == 5).long())


def test_max_pixels_bounds_a_picture(qwen: Path, pictures: list[Path]) -> None:
    processor = load_processor(qwen, max_pixels=4 * 28 * 28)
    encoded = encode(processor, [("user", "<image>\nWhat?"), ("assistant", "Red.")], pictures[1:])
    assert 0 < int((encoded.kinds == PICTURE).sum()) <= 4


@pytest.mark.parametrize("family", ["llava", "qwen"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_computes_what_its_rows_compute(
    family: str, side: Any, llava: Path, qwen: Path, pictures: list[Path]
) -> None:
    """Padding, positions and pictures of a batch: each row's logits are those that it has alone."""
    folder = {"llava": llava, "qwen": qwen}[family]
    processor, model = load_processor(folder), load_model(folder)
    rows = [
        encode(processor, [("user", f"<image>\n{question}"), ("assistant", "Red.")], [path])
        for question, path in zip(("What?", "What do you see here?"), pictures, strict=True)
    ]
    with torch.no_grad():
        together = model(**collate(rows, 0, side=side)).logits
        for index, row in enumerate(rows):
            alone = model(**collate([row], 0)).logits[0]
            place = slice(-len(row), None) if side == "left" else slice(0, len(row))
            torch.testing.assert_close(together[index, place], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_generation_is_the_same_alone_and_in_a_batch(
    family: str, llava: Path, qwen: Path, pictures: list[Path]
) -> None:
    folder = {"llava": llava, "qwen": qwen}[family]
    processor, model = load_processor(folder), load_model(folder)
    prompts = [Prompt("What?", pictures[0]), Prompt("Who is it?"), Prompt("What do you see here?", pictures[1])]
    together = generate_answers(model, processor, prompts, max_new_tokens=6)
    assert together == [generate_answers(model, processor, [p], max_new_tokens=6)[0] for p in prompts]
