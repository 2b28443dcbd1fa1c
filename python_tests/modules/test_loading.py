"""Models and processors from a folder, and what is said when there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kore_fast.errors import KoreError
from kore_fast.modules.loading import load_model, load_processor, preferred_precision


def test_a_picture_model_in_evaluation_mode_without_gradients(tiny_model_folder: Path) -> None:
    model = load_model(tiny_model_folder)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(tiny_model_folder, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_a_text_model_and_its_tokenizer(tmp_path: Path, tiny_model_folder: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(tmp_path)
    assert type(load_model(tmp_path)).__name__ == "LlamaForCausalLM"
    assert load_processor(tmp_path)("a", add_special_tokens=False)["input_ids"]


def test_processor_has_pictures(tiny_model_folder: Path) -> None:
    assert hasattr(load_processor(tiny_model_folder), "image_processor")


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(KoreError, match="nothing_here"):
        load_model(tmp_path / "nothing_here")
    with pytest.raises(KoreError, match=str(tmp_path)):
        load_model(tmp_path)


def test_precision_is_one_that_trains() -> None:
    assert preferred_precision() in (torch.bfloat16, torch.float32)
