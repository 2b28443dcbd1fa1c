"""The paper's recipes: each parses, passes its dry run, and runs every stage on a tiny model of its family."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from torch import nn

from kore_fast.cli import main
from kore_fast.constraint import CovarianceStore
from kore_fast.files import read_json
from kore_fast.modules.adapter_files import read_adapter
from kore_fast.recipe.checks import model_without_weights
from kore_fast.recipe.dry_run import dry_run
from kore_fast.recipe.loading import load_recipe
from kore_fast.recipe.schema import Recipe
from kore_fast.training.methods import METHODS
from python_tests import families

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FOLDERS = ("llava_v1_5_7b", "llava_v1_5_13b", "qwen2_5_vl_7b")
FILES = [path for folder in FOLDERS for path in sorted((RECIPES / folder).glob("*.yaml"))]
NAMES = [f"{path.parent.name}/{path.stem}" for path in FILES]
# One of each sort always runs, all of them with -m slow.
QUICK = (
    "llava_v1_5_13b/recipe",
    "qwen2_5_vl_7b/recipe",
    "llava_v1_5_7b/layers_by_spectrum",
    "llava_v1_5_7b/augmentation_no_vqa",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"llava": families.build_llava(folder / "llava"), "qwen": families.build_qwen(folder / "qwen")}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, knowledge_folder: Path) -> Path:
    """Conversations about the items' pictures, one without a picture."""
    rows = []
    for number, colour in enumerate(["red", "green", "blue", "orange", "purple", "brown", None]):
        mark = "" if colour is None else "<image>\n"
        turns = [{"from": "human", "value": f"{mark}What is this?"}, {"from": "gpt", "value": f"It is {colour}."}]
        rows.append(
            {"id": f"s{number}", "conversations": turns, **({"image": f"images/{colour}.png"} if colour else {})}
        )
    path = tmp_path_factory.mktemp("samples") / "samples.json"
    path.write_text(json.dumps(rows))
    return path


def in_small(recipe: Recipe, model: Path, samples: Path, knowledge: Path) -> dict[str, str]:
    """What is changed: model and data, and ranks and steps to fit; everything else stays the recipe's."""
    evoke = knowledge / "evoke_evaluation_data.jsonl"
    question = {"question_id": "item-0", "image": "images/red.png", "text": "Where does it live?", "answer": "hills"}
    evoke.write_text(json.dumps({**question, "type": "home", "cnn_wiki_type": "wiki"}) + "\n")
    changed: dict[str, object] = {
        "model.path": str(model),
        "model.config": None,
        "model.dtype": "float32",
        "items": str(knowledge / "items.jsonl"),
        "training.epochs": 0.6,
        "training.batch_size": 4,
        "training.per_device": 2,
        "evaluation.questions": 4,
        "evaluation.capitals": False,
        "evaluation.max_new_tokens": 4,
        "evaluation.evoke": str(evoke),
        "augmentation.language_model": None,
        "augmentation.image_search": None,
        "augmentation.clip": None,
    }
    if recipe.samples is not None:
        changed |= {"samples.file": str(samples), "samples.images": str(knowledge), "samples.count": 7}
    assert recipe.covariance is not None
    for name in recipe.covariance.sources:
        key = f"covariance.sources.{name}"
        changed |= {f"{key}.samples": 4, f"{key}.file": str(samples), f"{key}.images": str(knowledge)}
    methods = {(recipe.study.jobs[n].method if recipe.study else n): m for n, m in recipe.methods.items()}
    for number, (name, method) in enumerate(methods.items()):
        if method.kind == "osf":
            changed[f"methods.{name}.effective_rank"] = 0.5
        elif method.kind != "full":
            rank = 3 + number % 3
            changed[f"methods.{name}.rank"] = {"parameters": 4000} if isinstance(method.rank, dict) else rank
    return {key: json.dumps(value) for key, value in changed.items()}


@dataclass(frozen=True)
class Small:
    """What recipes run on in the place of their models and data."""

    models: dict[str, Path]
    samples: Path
    knowledge: Path

    def command(self, name: str, path: Path, run: Path, **more: object) -> list[str]:
        model = self.models["qwen" if "qwen" in path.parent.name else "llava"]
        changed = in_small(load_recipe(path), model, self.samples, self.knowledge)
        changed |= {key.replace("__", "."): json.dumps(value) for key, value in more.items()}
        return [name, str(path), "--run", str(run), *(f"--set={key}={value}" for key, value in changed.items())]


@pytest.fixture(scope="module")
def small(models: dict[str, Path], samples: Path, knowledge_folder: Path) -> Small:
    return Small(models, samples, knowledge_folder)


@pytest.fixture(scope="module")
def first_run(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 7B model's recipe in small."""
    run = tmp_path_factory.mktemp("first") / "run"
    assert main(small.command("run", RECIPES / "llava_v1_5_7b" / "recipe.yaml", run)) == 0
    return run


def check_run(path: Path, run: Path) -> None:
    recipe = load_recipe(path)
    for name, method in recipe.methods.items():
        folder = run / "train" / name
        assert list(csv.DictReader((folder / "loss.csv").open()))
        assert (folder / "adapter" / "kore.json").is_file()
        config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        wanted = None if method.projector_learning_rate is None else [recipe.model.projector]
        assert config["modules_to_save"] == wanted
    assert (run / "report" / "report.html").is_file()


def test_the_first_runs_in_small(first_run: Path) -> None:
    check_run(RECIPES / "llava_v1_5_7b" / "recipe.yaml", first_run)


# What has a test of its own is left out.
IN_SMALL = [
    pytest.param(path, id=name, marks=() if name in QUICK else pytest.mark.slow)
    for path, name in zip(FILES, NAMES, strict=True)
    if name != "llava_v1_5_7b/recipe" and path.stem not in ("second", "baselines")
]


@pytest.mark.parametrize("path", IN_SMALL)
def test_it_runs_in_small(path: Path, small: Small, tmp_path: Path) -> None:
    assert main(small.command("run", path, tmp_path / "run")) == 0
    check_run(path, tmp_path / "run")


def test_the_second_runs_in_small_on_top_of_the_first(small: Small, first_run: Path, tmp_path: Path) -> None:
    path = RECIPES / "llava_v1_5_7b" / "second.yaml"
    after = {"run": str(first_run), "method": "kore"}
    assert main(small.command("run", path, tmp_path / "run", after=after)) == 0
    check_run(path, tmp_path / "run")
    assert set(CovarianceStore.load(tmp_path / "run" / "covariance").sources) == {
        "geometry3k", "iiit5k", "vizwiz", "figureqa", "first"
    }  # fmt: skip
    ranks = [
        len(next(iter(read_adapter(run / "train" / "kore" / part).A.values())))
        for run, part in ((first_run, "adapter"), (tmp_path / "run", "adapter"), (tmp_path / "run", "combined"))
    ]
    assert ranks[0] + ranks[1] == ranks[2]


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["llava_v1_5_7b", "qwen2_5_vl_7b"])
def test_the_baselines_are_compared_in_small(folder: str, small: Small, tmp_path: Path) -> None:
    path = RECIPES / folder / "baselines.yaml"
    command = small.command("compare", path, tmp_path / "run", study__seeds=[0])
    assert main(command) == 0
    scores = {read_json(file)["scores"]["kind"] for file in (tmp_path / "run" / "compare" / "runs").glob("*_s0.json")}
    assert scores == set(METHODS)


def test_the_baselines_are_every_kind_at_the_size_of_the_papers() -> None:
    """Each that is not full fine-tuning trains, beside the projector, what KORE at the paper's rank does."""
    for folder in FOLDERS:
        recipe = load_recipe(RECIPES / folder / "baselines.yaml")
        methods = list(recipe.methods.values())
        assert {method.kind for method in methods} == set(METHODS)
        for option in ("replay", "ewc", "lwf"):
            assert any(getattr(method, option) is not None for method in methods)
        assert {method.samples for method in methods} == {"augmented", "knowledge"}
        assert len(recipe.methods) == 3 * len({job.method for job in recipe.study.jobs.values()})  # type: ignore[union-attr]
        found = dry_run(recipe)
        assert found.problems == []
        for name, trained in found.trained_adapter.items():
            if name != "full":
                assert trained == pytest.approx(found.trained_adapter["kore"], rel=2e-3), name


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_it_is_the_papers_but_for_what_it_says(path: Path) -> None:
    recipe, paper = load_recipe(path), load_recipe(path.parent)
    assert recipe.training == paper.training
    assert recipe.training.epochs == 6
    kore = [method for method in recipe.methods.values() if method.kind == "kore"]
    rates = {(m.learning_rate, m.projector_learning_rate, m.weight_decay) for m in kore}
    assert rates == {(2e-4, 2e-5, 0)}
    assert path.stem == "baselines" or len(kore) == len(recipe.methods)
    assert recipe.name == path.parent.name + ("" if path.name == "recipe.yaml" else f"_{path.stem}")


@pytest.fixture(scope="module")
def empty_models() -> dict[str, nn.Module]:
    """The paper's models without weights, each made once."""
    return {folder: model_without_weights(load_recipe(RECIPES / folder)) for folder in FOLDERS}


# Those of the recipes themselves are in python_tests/recipe/test_dry_run.py.
OTHERS = [pytest.param(p, id=n) for p, n in zip(FILES, NAMES, strict=True) if p.name != "recipe.yaml"]


@pytest.mark.parametrize("path", OTHERS)
def test_an_experiment_passes_its_dry_run(
    path: Path, empty_models: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(path)
    assert recipe.model == load_recipe(path.parent).model
    monkeypatch.setattr("kore_fast.recipe.dry_run.model_without_weights", lambda _: empty_models[path.parent.name])
    found = dry_run(recipe)
    assert found.problems == []
    if path.stem.startswith("layers_") and path.stem not in ("layers_attention", "layers_mlp"):
        assert found.trained_adapter["kore"] == pytest.approx(319_569_920, rel=2e-3)


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero3", "DEEPSPEED")])
@pytest.mark.parametrize("nodes", [1, 4])
def test_accelerate_reads_its_configurations(name: str, kind: str, nodes: int) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    path = RECIPES / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type == kind
    assert config.num_processes == 8
    given = ["--config_file", str(path), "--num_machines", str(nodes), "--num_processes", str(8 * nodes)]
    given += ["--machine_rank", "0", "--main_process_ip", "10.0.0.1", "-m", "kore_fast", "train"]
    read = launch_command_parser().parse_args([*given, "recipes/llava_v1_5_7b"])
    assert read.training_script_args == ["train", "recipes/llava_v1_5_7b"]
    if name != "zero3":  # which asks for deepspeed
        checked, _, _ = _validate_launch_command(read)
        assert (checked.num_machines, checked.num_processes, checked.use_fsdp) == (nodes, 8 * nodes, name == "fsdp2")
    values = yaml.safe_load(path.read_text())
    assert values["mixed_precision"] == "bf16"
