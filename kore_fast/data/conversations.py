"""Samples → model inputs: tokens, labels on the answers only, pictures; and batches of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch.utils.data import Dataset

from kore_fast.data.samples import Sample
from kore_fast.errors import DataError

IMAGE = "<image>"
IGNORE = -100
# What a position is, for weighting them apart: text of a question (with the chat's own marks), a picture's token, or
# text of an answer.
PROMPT, PICTURE, ANSWER = 0, 1, 2

Position = Literal["prompt", "picture", "answer"]
_KINDS: dict[str, int] = {"prompt": PROMPT, "picture": PICTURE, "answer": ANSWER}


@dataclass(frozen=True)
class Encoded:
    """A conversation as one sequence of T tokens."""

    input_ids: torch.Tensor
    """(T,) int64."""
    kinds: torch.Tensor
    """(T,) int8: PROMPT, PICTURE or ANSWER."""
    pixel_values: torch.Tensor | None
    """(images, 3, height, width), None without a picture."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def labels(self) -> torch.Tensor:
        """(T,): the token where it belongs to an answer, else `IGNORE`."""
        return torch.where(self.kinds == ANSWER, self.input_ids, torch.full_like(self.input_ids, IGNORE))


def tokenizer_of(processor: Any) -> Any:
    """A processor's tokenizer; a tokenizer is its own."""
    return getattr(processor, "tokenizer", processor)


def encode(
    processor: Any,
    messages: Sequence[tuple[str, str]],
    images: Sequence[Path | Image.Image] = (),
    *,
    answer_follows: bool = False,
) -> Encoded:
    """Tokens of a conversation in the processor's own chat format.

    Args:
        messages: (role, text) with roles ``"user"`` and ``"assistant"``, perhaps ``"system"`` first; each ``<image>``
            in a text shows a picture.
        images: the pictures or their files, in the order of their marks.
        answer_follows: end with the mark that opens an answer, for generation.

    Each answer is tokenised apart from its prompt, as it is when the model generates it. An answer's closing mark
    belongs to the answer: the model learns to stop.

    Raises:
        DataError: as many ``<image>`` as pictures are wanted; a chat template that rewrites what stands before an
            answer.
    """
    texts: list[tuple[str, int]] = []
    shown = ""
    turns = [{"role": role, "content": text} for role, text in messages]
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        prompt = _render(processor, turns[:index], add_generation_prompt=True)
        whole = _render(processor, turns[: index + 1], add_generation_prompt=False)
        if not (prompt.startswith(shown) and whole.startswith(prompt)):
            raise DataError("the model's chat template changes earlier turns as a conversation grows; not supported")
        texts += [(prompt[len(shown) :], PROMPT), (whole[len(prompt) :], ANSWER)]
        shown = whole
    if answer_follows:
        texts.append((_render(processor, turns, add_generation_prompt=True)[len(shown) :], PROMPT))
    tokenizer = tokenizer_of(processor)
    pieces: list[torch.Tensor] = []
    kinds: list[torch.Tensor] = []
    pictures: list[torch.Tensor] = []
    waiting = list(images)
    for text, kind in texts:
        if marks := text.count(IMAGE):
            shown_here, waiting = waiting[:marks], waiting[marks:]
            if len(shown_here) < marks:
                raise DataError(f"{len(images)} picture(s), but more {IMAGE} marks in the conversation")
            opened = [_open(path) for path in shown_here]
            inputs = processor(text=[text], images=opened, return_tensors="pt", add_special_tokens=False)
            ids = inputs["input_ids"][0]
            pictures.append(inputs["pixel_values"])
            piece_kinds = torch.full_like(ids, kind, dtype=torch.int8)
            piece_kinds[ids == tokenizer.convert_tokens_to_ids(IMAGE)] = PICTURE
        else:
            ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
            piece_kinds = torch.full_like(ids, kind, dtype=torch.int8)
        pieces.append(ids)
        kinds.append(piece_kinds)
    if waiting:
        raise DataError(f"{len(images)} picture(s), but only {len(images) - len(waiting)} {IMAGE} mark(s)")
    return Encoded(torch.cat(pieces), torch.cat(kinds), torch.cat(pictures) if pictures else None)


def _render(processor: Any, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    return str(processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt))


def _open(path: Path | Image.Image) -> Image.Image:
    if isinstance(path, Image.Image):
        return path.convert("RGB")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path}: no such picture") from None
    except OSError as error:
        raise DataError(f"{path}: not a whole picture ({error})") from None


def encode_sample(processor: Any, sample: Sample, image_root: Path) -> Encoded:
    """`encode` a training sample; its pictures are looked up below ``image_root``.

    Raises:
        DataError: with the sample's id.
    """
    messages = [] if sample.system is None else [("system", sample.system)]
    messages += [("user" if t.speaker == "human" else "assistant", t.value) for t in sample.conversations]
    try:
        return encode(processor, messages, [image_root / image for image in sample.images])
    except DataError as error:
        raise DataError(f"sample {sample.id}: {error}") from None


def encode_texts(processor: Any, texts: Sequence[str], max_tokens: int) -> list[Encoded]:
    """Passages as token sequences of at most ``max_tokens``, every token counted as an answer: its prediction is what
    is measured. A literal ``<image>`` in a text has no picture and is left out; a passage of one token too."""
    tokenizer = tokenizer_of(processor)
    encoded = []
    for text in texts:
        ids = torch.tensor(tokenizer(text.replace(IMAGE, ""), add_special_tokens=False)["input_ids"][:max_tokens])
        if len(ids) > 1:
            encoded.append(Encoded(ids, torch.full_like(ids, ANSWER, dtype=torch.int8), None))
    return encoded


def collate(
    batch: Sequence[Encoded],
    pad_token_id: int,
    *,
    side: Literal["left", "right"] = "right",
    labels: bool = False,
    position_weights: Mapping[Position, float] | None = None,
) -> dict[str, torch.Tensor]:
    """Pad sequences into one batch of keyword arguments for the model.

    Args:
        side: right for training, left for generation.
        labels: add ``labels``, set on answers only.
        position_weights: add ``token_weights`` (batch, T) by what a position is; kinds not named weigh 1.
    """
    length = max(len(encoded) for encoded in batch)

    def padded(values: Sequence[torch.Tensor], fill: float) -> torch.Tensor:
        out = values[0].new_full((len(values), length), fill)
        for row, value in zip(out, values, strict=True):
            row[slice(length - len(value), None) if side == "left" else slice(0, len(value))] = value
        return out

    inputs = {
        "input_ids": padded([e.input_ids for e in batch], pad_token_id),
        "attention_mask": padded([torch.ones_like(e.input_ids) for e in batch], 0),
    }
    if labels:
        inputs["labels"] = padded([e.labels for e in batch], IGNORE)
    if position_weights is not None:
        unknown = sorted(set(position_weights) - set(_KINDS))
        if unknown:
            raise DataError(f"position weights name {unknown}; positions are {sorted(_KINDS)}")
        table = torch.ones(len(_KINDS))
        for position, weight in position_weights.items():
            table[_KINDS[position]] = weight
        inputs["token_weights"] = padded([table[e.kinds.long()] for e in batch], 0.0)
    pictures = [e.pixel_values for e in batch if e.pixel_values is not None]
    if pictures:
        inputs["pixel_values"] = torch.cat(pictures)
    return inputs


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of like length, longest first, so that padding is small and a batch that is too large shows
    at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def training_order(
    lengths: Sequence[int],
    batch_size: int,
    steps: int,
    seed: int,
    *,
    old: Sequence[int] = (),
    share_old: float = 0.0,
) -> list[list[int]]:
    """The batches of a whole run: each epoch shuffled anew, like lengths together, every batch full.

    It is a function of its arguments alone, so that a resumed run sees what an uninterrupted one does. Within chunks of
    16 batches samples are sorted by length: little padding, yet the mix changes from epoch to epoch.

    Args:
        old: lengths of old samples to replay, whose indices go on from those of ``lengths``.
        share_old: their share among all that are drawn, kept to within one sample in every chunk.
    """
    if share_old > 0 and not old:
        raise DataError("replay was asked for, but there are no old samples to draw from")
    rng = random.Random(seed)
    stream = _shuffled_forever(len(lengths), rng)
    if share_old > 0:
        again = _shuffled_forever(len(old), random.Random(f"replay {seed}"))
        stream = _mixed(stream, (len(lengths) + index for index in again), share_old)
    sizes = [*lengths, *old]
    batches: list[list[int]] = []
    while len(batches) < steps:
        size = min(16, steps - len(batches)) * batch_size
        chunk = sorted((next(stream) for _ in range(size)), key=lambda i: (-sizes[i], i))
        grouped = [chunk[start : start + batch_size] for start in range(0, len(chunk), batch_size)]
        rng.shuffle(grouped)
        batches += grouped
    return batches


def _mixed(new: Iterator[int], old: Iterator[int], share_old: float) -> Iterator[int]:
    """After n draws, n·share_old of them (rounded down) were old."""
    for drawn in count(1):
        yield next(old if int(drawn * share_old) > int((drawn - 1) * share_old) else new)


def _shuffled_forever(n: int, rng: random.Random) -> Iterator[int]:
    while True:
        order = list(range(n))
        rng.shuffle(order)
        yield from order


class ConversationDataset(Dataset[Encoded]):
    """Samples in the order in which a run trains on them, encoded when asked for.

    Nothing is kept, so that memory does not grow with the data; only ``old`` samples to replay, which are few, are held
    as they are. Their indices go on from those of the samples.
    """

    def __init__(
        self, processor: Any, samples: Sequence[Sample], image_root: Path, old: Sequence[Encoded] = ()
    ) -> None:
        self.processor = processor
        self.samples = list(samples)
        self.image_root = image_root
        self.old = list(old)
        self.order = list(range(len(self.samples)))

    def lengths(self) -> list[int]:
        """Tokens of each sample; encodes every one, so a broken picture or template shows before training starts."""
        return [len(encode_sample(self.processor, sample, self.image_root)) for sample in self.samples]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Encoded:
        place = self.order[index]
        if place >= len(self.samples):
            return self.old[place - len(self.samples)]
        return encode_sample(self.processor, self.samples[place], self.image_root)
