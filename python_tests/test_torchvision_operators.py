"""torchvision beside a torch that its compiled library does not fit: with a stand-in everywhere, with the real one (a
fresh environment, the extra's install line) marked end_to_end."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

# What torchvision's own import does: load the library if it can, then register for an operator that must be declared.
STAND_IN = """
import torch
from pathlib import Path
try:
    torch.ops.load_library(str(Path(__file__).with_name("_C.so")))
except OSError:
    pass

@torch.library.register_fake("torchvision::nms")
def meta_nms(dets, scores, iou_threshold):
    return dets
"""


def run(code: str, *paths: Path, python: str | Path = sys.executable) -> subprocess.CompletedProcess[str]:
    search = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*paths, REPOSITORY)))}
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, env=search, cwd="/")


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A folder with a torchvision whose compiled library does not load."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(STAND_IN)
    (tmp_path / "torchvision" / "_C.so").write_bytes(b"built for another torch")
    return tmp_path


def test_the_trap_is_there_and_importing_kore_fast_takes_it_away(stand_in: Path) -> None:
    alone = run("import torchvision", stand_in)
    assert "operator torchvision::nms does not exist" in alone.stderr
    with_us = run("import kore_fast, torchvision; print(torchvision.meta_nms.__name__)", stand_in)
    assert with_us.stdout.strip() == "meta_nms", with_us.stderr


def test_nothing_is_declared_where_the_operators_are_there(stand_in: Path) -> None:
    code = """
import torch
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from pathlib import Path
from kore_fast.torchvision_operators import declare_missing
print(declare_missing(Path({folder!r})))
"""
    done = run(code.format(folder=str(stand_in / "torchvision")))
    assert done.stdout.strip() == "[]", done.stderr


def test_both_operators_are_declared_once(stand_in: Path) -> None:
    code = """
from pathlib import Path
from kore_fast.torchvision_operators import declare_missing
folder = Path({folder!r})
print(declare_missing(folder), declare_missing(folder))
import torch
torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
"""
    done = run(code.format(folder=str(stand_in / "torchvision")))
    assert done.stdout.strip() == "['nms', 'qnms'] []"
    assert "NotImplementedError" in done.stderr


def test_looking_for_torchvision_loads_nothing_and_its_absence_stays_an_import_error(stand_in: Path) -> None:
    looking = "import importlib.util, sys, kore_fast; assert importlib.util.find_spec('torchvision')"
    done = run(f"{looking}; assert 'torch' not in sys.modules and 'torchvision' not in sys.modules", stand_in)
    assert done.returncode == 0, done.stderr
    absent = run(
        "import sys, kore_fast\n"
        "sys.path = [p for p in sys.path if 'site-packages' not in p]\n"
        "import importlib.util; assert importlib.util.find_spec('torchvision') is None\n"
        "import torchvision"
    )
    assert "No module named 'torchvision'" in absent.stderr


USES = """
import sys
import kore_fast
import open_clip, torch, torchvision
from transformers import AutoModel, BertConfig, LlamaConfig

for config in (
    BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16),
    LlamaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16),
):
    model = AutoModel.from_config(config)
    assert model(input_ids=torch.arange(5)[None]).last_hidden_state.shape == (1, 5, 8)
    folder = sys.argv[1] + "/" + config.model_type
    model.save_pretrained(folder)
    AutoModel.from_pretrained(folder)

from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(sys.argv[1] + "/words")
assert AutoTokenizer.from_pretrained(sys.argv[1] + "/words")("a")["input_ids"] == [0]
print(torch.__version__, torchvision.__version__, open_clip.__version__)
"""


@pytest.mark.end_to_end
def test_the_extra_gives_open_clip_and_leaves_transformers_working(tmp_path: Path) -> None:
    import torch

    folder = tmp_path / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    # The version alone: where this torch is a CPU build from an index of one's own, pip finds it there again.
    pinned = f"torch=={torch.__version__.partition('+')[0]}"
    built = {**os.environ, "KORE_FAST_NATIVE": "0"}
    for line in ([pinned], [f"{REPOSITORY}[clip]", pinned], ["pytest"]):
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *line], check=True, env=built, cwd=tmp_path)
    uses = tmp_path / "uses.py"
    uses.write_text(USES)
    done = subprocess.run([str(python), str(uses), str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(pinned.removeprefix("torch=="))
    # And the filter's own tests, with open_clip's real code.
    tests = REPOSITORY / "python_tests" / "augmentation" / "test_clip.py"
    done = subprocess.run(
        [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout
