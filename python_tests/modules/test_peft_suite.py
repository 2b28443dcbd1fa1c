"""PEFT's own tests of LoRA on linear layers, with our layer in the place of PEFT's.

The source distribution of the installed PEFT is fetched from the package registry into ``build/`` and its tests are run
offline. Each test that fails with ours is run again with PEFT's layer: it must fail there too. Because PEFT's tests
train A, and then our layer leaves the forward pass to PEFT, those that build our layer are run once more with A frozen.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers

from python_tests.constraint.stack import PYTHONPATH

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]
# By the name of the module; what comes with attrs is called attr.
NEEDED = {name: name for name in ("datasets", "diffusers", "parameterized", "scipy")} | {"attr": "attrs"}
# With these two, pip finds versions that leave what is installed as it is.
PINS = f"peft=={peft.__version__} transformers=={transformers.__version__}"
# What must have been among the tests that ran.
CORE = ("test_custom_models.py", "test_initialization.py", "test_lora_variants.py", "test_mixed.py")


# Tests that expect the name of PEFT's class: that may differ.
OF_THE_NAME = (
    "::test_modules_to_save_targets_lora_layer_raises",
    "::test_repr_lora_linear",
    "::test_module_type_small",
    "::test_module_type_large",
    "::test_target_parameters_and_target_modules",
)


@pytest.fixture(scope="session")
def suite() -> Path:
    """A folder with the tests of the installed PEFT as its package ``tests``."""
    missing = [package for name, package in NEEDED.items() if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"PEFT's tests need more packages: pip install {' '.join(missing)} {PINS}")
    folder = REPOSITORY / "build" / "peft_suite" / peft.__version__
    archive = folder / f"peft-{peft.__version__}.tar.gz"
    if not archive.exists():
        options = ("--no-deps", "--no-binary", "peft", "--dest", str(folder))
        command = [sys.executable, "-m", "pip", "download", *options, f"peft=={peft.__version__}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"the source distribution of PEFT {peft.__version__} does not come: {done.stderr[-400:]}")
    tests = folder / "tests"
    tests.mkdir(exist_ok=True)
    with tarfile.open(archive) as held:
        for member in held.getmembers():
            if re.fullmatch(r"[^/]+/tests/[^/]+\.py", member.name):
                (tests / Path(member.name).name).write_bytes(held.extractfile(member).read())
    (tests / "__init__.py").touch()
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n single_gpu_tests\n multi_gpu_tests\n bitsandbytes\n")
    return folder


def run(suite: Path, name: str, *options: str, only: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """What came of each test; those with other methods' configurations are left out."""
    if only is not None:
        (suite / f"{name}.only.json").write_text(json.dumps(only))
        options = (*options, "--only", f"{name}.only.json")
    files = sorted({node.split("::")[0] for node in only}) if only is not None else _of_lora(suite)
    (suite / f"{name}.json").unlink(missing_ok=True)
    plugins = (
        "-p",
        "python_tests.modules.peft_suite",
        "-p",
        "no:cacheprovider",
        "-n",
        str(min(os.cpu_count() or 1, 8)),
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "--continue-on-collection-errors",
        *plugins,
        *options,
    ]
    with open(suite / f"{name}.log", "w") as log:
        subprocess.run(
            [*command, "--results", f"{name}.json", *files],
            cwd=suite,
            env={
                **os.environ,
                "PYTHONPATH": f"{suite}:{PYTHONPATH}",
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
            },
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if not (suite / f"{name}.json").exists():
        pytest.fail(f"PEFT's tests did not run: {(suite / f'{name}.log').read_text()[-2000:]}")
    return json.loads((suite / f"{name}.json").read_text(encoding="utf-8"))


def _of_lora(suite: Path) -> list[str]:
    return [f"tests/{path.name}" for path in sorted(suite.glob("tests/test_*.py")) if "LoraConfig" in path.read_text()]


def failed(result: dict[str, Any]) -> bool:
    return result["outcome"] in ("failed", "not collected")


@pytest.fixture(scope="session")
def with_a_trained(suite: Path) -> dict[str, dict[str, Any]]:
    return run(suite, "trained-a-ours", "--kore-layers")


@pytest.mark.parametrize("frozen", [False, True], ids=["trained-a", "frozen-a"])
def test_nothing_fails_that_passes_with_peft_s_layer(
    suite: Path, with_a_trained: dict[str, dict[str, Any]], frozen: bool, request: pytest.FixtureRequest
) -> None:
    name, options = request.node.callspec.id, ("--freeze-a",) if frozen else ()
    ours = with_a_trained
    if frozen:
        building = [node for node, result in ours.items() if result.get("built")]
        ours = run(suite, f"{name}-ours", "--kore-layers", *options, only=building)
    # What fails for want of the hub shows no layer's fault.
    again = [node for node, result in ours.items() if failed(result) and not result["offline"]]
    theirs = run(suite, f"{name}-theirs", *options, only=again) if again else {}

    of_linear = {node: result for node, result in ours.items() if result.get("built")}
    worse = {node: ours[node]["why"] for node in again if not failed(theirs.get(node, {"outcome": "missing"}))}
    allowed = {node: why for node, why in worse.items() if node.endswith(OF_THE_NAME)}
    worse = {node: why for node, why in worse.items() if node not in allowed}
    summary = {
        "peft": peft.__version__,
        "tests that built our layer": len(of_linear),
        "their outcomes": Counter(result["outcome"] for result in of_linear.values()),
        "tests in which the operation ran": sum(result["fused"] > 0 for result in of_linear.values()),
        "forward passes of the operation": sum(result["fused"] for result in of_linear.values()),
        "tests that built no LoRA on nn.Linear": sum(result.get("built") == 0 for result in ours.values()),
        "fail with ours only": worse,
        "expect the name of PEFT's class": allowed,
        "fail with PEFT's layer too": {node: ours[node]["why"] for node in again if node not in {*worse, *allowed}},
        "need the model hub": [node for node, result in ours.items() if result["offline"]],
        "skipped by PEFT": {
            node: result["why"]
            for node, result in ours.items()
            if result["outcome"] == "skipped" and not result["offline"]
        },
    }
    (suite / f"{name}.summary.json").write_text(json.dumps(summary, indent=1))
    print(json.dumps({key: value if isinstance(value, (int, str)) else len(value) for key, value in summary.items()}))

    assert not worse, json.dumps(worse, indent=1)
    passed = {node.split("::")[0] for node, result in of_linear.items() if result["outcome"] == "passed"}
    assert {f"tests/{file}" for file in CORE} <= passed
    assert summary["forward passes of the operation"] > 0
