"""A processor for pictures and text of models whose own needs torchvision for videos (Qwen2.5-VL, Qwen2-VL)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class PictureProcessor:
    """What such a processor does with pictures and text: its image processor, its tokenizer, its chat template."""

    def __init__(self, image_processor: Any, tokenizer: Any, *, typed: bool) -> None:
        """``typed``: whether the model takes ``mm_token_type_ids`` (transformers 5)."""
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.chat_template = tokenizer.chat_template
        self.image_token = "<|image_pad|>"
        self._typed = typed

    @classmethod
    def from_pretrained(cls, path: str) -> PictureProcessor:
        """Raises OSError or ValueError where there are no such parts."""
        from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLProcessor

        pictures = AutoImageProcessor.from_pretrained(path)
        if not hasattr(pictures, "merge_size"):
            raise ValueError(f"{path}: its pictures are not cut into patches of their own number")
        typed = bool(getattr(Qwen2_5_VLProcessor, "return_mm_token_type_ids", False))
        return cls(pictures, AutoTokenizer.from_pretrained(path), typed=typed)

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """As the tokenizer's, which renders the same template."""
        return self.tokenizer.apply_chat_template(conversation, **options)

    def __call__(self, text: Sequence[str], images: Sequence[Any], **options: Any) -> dict[str, torch.Tensor]:
        """One text with its pictures: each mark becomes as many tokens as its picture has merged patches."""
        (one,) = text
        made = self.image_processor(images=list(images), return_tensors="pt")
        before, *others = one.split(self.image_token)
        counts = (made["image_grid_thw"].prod(dim=1) // self.image_processor.merge_size**2).tolist()
        shown = before + "".join(self.image_token * n + rest for n, rest in zip(counts, others, strict=True))
        options.pop("return_tensors", None)
        ids = torch.tensor([self.tokenizer(shown, **options)["input_ids"]])
        inputs = {"input_ids": ids, "pixel_values": made["pixel_values"], "image_grid_thw": made["image_grid_thw"]}
        if self._typed:
            inputs["mm_token_type_ids"] = (ids == self.tokenizer.convert_tokens_to_ids(self.image_token)).long()
        return inputs
