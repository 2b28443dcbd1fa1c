"""KORE in Trainer and in a plain accelerate loop: A stays, checkpoints are whole, what would break it is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState

import kore_fast as kf
from kore_fast.errors import ConstraintError
from kore_fast.modules.adapter import KorePeftModel
from python_tests.constraint.stack import PYTHONPATH
from python_tests.training import small


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To start from; read only."""
    return small.make_adapter(tmp_path_factory.mktemp("start") / "adapter")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, adapter: Path) -> tuple[KorePeftModel, dict[int, float], Path]:
    """A run that was not interrupted: model, losses, folder."""
    folder = tmp_path_factory.mktemp("whole")
    model = small.start(adapter)
    trainer = small.trainer(model, folder, [kf.KoreCallback()])
    trainer.train()
    trainer.save_model()
    return model, small.losses(trainer), folder


def test_checkpoints_are_whole_adapters(whole: tuple[KorePeftModel, dict[int, float], Path], adapter: Path) -> None:
    model, _, folder = whole
    A = small.read(adapter, "A")
    for place in ("checkpoint-2", "checkpoint-4", "."):
        assert small.same(small.read(folder / place, "A"), A)
        assert (folder / place / "kore.json").read_bytes() == (adapter / "kore.json").read_bytes()
    assert small.same(small.parts(model, "A"), A)
    assert all(B.any() for B in small.read(folder, "B").values())
    assert torch.equal(small.by_plain_peft(folder), small.logits(model))


def test_resumed_is_uninterrupted(
    whole: tuple[KorePeftModel, dict[int, float], Path], adapter: Path, tmp_path: Path
) -> None:
    model, wanted, folder = whole
    again = small.start(adapter)
    trainer = small.trainer(again, tmp_path, [kf.KoreCallback()])
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert small.frozen(again)
    assert small.same(small.parts(again, "A"), small.read(adapter, "A"))
    assert small.same(small.parts(again, "B"), small.parts(model, "B"))
    assert {step: small.losses(trainer)[step] for step in (3, 4)} == {step: wanted[step] for step in (3, 4)}
    assert torch.equal(small.logits(again), small.logits(model))


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import kore_fast as kf
from python_tests.training import small
checkpoint, out = map(Path, sys.argv[1:])
model = kf.load_kore_model(small.base(), checkpoint, is_trainable=True)
trainer = small.trainer(model, out, [kf.KoreCallback()])
trainer.train(resume_from_checkpoint=str(checkpoint))
assert small.frozen(model)
trainer.save_model()
"""


def test_resumed_in_a_new_process_from_the_checkpoint_alone(
    whole: tuple[KorePeftModel, dict[int, float], Path], tmp_path: Path
) -> None:
    _, _, folder = whole
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder / "checkpoint-2", tmp_path],
        env={"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for part in "AB":
        assert small.same(small.read(tmp_path, part), small.read(folder, part))


def test_the_trap_plain_peft_trains_a(
    whole: tuple[KorePeftModel, dict[int, float], Path], adapter: Path, tmp_path: Path
) -> None:
    """What happens today to a checkpoint that plain PEFT loads to train on, and why the callback refuses it."""
    checkpoint = whole[2] / "checkpoint-2"
    model = PeftModel.from_pretrained(small.base(), str(checkpoint), is_trainable=True)
    assert all(A.requires_grad for A in small.parts(model, "A").values())
    small.trainer(model, tmp_path, []).train()
    A = small.read(adapter, "A")
    assert all(not torch.equal(now, A[name]) for name, now in small.parts(model, "A").items())


def test_a_stays_frozen_whatever_is_loaded_or_switched(adapter: Path) -> None:
    model = small.start(adapter)
    model.load_adapter(str(adapter), "default", is_trainable=True)
    assert small.frozen(model)
    model.set_requires_grad("default")
    assert small.frozen(model)
    model.set_adapter("default")
    assert small.frozen(model)


def test_another_a_is_refused_when_resuming(
    whole: tuple[KorePeftModel, dict[int, float], Path], adapter: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(whole[2] / "checkpoint-2", checkpoint)
    path = checkpoint / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "lora_A" in key)
    save_file({**tensors, key: tensors[key] * 2}, path, metadata={"format": "pt"})
    with pytest.raises(ConstraintError, match="lora_A has changed"):
        small.trainer(small.start(adapter), tmp_path / "out", [kf.KoreCallback()]).train(
            resume_from_checkpoint=str(checkpoint)
        )


def test_what_a_saver_left_out_is_added(adapter: Path, tmp_path: Path) -> None:
    model = small.start(adapter)
    folder = tmp_path / "checkpoint-2"
    model.save_pretrained(str(folder))
    path = folder / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "lora_A" not in k}, path, metadata={"format": "pt"})
    state = TrainerState(global_step=2)
    kf.KoreCallback().on_save(small.arguments(tmp_path), state, TrainerControl(), model=model)
    assert small.same(small.read(folder, "A"), small.read(adapter, "A"))
    (folder / "kore.json").unlink()
    kf.KoreCallback().on_save(small.arguments(tmp_path), state, TrainerControl(), model=model)
    assert (folder / "kore.json").read_bytes() == (adapter / "kore.json").read_bytes()
    written = path.stat().st_mtime_ns
    kf.KoreCallback().on_save(small.arguments(tmp_path), state, TrainerControl(), model=model)
    assert path.stat().st_mtime_ns == written  # nothing was missing


def test_weight_decay_is_refused(adapter: Path, tmp_path: Path) -> None:
    """When the Trainer is made; where the callback is added later, before the first step."""
    model = small.start(adapter)
    with pytest.raises(ConstraintError, match=r"weight_decay=0\.01"):
        small.trainer(model, tmp_path, [kf.KoreCallback()], weight_decay=0.01)
    trainer = small.trainer(model, tmp_path, [], weight_decay=0.01)
    trainer.add_callback(kf.KoreCallback())
    with pytest.raises(ConstraintError, match=r"weight_decay=0\.01"):
        trainer.train()
    assert not any(B.any() for B in small.parts(model, "B").values())


def test_weight_decay_of_an_optimizer_is_refused(adapter: Path, tmp_path: Path) -> None:
    model = small.start(adapter)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])  # torch's default: 0.01
    trainer = small.trainer(model, tmp_path, [kf.KoreCallback()])
    trainer.optimizer = optimizer
    with pytest.raises(ConstraintError, match=r"weight_decay=0\.01"):
        trainer.train()


def test_an_optimizer_with_a_is_refused(adapter: Path, tmp_path: Path) -> None:
    model = small.start(adapter)
    next(iter(small.parts(model, "A").values())).requires_grad_(True)
    with pytest.raises(ConstraintError, match=r"layers\.0\..*: the optimizer was given lora_A"):
        small.trainer(model, tmp_path, [kf.KoreCallback()]).train()
    assert not any(B.any() for B in small.parts(model, "B").values())


def test_dropout_is_refused(adapter: Path, tmp_path: Path) -> None:
    model = small.start(adapter)
    model.peft_config["default"].lora_dropout = 0.1
    with pytest.raises(ConstraintError, match=r"lora_dropout=0\.1"):
        small.trainer(model, tmp_path, [kf.KoreCallback()])


def test_a_that_changes_while_training_is_found(adapter: Path, tmp_path: Path) -> None:
    class Changes(TrainerCallback):
        def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            with torch.no_grad():
                next(iter(small.parts(model, "A").values())).mul_(1.001)

    with pytest.raises(ConstraintError, match="lora_A has changed"):
        small.trainer(small.start(adapter), tmp_path, [Changes(), kf.KoreCallback()], save_strategy="no").train()


def test_a_model_without_kore_is_refused(adapter: Path, tmp_path: Path) -> None:
    for model in (small.base(), PeftModel.from_pretrained(small.base(), str(adapter), is_trainable=True)):
        with pytest.raises(ConstraintError, match=r"without a KORE adapter: make it with kore_fast\.get_kore_model"):
            small.trainer(model, tmp_path, [kf.KoreCallback()])


def test_a_trained_on_purpose_is_let_through(tmp_path: Path) -> None:
    model = small.base()
    store = kf.collect_covariance(model, [{"input_ids": small.IDS}], warn_few_tokens=False)
    model = kf.get_kore_model(model, kf.KoreConfig(rank=4, train_a=True), store)
    A = small.copied(small.parts(model, "A"))
    small.trainer(model, tmp_path, [kf.KoreCallback()]).train()
    assert all(not torch.equal(now, A[name]) for name, now in small.parts(model, "A").items())
    assert small.same(small.read(tmp_path / "checkpoint-4", "A"), small.parts(model, "A"))


def test_best_model_is_loaded_with_a_frozen(adapter: Path, tmp_path: Path) -> None:
    model = small.start(adapter)
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    trainer = small.trainer(model, tmp_path, [kf.KoreCallback()], **options)
    trainer.train()
    assert not any(A.requires_grad for A in small.parts(model, "A").values())
    best = Path(trainer.state.best_model_checkpoint)
    assert small.same(small.parts(model, "B"), small.read(best, "B"))


def test_plain_accelerate_loop(adapter: Path, tmp_path: Path) -> None:
    from accelerate import Accelerator

    def run(model: KorePeftModel, steps: range, state: Path | None = None) -> KorePeftModel:
        accelerator = Accelerator(cpu=True)
        trained = [p for p in model.parameters() if p.requires_grad]
        wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-2, weight_decay=0))
        if state is not None:
            accelerator.load_state(str(state))
        for step in steps:
            row = small.samples()[step]["input_ids"][None]
            accelerator.backward(wrapped(input_ids=row, labels=row).loss)
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                accelerator.save_state(str(tmp_path / "state"))
        kf.save_kore_adapter(wrapped, tmp_path / f"from-{steps.start}")
        accelerator.free_memory()
        return model

    model = run(small.start(adapter), range(4))
    again = run(small.start(adapter), range(2, 4), tmp_path / "state")
    assert small.frozen(again)
    for folder in (tmp_path / "from-0", tmp_path / "from-2"):
        assert small.same(small.read(folder, "A"), small.read(adapter, "A"))
        assert small.same(small.read(folder, "B"), small.parts(model, "B"))
        assert torch.equal(small.by_plain_peft(folder), small.logits(model))
