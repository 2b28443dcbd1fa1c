"""Loading a vision-language or language model with its processor, from a folder or a hub name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from kore_fast.errors import KoreError


def quiet_transformers() -> None:
    """Keep the libraries' notes to each other out of the terminal; errors still show."""
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_processor(path: str | Path, max_pixels: int | None = None) -> Any:
    """The model's processor, or its tokenizer where it has no pictures.

    Args:
        max_pixels: of a picture as it is passed on, where the processor takes pictures of any size.
    """
    from transformers import AutoProcessor, AutoTokenizer

    processor: Any
    try:
        processor = AutoProcessor.from_pretrained(str(path))
    except (OSError, ValueError, ImportError) as error:
        from kore_fast.modules.picture_processor import PictureProcessor

        try:
            if not isinstance(error, ImportError):
                raise ValueError("not for want of a library") from error
            processor = PictureProcessor.from_pretrained(str(path))
        except (OSError, ValueError):
            return AutoTokenizer.from_pretrained(str(path))
    pictures: Any = getattr(processor, "image_processor", None)
    if max_pixels is not None and hasattr(pictures, "merge_size"):
        smallest = min(int(dict(pictures.size).get("shortest_edge") or max_pixels), max_pixels)
        # The names that transformers 4 and 5 read.
        pictures.size = {"shortest_edge": smallest, "longest_edge": max_pixels}
        pictures.min_pixels, pictures.max_pixels = smallest, max_pixels
    return processor


def load_model(path: str | Path, dtype: torch.dtype | Literal["auto"] = torch.float32) -> nn.Module:
    """The model in evaluation mode, its gradients off: an image-text model where the folder holds one, else a text one.

    Args:
        dtype: of the weights; ``"auto"`` for the one that they are stored in.

    Raises:
        KoreError: no such folder, or not a model; names it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(str(path))
        family = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        model = family.from_pretrained(str(path), dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise KoreError(f"{path}: cannot load a model from here ({reason})") from None
    return model.eval().requires_grad_(False)


def preferred_precision() -> torch.dtype:
    """bfloat16 where the machine computes in it (a GPU, or a CPU with AVX512-BF16 or AMX), else float32."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    capabilities = torch.backends.cpu.get_cpu_capability()
    fast = "AVX512" in capabilities and bool(torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if fast or bool(torch.cpu._is_amx_tile_supported()) else torch.float32
