"""The loop: A untouched, resuming to the bit, the loss that the model itself computes, what may be trained."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from kore_fast.constraint import KoreConfig, collect_covariance, get_kore_model
from kore_fast.data.conversations import ConversationDataset, collate, training_order
from kore_fast.data.samples import Sample
from kore_fast.errors import ConstraintError
from kore_fast.modules.adapter import lora_layers, model_lora_a_hash
from kore_fast.modules.loading import load_model
from kore_fast.training.loop import (
    LOSS_COLUMNS,
    TrainingOptions,
    _Trainer,
    last_whole_checkpoint,
    share_of_step,
    train,
    write_loss,
)
from kore_fast.training.methods import METHODS
from kore_fast.training.methods.interface import StartOptions

OPTIONS = TrainingOptions(learning_rate=1e-2, steps=8, batch_size=3, checkpoint_every=3)
COLOURS = ["red", "green", "blue", "orange", "purple"]


def samples() -> list[Sample]:
    return [
        Sample.model_validate(
            {
                "id": f"s{n}",
                "image": f"images/{colour}.png",
                "conversations": [
                    {"from": "human", "value": f"<image>\nWhat is it{'?' * (n + 1)}"},
                    {"from": "gpt", "value": f"A {colour} one."},
                    {"from": "human", "value": "Sure?"},
                    {"from": "gpt", "value": "Yes." * n + "Yes."},
                ],
            }
        )
        for n, colour in enumerate(COLOURS)
    ]


@pytest.fixture
def dataset(tiny_processor: Any, knowledge_folder: Path) -> ConversationDataset:
    return ConversationDataset(tiny_processor, samples(), knowledge_folder)


def kore_model(folder: Path, **config: Any) -> Any:
    model = load_model(folder)
    store = collect_covariance(model, [{"input_ids": torch.arange(4, 124).reshape(4, 30)}])
    return get_kore_model(model, KoreConfig(rank=4, **config), store)


def lora_model(folder: Path, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=2, lora_dropout=dropout, target_modules=r".*language_model.*_proj")
    return get_peft_model(load_model(folder), config)


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Killed(Exception):
    pass


def killed_at(step: int) -> Any:
    """A progress bar that fails when the step begins to show."""

    def show(items: Iterable[Any], total: int | None = None, label: str = "") -> Iterator[Any]:
        for number, item in enumerate(items, start=1):
            if number == step:
                raise Killed
            yield item

    return show


def test_a_stays_and_b_learns(tiny_model_folder: Path, dataset: ConversationDataset, tmp_path: Path) -> None:
    model = kore_model(tiny_model_folder)
    layers = lora_layers(model)
    A = {name: layer.lora_A["default"].weight.clone() for name, layer in layers.items()}
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    rows = train(model, dataset, replace(OPTIONS, steps=20), tmp_path)
    for name, layer in layers.items():
        assert torch.equal(layer.lora_A["default"].weight, A[name])
        assert layer.lora_B["default"].weight.abs().max() > 0
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert model_lora_a_hash(model) == model.kore["lora_a_sha256"]
    assert not model.training
    assert rows[-1]["step"] == 20
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["epoch"] == pytest.approx(20 * 3 / 5)


@pytest.mark.parametrize("kind", ["kore", "lora with dropout", "full"])
@pytest.mark.parametrize("step", [2, 5, 8])
def test_interrupted_and_resumed_is_uninterrupted(
    tiny_model_folder: Path, dataset: ConversationDataset, tmp_path: Path, kind: str, step: int
) -> None:
    def fresh() -> nn.Module:
        if kind == "kore":
            return kore_model(tiny_model_folder)
        if kind == "full":
            model = load_model(tiny_model_folder)
            model.get_submodule("model.language_model.layers").requires_grad_(True)
            return model
        return lora_model(tiny_model_folder, dropout=0.3)

    whole = fresh()
    wanted = train(whole, dataset, OPTIONS, tmp_path / "whole")
    with pytest.raises(Killed):
        train(fresh(), dataset, OPTIONS, tmp_path / "broken", progress=killed_at(step))
    assert (last_whole_checkpoint(tmp_path / "broken") is None) == (step <= 3)
    again = fresh()
    assert train(again, dataset, OPTIONS, tmp_path / "broken") == wanted
    assert same(trained(again), trained(whole))
    # And once more from the checkpoint of the very last step, as after a kill before the adapter was written.
    once_more = fresh()
    assert train(once_more, dataset, OPTIONS, tmp_path / "broken") == wanted
    assert same(trained(once_more), trained(whole))


@pytest.mark.parametrize("every", [3, 7, 20])
def test_loss_log_does_not_depend_on_where_it_was_cut(
    tiny_model_folder: Path, dataset: ConversationDataset, tmp_path: Path, every: int
) -> None:
    """Rows are means over steps: one that began before the checkpoint would lose its beginning."""
    options = replace(OPTIONS, steps=40, checkpoint_every=every, batch_size=1)
    wanted = train(lora_model(tiny_model_folder), dataset, options, tmp_path / "whole")
    with pytest.raises(Killed):
        train(lora_model(tiny_model_folder), dataset, options, tmp_path / "broken", progress=killed_at(23))
    assert train(lora_model(tiny_model_folder), dataset, options, tmp_path / "broken") == wanted


@pytest.mark.parametrize(
    "damage",
    ["trainer_state.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "truncated"],
)
def test_broken_last_checkpoint_is_passed_over(
    tiny_model_folder: Path, dataset: ConversationDataset, tmp_path: Path, damage: str
) -> None:
    wanted = train(kore_model(tiny_model_folder), dataset, OPTIONS, tmp_path / "whole")
    with pytest.raises(Killed):
        train(kore_model(tiny_model_folder), dataset, OPTIONS, tmp_path / "broken", progress=killed_at(8))
    last = tmp_path / "broken" / "checkpoint-6"
    if damage == "truncated":
        state = last / "trainer_state.json"
        state.write_text(state.read_text()[:40])
    else:
        (last / damage).unlink()
    assert last_whole_checkpoint(tmp_path / "broken") == str(tmp_path / "broken" / "checkpoint-3")
    assert not last.exists()
    assert train(kore_model(tiny_model_folder), dataset, OPTIONS, tmp_path / "broken") == wanted


def test_newest_whole_checkpoint_by_number(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path / "nothing") is None
    for step in (5, 10, 100):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (folder / name).touch()
        (folder / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
    shutil.rmtree(tmp_path / "checkpoint-100")
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import test_loop as t
from kore_fast.data.conversations import ConversationDataset
from kore_fast.modules.loading import load_processor
model, knowledge, out = map(Path, sys.argv[2:])
dataset = ConversationDataset(load_processor(model), t.samples(), knowledge)
adapted = t.kore_model(model)

def slow(items, total=None, label=""):
    for item in items:
        print("step", flush=True)
        time.sleep(0.2)
        yield item

t.train(adapted, dataset, t.OPTIONS, out, progress=slow)
"""


def test_killed_process_is_continued(
    tiny_model_folder: Path, knowledge_folder: Path, dataset: ConversationDataset, tmp_path: Path
) -> None:
    whole = kore_model(tiny_model_folder)
    wanted = train(whole, dataset, OPTIONS, tmp_path / "whole")
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), tiny_model_folder, knowledge_folder, folder],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for _ in range(5):
        assert process.stdout.readline() == "step\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-3")
    again = kore_model(tiny_model_folder)
    assert train(again, dataset, OPTIONS, folder) == wanted
    again.save_pretrained(str(tmp_path / "a"))
    whole.save_pretrained(str(tmp_path / "b"))
    one, other = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "ab")
    assert one == other


def test_changed_a_in_a_checkpoint_is_refused(
    tiny_model_folder: Path, dataset: ConversationDataset, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(Killed):
        train(kore_model(tiny_model_folder), dataset, OPTIONS, tmp_path, progress=killed_at(5))
    path = tmp_path / "checkpoint-3" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "lora_A" in key)
    save_file({**tensors, key: tensors[key] * 2}, path, metadata={"format": "pt"})
    with pytest.raises(ConstraintError, match="lora_A has changed"):
        train(kore_model(tiny_model_folder), dataset, OPTIONS, tmp_path)


def test_something_that_trains_a_is_caught(
    tiny_model_folder: Path, dataset: ConversationDataset, tmp_path: Path
) -> None:
    model = kore_model(tiny_model_folder)
    next(iter(lora_layers(model).values())).lora_A["default"].weight.requires_grad_(True)
    with pytest.raises(ConstraintError, match="lora_A has changed"):
        train(model, dataset, OPTIONS, tmp_path)


def test_weight_decay_is_refused_for_kore_before_anything(
    tiny_model_folder: Path, dataset: ConversationDataset, tmp_path: Path
) -> None:
    options = replace(OPTIONS, weight_decay=0.01)
    with pytest.raises(ConstraintError, match=r"weight_decay=0\.01"):
        train(kore_model(tiny_model_folder), dataset, options, tmp_path / "kore")
    assert not (tmp_path / "kore").exists()
    assert train(lora_model(tiny_model_folder), dataset, replace(options, steps=2), tmp_path / "lora")


def test_loss_is_the_model_s_own(tiny_model_folder: Path, dataset: ConversationDataset, tmp_path: Path) -> None:
    model = load_model(tiny_model_folder)
    inputs = collate([dataset[i] for i in range(4)], 0, labels=True)
    wanted = model(**inputs).loss
    loss = _Trainer.compute_loss(object.__new__(_Trainer), model, dict(inputs))
    assert torch.allclose(loss, wanted, rtol=1e-5)
    count = (inputs["labels"] != -100).sum()
    assert torch.allclose(
        _Trainer.compute_loss(object.__new__(_Trainer), model, dict(inputs), num_items_in_batch=2 * count),
        wanted / 2,
        rtol=1e-5,
    )


def test_first_row_of_the_log_is_the_base_s_loss(
    tiny_model_folder: Path, dataset: ConversationDataset, tmp_path: Path
) -> None:
    model = kore_model(tiny_model_folder)
    order = training_order(dataset.lengths(), 3, OPTIONS.steps, OPTIONS.seed)
    with torch.no_grad():
        wanted = float(model(**collate([dataset[i] for i in order[0]], 0, labels=True)).loss)
    assert train(model, dataset, OPTIONS, tmp_path)[0]["loss"] == pytest.approx(wanted, rel=1e-4)


def test_accumulated_batches_are_one_large_batch(
    tiny_model_folder: Path, dataset: ConversationDataset, tmp_path: Path
) -> None:
    """The mean is over all answers' tokens of a step, however they are cut into batches."""
    parts = train(
        lora_model(tiny_model_folder), dataset, replace(OPTIONS, steps=1, batch_size=1, accumulation=5), tmp_path / "a"
    )
    whole = train(lora_model(tiny_model_folder), dataset, replace(OPTIONS, steps=1, batch_size=5), tmp_path / "b")
    assert parts[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-5)
    assert parts[0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"], rel=1e-4)


def test_loss_that_is_no_number_stops_the_run(
    tiny_model_folder: Path, dataset: ConversationDataset, tmp_path: Path
) -> None:
    model = lora_model(tiny_model_folder)
    with torch.no_grad():
        next(iter(lora_layers(model).values())).lora_B["default"].weight.fill_(float("nan"))
    with pytest.raises(ConstraintError, match="the loss is nan at step 1: lower the learning rate"):
        train(model, dataset, OPTIONS, tmp_path)


def test_projector_has_its_own_learning_rate(tiny_model_folder: Path, dataset: ConversationDataset) -> None:
    from transformers import TrainingArguments

    model = kore_model(tiny_model_folder, modules_to_save=["multi_modal_projector"])
    arguments = TrainingArguments(output_dir="unused", learning_rate=1e-3, use_cpu=True, report_to="none")
    trainer = _Trainer(model=model, args=arguments, train_dataset=dataset)
    trainer.options = replace(OPTIONS, projector_learning_rate=2e-5)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    assert set(rates) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, rate in rates.items():
        assert rate == (2e-5 if "multi_modal_projector" in name else 1e-3), name
    assert set(rates.values()) == {2e-5, 1e-3}


@pytest.mark.parametrize("projector", ["visual.merger", "model.connector"])
def test_full_fine_tuning_trains_a_projector_of_any_name(projector: str) -> None:
    """Qwen's has two parts, and another model's neither "projector" nor "merger" in it."""
    from transformers import TrainingArguments

    model = nn.Module()
    for name in ("model.language.up", "model.language.connectors.down", f"{projector}.linear", "head"):
        parent, _, last = name.rpartition(".")
        inner: nn.Module = model
        for part in filter(None, parent.split(".")):
            if part not in inner._modules:
                inner.add_module(part, nn.Module())
            inner = inner.get_submodule(part)
        inner.add_module(last, nn.Linear(2, 2, bias=False).requires_grad_(False))
    layers = ["model.language.up", "model.language.connectors.down"]
    opened = METHODS["full"].open(model, StartOptions(layers=layers, modules_to_save=[projector]), None)
    trained = {name for name, p in opened.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.weight" for name in (*layers, f"{projector}.linear")}
    arguments = TrainingArguments(output_dir="unused", learning_rate=1e-3, use_cpu=True, report_to="none")
    trainer = _Trainer(model=opened, args=arguments)
    trainer.options = replace(OPTIONS, projector_learning_rate=2e-5, trained_whole=[projector])
    trainer.method = METHODS["full"]
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    assert rates == {name: 2e-5 if projector in name else 1e-3 for name in trained}


def test_a_projector_s_learning_rate_for_nothing_is_refused(
    tiny_model_folder: Path, dataset: ConversationDataset, tmp_path: Path
) -> None:
    with pytest.raises(ConstraintError, match="but nothing that is trained is within modules_to_save or"):
        train(
            lora_model(tiny_model_folder),
            dataset,
            replace(OPTIONS, projector_learning_rate=1e-2, trained_whole=["multi_modal_projector"]),
            tmp_path,
        )


def test_projector_is_trained_and_resumed(
    tiny_model_folder: Path, dataset: ConversationDataset, tmp_path: Path
) -> None:
    options = replace(OPTIONS, projector_learning_rate=1e-2)

    def fresh() -> Any:
        return kore_model(tiny_model_folder, modules_to_save=["multi_modal_projector"])

    whole = fresh()
    before = trained(whole)
    wanted = train(whole, dataset, options, tmp_path / "whole")
    after = trained(whole)
    assert all(not torch.equal(before[n], after[n]) for n in before if "projector" in n and "weight" in n)
    with pytest.raises(Killed):
        train(fresh(), dataset, options, tmp_path / "broken", progress=killed_at(5))
    again = fresh()
    assert train(again, dataset, options, tmp_path / "broken") == wanted
    assert same(trained(again), after)


def test_loss_file_has_its_columns(tmp_path: Path) -> None:
    write_loss(tmp_path / "loss.csv", [dict.fromkeys(LOSS_COLUMNS, 1) | {"loss": 2.5}])
    assert (tmp_path / "loss.csv").read_text() == "step,epoch,loss,learning_rate,grad_norm\n1,1,2.5,1,1\n"


@pytest.mark.parametrize(
    ("samples", "most", "processes", "wanted"),
    [
        (54, 7, 8, (7, 1)),
        (54, 7, 1, (7, 8)),
        (192, 6, 8, (6, 4)),
        (4, 4, 1, (4, 1)),
        (3, 2, 2, (2, 1)),
        (5, 8, 8, (1, 1)),
    ],
)
def test_a_step_is_shared_with_few_places_left(
    samples: int, most: int, processes: int, wanted: tuple[int, int]
) -> None:
    at_a_time, rounds = share_of_step(samples, most, processes)
    assert (at_a_time, rounds) == wanted
    assert at_a_time <= most
    assert samples <= at_a_time * rounds * processes < samples + rounds * processes
