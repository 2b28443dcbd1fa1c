"""A fixed prompt, and a picture where the model takes one: enough to see whether two models compute the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from kore_fast.modules.loading import load_processor

TEXT = "The river rises in the northern hills and is 240 miles long. Who lives on its banks, and what do they eat?"


def find_processor(model: str | Path) -> Any | None:
    """The model's processor or tokenizer, None where its folder has none."""
    try:
        return load_processor(model)
    except (OSError, ValueError, TypeError, KeyError, ImportError):
        return None


def trial_inputs(model: nn.Module, processor: Any | None) -> dict[str, dict[str, torch.Tensor]]:
    """Inputs of a forward pass by what they show: ``"text"``, and ``"picture"`` where model and processor take one.

    Without a processor the text is the first tokens of the vocabulary.
    """
    tokens = getattr(processor, "tokenizer", processor)(TEXT)["input_ids"] if processor is not None else []
    ids = torch.tensor([tokens], dtype=torch.int64)
    if not tokens:  # no tokenizer, or the empty one that transformers makes where there are no files
        rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        ids = torch.arange(48).remainder(rows)[None]
    inputs = {"text": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}}
    if processor is not None and hasattr(processor, "image_processor") and hasattr(model.config, "vision_config"):
        content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
        try:
            prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        except (ValueError, AttributeError, ImportError):  # a processor without a chat template
            prompt = f"{getattr(processor, 'image_token', '<image>')}\nWhat is this?"
        made = processor(text=[prompt], images=[_picture()], return_tensors="pt")
        inputs["picture"] = {key: value for key, value in made.items() if isinstance(value, torch.Tensor)}
    return inputs


def trial_logits(model: nn.Module, inputs: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Logits in float32 on the CPU for each of `trial_inputs`."""
    first = next(model.parameters())
    logits = {}
    with torch.no_grad():
        for name, given in inputs.items():
            moved = {
                key: value.to(first.device, first.dtype if value.is_floating_point() else value.dtype)
                for key, value in given.items()
            }
            logits[name] = model(**moved).logits.float().cpu()
    return logits


def _picture() -> Image.Image:
    """Bands of colour, 224 pixels square, the same in every version of Pillow."""
    rows, columns = np.mgrid[0:224, 0:224]
    return Image.fromarray(np.stack([rows, columns, (rows + columns) // 2], axis=-1).astype(np.uint8))
