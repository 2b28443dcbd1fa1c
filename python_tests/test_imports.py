"""What an import loads: nothing heavy for the package, torch alone for the kernels and the constraint."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCKER = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError("not installed here: " + name)

sys.meta_path.insert(0, Absent())
{code}
"""
PIPELINE = {"transformers", "peft", "accelerate", "pydantic", "yaml", "PIL", "jinja2", "matplotlib", "tqdm", "openai"}


def run_without(blocked: set[str], code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKER.format(blocked=blocked, code=code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_package_loads_nothing() -> None:
    run_without(
        {*PIPELINE, "torch", "numpy", "safetensors"},
        "import kore_fast\nassert kore_fast.__version__\nassert 'get_kore_model' in dir(kore_fast)",
    )


def test_kernels_and_constraint_need_only_torch() -> None:
    run_without(
        PIPELINE,
        """
import torch
import kore_fast as kf
from kore_fast.ops import nullspace
class Takes(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 3)])
    def forward(self, x):
        return self.layers[0](x)
store = kf.collect_covariance(Takes(), [{'x': torch.randn(50, 4)}])
assert nullspace(store.covariance('layers.0'), 2).basis.shape == (4, 2)
config = kf.KoreConfig(rank=2)
try:
    kf.get_kore_model(Takes(), config, store)
except ModuleNotFoundError as error:
    assert 'peft' in str(error)
else:
    raise SystemExit('peft was not needed')
""",
    )


def test_the_command_answers_without_the_pipeline() -> None:
    run_without(
        PIPELINE - {"tqdm"} | {"torch"},
        "from kore_fast.cli import main\ntry:\n    main(['--version'])\nexcept SystemExit as e:\n    assert not e.code",
    )


def test_every_public_name_is_there() -> None:
    import kore_fast

    for name in kore_fast.__all__:
        assert getattr(kore_fast, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'no_such'"):
        _ = kore_fast.no_such
