"""What a budget allows: never more than it says, few passes, every group once."""

from __future__ import annotations

import pytest

from kore_fast.constraint.budget import LEAST_TOKENS, Pass, buffer_tokens, plan_passes, plan_spill, sum_bytes
from kore_fast.constraint.inputs import Width
from kore_fast.errors import ConstraintError

# LLaVA-7B in bfloat16: three inputs of 4096 and one of 11008 in each of 32 layers.
LLAVA = {f"{layer}.{i}": Width(11008 if i == 3 else 4096, 2) for layer in range(32) for i in range(4)}
GB = 10**9


def taken(plan: Pass, widths: dict[str, Width]) -> int:
    """Bytes on the device at the most."""
    sums = sum(sum_bytes(widths[group]) for group in plan.tokens if group not in plan.spilled)
    buffers = sum(tokens * (widths[group].d * widths[group].itemsize + 8) for group, tokens in plan.tokens.items())
    slots = plan.slots * max((sum_bytes(widths[group]) for group in plan.spilled), default=0)
    return sums + buffers + slots


@pytest.mark.parametrize("gigabytes", [1, 3, 12, 44, 50, 100])
def test_within_the_budget(gigabytes: int) -> None:
    passes = plan_passes(LLAVA, gigabytes * GB)
    assert sorted(group for plan in passes for group in plan.tokens) == sorted(LLAVA)
    for plan in [*passes, plan_spill(LLAVA, gigabytes * GB)]:
        assert taken(plan, LLAVA) <= gigabytes * GB
    spilling = plan_spill(LLAVA, gigabytes * GB)
    assert set(spilling.tokens) == set(LLAVA)
    assert bool(spilling.spilled) == (gigabytes < 44)


def test_what_the_documentation_says_of_llava() -> None:
    assert round(sum(map(sum_bytes, LLAVA.values())) / GB) == 44
    assert len(plan_passes(LLAVA, 12 * GB)) == 5
    # Buffers are long enough for the sums to be read seldom.
    assert min(min(plan.tokens.values()) for plan in plan_passes(LLAVA, 12 * GB)) >= 1024
    assert min(plan_spill(LLAVA, 12 * GB).tokens.values()) >= 2048


def test_a_whole_fit_takes_one_pass_however_short_its_buffers() -> None:
    widths = {"a": Width(10, 4), "b": Width(20, 4)}
    exact = sum(map(sum_bytes, widths.values()))
    assert [set(plan.tokens) for plan in plan_passes(widths, exact)] == [{"a", "b"}]
    assert plan_passes(widths, exact)[0].tokens == {"a": 0, "b": 0}
    assert len(plan_passes(widths, exact - 1)) == 2
    assert not plan_spill(widths, exact).spilled


@pytest.mark.parametrize("width", [Width(8, 4), Width(576, 4), Width(1536, 2), Width(4096, 2), Width(18944, 4)])
def test_a_buffer_takes_a_quarter_of_its_sum_at_most_or_is_small(width: Width) -> None:
    tokens = buffer_tokens(width)
    assert tokens >= LEAST_TOKENS
    assert tokens == LEAST_TOKENS or tokens * width.d * width.itemsize <= sum_bytes(width) / 4


@pytest.mark.parametrize("plan", [plan_passes, plan_spill])
def test_one_sum_must_fit(plan: object) -> None:
    with pytest.raises(ConstraintError, match=r"b: its covariance takes 3,200 bytes; max_memory is 3,199"):
        plan({"a": Width(10, 4), "b": Width(20, 4)}, 3199)  # type: ignore[operator]
