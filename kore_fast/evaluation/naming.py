"""Picture naming: which of a few names a vision-language model finds most likely for a picture."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from kore_fast.errors import DataError
from kore_fast.evaluation.batches import BatchSize, Kept
from kore_fast.files import quick_digest

QUESTION = "What is in the picture?"
OPENING = "The picture shows"


def name_phrase(name: str) -> str:
    """The name as it stands in a sentence: with "a" or "an" before a singular, "the" before a flag."""
    last = name.split()[-1]
    if name.startswith("flag of "):
        return f"the {name}"
    if last.endswith("s") and not last.endswith(("ss", "us", "is")):
        return name
    vowel = name[0].lower() in "aeiou" and not name.lower().startswith(("uni", "use", "eu", "one"))
    return f"{'an' if vowel else 'a'} {name}"


def score_choices(
    model: Any,
    processor: Any,
    pictures: Sequence[Any],
    choices: Sequence[Sequence[str]],
    *,
    against_blank: bool = True,
    batch_size: int = 16,
    bfloat16: bool = True,
    progress: Callable[[int], object] | None = None,
    journal: Path | None = None,
) -> list[list[float]]:
    """Log-likelihood, in nats, of each choice as the answer "The picture shows a …." to "What is in the picture?".

    Each picture goes through the model once; its choices continue from the repeated key-value cache.

    Args:
        model: a LLaVA-like model (PEFT-wrapped or not); put into evaluation mode for the call, and back after it.
        processor: its processor.
        pictures: PIL images, or paths of image files.
        choices: for each picture, the names to score.
        against_blank: subtract the log-likelihood of the same answer for a white picture, so that a name which is
            likely whatever the picture shows has no advantage (pointwise mutual information).
        batch_size: pictures at a time, halved where memory runs out, as are the names that are scored for the white
            picture at a time (of these as many as such a batch of pictures has); the scores do not depend on it,
            beyond rounding.
        bfloat16: compute under bfloat16 autocast (about twice as fast on a CPU that has it).
        progress: called with the number of pictures just finished.
        journal: where scores are kept batch by batch, so that a killed call goes on and gives what an uninterrupted one
            does. It is bound to pictures and choices, not to the model: one file for each.

    Returns:
        One list of scores a picture, in the order of its choices.

    Raises:
        DataError: a picture cannot be read, or has no choices; the journal cannot be read or written.
        KoreError: memory does not suffice for one picture, or for one name; says which. With a journal, also for scores
            that are not finite.
    """
    import torch

    if len(pictures) != len(choices):
        raise ValueError(f"{len(pictures)} pictures but {len(choices)} lists of choices")
    for index, names in enumerate(choices):
        if not names:
            raise DataError(f"picture {index} has no choices to score")
    done = Kept(
        journal,
        lambda: [[*map(_digest, pictures)], [*map(list, choices)], against_blank, batch_size, bfloat16],
    )
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    precision = torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext()
    try:
        with torch.inference_mode(), precision:
            size = BatchSize(batch_size)
            blank: dict[str, float] = {}
            if against_blank and choices:
                distinct = sorted({name for names in choices for name in names})
                white = _white_picture()

                def score_white(rows: Sequence[int]) -> list[float]:
                    return _score(model, processor, [white], [[distinct[i] for i in rows]])[0]

                # The key-value cache is repeated for each name: no more of them than a batch of pictures has.
                at_once = BatchSize(size.size * max(map(len, choices)))
                for rows, values in done.run(
                    at_once, range(len(distinct)), score_white, lambda i: f"{distinct[i]!r} for a white picture"
                ):
                    blank |= {distinct[i]: value for i, value in zip(rows, values, strict=True)}

            def score(rows: Sequence[int]) -> list[list[float]]:
                images = [_open(pictures[i]) for i in rows]
                return _score(model, processor, images, [choices[i] for i in rows])

            result: list[list[float]] = []
            for rows, scores in done.run(size, range(len(pictures)), score, lambda i: f"picture {i}"):
                for i, row in zip(rows, scores, strict=True):
                    result.append([value - blank.get(name, 0.0) for value, name in zip(row, choices[i], strict=True)])
                if progress is not None:
                    progress(len(rows))
    finally:
        model.train(training)
    return result


def naming_accuracy(scores: Sequence[Sequence[float]], answers: Sequence[int]) -> float:
    """Share of pictures whose right name has the highest score; a tie counts as its part of the best (1/2 for two).

    Raises:
        ValueError: no pictures, or lists of different length.
    """
    if not scores:
        raise ValueError("no pictures: the accuracy of nothing is undefined")
    total = 0.0
    for row, answer in zip(scores, answers, strict=True):
        best = max(row)
        if row[answer] == best:
            total += 1 / sum(score == best for score in row)
    return total / len(scores)


def _white_picture() -> Any:
    from PIL import Image

    return Image.new("RGB", (112, 112), "white")


def _digest(picture: Any) -> str:
    if isinstance(picture, str | Path):
        return quick_digest(picture)
    return hashlib.sha256(f"{picture.mode} {picture.size}".encode() + picture.tobytes()).hexdigest()


def _open(picture: Any) -> Any:
    from PIL import Image

    if not isinstance(picture, str | Path):
        return picture.convert("RGB")
    try:
        with Image.open(picture) as image:
            return image.convert("RGB")
    except OSError as error:
        raise DataError(f"{picture}: not a readable image ({error}); replace the file") from None


def _score(model: Any, processor: Any, images: Sequence[Any], choices: Sequence[Sequence[str]]) -> list[list[float]]:
    """Log-likelihoods of the choices; all prompts are alike, so no prefix is padded."""
    import torch

    tokenizer = processor.tokenizer
    device = next(model.parameters()).device
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=list(images), text=[prompt + OPENING] * len(images), return_tensors="pt").to(device)
    opening = tokenizer(OPENING, add_special_tokens=False)["input_ids"]
    endings = []
    for names in choices:
        for name in names:
            tokens = tokenizer(f"{OPENING} {name_phrase(name)}.", add_special_tokens=False)["input_ids"]
            if tokens[: len(opening)] != opening:
                raise DataError(f"the tokenizer joins {OPENING!r} with what follows; this scoring needs it apart")
            endings.append(tokens[len(opening) :])
    counts = torch.tensor([len(names) for names in choices], device=device)
    owner = torch.repeat_interleave(torch.arange(len(choices), device=device), counts)

    # Only the logits after the prefix are needed from the first pass.
    first = model(**inputs, use_cache=True, logits_to_keep=1)
    cache = first.past_key_values
    if hasattr(cache, "batch_select_indices"):
        cache.batch_select_indices(owner)
    length = max(len(tokens) for tokens in endings)
    pad = tokenizer.pad_token_id
    ending = torch.tensor([tokens + [pad] * (length - len(tokens)) for tokens in endings], device=device)
    present = torch.tensor([[1] * len(tokens) + [0] * (length - len(tokens)) for tokens in endings], device=device)
    before = torch.ones(len(endings), inputs["input_ids"].shape[1], dtype=present.dtype, device=device)
    logits = first.logits[:, -1:].index_select(0, owner)
    if length > 1:
        rest = model(
            input_ids=ending[:, :-1],
            attention_mask=torch.cat([before, present[:, :-1]], dim=1),
            past_key_values=cache,
            use_cache=True,
        )
        logits = torch.cat([logits, rest.logits], dim=1)
    each = -torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ending.flatten(), reduction="none").view_as(
        ending
    )
    totals = (each * present).sum(dim=1).tolist()
    result, start = [], 0
    for names in choices:
        result.append(totals[start : start + len(names)])
        start += len(names)
    return result
