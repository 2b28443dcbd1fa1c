"""Measure on pictures never trained on whether the tiny VLM sees: naming among four, beside a shuffled control.

    python recipes/tiny_vlm/evaluate_grounding.py --model DIR

Writes grounding.json beside this file; the same model gives the same file.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from kore_fast.data.old_knowledge import read_pictures
from kore_fast.evaluation.naming import QUESTION, naming_accuracy, score_choices
from kore_fast.files import read_jsonl, write_json
from kore_fast.intervals import mean_interval, wilson_interval

HERE = Path(__file__).resolve().parent
PICTURES = HERE / "pictures"


def derangement(count: int, seed: int = 0) -> list[int]:
    """An order of ``count`` places in which none stays where it was (one cycle through all of them)."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    result = [0] * count
    for place, following in zip(order, order[1:] + order[:1], strict=True):
        result[place] = following
    return result


def share(successes: int, count: int) -> dict[str, Any]:
    """A share with its 95 % Wilson interval."""
    low, high = wilson_interval(successes, count)
    return {"value": round(successes / count, 4), "low": round(low, 4), "high": round(high, 4), "count": count}


def mean(values: Sequence[float]) -> dict[str, Any]:
    """A mean with its 95 % interval."""
    low, high = mean_interval(values)
    average = math.fsum(values) / len(values)
    return {"value": round(average, 4), "low": round(low, 4), "high": round(high, 4), "count": len(values)}


def names_it(answer: str, name: str) -> bool:
    """Whether the whole name stands in the answer, word-bounded, case and a plural "s" aside."""
    return re.search(rf"\b{re.escape(name.lower())}s?\b", answer.lower()) is not None


def answer_openly(
    model: Any, processor: Any, images: Sequence[Image.Image], progress: Callable[[int], object], batch_size: int = 20
) -> list[str]:
    """Greedy answers to "What is in the picture?", at most 16 tokens."""
    import torch

    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    answers: list[str] = []
    for start in range(0, len(images), batch_size):
        batch = list(images[start : start + batch_size])
        inputs = processor(images=batch, text=[prompt] * len(batch), return_tensors="pt")
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        output = output[:, inputs["input_ids"].shape[1] :]
        answers.extend(text.strip() for text in processor.tokenizer.batch_decode(output, skip_special_tokens=True))
        progress(len(batch))
    return answers


def evaluate(model: Any, processor: Any, pictures: Path = PICTURES) -> dict[str, Any]:
    """All figures of the card's grounding table, with some of the open answers."""
    questions = read_pictures(pictures / "held_out.jsonl", need_choices=True)
    trained = {row["id"]: row["name_trained"] for _, row in read_jsonl(pictures / "held_out.jsonl")}
    calibration = [row for _, row in read_jsonl(pictures / "calibration.jsonl")]
    images = [Image.open(question.path).convert("RGB") for question in questions]
    order = derangement(len(questions))
    shuffled = [images[place] for place in order]
    answers = [question.answer for question in questions]
    choices = [question.choices for question in questions]

    # Whether to subtract the white picture's score is decided on training pictures.
    generator = random.Random(0)
    names = sorted({row["name"] for row in calibration})
    known_choices = [
        [row["name"], *generator.sample([name for name in names if name != row["name"]], 3)] for row in calibration
    ]
    known_images = [Image.open(pictures / row["image"]).convert("RGB") for row in calibration]

    bar = tqdm(total=2 * len(known_images) + 6 * len(images), desc="grounding", unit="picture")

    def accuracy(
        shown: Sequence[Image.Image], named: Any, right: Sequence[int], blank: bool
    ) -> tuple[float, list[bool]]:
        scores = score_choices(model, processor, shown, named, against_blank=blank, progress=bar.update)
        return naming_accuracy(scores, right), [
            max(row) == row[place] for row, place in zip(scores, right, strict=True)
        ]

    zero = [0] * len(known_images)
    result: dict[str, Any] = {
        "training_pictures_4way": {
            "against_blank": round(accuracy(known_images, known_choices, zero, True)[0], 4),
            "plain": round(accuracy(known_images, known_choices, zero, False)[0], 4),
        }
    }
    count = len(questions)
    _, right = accuracy(images, choices, answers, True)
    _, control = accuracy(shuffled, choices, answers, True)
    _, plain = accuracy(images, choices, answers, False)
    _, plain_control = accuracy(shuffled, choices, answers, False)
    result["chance"] = 0.25
    result["held_out_4way"] = share(sum(right), count)
    result["held_out_4way_shuffled"] = share(sum(control), count)
    result["held_out_4way_plain"] = share(sum(plain), count)
    result["held_out_4way_plain_shuffled"] = share(sum(plain_control), count)
    for label, wanted in (("name_in_training", True), ("name_not_in_training", False)):
        part = [hit for hit, question in zip(right, questions, strict=True) if trained[question.id] is wanted]
        result[f"held_out_4way_{label}"] = share(sum(part), len(part))

    single = [[question.name] for question in questions]
    loss = [-row[0] for row in score_choices(model, processor, images, single, against_blank=False)]
    other = [-row[0] for row in score_choices(model, processor, shuffled, single, against_blank=False)]
    result["answer_loss"] = mean(loss)
    result["answer_loss_shuffled"] = mean(other)
    result["answer_loss_gain"] = mean([b - a for a, b in zip(loss, other, strict=True)])

    said = answer_openly(model, processor, images, bar.update)
    named = [names_it(answer, question.name) for answer, question in zip(said, questions, strict=True)]
    # The control for open naming: the same answers held against another picture's name.
    by_chance = [names_it(said[place], question.name) for place, question in zip(order, questions, strict=True)]
    result["open_naming"] = share(sum(named), count)
    result["open_naming_shuffled"] = share(sum(by_chance), count)
    bar.close()
    rows = list(zip(questions, said, named, strict=True))
    for label, wanted in (("open_right", True), ("open_wrong", False)):
        picked = [row for row in rows if row[2] is wanted]
        picked = random.Random(0).sample(picked, min(10, len(picked)))
        result[label] = [{"name": question.name, "answer": answer} for question, answer, _ in picked]
    return result


def main() -> None:
    """Load the model, measure, write and print."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="the folder that build.py made")
    parser.add_argument("--output", type=Path, default=HERE / "grounding.json")
    arguments = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(arguments.model).eval()
    processor = AutoProcessor.from_pretrained(arguments.model)
    result = evaluate(model, processor)
    write_json(arguments.output, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
