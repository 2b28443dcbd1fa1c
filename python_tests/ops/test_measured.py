"""The measured choice: the fastest way is found once, and kept for the next process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kore_fast.ops import frozen_lora, measured

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No choice yet, and a file of the test's own."""
    monkeypatch.setenv("KORE_FAST_CACHE", str(tmp_path))
    monkeypatch.delenv("KORE_FAST_AUTOTUNE", raising=False)
    monkeypatch.setattr(measured, "_chosen", {})
    return tmp_path / "choices.json"


def sleeping(seconds: float, calls: list[float]) -> Callable[[], None]:
    def call() -> None:
        calls.append(seconds)
        time.sleep(seconds)

    return call


def test_the_fastest_is_taken_and_kept(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    ways = {"slow": sleeping(0.03, calls), "fast": sleeping(0.001, calls)}
    assert measured.fastest("a kind", CPU, ways) == "fast"
    assert len(calls) == 2 * 4
    assert measured.fastest("a kind", CPU, ways) == "fast"
    monkeypatch.setattr(measured, "_chosen", {})  # as another process
    assert measured.fastest("a kind", CPU, ways) == "fast"
    assert len(calls) == 2 * 4
    assert measured.known_choices(CPU) == {"a kind": "fast"}


def test_another_machine_s_choice_is_not_taken(fresh: Path) -> None:
    fresh.write_text(json.dumps({"another; torch 2": {"a kind": "slow"}}))
    assert measured.fastest("a kind", CPU, {"slow": lambda: time.sleep(0.03), "fast": lambda: None}) == "fast"
    assert "another; torch 2" in json.loads(fresh.read_text())


@pytest.mark.parametrize("content", ["", "[1]", '{"x": 1}', "\x00"])
def test_a_broken_file_is_made_anew(fresh: Path, content: str) -> None:
    fresh.write_text(content)
    assert measured.fastest("a kind", CPU, {"slow": lambda: time.sleep(0.03), "fast": lambda: None}) == "fast"
    assert measured.known_choices(CPU) == {"a kind": "fast"}


def test_a_way_that_is_no_more_is_measured_again(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured.fastest("a kind", CPU, {"slow": lambda: time.sleep(0.03), "gone": lambda: None})
    monkeypatch.setattr(measured, "_chosen", {})
    assert measured.fastest("a kind", CPU, {"slow": lambda: time.sleep(0.03), "fast": lambda: None}) == "fast"


def test_one_that_does_not_fit_into_memory_loses(fresh: Path) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("no")

    assert measured.fastest("a kind", CPU, {"full": full, "slow": lambda: time.sleep(0.01)}) == "slow"


def test_switched_off_it_takes_the_first(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KORE_FAST_AUTOTUNE", "0")
    assert measured.fastest("a kind", CPU, {"slow": lambda: time.sleep(0.03), "fast": lambda: None}) == "slow"
    assert not fresh.exists()


def test_a_folder_that_cannot_be_written_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KORE_FAST_CACHE", str(tmp_path / "file" / "below"))
    calls: list[float] = []
    ways = {"slow": sleeping(0.03, calls), "fast": sleeping(0.001, calls)}
    assert [measured.fastest("a kind", CPU, ways) for _ in range(2)] == ["fast", "fast"]
    assert len(calls) == 2 * 4


MEETING = """
import sys, time, torch
from kore_fast.ops import measured
calls = []
ways = {"slow": lambda: time.sleep(0.05), "fast": lambda: calls.append(1)}
print(measured.fastest("a kind", torch.device("cpu"), ways), len(calls))
"""


def test_processes_that_meet_measure_once(fresh: Path) -> None:
    both = [subprocess.Popen([sys.executable, "-c", MEETING], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = sorted(process.communicate()[0].split() for process in both)
    assert told == [["fast", "0"], ["fast", "4"]]


def test_the_layer_s_backward_is_chosen_by_measurement(fresh: Path) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 320, generator=g).requires_grad_()
    W, A = torch.randn(320, 320, generator=g), torch.randn(16, 320, generator=g)
    B = torch.randn(320, 16, generator=g).requires_grad_()
    frozen_lora(x, W, A, B).square().sum().backward()
    kinds = measured.known_choices(CPU)
    assert {kind.rpartition(", ")[2] for kind in kinds} == {"dx", "dB"}
    assert all("320 → 320 r 16 with 1024 tokens, torch.float32" in kind for kind in kinds)
    small = x.detach()[:64].requires_grad_()
    frozen_lora(small, W, A, B).sum().backward()
    assert measured.known_choices(CPU) == kinds  # not worth a measurement
