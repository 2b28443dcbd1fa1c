"""Calibration: old knowledge as batches for the covariance, in every form in which it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from kore_fast.files import read_jsonl, write_jsonl
from kore_fast.progress import Progress
from kore_fast.recipe.schema import CalibrationSource, Recipe

if TYPE_CHECKING:
    from kore_fast.data.conversations import Encoded


def write_answers(
    recipe: Recipe,
    name: str,
    source: CalibrationSource,
    model: nn.Module,
    processor: Any,
    folder: Path,
    progress: Progress,
) -> None:
    """The model's own answers to a chat source's questions, into ``<folder>/<name>.jsonl`` where that is not there."""
    from kore_fast.data.old_knowledge import chat_questions, read_texts
    from kore_fast.evaluation.generation import Prompt, generate_answers

    answered = folder / f"{name}.jsonl"
    if answered.exists():
        return
    assert recipe.old_knowledge.texts is not None, "the recipe's schema checks it"
    texts = read_texts(recipe.resolve(recipe.old_knowledge.texts), held_out=False)
    questions = chat_questions([text.title for text in texts], source.samples, recipe.seed)
    answers = generate_answers(
        model,
        processor,
        [Prompt(question.text) for question in questions],
        max_new_tokens=source.max_tokens,
        bf16=recipe.bf16(),
        progress=progress,
        label=f"the model's own answers for {name}",
    )
    pairs = zip(questions, answers, strict=True)
    write_jsonl(answered, ({"id": q.id, "question": q.text, "answer": a} for q, a in pairs if a))


def calibration_batches(
    recipe: Recipe, name: str, source: CalibrationSource, processor: Any, folder: Path
) -> list[dict[str, Any]]:
    """Keyword arguments of the model; a chat source's from what `write_answers` left in ``folder``."""
    from kore_fast.data.conversations import by_length, collate, tokenizer_of

    assert recipe.covariance is not None
    encoded = calibration_samples(recipe, name, source, processor, folder)
    pad = tokenizer_of(processor).pad_token_id
    return [
        # The head is not needed to see the inputs of the layers below it.
        {**collate([encoded[i] for i in rows], pad, position_weights=source.positions), "logits_to_keep": 1}
        for rows in by_length([len(e) for e in encoded], recipe.covariance.batch_size)
    ]


def calibration_samples(
    recipe: Recipe, name: str, source: CalibrationSource, processor: Any, folder: Path
) -> list[Encoded]:
    """A source's samples; a chat source's from what `write_answers` left in ``folder``."""
    from kore_fast.data.conversations import encode, encode_texts
    from kore_fast.data.old_knowledge import picture_prompts, read_pictures, read_texts, sample
    from kore_fast.evaluation.naming import OPENING, name_phrase

    old = recipe.old_knowledge
    if source.kind == "pictures":
        assert old.pictures is not None, "the recipe's schema checks it"
        pictures = sample(read_pictures(recipe.resolve(old.pictures)), source.samples, recipe.seed)
        prompts = picture_prompts()
        return [
            encode(
                processor,
                [("user", f"<image>\n{prompts[i % len(prompts)]}"), ("assistant", f"{OPENING} {name_phrase(p.name)}.")],
                [p.path],
            )
            for i, p in enumerate(pictures)
        ]
    if source.kind == "text":
        assert old.texts is not None, "the recipe's schema checks it"
        texts = read_texts(recipe.resolve(old.texts), held_out=False)
        chosen = sample([text.text for text in texts], source.samples, recipe.seed)
        return encode_texts(processor, chosen, source.max_tokens)
    rows = [row for _, row in read_jsonl(folder / f"{name}.jsonl")]
    return [encode(processor, [("user", r["question"]), ("assistant", r["answer"])]) for r in rows]


def old_samples(recipe: Recipe, processor: Any, folder: Path) -> list[Encoded]:
    """The samples of every source that weighs something: what is replayed, and what a Fisher is taken over. Held-out
    knowledge is never among them; ``folder`` is the covariance's."""
    assert recipe.covariance is not None, "the recipe's schema checks it"
    return [
        encoded
        for name, source in recipe.covariance.sources.items()
        if source.weight > 0
        for encoded in calibration_samples(recipe, name, source, processor, folder)
    ]
