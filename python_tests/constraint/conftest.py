"""Old knowledge of the tiny model, and its covariances."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kore_fast.constraint import CovarianceStore, collect_covariance
from kore_fast.data.conversations import collate, encode


@pytest.fixture(scope="module")
def batch(tiny_processor: Any, knowledge_folder: Path) -> dict[str, torch.Tensor]:
    encoded = [
        encode(
            tiny_processor,
            [("user", f"<image>\nWhat is this? {'Please tell. ' * n}"), ("assistant", "A hill with moss and fern.")],
            [knowledge_folder / "images" / f"{colour}.png"],
        )
        for n, colour in enumerate(["red", "green", "blue", "orange"])
    ]
    return collate(encoded, 0)


@pytest.fixture
def store(tiny_model: nn.Module, batch: dict[str, torch.Tensor]) -> CovarianceStore:
    return collect_covariance(tiny_model, [batch])
