"""Injecting on top of an earlier run: its data set is old knowledge now, and two adapters are one for the base."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from kore_fast.cli import main
from kore_fast.constraint import CovarianceStore
from kore_fast.constraint.leak import leak_report
from kore_fast.data.conversations import collate, encode_sample
from kore_fast.data.samples import read_samples
from kore_fast.files import read_json, read_jsonl
from kore_fast.modules.adapter import lora_layers
from kore_fast.modules.adapter_files import read_adapter
from kore_fast.modules.combining import combine_adapters
from kore_fast.modules.earlier import earlier_factors, whole_weight
from kore_fast.modules.loading import load_model, load_processor
from kore_fast.recipe.dry_run import dry_run
from kore_fast.recipe.loading import load_recipe
from kore_fast.recipe.materials import base_model, earlier_adapter, earlier_questions

SECOND = """
extends: recipe.yaml
name: second
after: {{ run: {run}, images: {images} }}
covariance:
  sources: {{ text: null, chat: null, pictures: null{first} }}
methods: {{ lora: null, kore: {{ learning_rate: 3e-2 }} }}
training: {{ steps: 8 }}
seed: 5
"""


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory, finished: Path, knowledge_folder: Path) -> Path:
    """Two runs after the finished one: ``updated`` knows its data set as old knowledge, ``forgetful`` does not."""
    folder = tmp_path_factory.mktemp("second")
    (folder / "recipe.yaml").write_text((finished / "recipe.yaml").read_text())
    samples = finished / "run" / "augment" / "samples.json"
    first = f", first: {{ kind: samples, samples: 64, file: {samples}, images: {knowledge_folder}, weight: 3 }}"
    for name, source in (("updated", first), ("forgetful", "")):
        text = SECOND.format(run=finished / "run", images=knowledge_folder, first=source)
        (folder / f"{name}.yaml").write_text(text)
        for stage in ("augment", "covariance", "init", "train"):
            assert main([stage, str(folder / f"{name}.yaml"), "--run", str(folder / name)]) == 0
    return folder


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def batch_of_first(finished: Path, knowledge: Path) -> dict[str, torch.Tensor]:
    processor = load_processor(load_recipe(finished).model_path())
    samples = read_samples(finished / "run" / "augment" / "samples.json")[:8]
    return collate([encode_sample(processor, sample, knowledge) for sample in samples], 0)


def test_the_store_is_the_earlier_one_and_the_injected_samples(second: Path, finished: Path) -> None:
    before = CovarianceStore.load(finished / "run" / "covariance")
    after = CovarianceStore.load(second / "updated" / "covariance")
    assert set(after.sources) == {*before.sources, "first"}
    layer = after.layers[0]
    only = {**dict.fromkeys(after.sources, 0.0), "text": 1.0}
    kept = before.covariance(layer, {name: only[name] for name in before.sources})
    assert torch.equal(after.covariance(layer, only), kept)


def test_a_dry_run_counts_the_adapter_that_is_there_already(second: Path, finished: Path) -> None:
    def beside(name: str) -> int:
        memory = [rows for heading, rows in dry_run(load_recipe(second / name)).sections if "Memory" in heading]
        found = [re.search(r"earlier adapter ([\d.]+)", text) for rows in memory for _, text in rows]
        assert all(found) or not any(found)
        return len([match for match in found if match])

    assert beside("recipe.yaml") == 0
    assert beside("updated.yaml") > 0


def test_the_new_null_space_leaks_less_of_what_was_injected(second: Path) -> None:
    store = CovarianceStore.load(second / "updated" / "covariance")
    only = {**dict.fromkeys(store.sources, 0.0), "first": 1.0}
    leaks = {}
    for name in ("updated", "forgetful"):
        A = read_adapter(second / name / "init" / "kore").A
        weights = {layer: torch.zeros(1, A[layer].shape[1]) for layer in A}
        leaks[name] = [leak.leak for leak in leak_report(A, weights, store, only)]
    # Of 32 directions 8 are to be free of four kinds of input: not zero, but far less.
    assert sum(leaks["updated"]) < 0.75 * sum(leaks["forgetful"])
    assert max(leaks["updated"]) < 0.3


def test_few_tokens_that_weigh_much_leak_nothing(
    finished: Path, knowledge_folder: Path, second: Path, tmp_path: Path
) -> None:
    """Two answers of a few tokens span fewer directions than the width leaves free: 8 of 32 can avoid them all."""
    turns = [{"from": "human", "value": "Is it so?"}, {"from": "gpt", "value": "Yes."}]
    few = [{"id": f"s{n}", "conversations": [{**turns[0], "value": "Is it so" + "?" * n}, turns[1]]} for n in (1, 2)]
    (tmp_path / "few.json").write_text(json.dumps(few))
    (tmp_path / "recipe.yaml").write_text((finished / "recipe.yaml").read_text())
    source = f"kind: samples, file: {tmp_path / 'few.json'}, weight: 1e6, positions: {{ prompt: 0 }}"
    text = SECOND.format(run=finished / "run", images=knowledge_folder, first=f", first: {{ {source} }}")
    (tmp_path / "few.yaml").write_text(text)
    for stage in ("augment", "covariance", "init"):
        assert main([stage, str(tmp_path / "few.yaml"), "--run", str(tmp_path / "run")]) == 0
    store = CovarianceStore.load(tmp_path / "run" / "covariance")
    only = {**dict.fromkeys(store.sources, 0.0), "first": 1.0}
    leaks = {}
    for name, run in {"updated": tmp_path / "run", "forgetful": second / "forgetful"}.items():
        A = read_adapter(run / "init" / "kore").A
        assert {len(factor) for factor in A.values()} == {8}
        weights = {layer: torch.zeros(1, A[layer].shape[1]) for layer in A}
        leaks[name] = [leak.leak for leak in leak_report(A, weights, store, only)]
    spans = [int(torch.linalg.matrix_rank(store.covariance(group, only), rtol=1e-6)) for group in store.groups]
    assert max(spans) <= 32 - 8
    assert max(leaks["updated"]) < 1e-3
    assert min(leaks["forgetful"]) > 10 * max(leaks["updated"])


def test_what_was_injected_moves_less_with_the_update(second: Path, finished: Path, knowledge_folder: Path) -> None:
    """Of outputs on the first data set, at the same size of B."""
    path = load_recipe(finished).model_path()
    batch = batch_of_first(finished, knowledge_folder)
    start = PeftModel.from_pretrained(load_model(path), str(finished / "run" / "train" / "kore" / "adapter"))
    moved = {}
    for name in ("updated", "forgetful"):
        model = PeftModel.from_pretrained(load_model(path), str(second / name / "train" / "kore" / "combined"))
        with torch.no_grad():
            before, after = (m.eval()(**batch).logits[batch["attention_mask"].bool()] for m in (start, model))
        size = sum(float(B.norm() ** 2) for B in read_adapter(second / name / "train" / "kore" / "adapter").B.values())
        moved[name] = float((after - before).norm()) / size**0.5
    assert moved["updated"] < moved["forgetful"]


def test_two_adapters_are_one_for_the_untouched_base(second: Path, finished: Path, knowledge_folder: Path) -> None:
    path = load_recipe(finished).model_path()
    batch = batch_of_first(finished, knowledge_folder)
    first = finished / "run" / "train" / "kore" / "adapter"
    trained = second / "updated" / "train" / "kore"
    below = PeftModel.from_pretrained(load_model(path), str(first)).merge_and_unload()
    stacked = PeftModel.from_pretrained(below, str(trained / "adapter")).eval()
    combined = PeftModel.from_pretrained(load_model(path), str(trained / "combined")).eval()
    with torch.no_grad():
        torch.testing.assert_close(combined(**batch).logits, stacked(**batch).logits, rtol=1e-4, atol=1e-5)
    assert {len(layer.lora_A["default"].weight) for layer in lora_layers(combined).values()} == {16}


def test_a_third_run_begins_with_both(second: Path, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text((second / "recipe.yaml").read_text())
    text = (second / "updated.yaml").read_text().replace(str(finished / "run"), str(second / "updated"), 1)
    (tmp_path / "third.yaml").write_text(text)
    assert earlier_adapter(load_recipe(second / "updated.yaml")).name == "adapter"
    recipe = load_recipe(tmp_path / "third.yaml")
    assert earlier_adapter(recipe) == second / "updated" / "train" / "kore" / "combined"
    layers = dict(base_model(recipe).named_modules())
    first, then = (read_adapter(run / "train" / "kore" / "adapter") for run in (finished / "run", second / "updated"))
    for name, A in first.A.items():
        factors = earlier_factors(layers[name])
        assert factors is not None
        wanted = first.B[name] @ A + then.B[name] @ then.A[name]
        torch.testing.assert_close(factors[1] @ factors[0], wanted)


def test_in_bfloat16_the_earlier_adapter_is_beside_the_weights(second: Path, finished: Path, tmp_path: Path) -> None:
    """All of it, through every stage: not what bfloat16 weights would leave of it."""
    recipe = load_recipe(second / "updated.yaml", {"model.dtype": "bfloat16", "training.precision": "bf16"})
    model = base_model(recipe)
    alone = load_model(recipe.model_path(), torch.bfloat16)
    earlier = read_adapter(finished / "run" / "train" / "kore" / "adapter")
    for name, A in earlier.A.items():
        layer, W0 = model.get_submodule(name), alone.get_submodule(name).weight
        assert torch.equal(layer.weight, W0)
        torch.testing.assert_close(whole_weight(layer) - W0.float(), earlier.B[name] @ A, rtol=1e-5, atol=1e-6)
    settings = ["--set=model.dtype=bfloat16", "--set=training.precision=bf16", "--set=training.steps=2"]
    for stage in ("augment", "covariance", "init", "train"):
        given = [stage, str(second / "updated.yaml"), "--run", str(tmp_path / "run"), *settings]
        assert main([*given, *(["--method", "kore"] if stage == "train" else [])]) == 0
    # What was trained on top is as far from the first run's model on the untouched base as it was here.
    trained = tmp_path / "run" / "train" / "kore"
    stacked = PeftModel.from_pretrained(base_model(recipe), str(trained / "adapter")).eval()
    combined = PeftModel.from_pretrained(alone, str(trained / "combined")).eval()
    ids = torch.arange(4, 84).reshape(4, 20)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(combined(input_ids=ids).logits, stacked(input_ids=ids).logits, rtol=0.1, atol=0.1)


def test_scalings_and_ranks_of_both_go_into_one(finished: Path, tmp_path: Path) -> None:
    lora, kore = (finished / "run" / "train" / name / "adapter" for name in ("lora", "kore"))
    ranks = combine_adapters(lora, kore, tmp_path / "both")
    one, two, both = (read_adapter(folder) for folder in (lora, kore, tmp_path / "both"))
    assert set(ranks.values()) == {12}
    for name in ranks:
        wanted = sum(a.scalings()[name] * (a.B[name] @ a.A[name]) for a in (one, two))
        torch.testing.assert_close(both.scalings()[name] * (both.B[name] @ both.A[name]), wanted)


def test_the_earlier_questions_are_asked_again(second: Path, finished: Path, tmp_path: Path) -> None:
    """Of the second run's base, which is the first run's model, and of what it became."""
    run = tmp_path / "run"
    shutil.copytree(second / "updated", run)
    assert main(["evaluate", str(second / "updated.yaml"), "--run", str(run)]) == 0
    before = [row for _, row in read_jsonl(finished / "run" / "evaluate" / "kore" / "questions.jsonl")]
    for name in ("base", "kore"):
        asked = [row for _, row in read_jsonl(run / "evaluate" / name / "earlier.jsonl")]
        assert [row["question_id"] for row in asked] == [row["question_id"] for row in before]
        metrics = read_json(run / "evaluate" / name / "scores.json")["metrics"]
        for form, prefix in (("by_name", "earlier"), ("by_picture", "earlier_by_picture")):
            right = [row["cem"] for row in asked if row["form"] == form]
            assert metrics[f"{prefix}_cem"]["value"] == pytest.approx(sum(right) / len(right))
    # An adapter beside the weights answers as the adapter that PEFT puts on.
    asked = [row for _, row in read_jsonl(run / "evaluate" / "base" / "earlier.jsonl")]
    assert [row["prediction"] for row in asked] == [row["prediction"] for row in before]


def test_without_their_pictures_they_are_not(second: Path, tmp_path: Path) -> None:
    text = (second / "updated.yaml").read_text()
    head, images = text.split(", images: ", 1)
    (tmp_path / "recipe.yaml").write_text((second / "recipe.yaml").read_text())
    (tmp_path / "plain.yaml").write_text(f"{head} }}\n{images.partition(chr(10))[2]}")
    assert earlier_questions(load_recipe(tmp_path / "plain.yaml")) == (None, Path())
    file, _ = earlier_questions(load_recipe(second / "updated.yaml"))
    assert file is not None
    assert file.name == "questions.jsonl"


def test_earlier_questions_that_are_gone_are_named(
    second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load_recipe(second / "updated.yaml").after
    assert run is not None
    (tmp_path / "earlier" / "augment").mkdir(parents=True)
    for part in ("covariance", "train"):
        (tmp_path / "earlier" / part).symlink_to(run.run / part)
    (tmp_path / "recipe.yaml").write_text((second / "recipe.yaml").read_text())
    text = (second / "updated.yaml").read_text().replace(str(run.run), str(tmp_path / "earlier"), 1)
    (tmp_path / "gone.yaml").write_text(text)
    shutil.copytree(second / "updated", tmp_path / "run")
    assert main(["evaluate", str(tmp_path / "gone.yaml"), "--run", str(tmp_path / "run")]) == 1
    assert "questions.jsonl is not there" in capsys.readouterr().err


def third(second: Path, tmp_path: Path, knowledge_folder: Path, name: str, **more: object) -> list[str]:
    """A run after ``updated``, whose own samples are a source called ``name``."""
    (tmp_path / "recipe.yaml").write_text((second / "recipe.yaml").read_text())
    samples = second / "updated" / "augment" / "samples.json"
    source = f", {name}: {{ kind: samples, samples: 64, file: {samples}, images: {knowledge_folder} }}"
    text = SECOND.format(run=second / "updated", images=knowledge_folder, first=source)
    (tmp_path / "third.yaml").write_text(text.replace("name: second", "name: third"))
    given = [f"--set={key}={json.dumps(value)}" for key, value in more.items()]
    return [str(tmp_path / "third.yaml"), "--run", str(tmp_path / "run"), *given]


def test_a_third_run_has_all_that_came_before(second: Path, tmp_path: Path, knowledge_folder: Path) -> None:
    recipe = third(second, tmp_path, knowledge_folder, "second", **{"methods.kore.source_weights": {"first": 1}})
    for stage in ("augment", "covariance", "init", "train"):
        assert main([stage, *recipe]) == 0
    before = CovarianceStore.load(second / "updated" / "covariance")
    store = CovarianceStore.load(tmp_path / "run" / "covariance")
    assert set(store.sources) == {*before.sources, "second"} == {"text", "chat", "pictures", "first", "second"}
    # A source that was taken over may be named, and what is not named weighs nothing.
    A = read_adapter(tmp_path / "run" / "init" / "kore").A
    shown = {row["layer"]: float(row["leak"]) for row in read_rows(tmp_path / "run" / "init" / "kore" / "leak.csv")}
    only = {**dict.fromkeys(store.sources, 0.0), "first": 1.0}
    weights = {layer: torch.zeros(1, factor.shape[1]) for layer, factor in A.items()}
    assert {leak.layer: leak.leak for leak in leak_report(A, weights, store, only)} == pytest.approx(shown)
    # Its model has the adapters of both runs before it, and so has the one that is made of all three.
    combined = read_adapter(tmp_path / "run" / "train" / "kore" / "combined")
    earlier = read_adapter(second / "updated" / "train" / "kore" / "combined")
    own = read_adapter(tmp_path / "run" / "train" / "kore" / "adapter")
    for layer, rows in combined.A.items():
        assert torch.equal(rows, torch.cat([earlier.A[layer], own.A[layer]]))
        assert len(rows) == 3 * 8


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("first", {}, "covariance source 'first'"),
        ("second", {"after.weights": {"frist": 1}}, "after.weights names 'frist'"),
        ("second", {"methods.kore.source_weights": {"frist": 1}}, "methods.kore.source_weights names 'frist'"),
        ("second", {"after.method": "nothing"}, "is not there"),
        ("second", {"methods.osf": {"kind": "osf", "learning_rate": 1e-3}}, "OSF's adapter is no LoRA"),
    ],
)
def test_what_would_be_lost_is_refused_before_anything_is_made(
    second: Path,
    tmp_path: Path,
    knowledge_folder: Path,
    name: str,
    settings: dict[str, object],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["run", *third(second, tmp_path, knowledge_folder, name, **settings)]) == 1
    assert said in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("**/*.safetensors"))


@pytest.mark.parametrize(("adapter", "said"), [("OSF", "is no LoRA adapter"), (None, "holds no adapter")])
def test_only_a_lora_is_gone_on_from(
    finished: Path, tmp_path: Path, adapter: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = tmp_path / "earlier" / "train" / "kore"
    trained.mkdir(parents=True)
    if adapter:
        (trained / "adapter").mkdir()
        (trained / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": adapter}))
    settings = f"after={json.dumps({'run': str(tmp_path / 'earlier')})}"
    assert main(["run", str(finished), "--run", str(tmp_path / "run"), "--set", settings]) == 1
    assert said in capsys.readouterr().err
