"""Progress: nothing lost on the way, and a time left that follows what was measured."""

from __future__ import annotations

import pytest

from kore_fast.progress import RunClock, bar, minutes, silent


def test_items_pass_through(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(silent([1, 2, 3], 3, "x")) == [1, 2, 3]
    assert list(bar([1, 2, 3], label="knead")) == [1, 2, 3]
    shown = capsys.readouterr()
    assert "knead" in shown.err
    assert "3/3" in shown.err
    assert not shown.out
    assert list(bar(iter([1, 2]), None, "x")) == [1, 2]


def test_costs_make_the_time_left_right(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three items of very different size: after the first, 27 of 36 seconds' worth is done, not a third."""
    import tqdm.std

    clock = 1000.0
    monkeypatch.setattr(tqdm.std, "time", lambda: clock)
    done = []
    for side in bar([3, 2, 1], label="solve", cost=lambda side: side**3):
        done.append(side)
        clock += 10 * side**3
    assert done == [3, 2, 1]
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "solve" in line]
    # 270 s for 27 of 36; then 80 s for 8; no unit of cost is shown.
    assert any("75%" in line and "04:30<01:30" in line and "1/3" in line for line in lines), lines
    assert any("97%" in line and "05:50<00:10" in line and "2/3" in line for line in lines), lines
    assert "100%" in lines[-1]
    assert "3/3" in lines[-1]
    assert not any("36" in line for line in lines)
    assert list(silent([1, 2], 3.0, "x", float)) == [1, 2]
    assert list(bar(iter([1, 2]), 3.0, "x", float)) == [1, 2]
    assert list(bar([], 0, "x", float)) == []


def test_time_left_follows_the_measured_speed() -> None:
    clock = RunClock({"a": 100, "b": 200, "c": 300})
    assert clock.left() == 600
    clock.skip("c")
    assert clock.left() == 300
    clock.finish("a", 420)
    # Measured 420 for 100, with a minute of belief in the plan: (420 + 60) / (100 + 60) = 3.
    assert clock.left() == pytest.approx(600)
    with clock.timed("b"):
        pass
    assert clock.left() == 0


def test_a_step_of_unknown_length_is_named_and_teaches_nothing() -> None:
    clock = RunClock({"a": None, "b": 200, "c": None})
    assert (clock.left(), clock.unknown()) == (200, ["a", "c"])
    clock.finish("a", 100_000)
    clock.skip("c")
    assert (clock.left(), clock.unknown()) == (200, [])


def test_failed_step_is_still_counted() -> None:
    clock = RunClock({"a": 5, "b": 5})
    with pytest.raises(KeyError), clock.timed("a"):
        raise KeyError
    assert 0 < clock.left() < 6


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "under a minute"), (44, "under a minute"), (46, "about 1 min"), (600, "about 10 min")]
)
def test_minutes(seconds: float, said: str) -> None:
    assert minutes(seconds) == said
