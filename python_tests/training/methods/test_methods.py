"""Every method through the recipe on the tiny model: it starts as the base, trains what it says, and what it saves is
the trained model in plain PEFT or transformers."""

from __future__ import annotations

import csv
import json
import shutil
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from kore_fast.cli import main
from kore_fast.constraint import CovarianceStore, select_linears
from kore_fast.errors import ConstraintError
from kore_fast.modules.adapter import lora_layers
from kore_fast.modules.loading import load_model
from kore_fast.recipe import work
from kore_fast.recipe.loading import load_recipe
from kore_fast.recipe.methods import start_options
from kore_fast.recipe.schema import Method, Recipe
from kore_fast.training.loop import TrainingOptions, move_named_state, train
from kore_fast.training.methods import METHODS
from kore_fast.training.methods.low_rank import product
from kore_fast.training.methods.residual import released_covariances
from kore_fast.training.retention.ewc import diagonal_fisher
from python_tests.conftest import recipe_text
from python_tests.training.test_loop import Killed, killed_at, samples

IDS = torch.arange(4, 84).reshape(4, 20)
RATE = "learning_rate: 1e-2"
OPTIONS = {
    "full": f"{{ kind: full, {RATE} }}",
    "osf": f"{{ kind: osf, {RATE}, effective_rank: 0.75 }}",
    "lora": f"{{ kind: lora, rank: 4, alpha: 8, {RATE} }}",
    "lora_fa": f"{{ kind: lora_fa, rank: 4, alpha: 8, {RATE} }}",
    "pissa": f"{{ kind: pissa, rank: 4, alpha: 8, {RATE} }}",
    "corda": f"{{ kind: corda, rank: 4, {RATE} }}",
    "lora_null": f"{{ kind: lora_null, rank: 4, alpha: 8, {RATE} }}",
    "lora_null_2": f"{{ kind: lora_null, rank: 4, {RATE}, freeze_a: true, null_covariance: store }}",
    "mica": f"{{ kind: mica, rank: 4, {RATE} }}",
    "kore": f"{{ kind: kore, rank: 8, {RATE} }}",
}
RESIDUAL = ("pissa", "corda", "lora_null", "lora_null_2")


def here(name: str) -> bool:
    """Whether the installed packages have the method."""
    try:
        METHODS[kind(name)].check_available()
    except ConstraintError:
        return False
    return True


def kind(name: str) -> str:
    return name.removesuffix("_2")


def each(*left_out: str) -> Any:
    """Every method as a parameter, those that cannot run here skipped with the reason."""
    reason = {
        "mica": "MiCA needs PEFT 0.20",
        "corda": "PEFT's CorDA imports attrs, which is not installed" if find_spec("attr") is None else "",
    }
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=pytest.mark.skipif(not here(name), reason=reason.get(name, "not available")))
            for name in OPTIONS
            if name not in left_out
        ],
    )


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, knowledge_folder: Path) -> Recipe:
    """A recipe of all methods that can run here, taken through every stage."""
    folder = tmp_path_factory.mktemp("methods")
    text = recipe_text(tiny_model_folder, knowledge_folder)
    first, last = text.index("methods:"), text.index("training:")
    methods = "".join(f"  {name}: {options}\n" for name, options in OPTIONS.items() if here(name))
    (folder / "recipe.yaml").write_text(f"{text[:first]}methods:\n{methods}{text[last:]}")
    assert main(["run", str(folder), "--run", str(folder / "run"), "--set=training.steps=4"]) == 0
    return load_recipe(folder, {"training.steps": "4"})


def run_of(recipe: Recipe) -> Path:
    return recipe.base_folder / "run"


def opened(recipe: Recipe, name: str) -> nn.Module:
    """What training begins with."""
    method = recipe.methods[name]
    base = load_model(recipe.model_path())
    start = None if method.way.starts == "nothing" else run_of(recipe) / "init" / name
    return method.way.open(base, start_options(recipe, method, base), start)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def dataset(recipe: Recipe) -> Any:
    from kore_fast.data.conversations import ConversationDataset
    from kore_fast.modules.loading import load_processor

    return ConversationDataset(load_processor(recipe.model_path()), samples(), recipe.items.parent)


def test_the_schema_knows_every_kind() -> None:
    assert set(get_args(Method.model_fields["kind"].annotation)) == set(METHODS)
    assert {kind(name) for name in OPTIONS} == set(METHODS)


@each()
def test_every_stage_is_there(recipe: Recipe, name: str) -> None:
    run = run_of(recipe)
    scores = json.loads((run / "evaluate" / name / "scores.json").read_text())
    settings = scores["settings"]
    assert scores["kind"] == kind(name)
    model = opened(recipe, name)
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert scores["trained_parameters"] == trains > 0
    saved = 0 if name == "full" else sum(v.numel() for v in load_file(adapter(recipe, name)).values())
    assert settings["added_parameters"] == saved
    cost = json.loads((run / "cost" / "train" / f"{name}.json").read_text())
    assert cost["steps"] == 4
    assert cost["seconds"] > 0
    assert cost["peak_memory"] is None or cost["peak_memory"] > 1 << 20
    results = list(csv.DictReader((run / "report" / "results.csv").open()))
    assert kind(name) in {row["kind"] for row in results}
    assert not any(path.name == "untrained" for path in run.rglob("*"))


def adapter(recipe: Recipe, name: str) -> Path:
    return run_of(recipe) / "train" / name / "adapter" / "adapter_model.safetensors"


@each()
def test_it_starts_as_the_base(recipe: Recipe, name: str) -> None:
    wanted = logits(load_model(recipe.model_path()))
    found = logits(opened(recipe, name))
    if name in (*RESIDUAL, "osf"):  # sums that cancel to rounding
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(found, wanted)


@each("full", "osf", "lora", "lora_fa", "mica", "kore")
def test_residual_and_factors_sum_to_the_base_s_weight(recipe: Recipe, name: str) -> None:
    base = load_model(recipe.model_path())
    for layer_name, layer in lora_layers(opened(recipe, name)).items():
        W0 = base.get_submodule(layer_name).weight
        whole = layer.get_base_layer().weight + layer.get_delta_weight("default")
        assert not torch.allclose(layer.get_base_layer().weight, W0)
        torch.testing.assert_close(whole, W0, rtol=1e-5, atol=1e-6)


def trained_again(recipe: Recipe, name: str, folder: Path, **given: Any) -> nn.Module:
    model = opened(recipe, name)
    options = TrainingOptions(learning_rate=1e-2, steps=8, batch_size=3, checkpoint_every=3)
    train(model, dataset(recipe), options, folder, method=recipe.methods[name].way, **given)
    return model


@each()
def test_what_is_saved_is_the_trained_model_elsewhere(recipe: Recipe, name: str, tmp_path: Path) -> None:
    method = recipe.methods[name]
    model = trained_again(recipe, name, tmp_path / "checkpoints")
    wanted = logits(model)
    start = None if method.way.starts == "nothing" else run_of(recipe) / "init" / name
    before = {} if start is None else {p: p.read_bytes() for p in start.iterdir()}
    method.way.save(model, tmp_path / method.way.saves, start)
    assert all(path.read_bytes() == content for path, content in before.items())
    base = load_model(recipe.model_path())
    assert (wanted - logits(base)).abs().max() > 1e-2
    if name == "full":
        plain: nn.Module = load_model(tmp_path / "model")
    else:
        plain = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
        # Any PEFT and any server can load it, as nothing is made anew from the base.
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert name == "osf" or config["init_lora_weights"] is True
        assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            *(["kore.json"] if name == "kore" else []),
        ]
    torch.testing.assert_close(logits(plain), wanted, rtol=1e-3, atol=1e-4)
    loaded = method.way.load(tmp_path / method.way.saves, lambda folder: load_model(folder or recipe.model_path()))
    torch.testing.assert_close(logits(loaded), wanted, rtol=1e-3, atol=1e-4)
    # The model that was saved goes on as it was.
    assert torch.equal(logits(model), wanted)


@each()
def test_what_is_measured_is_base_and_adapter_unmerged(recipe: Recipe, name: str) -> None:
    """In bfloat16 the base's weights stay the base's, and the change is the float32 one of the file: merged, a small
    one would be lost in the weights' rounding."""
    half = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "bfloat16"})})
    method, folder = recipe.methods[name], run_of(recipe) / "train" / name
    model, base = work._trained(half, folder, method)
    untouched = dict(load_model(recipe.model_path(), torch.bfloat16).named_parameters())
    if name == "full":
        assert base is not None
        assert {p.dtype for p in (*model.parameters(), *base.parameters())} == {torch.bfloat16}
        return
    assert base is None
    assert isinstance(model, PeftModel)
    wrapped = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in model.named_parameters()}
    assert all(torch.equal(wrapped[n], p) for n, p in untouched.items())
    tensors = load_file(adapter(recipe, name))
    layers: Any = lora_layers(model)
    changes = {n: partial(product, layer) for n, layer in layers.items()} or method.way.weight_changes(model)
    for layer, change in changes.items():
        if name == "osf":
            U, S, V = (tensors[f"base_model.model.{layer}.osf_svd_params.{part}_low"] for part in "USV")
            module: Any = model.get_submodule(f"base_model.model.{layer}")
            start = [getattr(module, f"_osf_{part}_low_init")["default"] for part in "USV"]
            wanted = (U * S) @ V - (start[0] * start[1]) @ start[2]
        else:
            A, B = (tensors[f"base_model.model.{layer}.lora_{part}.weight"] for part in "AB")
            wanted = float(layers[layer].scaling["default"]) * (B @ A)
        torch.testing.assert_close(change().detach(), wanted, rtol=1e-5, atol=1e-7)


@each("full", "osf")
def test_the_rank_that_is_saved(recipe: Recipe, name: str) -> None:
    ranks = {v.shape[0] for k, v in load_file(adapter(recipe, name)).items() if "lora_A" in k}
    assert ranks == {{"kore": 8, "pissa": 8, "corda": 8, "lora_null": 8}.get(name, 4)}


@each("full", "osf")
def test_what_is_frozen_stays(recipe: Recipe, name: str, tmp_path: Path) -> None:
    frozen = {"lora_fa": "A", "lora_null_2": "A", "kore": "A", "mica": "B"}.get(name)
    model = opened(recipe, name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    options = TrainingOptions(learning_rate=1e-2, steps=3, batch_size=3)
    train(model, dataset(recipe), options, tmp_path, method=recipe.methods[name].way)
    changed = {n.split(".")[-3][-1] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"A", "B"} - {frozen}
    stayed = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert all(n in stayed for n in before if "lora_" not in n or n.split(".")[-3][-1] == frozen)


def test_osf_leaves_the_largest_direction(recipe: Recipe) -> None:
    """PEFT projects gradients, and Adam's steps leave that projection a little: not zero, but far below the change."""
    way = METHODS["osf"]
    trained = way.load(run_of(recipe) / "train" / "osf" / "adapter", lambda _: load_model(recipe.model_path()))
    base = load_model(recipe.model_path())
    changes = []
    for name, change in way.weight_changes(trained).items():
        W0, delta = base.get_submodule(name).weight.detach(), change().detach()
        U, S, Vh = torch.linalg.svd(W0, full_matrices=False)
        assert float((U[:, 0] @ delta @ Vh[0]).abs()) < 1e-3 * float(S[0])
        changes.append(float(delta.norm() / W0.norm()))
    assert len(changes) == len(select_linears(base))
    assert min(changes) > 1e-3


@each()
def test_interrupted_and_resumed_is_uninterrupted(recipe: Recipe, name: str, tmp_path: Path) -> None:
    def saved(model: nn.Module, folder: Path) -> dict[str, bytes]:
        way = recipe.methods[name].way
        start = None if way.starts == "nothing" else run_of(recipe) / "init" / name
        way.save(model, folder / way.saves, start)
        return {p.name: p.read_bytes() for p in (folder / way.saves).iterdir()}

    whole = saved(trained_again(recipe, name, tmp_path / "whole"), tmp_path / "a")
    with pytest.raises(Killed):
        trained_again(recipe, name, tmp_path / "broken", progress=killed_at(5))
    assert (tmp_path / "broken" / "checkpoint-3").is_dir()
    assert saved(trained_again(recipe, name, tmp_path / "broken"), tmp_path / "b") == whole


def test_full_fine_tuning_of_a_bfloat16_model_resumes_to_the_bit(recipe: Recipe, tmp_path: Path) -> None:
    """What is trained is float32: a step is smaller than bfloat16's spacing."""

    def trained_in_half(folder: Path, **given: Any) -> dict[str, torch.Tensor]:
        base = load_model(recipe.model_path(), torch.bfloat16)
        model = METHODS["full"].open(base, start_options(recipe, recipe.methods["full"], base), None)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        options = TrainingOptions(learning_rate=1e-4, steps=4, batch_size=3, checkpoint_every=2, bf16=True)
        train(model, dataset(recipe), options, folder, method=METHODS["full"], **given)
        return model.state_dict()

    whole = trained_in_half(tmp_path / "whole")
    with pytest.raises(Killed):
        trained_in_half(tmp_path / "broken", progress=killed_at(3))
    found = trained_in_half(tmp_path / "broken")
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32, torch.bfloat16}
    assert all(found[name].dtype == whole[name].dtype and torch.equal(found[name], whole[name]) for name in whole)


def test_lora_fa_is_not_adamw_on_b(recipe: Recipe, tmp_path: Path) -> None:
    from peft.optimizers.lorafa import LoraFAOptimizer

    way = METHODS["lora_fa"]
    model = opened(recipe, "lora_fa")
    assert isinstance(way.optimizer(model, TrainingOptions(1e-3, 1)), LoraFAOptimizer)
    data = dataset(recipe)
    options = TrainingOptions(learning_rate=1e-2, steps=2, batch_size=3)
    train(model, data, options, tmp_path / "own", method=way)
    other = opened(recipe, "lora_fa")
    train(other, data, options, tmp_path / "adamw", method=METHODS["lora"])
    B = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    assert any(not torch.allclose(p, B[n]) for n, p in other.named_parameters() if n in B)


@pytest.mark.parametrize("name", ["lora_fa", "pissa", "full"])
def test_the_projector_is_trained_and_saved_beside_it(recipe: Recipe, name: str, tmp_path: Path) -> None:
    """PEFT's conversion leaves it out, and LoRA-FA's optimiser keeps lists as long as its parameters."""
    method = recipe.methods[name].model_copy(update={"projector_learning_rate": 1e-2})
    way, start = method.way, None if name == "full" else tmp_path / "start"
    options = start_options(recipe, method, load_model(recipe.model_path()))
    if start is not None:
        way.make_start(load_model(recipe.model_path()), options, start)
    model = way.open(load_model(recipe.model_path()), options, start)
    beside = recipe.trained_whole(method) or ()
    chosen = TrainingOptions(
        learning_rate=1e-2, steps=4, batch_size=3, projector_learning_rate=1e-2, trained_whole=beside
    )
    train(model, dataset(recipe), chosen, tmp_path / "checkpoints", method=way)
    way.save(model, tmp_path / way.saves, start)
    loaded = way.load(tmp_path / way.saves, lambda folder: load_model(folder or recipe.model_path()))
    base = load_model(recipe.model_path())
    for part in ("linear_1", "linear_2"):
        before = dict(base.named_parameters())
        after = {
            n.removeprefix("base_model.model.").replace(".modules_to_save.default", ""): p
            for n, p in loaded.named_parameters()
        }
        names = [n for n in before if "multi_modal_projector" in n and part in n and n.endswith("weight")]
        assert names
        assert all(not torch.equal(before[n], after[n]) for n in names)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not here("corda"), reason="PEFT's CorDA imports attrs, which is not installed")
def test_corda_on_white_inputs_is_pissa(recipe: Recipe, tmp_path: Path) -> None:
    method = recipe.methods["corda"].model_copy(update={"corda_mode": "ipm"})
    factors = {}
    for kind_, scale in (("pissa", 1.0), ("corda", 1.0), ("corda", 1e4)):
        base = load_model(recipe.model_path())
        options = start_options(recipe, method, base)
        widths = {name: base.get_submodule(name).in_features for name in options.layers}
        white = {name: scale * torch.eye(width, dtype=torch.float64) for name, width in widths.items()}
        given = {**vars(options), "covariance": white.__getitem__}
        adapted = METHODS[kind_].make_start(base, type(options)(**given), tmp_path / f"{kind_}{scale}")
        factors[kind_, scale] = {n: layer.get_delta_weight("default") for n, layer in lora_layers(adapted).items()}
    for name, wanted in factors["pissa", 1.0].items():
        torch.testing.assert_close(factors["corda", 1.0][name], wanted, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(factors["corda", 1e4][name], wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not here("corda"), reason="PEFT's CorDA imports attrs, which is not installed")
def test_corda_s_knowledge_preserving_start_has_less_of_the_old(recipe: Recipe) -> None:
    """What is taken out and trained answers old inputs less than in the other mode; nothing is left on the model."""
    store = CovarianceStore.load(run_of(recipe) / "covariance")
    energy = {}
    for mode in ("kpm", "ipm"):
        method = recipe.methods["corda"].model_copy(update={"corda_mode": mode})
        base = load_model(recipe.model_path())
        options = start_options(recipe, method, base, run_of(recipe) / "covariance")
        folder = recipe.base_folder / f"corda_{mode}"
        adapted = METHODS["corda"].make_start(base, options, folder)
        shutil.rmtree(folder)
        energy[mode] = sum(
            float(torch.trace(d @ store.covariance(n).float() @ d.mT))
            for n, d in ((n, layer.get_delta_weight("default").detach()) for n, layer in lora_layers(adapted).items())
        )
        left = {key for module in base.modules() for key in vars(module)}
        assert not left & {"eigens", "covariance_matrix", "sample_count"}
    assert energy["kpm"] < 0.05 * energy["ipm"]


def test_lora_null_is_the_projection_on_the_lowest_directions(recipe: Recipe) -> None:
    """B0·A0 is W0 on the space that A spans, and old inputs have next to nothing there. Which vectors span it is not
    compared: fewer tokens than dimensions leave that open."""
    store = CovarianceStore.load(run_of(recipe) / "covariance")
    base = load_model(recipe.model_path())
    start = load_file(run_of(recipe) / "init" / "lora_null_2" / "adapter_model.safetensors")
    for name in select_linears(base):
        A, B = (start[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        Q = torch.linalg.qr(A.mT).Q
        wanted = base.get_submodule(name).weight.double() @ Q @ Q.mT
        assert float((B @ A - wanted).norm()) < 1e-4 * float(wanted.norm())
        torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-3, atol=1e-5)
        C = store.covariance(name)
        lowest = torch.linalg.eigvalsh(C)[:4].clamp(min=0).sum()
        # What float32, in which its code decomposes, can tell from zero.
        assert float(torch.trace(Q.mT @ C @ Q)) < 1.01 * float(lowest) + 1e-6 * float(C.norm())


def test_lora_null_s_own_covariances() -> None:
    """A plain recomputation of what its code sums: largest entry (not magnitude), a fixed 256, all in float16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False))
    samples = [torch.randn(1, 9, 6) - 0.5 for _ in range(3)]

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    found = released_covariances(Takes(), [{"x": x} for x in samples], ["inner.0"])("inner.0")
    assert found.dtype == torch.float16
    exact = torch.zeros(6, 6, dtype=torch.float64)
    for x in samples:
        X = x[0].double() / x.max().double().abs()
        exact += X.T @ X / 256
    assert torch.allclose(found.double(), exact, rtol=5e-3, atol=1e-4)
    assert not torch.allclose(found.double(), exact, rtol=1e-6)
    with pytest.raises(ConstraintError, match=r"inner\.0: LoRA-Null's float16 sum .* null_covariance: store"):
        released_covariances(Takes(), [{"x": torch.full((1, 3, 6), -1e5)}], ["inner.0"])


class Elsewhere(nn.Module):
    """A model on another device than its samples, which looks where they come to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2, bias=False, device="meta")

    def forward(self, **inputs: torch.Tensor) -> None:
        raise Arrived({name: value.device.type for name, value in inputs.items()})


class Arrived(Exception):
    pass


def test_samples_go_to_the_model_s_device() -> None:
    sample = {"input_ids": torch.ones(1, 4, dtype=torch.int64), "labels": torch.ones(1, 4, dtype=torch.int64)}
    with pytest.raises(Arrived) as found:
        released_covariances(Elsewhere(), [sample], ["inner"])
    assert found.value.args[0] == {"input_ids": "meta", "labels": "meta"}
    with pytest.raises(Arrived) as found:
        diagonal_fisher(Elsewhere(), ["inner"], [sample])
    assert found.value.args[0] == {"input_ids": "meta"}
    assert sample["labels"].device.type == "cpu"


def test_moments_that_are_kept_by_name_go_to_the_device(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch moves what an optimiser keeps for parameters, and leaves LoRA-FA's moments where Trainer loaded them: on
    the CPU. Here another device than the CPU is the one that nothing can be computed on."""
    from torch.optim import Optimizer

    with pytest.raises(Killed):
        trained_again(recipe, "lora_fa", tmp_path, progress=killed_at(5))
    moved: dict[str, torch.Tensor] = {}

    class Loaded(Exception):
        pass

    def on_meta(optimizer: Optimizer, device: torch.device) -> None:
        assert device.type == "cpu"
        move_named_state(optimizer, torch.device("meta"))
        for key, state in optimizer.state.items():
            assert isinstance(key, str)
            moved.update({f"{key} {name}": v for name, v in state.items() if isinstance(v, torch.Tensor)})
        raise Loaded

    monkeypatch.setattr("kore_fast.training.loop.move_named_state", on_meta)
    with pytest.raises(Loaded):
        trained_again(recipe, "lora_fa", tmp_path)
    assert len(moved) == 2 * len(lora_layers(opened(recipe, "lora_fa")))
    assert {tensor.device.type for tensor in moved.values()} == {"meta"}


def test_a_method_that_this_peft_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from kore_fast.training.methods import interface

    monkeypatch.setattr(interface, "version", lambda _: "0.19.1")
    with pytest.raises(ConstraintError, match=r"MiCA \(kind 'mica'\) needs PEFT 0\.20 or newer and 0\.19\.1"):
        METHODS["mica"].check_available()
    METHODS["pissa"].check_available()
