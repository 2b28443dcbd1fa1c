"""Buffers and sums: nothing lost, nothing waited for, and sums elsewhere equal sums on the spot."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from kore_fast.constraint import sums as module
from kore_fast.constraint.budget import Pass
from kore_fast.constraint.inputs import Rows, Width
from kore_fast.constraint.sums import (
    Buffered,
    ResidentSum,
    Spill,
    SpilledSum,
    Sums,
    from_panels,
    pack_panels,
    panel_size,
    to_panels,
)
from kore_fast.errors import DataError
from kore_fast.ops import finalize

CPU = torch.device("cpu")
ALL = Rows(None, None)


def lower(d: int) -> torch.Tensor:
    return torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d))


def batch(rows: int, d: int, seed: int, kind: str) -> tuple[torch.Tensor, Rows, torch.Tensor]:
    """Activations in float64, what counts of them, and that as a weight for each row."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(2, rows, d, dtype=torch.float64, generator=random)
    mask = (torch.rand(2, rows, generator=random) > 0.3).long() if "mask" in kind else None
    scale = torch.rand(2, rows, generator=random) * (torch.rand(2, rows, generator=random) > 0.2)
    scale = scale if "scale" in kind else None
    weights = torch.ones(2, rows, dtype=torch.float64)
    for factor in (mask, scale):
        weights = weights if factor is None else weights * factor
    return x, Rows(mask, scale), weights


def moment(batches: list[tuple[torch.Tensor, Rows, torch.Tensor]]) -> torch.Tensor:
    return sum(((x * w[..., None]).flatten(0, 1).T @ x.flatten(0, 1) for x, _, w in batches), torch.tensor(0.0))


@pytest.mark.parametrize("d", [1, 7, 256, 257, 600])
def test_panels_hold_the_lower_triangle(d: int) -> None:
    C = lower(d)
    panels = to_panels(C, torch.empty(panel_size(d), dtype=torch.float64))
    assert torch.equal(from_panels(panels, torch.zeros_like(C)).tril(), C.tril())
    assert d * (d + 1) // 2 <= panel_size(d) <= d * (d + 1) // 2 + 128 * d
    rows, columns = torch.tril_indices(d, d)
    assert torch.equal(pack_panels(panels, d), C[rows, columns])


KINDS = pytest.mark.parametrize("kind", ["plain", "mask", "scale", "mask and scale"])


@KINDS
@pytest.mark.parametrize("tokens", [0, 1, 13, 50, 1000])
def test_a_buffer_loses_nothing(kind: str, tokens: int) -> None:
    batches = [batch(rows, 6, seed, kind) for seed, rows in enumerate([3, 1, 9, 40, 2, 6, 0, 5])]
    buffered = Buffered(ResidentSum(6, CPU), tokens)
    for x, rows, _ in batches:
        buffered.add("layer", x, rows)
    buffered.flush()
    assert isinstance(buffered.total, ResidentSum)
    wanted = moment(batches)
    assert torch.allclose(finalize(buffered.total.C), wanted, rtol=1e-12, atol=1e-12)
    assert int(buffered.total.count[0]) == sum(int((w != 0).sum()) for *_, w in batches)
    assert float(buffered.total.count[1]) == pytest.approx(float(sum(w.sum() for *_, w in batches)), rel=1e-12)


def test_rows_of_kinds_may_wait_together() -> None:
    batches = [batch(4, 6, seed, kind) for seed, kind in enumerate(["plain", "mask", "scale", "plain"])]
    buffered = Buffered(ResidentSum(6, CPU), 100)
    for x, rows, _ in batches:
        buffered.add("layer", x, rows)
    buffered.flush()
    assert isinstance(buffered.total, ResidentSum)
    assert torch.allclose(finalize(buffered.total.C), moment(batches), rtol=1e-12, atol=1e-12)


def test_small_batches_are_gathered_and_large_ones_go_straight(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(module, "covariance_update_", lambda C, count, x, mask, scale: calls.append(x[..., 0].numel()))
    buffered = Buffered(ResidentSum(4, CPU), 16)
    for n in (5, 5, 5, 5, 40, 3):
        buffered.add("layer", torch.randn(n, 4), ALL)
    buffered.flush()
    assert calls == [15, 40, 8]
    # Masked rows do not fill the buffer on a CPU.
    calls.clear()
    for _ in range(5):
        buffered.add("layer", torch.randn(10, 4), Rows(torch.tensor([1, 1, 1] + [0] * 7), None))
    buffered.flush()
    assert calls == [15]


def test_another_dtype_does_not_wait_with_the_first() -> None:
    buffered = Buffered(ResidentSum(4, CPU), 16)
    x = torch.randn(3, 4)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        buffered.add("layer", x.to(dtype), ALL)
    buffered.flush()
    assert int(buffered.total.count[0]) == 9


def test_broken_rows_are_counted_after_waiting_too() -> None:
    buffered = Buffered(ResidentSum(3, CPU), 16)
    x = torch.ones(4, 3)
    x[1], x[2] = float("nan"), float("inf")
    buffered.add("layer", x, Rows(torch.tensor([1, 1, 0, 1]), None))
    buffered.flush()
    assert buffered.total.count.tolist() == [2, 2, 1]


@KINDS
def test_nothing_waits_for_an_accelerator(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without values, whatever would need one on the host raises."""
    seen: list[tuple[bool, bool]] = []
    monkeypatch.setattr(
        module, "covariance_update_", lambda C, count, x, mask, scale: seen.append((mask is None, scale is None))
    )
    device = torch.device("meta")
    buffered = Buffered(ResidentSum(8, device), 32)
    for rows in (5, 20, 10, 40, 3):
        x = torch.empty(2, rows, 8, dtype=torch.bfloat16, device=device)
        mask = torch.ones(2, rows, dtype=torch.int64, device=device) if "mask" in kind else None
        scale = torch.ones(2, rows, device=device) if "scale" in kind else None
        buffered.add("layer", x, Rows(mask, scale))
    buffered.flush()
    # The control: asking such a tensor for a value does raise.
    with pytest.raises(RuntimeError):
        bool(Rows(mask, torch.ones(3, device=device)).kept)
    # Of 10, 40, 20, 80 and 6 rows, those of 40 and 80 go straight; 10 and 20 wait together, 6 has no room with them.
    straight = ("mask" not in kind, "scale" not in kind)
    waited = (kind != "mask", "scale" not in kind)
    assert seen == [straight, straight, waited, waited]


class Stream:
    """Stands in for a stream and its events: notes the order of what the copy out of a device relies on."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def wait_stream(self, other: Any) -> None:
        self.calls.append("wait for the product")

    def record(self, stream: Any) -> None:
        assert stream is self
        self.calls.append("copied")

    def synchronize(self) -> None:
        assert "copied" in self.calls
        self.calls.append("arrived")


@pytest.fixture(params=["memory", "disk", "through a landing", "through a stream"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path | None:
    """Where sums go; by the way of a GPU's products too, with plain memory and a stream that does nothing."""
    if request.param.startswith("through"):
        real = module._Slot.__init__

        def landing(slot: Any, widest: int, device: torch.device) -> None:
            real(slot, widest, device)
            slot.landed = torch.full((panel_size(widest),), float("nan"), dtype=torch.float64)
            slot.arrived = stream if request.param == "through a stream" else None

        monkeypatch.setattr(module._Slot, "__init__", landing)
    if request.param == "through a stream":
        stream = Stream()
        original = Spill.__init__

        def streaming(spill: Any, *given: Any) -> None:
            original(spill, *given)
            spill._stream = stream

        monkeypatch.setattr(Spill, "__init__", streaming)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    return tmp_path / "spill" if request.param == "disk" else None


def spilled(place: Path | None) -> Sums:
    widths = {"a": Width(300, 8), "b": Width(20, 8), "c": Width(260, 8)}
    return Sums(Pass(dict.fromkeys(widths, 16), frozenset({"a", "c"}), 2), widths, place)


def test_sums_elsewhere_are_the_same(place: Path | None) -> None:
    widths = {"a": 300, "b": 20, "c": 260}
    batches = [(g, batch(rows, d, rows, "mask")) for rows in (3, 20, 4, 5, 30) for g, d in widths.items()]
    taken = {}
    for name in ("here", "elsewhere"):
        plan = Pass(dict.fromkeys(widths, 16))
        with Sums(plan, {}, None) if name == "here" else spilled(place) as sums:
            for group, (x, rows, _) in batches:
                sums(group, x, rows)
            sums.flush()
            counts = sums.counts(list(widths))
            taken[name] = [counts, *(sums.take(g, d, CPU) for g, d in widths.items())]
    assert torch.equal(taken["here"][0], taken["elsewhere"][0])
    for group, *panels in zip(widths, taken["here"][1:], taken["elsewhere"][1:], strict=True):
        wanted = moment([b for g, b in batches if g == group]).tril()
        for found in panels:
            C = from_panels(found, torch.zeros(2 * [widths[group]], dtype=torch.float64))
            assert torch.allclose(C.tril(), wanted, rtol=1e-12, atol=1e-12)
    assert place is None or list(place.iterdir()) == []


def test_a_slow_other_end_holds_the_products_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many products as slots are under way, and the one that makes them waits."""
    gate, under_way, most = threading.Semaphore(0), [0], [0]
    real = module._add_landed

    def slow(*given: Any) -> None:
        assert gate.acquire(timeout=20)
        real(*given)
        under_way[0] -= 1

    def make(C: torch.Tensor) -> None:
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        C += 1

    monkeypatch.setattr(module, "_add_landed", slow)
    spill = Spill(CPU, 4, 2, None)
    total = spill.new_sum(4)
    opener = threading.Thread(target=lambda: [(time.sleep(0.005), gate.release()) for _ in range(9)])
    opener.start()
    for _ in range(9):
        spill.add(total, 4, make)
    spill.drain()
    opener.join()
    spill.close()
    assert most[0] == 2
    assert torch.equal(total, torch.full((16,), 9.0, dtype=torch.float64))


def test_trouble_at_the_other_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(module, "_add_landed", broken)
    spill = Spill(CPU, 4, 1, None)
    total = SpilledSum(4, CPU, spill)
    total.add(torch.ones(2, 4), None, None)
    with pytest.raises(OSError, match="the disk is gone"):
        spill.drain()
    with pytest.raises(OSError, match="the disk is gone"):
        total.add(torch.ones(2, 4), None, None)
    spill.close()


def test_trouble_in_a_product_frees_its_slot() -> None:
    spill = Spill(CPU, 4, 1, None)
    total = spill.new_sum(4)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            spill.add(total, 4, lambda C: C.add_(1 / 0))
    spill.add(total, 4, lambda C: C.add_(1))
    spill.drain()
    spill.close()
    assert bool((total == 1).all())


def test_a_spill_folder_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    spill = Spill(CPU, 4, 1, tmp_path / "file")
    with pytest.raises(DataError, match=r"file: no room for a sum of 128 bytes"):
        spill.new_sum(4)
    spill.close()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    spill = Spill(CPU, 4, 1, tmp_path)
    with pytest.raises(DataError, match="No space left on device"):
        spill.new_sum(4)
    spill.close()


@KINDS
def test_a_state_continues_with_the_same_bits(kind: str, place: Path | None) -> None:
    batches = [batch(rows, 300, seed, kind) for seed, rows in enumerate([3, 5, 1, 9, 2, 30, 3])]

    def run(stop: int | None) -> torch.Tensor:
        sums = spilled(place)
        for number, (x, rows, _) in enumerate(batches):
            if number == stop:
                states = [(g, {k: t.clone() for k, t in tensors.items()}, about) for g, tensors, about in sums.states()]
                sums.__exit__()
                sums = spilled(place)
                for group, tensors, about in states:
                    sums.restore(group, Width(300, 8), tensors, about)
            sums("a", x, rows)
        sums.flush()
        taken = torch.cat([sums.take("a", 300, CPU), sums.counts(["b"]).reshape(-1)])
        sums.__exit__()
        return taken

    whole = run(None)
    for stop in range(1, len(batches)):
        assert torch.equal(run(stop), whole)
