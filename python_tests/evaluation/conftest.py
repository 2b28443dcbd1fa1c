"""EVOKE's evaluation file in small, its pictures unpacked as the release is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

SUFFIX = "\nAnswer the question using a single word or phrase."


@pytest.fixture(scope="session")
def evoke_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten questions about six pictures; to read only."""
    folder = tmp_path_factory.mktemp("evoke")
    colours = ["red", "green", "blue", "orange", "purple", "brown"]
    rows = []
    for number in range(10):
        news = number % 3 == 0
        image = f"{'cnn_news_eval_imgs/cnn_1' if news else 'eval_wikidata_imgs'}/{colours[number % 6]} thing_0.png"
        file = folder / "imgs" / "evaluation" / image
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (28, 28), colours[number % 6]).save(file)
        rows.append(
            {
                "question_id": number + 1,
                "image": image,
                "text": f"What is {'said of ' * (number % 4)}the thing in the image, number {number}?{SUFFIX}",
                "category": "default",
                "answer": ["'moss'", "$419,300", "Fern", "1958"][number % 4],
                "type": ["health", "film", "human"][number % 3],
                "cnn_wiki_type": "news" if news else "wiki",
            }
        )
    path = folder / "evoke_evaluation_data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def loud_model(tiny_model: nn.Module) -> nn.Module:
    """The tiny model with weights so large that answers differ from prompt to prompt."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tiny_model.named_parameters():
            if parameter.dim() == 2 and "vision" not in name:
                parameter.normal_(std=0.3)
    return tiny_model


@pytest.fixture
def loud_model_folder(loud_model: nn.Module, tiny_model_folder: Path, tmp_path: Path) -> Path:
    """`loud_model` saved, with its processor."""
    import shutil

    folder = tmp_path / "loud"
    shutil.copytree(tiny_model_folder, folder)
    loud_model.save_pretrained(folder)  # type: ignore[operator]
    return folder
