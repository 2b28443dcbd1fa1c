"""A dry run: the paper's numbers from the recipes, without weights or a hub, and what is wrong before it costs."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from kore_fast.cli import main
from kore_fast.recipe.checks import differences
from kore_fast.recipe.dry_run import DryRun, dry_run
from kore_fast.recipe.loading import load_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
# d_out of q, k, v, o, gate, up and down by hand, and the number of blocks.
DECODERS = {
    "llava_v1_5_7b": (4 * 4096 + 2 * 11008 + 4096, 32),
    "llava_v1_5_13b": (4 * 5120 + 2 * 13824 + 5120, 40),
    "qwen2_5_vl_7b": (3584 + 2 * 512 + 3584 + 2 * 18944 + 3584, 28),
}
PROJECTORS = {
    "llava_v1_5_7b": 1024 * 4096 + 4096 + 4096 * 4096 + 4096,
    "llava_v1_5_13b": 1024 * 5120 + 5120 + 5120 * 5120 + 5120,
    "qwen2_5_vl_7b": 1280 + 5120 * 5120 + 5120 + 5120 * 3584 + 3584,
}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a dry run asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "ranks", "total", "steps"),
    [
        ("llava_v1_5_7b", {"kore": 235, "kore_256": 256}, "7.06B", -(-74_734 * 6 // 54)),
        ("llava_v1_5_13b", {"kore": 235}, "13.35B", -(-74_734 * 6 // 32)),
        ("qwen2_5_vl_7b", {"kore": 274}, "8.29B", -(-74_734 * 6 // 192)),
    ],
)
def test_the_papers_numbers(name: str, ranks: dict[str, int], total: str, steps: int) -> None:
    found = dry_run(load_recipe(RECIPES / name))
    assert found.problems == []
    width, blocks = DECODERS[name]
    for method, rank in ranks.items():
        assert found.trained_adapter[method] == rank * width * blocks
        assert found.trained[method] == rank * width * blocks + PROJECTORS[name]
        assert found.steps[method] == steps
    assert total in found.text()
    wanted = {"llava_v1_5_7b": ["319.57M", "369.11M", "20.98M"], "llava_v1_5_13b": ["532.00M"], "qwen2_5_vl_7b": []}
    assert all(number in found.text() for number in wanted[name])
    # By facts of the paper: 20.4 GiB of packed sums for a source of LLaVA-7B, 41.5 of Qwen2.5-VL-7B.
    sums = {"llava_v1_5_7b": "of 20.4 GiB", "llava_v1_5_13b": "of 40.2 GiB", "qwen2_5_vl_7b": "of 41.5 GiB"}
    assert sums[name] in found.text()
    assert any("KORE-74K" in text for text in found.missing)
    assert "starts when the files above are there" in found.text()


def tried(**settings: str) -> DryRun:
    return dry_run(load_recipe(RECIPES / "llava_v1_5_7b", settings))


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("methods.kore.rank", "5000", "rank 5000 is larger than the width"),
        ("covariance.target_modules", "model.layers.0.q_proj", "matches no layer of LlavaForConditionalGeneration"),
        ("model.projector", "visual.merger", "has no module 'visual.merger'"),
        ("covariance.max_memory", "1000000", "its covariance takes"),
    ],
)
def test_what_is_wrong_is_told(key: str, value: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(RECIPES / "llava_v1_5_7b"), "--dry-run", "--set", f"{key}={value}"]) == 1
    out = capsys.readouterr().out
    assert named in out
    assert out.rstrip().endswith("Failed: see above")


def test_an_unknown_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_from_the_future"}))
    found = tried(**{"model.config": str(tmp_path / "config.json")})
    assert "not a model that this transformers knows" in found.problems[0]


def test_another_model_in_the_folder_is_told(tmp_path: Path) -> None:
    values = json.loads((RECIPES / "llava_v1_5_7b" / "config.json").read_text())
    values["text_config"]["hidden_size"] = 5120
    values["text_config"]["num_attention_heads"] = 40
    (tmp_path / "config.json").write_text(json.dumps(values))
    found = tried(**{"model.path": str(tmp_path)})
    assert "text_config.hidden_size is 5120, not 4096" in found.problems[0]


def test_only_what_makes_another_architecture_is_a_difference() -> None:
    told = {"hidden_size": 4, "rms_norm_eps": 1e-5, "vision_config": {"depth": 2}}
    own = {"hidden_size": 4, "rms_norm_eps": 1e-6, "vision_config": {"depth": 3}, "dtype": "bfloat16"}
    assert differences(told, own) == ["vision_config.depth is 3, not 2"]


def test_samples_that_are_there_are_counted(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows = [{"id": f"s{n}", "conversations": turns} for n in range(10)]
    (tmp_path / "samples.json").write_text(json.dumps(rows))
    file = str(tmp_path / "samples.json")
    found = tried(**{"samples.file": file, "samples.count": "10", "training.batch_size": "4", "training.epochs": "1.5"})
    assert found.steps == {"kore": 4, "kore_256": 4}
    assert any("holds 10 samples, the recipe says 74,734" in p for p in tried(**{"samples.file": file}).problems)


def test_run_refuses_what_a_dry_run_lists(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["run", str(RECIPES / "llava_v1_5_7b"), "--run", str(tmp_path / "run")]) == 1
    assert "evoke_injection_data.json" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_full_run_s_memory_by_hand() -> None:
    """7,063M parameters in bfloat16, of which 6,476M weights of the layers are trained, in float32."""
    found = tried(**{"methods.full": "{ kind: full, learning_rate: 2e-5 }"})
    layers = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert found.trained["full"] == layers
    total = 7_063_427_072
    weights = 2 * (total - layers) + 4 * layers
    rows = dict(next(rows for heading, rows in found.sections if "while full trains" in heading))
    wanted = f"weights {weights / 2**30:.1f}, adapter 0.0, gradients {4 * layers / 2**30:.1f}, "
    assert wanted + f"optimizer {8 * layers / 2**30:.1f}" in rows["1 × alone"]
    disk = dict(next(rows for heading, rows in found.sections if heading == "Disk"))
    # Nothing to start from; two checkpoints of the model and two moments.
    written = f"{weights / 2**30:.2f} GiB model, {2 * (weights + 8 * layers) / 2**30:.2f} GiB for two checkpoints"
    assert disk["full"].startswith(written)


def test_a_residual_s_adapter_has_twice_the_rank_on_disk() -> None:
    found = tried(**{"methods.pissa": "{ kind: pissa, rank: 128, learning_rate: 2e-4 }"})
    factors = 32 * 128 * (4 * (4096 + 4096) + 2 * (4096 + 11008) + 11008 + 4096)
    assert found.trained["pissa"] == factors
    disk = dict(next(rows for heading, rows in found.sections if heading == "Disk"))
    start, checkpoints = 4 * factors, 2 * (4 + 8) * factors
    assert disk["pissa"].startswith(f"{2 * start / 2**30:.2f} GiB adapter, {start / 2**30:.2f} GiB start, ")
    assert f"{checkpoints / 2**30:.2f} GiB for two checkpoints" in disk["pissa"]


def test_memory_is_told_for_what_a_method_can_be_trained_with() -> None:
    """FSDP2 and ZeRO-3 refuse PiSSA, and EWC with any method."""
    found = dry_run(load_recipe(RECIPES / "llava_v1_5_7b" / "baselines.yaml"))
    for method, spread in {"kore": True, "lora": True, "pissa": False, "ewc": False, "lwf": False}.items():
        (rows,) = [rows for heading, rows in found.sections if f"while {method} trains" in heading]
        assert {what.partition(" × ")[2] for what, _ in rows} == {"alone", "DDP"} | (
            {"FSDP2", "ZeRO-3"} if spread else set()
        )


def test_a_study_is_told_once_for_each_of_its_methods() -> None:
    method = "{ kind: %s, learning_rates: [1e-4, 2e-4], rank: 128 }"
    settings = {"methods.kore": "null", "methods.lora": method % "lora", "methods.pissa": method % "pissa"}
    study = {"seeds": [0, 1, 2], "match": "lora", "keep_weights": False}
    found = tried(**settings, **{"methods.kore_256": "null", "study": json.dumps(study)})
    assert found.problems == []
    assert set(found.trained) == {"lora", "pissa"}
    rows = dict(next(rows for heading, rows in found.sections if heading == "Trained"))
    assert rows["runs"].startswith("12 at most, 2 methods")
    for keeps, named in ((False, "2.38 GiB adapter,"), (True, "14.30 GiB in 6 adapters,")):
        kept = tried(**settings, **{"methods.kore_256": "null", "study": json.dumps({**study, "keep_weights": keeps})})
        disk = dict(next(rows for heading, rows in kept.sections if heading == "Disk"))
        assert disk["pissa"].startswith(named)


def test_steps_are_of_the_branches_that_a_method_takes(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    branches = ["dialogue"] * 6 + ["vqa"] * 9 + ["caption"] * 3
    rows = [{"id": f"s{n}", "conversations": turns, "branch": branch} for n, branch in enumerate(branches)]
    file = tmp_path / "samples.json"
    method = "{ kind: lora, rank: 8, learning_rate: 1e-4, branches: %s }"
    settings = {
        "samples": json.dumps({"file": str(file)}),
        "training.batch_size": "4",
        "training.epochs": "2",
        "methods.some": method % "[dialogue, caption]",
    }
    # Before the file is there nobody knows.
    assert set(tried(**settings).steps) == set()
    assert set(tried(**settings, **{"samples.count": "18"}).steps) == {"kore", "kore_256"}
    file.write_text(json.dumps(rows))
    assert tried(**settings).steps == {"kore": 9, "kore_256": 9, "some": -(-9 * 2 // 4)}
    none = tried(**settings, **{"methods.none": method % "[recognition]"})
    assert any("'none'" in problem and "no sample of recognition" in problem for problem in none.problems)


def test_a_rank_is_held_against_the_layers_of_its_method() -> None:
    """Of Qwen2.5-VL's attention k and v are 512 wide; its MLP is not."""
    wide = json.dumps({"kind": "kore", "rank": 600, "learning_rate": 2e-4, "layers": {"part": "mlp"}})
    assert dry_run(load_recipe(RECIPES / "qwen2_5_vl_7b", {"methods.wide": wide})).problems == []
    every = json.dumps({"kind": "kore", "rank": 600, "learning_rate": 2e-4})
    (problem,) = dry_run(load_recipe(RECIPES / "qwen2_5_vl_7b", {"methods.wide": every})).problems
    assert "rank 600 is larger than the width of" in problem
    assert "k_proj" in problem
