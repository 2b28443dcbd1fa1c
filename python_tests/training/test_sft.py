"""KORE in TRL's SFTTrainer, with a vision-language model: the same promises as in Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import kore_fast as kf
from kore_fast.modules.adapter import model_lora_a_hash
from kore_fast.modules.loading import load_model
from python_tests.training import small

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


def rows(knowledge: Path) -> Any:
    """TRL's conversations with pictures."""
    return datasets.Dataset.from_list(
        [
            {
                "images": [Image.open(path)],
                "prompt": [{"role": "user", "content": "What is it?"}],
                "completion": [{"role": "assistant", "content": f"A {path.stem} one."}],
            }
            for path in sorted((knowledge / "images").glob("*.png"))
        ]
    )


def test_saved_and_resumed(
    tiny_model_folder: Path, tiny_processor: Any, knowledge_folder: Path, tmp_path: Path
) -> None:
    ids = torch.arange(4, 84).reshape(4, 20)

    def base() -> nn.Module:
        return load_model(tiny_model_folder)

    def logits(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits

    model = base()
    store = kf.collect_covariance(model, [{"input_ids": ids}], warn_few_tokens=False)
    kf.get_kore_model(model, kf.KoreConfig(rank=4), store).save_pretrained(str(tmp_path / "adapter"))

    def run(start: Path, out: Path, checkpoint: Path | None = None) -> Any:
        arguments = trl.SFTConfig(
            output_dir=str(out),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            save_steps=2,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            max_length=None,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = trl.SFTTrainer(
            model=kf.load_kore_model(base(), start, is_trainable=True),
            args=arguments,
            train_dataset=rows(knowledge_folder),
            processing_class=tiny_processor,
            callbacks=[kf.KoreCallback()],
        )
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.save_model()
        return trainer

    whole = run(tmp_path / "adapter", tmp_path / "whole")
    assert "pixel_values" in next(iter(whole.get_train_dataloader()))
    assert small.losses(whole)[4] < small.losses(whole)[1]
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    A = small.read(tmp_path / "adapter", "A")
    for name, start in {"from the start": tmp_path / "adapter", "from the checkpoint": checkpoint}.items():
        again = run(start, tmp_path / name, checkpoint)
        assert small.frozen(again.model)
        assert model_lora_a_hash(again.model) == whole.model.kore["lora_a_sha256"]
        assert small.losses(again)[4] == small.losses(whole)[4]
        assert torch.equal(logits(again.model), logits(whole.model))
        for folder in (checkpoint, tmp_path / name, tmp_path / name / "checkpoint-4"):
            assert small.same(small.read(folder, "A"), A)
            assert (folder / "kore.json").is_file()
        loaded = kf.load_kore_model(base(), tmp_path / name)
        assert torch.equal(logits(loaded), logits(whole.model))
