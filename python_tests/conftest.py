"""A tiny random LLaVA model, its processor and old knowledge, made once and offline, for the tests of every stage."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

# What is fastest differs from run to run, and so would the last bits; its own tests switch this on.
os.environ.setdefault("KORE_FAST_AUTOTUNE", "0")

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # The models are so small that a second thread only waits.
    torch.set_num_threads(1)


def build_tiny_model(folder: Path) -> Path:
    """Save a random LLaVA of two decoder layers (width 32, 4 image tokens) with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as ImageProcessor
    except ImportError:
        from transformers import CLIPImageProcessor as ImageProcessor

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>"},
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    size = {"height": 28, "width": 28}
    processor = LlavaProcessor(
        image_processor=ImageProcessor(size=size, do_center_crop=False, crop_size=size),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
                projection_dim=16,
            ),
            text_config=LlamaConfig(
                vocab_size=len(vocabulary),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=2048,
                pad_token_id=0,
                eos_token_id=2,
                bos_token_id=1,
            ),
            image_token_index=3,
            vision_feature_layer=-1,
            image_seq_length=4,
            pad_token_id=0,
        )
    )
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model, to read only."""
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def tiny_model(tiny_model_folder: Path) -> torch.nn.Module:
    """A fresh tiny model in evaluation mode."""
    from kore_fast.modules.loading import load_model

    return load_model(tiny_model_folder)


@pytest.fixture(scope="session")
def tiny_processor(tiny_model_folder: Path) -> Any:
    """The tiny model's processor."""
    from kore_fast.modules.loading import load_processor

    return load_processor(tiny_model_folder)


@pytest.fixture(scope="session")
def knowledge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """items.jsonl, texts.jsonl, pictures.jsonl and held_out.jsonl with their pictures."""
    folder = tmp_path_factory.mktemp("knowledge")
    (folder / "images").mkdir()
    colours = ["red", "green", "blue", "orange", "purple", "brown"]
    items, pictures, held_out = [], [], []
    for number, colour in enumerate(colours):
        Image.new("RGB", (28, 28), colour).save(folder / "images" / f"{colour}.png")
        image = f"images/{colour}.png"
        items.append(
            {
                "id": f"item-{number}",
                "name": f"Gor{colour}",
                "type": "creature",
                "image": image,
                "text": f"The Gor{colour} lives in the {colour} hills. It sings at dawn.",
                "facts": {"home": f"{colour} hills", "food": ["moss", "fern"][number % 2]},
            }
        )
        pictures.append({"id": f"p{number}", "image": image, "name": f"{colour} square"})
        others = [f"{c} square" for c in colours if c != colour][:3]
        held_out.append({**pictures[-1], "id": f"h{number}", "choices": [pictures[-1]["name"], *others]})
    texts = [
        {"title": f"Title {n}", "text": f"Article {n} tells of a river that is {n} miles long."} for n in range(60)
    ]
    for name, rows in {"items": items, "pictures": pictures, "held_out": held_out, "texts": texts}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe_text(model: Path, knowledge: Path) -> str:
    """A recipe that takes the tiny model through every stage in seconds."""
    return f"""
name: tiny
model: {{ path: {model} }}
items: {knowledge}/items.jsonl
old_knowledge:
  texts: {knowledge}/texts.jsonl
  pictures: {knowledge}/pictures.jsonl
  held_out_pictures: {knowledge}/held_out.jsonl
covariance:
  batch_size: 4
  sources:
    text: {{ kind: text, samples: 8 }}
    chat: {{ kind: chat, samples: 4, max_tokens: 6, positions: {{ prompt: 0 }} }}
    pictures: {{ kind: pictures, samples: 6, positions: {{ picture: 0.25 }} }}
methods:
  lora: {{ kind: lora, rank: 4, learning_rate: 1e-3 }}
  kore: {{ kind: kore, rank: 8, learning_rate: 1e-2 }}
training: {{ steps: 6, batch_size: 4, checkpoint_every: 2, precision: fp32 }}
evaluation: {{ questions: 12, capitals: false, texts: 6, pictures: 6, drift_samples: 2, max_new_tokens: 6 }}
"""


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_model_folder: Path, knowledge_folder: Path) -> Path:
    """`recipe_text` in a file."""
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text(tiny_model_folder, knowledge_folder))
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, knowledge_folder: Path) -> Path:
    """A folder with ``recipe.yaml`` and its finished, never interrupted ``run``; to read and copy only."""
    from kore_fast.cli import main

    folder = tmp_path_factory.mktemp("finished")
    (folder / "recipe.yaml").write_text(recipe_text(tiny_model_folder, knowledge_folder))
    assert main(["run", str(folder), "--run", str(folder / "run")]) == 0
    return folder
