"""The command line: one clear line for each bad input, single stages, nothing done twice."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kore_fast
from kore_fast.cli import _PIPELINE, main


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The error that the command prints last; it must not be a traceback, and the status must be 1."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    before, mark, error = capsys.readouterr().err.rpartition("kore-fast: ")
    assert mark
    assert all(line.startswith("[") for line in before.splitlines())
    assert "Traceback" not in error
    return error


@pytest.fixture
def knowledge(tmp_path: Path, knowledge_folder: Path, recipe_file: Path) -> Path:
    """A copy of the knowledge to break, and the recipe pointed to it."""
    copy = tmp_path / "knowledge"
    shutil.copytree(knowledge_folder, copy)
    recipe_file.write_text(recipe_file.read_text().replace(str(knowledge_folder), str(copy)))
    return copy


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]


def write(folder: Path, items: list[dict[str, Any]]) -> None:
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))


def truncate(folder: Path) -> None:
    picture = folder / "images" / "blue.png"
    picture.write_bytes(picture.read_bytes()[:-30])


def change(number: int, **values: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        items = rows(folder)
        items[number] = {k: v for k, v in {**items[number], **values}.items() if v is not None}
        write(folder, items)

    return apply


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda folder: (folder / "images" / "blue.png").unlink(), ["item-2", "images/blue.png"]),
        (truncate, ["item-2", "images/blue.png", "cut short"]),
        (change(1, name=None), ["line 2", "item-1", "'name' is missing"]),
        (change(1, id="item-0"), ["line 2", "item-0", "already used on line 1"]),
        (change(1, image="../outside.png"), ["item-1", "../outside.png", "leaves its folder"]),
        (change(1, image="/etc/hostname"), ["item-1", "/etc/hostname", "leaves its folder"]),
        (lambda folder: (folder / "items.jsonl").write_text('{"id": '), ["line 1", "not valid JSON"]),
        (lambda folder: (folder / "items.jsonl").unlink(), ["items.jsonl", "no such file"]),
        (lambda folder: (folder / "held_out.jsonl").write_text('{"id": "a"}\n'), ["held_out.jsonl, line 1", "'image'"]),
        (lambda folder: (folder / "texts.jsonl").write_text("[]\n"), ["texts.jsonl, line 1"]),
    ],
    ids=["missing", "truncated", "nameless", "twice", "outside", "absolute", "json", "no items", "picture", "text"],
)
def test_bad_data_is_one_clear_error_before_any_work(
    knowledge: Path,
    recipe_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    named: list[str],
) -> None:
    spoil(knowledge)
    error = fails(capsys, "run", recipe_file, "--run", tmp_path / "run")
    for words in named:
        assert words in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("trainin.steps=3", ["recipe.yaml", "did you mean 'training'"]),
        ("methods.kore.rnk=3", ["methods.kore.rnk", "did you mean 'rank'"]),
        ("methods.kore.rank=40", ["'kore'", "rank 40", "k_proj", "at most 16"]),
        ("methods.lora.rank=40", ["'lora'", "rank 40"]),
        ("methods.kore.weight_decay=0.1", ["methods.kore", "weight_decay"]),
        ("methods.kore.lora_dropout=0.1", ["methods.kore", "lora_dropout"]),
        ("covariance.target_modules=.*no_such", ["no_such", "matches no layer"]),
        ("model.path=/no/such/folder", ["model.path", "/no/such/folder"]),
        ("training.steps", ["want KEY=VALUE"]),
    ],
)
def test_bad_recipe_is_one_clear_error(
    recipe_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    setting: str,
    named: list[str],
) -> None:
    error = fails(capsys, "run", recipe_file, "--run", tmp_path / "run", "--set", setting)
    for words in named:
        assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_no_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such recipe" in fails(capsys, "run", tmp_path)


def test_missing_upstream_names_its_command(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert "kore-fast covariance" in fails(capsys, "init", recipe_file, "--run", run, "--method", "kore")
    assert "kore-fast init" in fails(capsys, "train", recipe_file, "--run", run)
    assert "kore-fast augment" in fails(capsys, "evaluate", recipe_file, "--run", run)
    assert "kore-fast evaluate" in fails(capsys, "report", recipe_file, "--run", run)


def test_image_count_is_checked_in_a_replaced_samples_file(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    path = tmp_path / "run" / "augment" / "samples.json"
    samples = json.loads(path.read_text())
    samples[3]["conversations"][0]["value"] += " <image>"
    path.write_text(json.dumps(samples))
    error = fails(capsys, "train", finished, "--run", tmp_path / "run", "--method", "lora")
    assert samples[3]["id"] in error
    assert "1 image(s), but 2 <image> mark(s)" in error


def test_store_of_another_model(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kore_fast.modules.loading import load_model, load_processor
    from kore_fast.recipe.loading import load_recipe

    shutil.copytree(finished / "run" / "covariance", tmp_path / "run" / "covariance")
    path = load_recipe(finished).model_path()
    other = load_model(path)
    with torch.no_grad():
        other.get_submodule("model.language_model.layers.0.mlp.up_proj").weight.neg_()
    other.save_pretrained(tmp_path / "other")
    load_processor(path).save_pretrained(tmp_path / "other")
    command = ("init", finished, "--run", tmp_path / "run", "--set", f"model.path={tmp_path / 'other'}")
    assert "the store was made for another model" in fails(capsys, *command, "--method", "kore")


def test_single_stages_make_what_run_makes(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["augment", str(finished), "--run", str(run)]) == 0
    assert [p.name for p in run.iterdir() if p.name[0] != "."] == ["augment"]
    shutil.copytree(finished / "run" / "covariance", run / "covariance")
    assert main(["init", str(finished), "--run", str(run), "--method", "kore"]) == 0
    assert not (run / "init" / "lora").exists()
    for name in ("augment/samples.json", "init/kore/adapter_model.safetensors", "init/kore/leak.csv"):
        assert (run / name).read_bytes() == (finished / "run" / name).read_bytes()
    error = fails(capsys, "init", finished, "--run", run, "--method", "koer")
    assert "the recipe has lora, kore" in error
    assert "nothing to do" in fails(capsys, "init", finished, "--run", run, "--method", "base")


def test_report_ends_with_table_path_and_lines_for_peft(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    capsys.readouterr()
    assert main(["report", str(finished), "--run", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert str(tmp_path / "run" / "report" / "report.html") in out
    assert all(method in out.lower() for method in ("base", "lora", "kore"))
    lines = [line.strip() for line in out.partition("without kore_fast:")[2].splitlines() if line.strip()]
    assert len(lines) == 3
    assert "kore_fast" not in "".join(lines)
    found: dict[str, Any] = {}
    exec("\n".join(lines), found)
    assert any(type(value).__name__.startswith("Peft") for value in found.values())


def test_spectrum_needs_the_store_alone(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "run" / "covariance", run / "covariance")
    before = {path: path.read_bytes() for path in (run / "covariance").iterdir()}
    assert main(["spectrum", str(run / "covariance"), "--rank", "8", "40"]) == 0
    out = capsys.readouterr().out
    assert "q_proj, k_proj, v_proj" in out
    assert "tail at 40" in out
    files = {path.name: path.read_bytes() for path in (run / "spectrum").iterdir()}
    assert sorted(files) == ["spectrum.csv", "tails.csv", "tails.png"]
    assert all(name in out for name in ("spectrum.csv", "tails.png"))
    # Later stages depend on what is in the covariance folder.
    assert {path: path.read_bytes() for path in (run / "covariance").iterdir()} == before

    rows = list(csv.DictReader(files["spectrum.csv"].decode().splitlines()))
    leaks = list(csv.DictReader((finished / "run" / "init" / "kore" / "leak.csv").read_text().splitlines()))
    assert {row["layer"] for row in rows} == {row["layer"] for row in leaks}
    energy = {row["layer"]: float(row["tail_energy_8"]) for row in rows}
    for row in leaks:
        assert energy[row["layer"]] == pytest.approx(float(row["tail_energy"]), rel=1e-6, abs=1e-13)

    assert main(["spectrum", str(run), "--rank", "8", "40", "--output", str(tmp_path / "again")]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == files
    assert main(["spectrum", str(run / "covariance" / "text.safetensors")]) == 0
    assert (run / "spectrum" / "spectrum.csv").read_bytes() != files["spectrum.csv"]
    text_alone = (run / "spectrum" / "tails.csv").read_bytes()
    assert main(["spectrum", str(run), "--weight", "chat=0", "--weight", "pictures=0"]) == 0
    assert (run / "spectrum" / "tails.csv").read_bytes() == text_alone


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--rank", "65"], "rank 65: want 1…64"),
        (["--weight", "text"], "--weight text: want SOURCE=NUMBER"),
        (["--weight", "texts=1"], "source weights name ['texts']"),
        (["--device", "no_such"], "--device no_such"),
    ],
)
def test_spectrum_s_errors(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    output = tmp_path / "out"
    assert named in fails(capsys, "spectrum", finished / "run", "--output", output, *arguments)
    assert "no covariance files here" in fails(capsys, "spectrum", tmp_path, "--output", output)
    assert not output.exists()


def test_verify_prints_a_line_a_check(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kore_fast.recipe.loading import load_recipe

    adapter, model = finished / "run" / "train" / "kore" / "adapter", str(load_recipe(finished).model_path())
    command = ["verify", str(adapter), "--model", model]
    capsys.readouterr()
    assert main([*command, "--pad", str(tmp_path / "padded")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:7]] == [
        [name, "ok"] for name in ("files", "layers", "function", "A", "base", "leak", "rank")
    ]
    assert main(["verify", str(tmp_path / "padded"), "--model", model]) == 0
    # Out of its run's folder the store is not found, and then it is given.
    assert "leak      skipped" in capsys.readouterr().out
    store = ["--covariance", str(finished / "run" / "covariance")]
    assert main(["verify", str(tmp_path / "padded"), "--model", model, *store]) == 0
    assert "leak      ok" in capsys.readouterr().out

    start = finished / "run" / "init" / "kore"
    assert main(["verify", str(start), "--model", model, "--pad", str(tmp_path / "not")]) == 1
    out = capsys.readouterr().out
    assert "function  FAILED   B is zero: not trained" in out
    assert "Not padded: function failed" in out
    assert not (tmp_path / "not").exists()
    assert "cannot load a model" in fails(capsys, "verify", adapter, "--model", tmp_path / "nothing")


def test_merge_makes_a_model(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kore_fast.modules.loading import load_model, load_processor
    from kore_fast.recipe.loading import load_recipe

    adapter, model = finished / "run" / "train" / "kore" / "adapter", str(load_recipe(finished).model_path())
    command = ["merge", str(adapter), "--model", model, "--output", str(tmp_path / "out"), "--dtype", "bfloat16"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "14 layers merged in bfloat16" in out
    assert str(tmp_path / "out") in out
    assert next(load_model(tmp_path / "out", "auto").parameters()).dtype == torch.bfloat16
    assert hasattr(load_processor(tmp_path / "out"), "image_processor")
    assert "not empty" in fails(capsys, *command)


def test_import_kore_says_what_it_found(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    from kore_fast.modules.loading import load_model

    state = dict(load_model(tiny_model_folder).state_dict())
    name = "model.language_model.layers.0.mlp.up_proj"
    weight = state.pop(f"{name}.weight")
    torch.manual_seed(0)
    A, B0 = torch.randn(3, 32), torch.randn(64, 3)
    state |= {
        f"{name}.weight_residual": weight - B0 @ A,
        f"{name}.BLinear.weight": A,
        f"{name}.ALinear.weight": B0 + 0.1,
    }
    save_file(state, tmp_path / "model.safetensors")
    command = ["import-kore", str(tmp_path), "--model", str(tiny_model_folder), "--output", str(tmp_path / "adapter")]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "1 layers of which B was trained: rank 3" in out
    assert "rounding of float32" in out
    assert main(["verify", str(tmp_path / "adapter"), "--model", str(tiny_model_folder)]) == 0
    assert "A         ok" in capsys.readouterr().out
    assert "not empty" in fails(capsys, *command)


def test_env_prints_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert f"kore-fast     {kore_fast.__version__}" in out
    assert torch.__version__.partition("+")[0] in out
    assert "covariance    reference on cpu: yes" in out


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for argument, words in (("--version", kore_fast.__version__), ("--help", "covariance")):
        with pytest.raises(SystemExit) as ended:
            main([argument])
        assert ended.value.code == 0
        assert words in capsys.readouterr().out


def test_interrupt_says_how_to_go_on(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import kore_fast.recipe.work as work

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "augment", stop)
    assert main(["augment", str(recipe_file), "--run", str(tmp_path / "run")]) == 130
    assert "the same command continues from here" in capsys.readouterr().err


def test_without_the_pipelines_packages_every_command_says_what_to_install(tmp_path: Path) -> None:
    words = {
        "run": ["run", "recipe.yaml"],
        "compare": ["compare", "recipe.yaml"],
        "augment": ["augment", "recipe.yaml"],
        "train": ["train", "recipe.yaml"],
        "evaluate": ["evaluate", "recipe.yaml"],
        "spectrum": ["spectrum", "run"],
        "verify": ["verify", "adapter", "--model", "base"],
        "merge": ["merge", "adapter", "--model", "base", "--output", "merged"],
        "convert": ["convert", "samples.json", "out.jsonl", "--format", "swift", "--images", "."],
    }
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({list(_PIPELINE)!r}))\n"
        "from kore_fast.cli import main\n"
        f"print([main(words) for words in {list(words.values())!r}], main(['env']))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **_here()}
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == f"{[1] * len(words)} 0"
    lines = ran.stderr.splitlines()
    assert [line.split()[1] for line in lines] == list(words)
    assert all(
        re.search(r'needs [a-z0-9]+, which is not installed: pip install "kore-fast\[pipeline\]"$', x) for x in lines
    )


def test_the_packages_that_a_command_may_lack_are_the_extras() -> None:
    text = (Path(kore_fast.__file__).parents[1] / "pyproject.toml").read_text()
    extra = re.search(r"^pipeline = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert extra
    assert set(re.findall(r'^  "([a-z0-9]+)', extra[1], re.MULTILINE)) == set(_PIPELINE.values())


def _here() -> dict[str, str]:
    """The package under test, also where the directory is another."""
    return {"PYTHONPATH": str(Path(kore_fast.__file__).parents[1])}
