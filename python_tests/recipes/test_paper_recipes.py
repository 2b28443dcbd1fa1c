"""The paper's recipes: each parses, passes its dry run, and runs every stage on a tiny model of its family."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from kore_fast.cli import main
from kore_fast.recipe.dry_run import dry_run
from kore_fast.recipe.schema import Recipe, load_recipe
from python_tests import families

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FOLDERS = ("llava_v1_5_7b", "llava_v1_5_13b", "qwen2_5_vl_7b")
FILES = [path for folder in FOLDERS for path in sorted((RECIPES / folder).glob("*.yaml"))]
NAMES = [f"{path.parent.name}/{path.stem}" for path in FILES]
MAIN = [pytest.param(p, id=n) for p, n in zip(FILES, NAMES, strict=True) if p.name == "recipe.yaml"]
OTHERS = [
    pytest.param(p, id=n, marks=pytest.mark.slow) for p, n in zip(FILES, NAMES, strict=True) if p.name != "recipe.yaml"
]


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
    for number, (name, method) in enumerate(recipe.methods.items()):
        changed[f"methods.{name}.rank"] = {"parameters": 4000} if isinstance(method.rank, dict) else 3 + number
    return {key: json.dumps(value) for key, value in changed.items()}


# What goes on after another run has its own test: python_tests/recipe/test_after.py.
IN_SMALL = [case for case in (*MAIN, *OTHERS) if not str(case.id).endswith("/second")]


@pytest.mark.parametrize("path", IN_SMALL)
def test_it_runs_in_small(
    path: Path, models: dict[str, Path], samples: Path, knowledge_folder: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(path)
    model = models["qwen" if "qwen" in path.parent.name else "llava"]
    changed = in_small(recipe, model, samples, knowledge_folder)
    settings = [f"--set={key}={value}" for key, value in changed.items()]
    assert main(["run", str(path), "--run", str(tmp_path / "run"), *settings]) == 0
    for name, method in recipe.methods.items():
        folder = tmp_path / "run" / "train" / name
        assert list(csv.DictReader((folder / "loss.csv").open()))
        assert (folder / "adapter" / "kore.json").is_file()
        config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        wanted = None if method.projector_learning_rate is None else [recipe.model.projector]
        assert config["modules_to_save"] == wanted
    assert (tmp_path / "run" / "report" / "report.html").is_file()


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_it_is_the_papers_but_for_what_it_says(path: Path) -> None:
    recipe, paper = load_recipe(path), load_recipe(path.parent)
    assert recipe.training == paper.training
    assert recipe.training.epochs == 6
    rates = {(m.learning_rate, m.projector_learning_rate, m.weight_decay) for m in recipe.methods.values()}
    assert rates == {(2e-4, 2e-5, 0)}
    assert recipe.name == path.parent.name + ("" if path.name == "recipe.yaml" else f"_{path.stem}")


@pytest.mark.parametrize("path", OTHERS)
def test_an_experiment_passes_its_dry_run(path: Path) -> None:
    found = dry_run(load_recipe(path))
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
