"""Replay, EWC and LwF: with no weight they change nothing, with much they hold, and their parts are what they say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from kore_fast.cli import main
from kore_fast.constraint import decoder_linears
from kore_fast.data.conversations import ConversationDataset, encode_texts, training_order
from kore_fast.errors import DataError, RecipeError
from kore_fast.modules.adapter import lora_layers
from kore_fast.modules.loading import load_model
from kore_fast.recipe import methods as recipe_methods
from kore_fast.recipe.loading import load_recipe
from kore_fast.recipe.schema import Method
from kore_fast.training.loop import TrainingOptions, train
from kore_fast.training.methods import METHODS
from kore_fast.training.retention.ewc import Ewc, diagonal_fisher, load_fisher, save_fisher
from kore_fast.training.retention.lwf import Lwf
from kore_fast.training.retention.terms import Batch
from python_tests.training.test_loop import OPTIONS, Killed, killed_at, kore_model, lora_model, same, samples, trained

IDS = torch.arange(4, 84).reshape(4, 20)


@pytest.fixture
def dataset(tiny_processor: Any, knowledge_folder: Path) -> ConversationDataset:
    return ConversationDataset(tiny_processor, samples(), knowledge_folder)


def ones(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.ones_like(layer.get_base_layer().weight) for name, layer in lora_layers(model).items()}


# Replay


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("batch_size", [1, 4, 5])
def test_replay_has_the_share_that_was_asked_for(share: float, batch_size: int) -> None:
    new, old = [9, 3, 7, 5, 8], [4, 6]
    order = training_order(new, batch_size, 64, 3, old=old, share_old=share)
    drawn = [index for batch in order for index in batch]
    assert sum(index >= len(new) for index in drawn) == pytest.approx(share * len(drawn), abs=1)
    for start in range(0, 64, 16):
        chunk = [index for batch in order[start : start + 16] for index in batch]
        assert sum(index >= len(new) for index in chunk) == pytest.approx(share * len(chunk), abs=1)
    assert set(drawn) == set(range(len(new) + len(old)))
    assert all(len(batch) == batch_size for batch in order)
    assert order == training_order(new, batch_size, 64, 3, old=old, share_old=share)
    assert order != training_order(new, batch_size, 64, 4, old=old, share_old=share)


def test_without_replay_the_order_is_what_it_was() -> None:
    lengths = list(range(3, 40))
    assert training_order(lengths, 4, 30, 1) == training_order(lengths, 4, 30, 1, old=[5, 6], share_old=0.0)
    with pytest.raises(DataError, match="no old samples"):
        training_order(lengths, 4, 30, 1, share_old=0.1)


def test_replayed_run_resumes(
    tiny_model_folder: Path, dataset: ConversationDataset, tiny_processor: Any, tmp_path: Path
) -> None:
    dataset.old = encode_texts(tiny_processor, ["A river runs.", "A long river runs to the sea."], 40)
    options = TrainingOptions(**{**vars(OPTIONS), "replay": 0.5})
    seen: list[int] = []

    class Watched(ConversationDataset):
        def __getitem__(self, index: int) -> Any:
            seen.append(self.order[index])
            return super().__getitem__(index)

    watched = Watched(tiny_processor, dataset.samples, dataset.image_root, dataset.old)
    whole = lora_model(tiny_model_folder)
    wanted = train(whole, watched, options, tmp_path / "whole")
    drawn = seen[: 8 * 3]
    assert sum(index >= len(dataset.samples) for index in drawn) == 12
    with pytest.raises(Killed):
        train(lora_model(tiny_model_folder), dataset, options, tmp_path / "broken", progress=killed_at(5))
    again = lora_model(tiny_model_folder)
    assert train(again, dataset, options, tmp_path / "broken") == wanted
    assert same(trained(again), trained(whole))
    without = lora_model(tiny_model_folder)
    train(without, dataset, OPTIONS, tmp_path / "without")
    assert not same(trained(without), trained(whole))


# EWC


def test_fisher_is_the_mean_of_squared_gradients_of_each_sample() -> None:
    """On one linear with a softmax over it, by the formula: ∂L/∂W = mean over answers of (p − e_y)·xᵀ."""
    torch.manual_seed(0)

    class Out:
        def __init__(self, logits: torch.Tensor) -> None:
            self.logits = logits

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 4, bias=False)

        def forward(self, x: torch.Tensor) -> Out:
            return Out(self.head(x))

    model = Tiny().requires_grad_(False)
    rows = [
        {"x": torch.randn(1, 5, 3), "labels": torch.tensor([[-100, 2, -100, 0, 1]])},
        {"x": torch.randn(1, 3, 3), "labels": torch.tensor([[-100, -100, 3]])},
    ]
    wanted = torch.zeros(4, 3, dtype=torch.float64)
    for row in rows:
        gradient, answers = torch.zeros(4, 3, dtype=torch.float64), 0
        for place, label in enumerate(row["labels"][0].tolist()):
            if label >= 0:
                x = row["x"][0, place - 1].double()
                error = torch.softmax(model.head.weight.double() @ x, 0)
                error[label] -= 1
                gradient += torch.outer(error, x)
                answers += 1
        wanted += (gradient / answers) ** 2 / len(rows)
    found = diagonal_fisher(model, ["head"], rows)["head"]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-9)
    assert not model.head.weight.requires_grad


def test_penalty_and_its_gradient() -> None:
    """λ/2·Σ F∘(s·B·A)² and its gradient by B, λ·s·(F∘s·B·A)·Aᵀ, split over the batches of a step."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(5, 4)), LoraConfig(r=2, lora_alpha=6, target_modules=["0"]))
    layer = lora_layers(model)["0"]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        B.normal_()
    fisher = torch.rand(4, 5)
    term = Ewc(7.0, {"0": fisher}, METHODS["lora"].weight_changes(model))
    batch = Batch(model, {}, torch.zeros(1, 1), torch.zeros(1, dtype=torch.bool), 1, batches=2)
    value = term(batch)
    change = 3 * (B @ A).detach()
    assert float(value) == pytest.approx(7 / 2 * float((fisher * change**2).sum()) / 2, rel=1e-5)
    value.backward()
    assert B.grad is not None
    torch.testing.assert_close(B.grad, 7 * 3 * (fisher * change) @ A.detach().T / 2, rtol=1e-4, atol=1e-5)


Maker = Callable[[nn.Module], list[Any]]


@pytest.mark.parametrize("kind", ["ewc", "lwf"])
@pytest.mark.parametrize("adapter", ["lora", "kore"])
def test_without_weight_it_is_the_method_itself(
    tiny_model_folder: Path, dataset: ConversationDataset, tmp_path: Path, kind: str, adapter: str
) -> None:
    def fresh() -> nn.Module:
        return lora_model(tiny_model_folder) if adapter == "lora" else kore_model(tiny_model_folder)

    plain, added = fresh(), fresh()
    way = METHODS[adapter]
    term: Any = Ewc(0.0, ones(added), way.weight_changes(added)) if kind == "ewc" else Lwf(0.0, 2.0, way)
    wanted = train(plain, dataset, OPTIONS, tmp_path / "plain", method=way)
    assert train(added, dataset, OPTIONS, tmp_path / "added", method=way, terms=[term]) == wanted
    assert same(trained(added), trained(plain))


@pytest.mark.parametrize("name", ["lora", "full", "osf"])
def test_a_huge_strength_keeps_the_start(
    tiny_model_folder: Path, dataset: ConversationDataset, tmp_path: Path, name: str
) -> None:
    from kore_fast.training.methods.interface import StartOptions

    way = METHODS[name]
    moved = {}
    for strength in (0.0, 1e8):
        if name == "lora":
            model = lora_model(tiny_model_folder)
        else:
            base = load_model(tiny_model_folder)
            options = StartOptions(layers=decoder_linears(base), target_modules=r".*language_model.*_proj")
            model = way.open(base, options, None)
        changes = way.weight_changes(model)
        fisher = {layer: torch.ones_like(change().detach()) for layer, change in changes.items()}
        assert len(fisher) == 14
        terms = [Ewc(strength, fisher, changes)]
        chosen = TrainingOptions(learning_rate=1e-3, steps=8, batch_size=3)
        train(model, dataset, chosen, tmp_path / f"{strength}", method=way, terms=terms)
        moved[strength] = sum(float(change().square().sum()) for change in changes.values()) ** 0.5
    # Adam's steps are as long however large the gradient is: it turns back at each.
    assert 0 < moved[1e8] < 0.5 * moved[0.0]


def test_one_process_takes_the_fisher_on_its_gpu(
    finished: Path, tiny_model: nn.Module, tiny_processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two finds the file that the first wrote meanwhile."""
    recipe = load_recipe(finished)
    method = Method(kind="lora", rank=2, learning_rate=1e-3, ewc={"strength": 1.0, "samples": 2})
    old = encode_texts(tiny_processor, ["A river is long.", "Hills are green."], 8)
    moved: list[nn.Module] = []

    def on_accelerator(model: nn.Module) -> nn.Module:
        moved.append(model)
        return model

    monkeypatch.setattr(recipe_methods, "on_accelerator", on_accelerator)
    first = recipe_methods.fisher(recipe, method, tiny_model, tiny_processor, old, tmp_path / "first")
    assert moved == [tiny_model]
    assert first

    class Second:
        world, rank = 2, 1

        def by_first(self, work: Callable[[], Any]) -> None:
            shutil.copytree(tmp_path / "first", tmp_path / "second")

    monkeypatch.setattr("kore_fast.constraint.distributed.Ranks", Second)
    second = recipe_methods.fisher(recipe, method, tiny_model, tiny_processor, old, tmp_path / "second")
    assert moved == [tiny_model]
    assert same(second, first)


def test_fisher_file(tmp_path: Path) -> None:
    fisher = {"a.b": torch.rand(3, 4), "c": torch.rand(2, 2)}
    save_fisher(tmp_path / "fisher.safetensors", fisher)
    assert same(load_fisher(tmp_path / "fisher.safetensors"), fisher)


# LwF


def batch_of(model: nn.Module, logits: torch.Tensor) -> Batch:
    return Batch(model, {"input_ids": IDS}, logits, torch.arange(len(logits)) % 3 == 0, 10, 1)


def test_distillation_by_its_definition(tiny_model_folder: Path) -> None:
    model = lora_model(tiny_model_folder)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight.normal_(std=0.5)
        base = load_model(tiny_model_folder)(input_ids=IDS).logits.flatten(0, 1)
        student = model(input_ids=IDS).logits.flatten(0, 1)
    batch = batch_of(model, student)
    p = torch.softmax(base.double()[batch.answers] / 3, -1)
    q = torch.softmax(student.double()[batch.answers] / 3, -1)
    wanted = 0.5 * 9 * float((p * (p / q).log()).sum()) / 10
    assert wanted > 0
    assert float(Lwf(0.5, 3.0, METHODS["lora"])(batch)) == pytest.approx(wanted, rel=1e-3)
    copy = load_model(tiny_model_folder)
    assert float(Lwf(0.5, 3.0, METHODS["full"], copy)(batch)) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("adapter", ["lora", "kore"])
def test_looking_at_the_base_leaves_the_model_as_it_was(tiny_model_folder: Path, adapter: str) -> None:
    model = lora_model(tiny_model_folder) if adapter == "lora" else kore_model(tiny_model_folder)
    model.train()
    model.get_submodule("base_model.model.model.vision_tower").eval()
    trains = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    wanted = model(input_ids=IDS).logits.detach()
    term = Lwf(1.0, 2.0, METHODS[adapter])
    assert float(term(batch_of(model, wanted.flatten(0, 1)))) == pytest.approx(0.0, abs=1e-5)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trains
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert torch.equal(model(input_ids=IDS).logits, wanted)


def test_much_distillation_keeps_the_answers(
    tiny_model_folder: Path, dataset: ConversationDataset, tmp_path: Path
) -> None:
    away = {}
    for weight in (0.0, 100.0):
        model = lora_model(tiny_model_folder)
        terms = [Lwf(weight, 1.0, METHODS["lora"])]
        train(model, dataset, OPTIONS, tmp_path / f"{weight}", terms=terms)
        with torch.no_grad():
            found = torch.log_softmax(model(input_ids=IDS).logits, -1)
            base = torch.log_softmax(load_model(tiny_model_folder)(input_ids=IDS).logits, -1)
        away[weight] = float((base.exp() * (base - found)).sum(-1).mean())
    assert away[100.0] < 0.5 * away[0.0]


# Through a recipe


def test_all_together_through_a_recipe(finished: Path, tmp_path: Path) -> None:
    """On a method whose base can be shown and on one that needs a copy; a kill while training changes nothing."""
    kinds = {
        "kore": "{kind: kore, rank: 4, learning_rate: 1e-2, ADDED}",
        "pissa": "{kind: pissa, rank: 4, learning_rate: 1e-3, ADDED}",
    }
    added = "replay: 0.25, ewc: {strength: 1e3, samples: 3}, lwf: {weight: 0.5}"
    settings = [f"methods.{n}={text.replace('ADDED', added)}" for n, text in kinds.items()]
    command = [str(finished), *(f"--set={s}" for s in [*settings, "methods.lora=null", "training.steps=4"])]
    trees = []
    for name in ("whole", "broken"):
        run = tmp_path / name
        for done in ("augment", "covariance"):
            shutil.copytree(finished / "run" / done, run / done)
        assert main(["init", *command, "--run", str(run)]) == 0
        if name == "broken":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("kore_fast.training.loop._ShowSteps.on_step_end", _fail_at(3))
                with pytest.raises(Killed):
                    main(["train", *command, "--run", str(run)])
            assert (run / "train" / "kore" / "checkpoints" / "fisher.safetensors").is_file()
        assert main(["train", *command, "--run", str(run)]) == 0
        files = sorted(p for p in (run / "train").rglob("*") if p.is_file())
        trees.append({str(p.relative_to(run)): p.read_bytes() for p in files})
    assert trees[0] == trees[1]
    told = json.loads((tmp_path / "whole" / "train" / "pissa" / "settings.json").read_text())
    assert {"replay": 0.25, "ewc_strength": 1000.0, "lwf_weight": 0.5, "lwf_temperature": 2.0}.items() <= told.items()
    assert told["old_sample_count"] > 10


def _fail_at(step: int) -> Callable[..., None]:
    def on_step_end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == step:
            raise Killed

    return on_step_end


def test_old_knowledge_is_asked_for(finished: Path, tmp_path: Path) -> None:
    text = (finished / "recipe.yaml").read_text()
    first, last = text.index("covariance:"), text.index("methods:")
    (tmp_path / "recipe.yaml").write_text(text[:first] + text[last:])
    for added in ("replay: 0.1", "ewc: {strength: 1}"):
        with pytest.raises(RecipeError, match=r"method 'lora': (replay|ewc) draws on the samples of old knowledge"):
            load_recipe(
                tmp_path,
                {"methods.kore": "null", "methods.lora": f"{{kind: lora, rank: 2, learning_rate: 1, {added}}}"},
            )
