"""What a memory budget allows: which sums stay on the model's device, in which pass, and how long the buffers are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kore_fast.constraint.inputs import Width
from kore_fast.errors import ConstraintError

# A kernel call reads and writes the whole sum: with so many rows in a call that costs little beside the product.
TOKENS = 4096
# Fewer cost more by the call than by the product, however narrow the input.
LEAST_TOKENS = 512
# Where every call also moves the sum to another memory, more rows a call are worth their room.
SPILLED_TOKENS = 16384


@dataclass(frozen=True)
class Pass:
    """One pass over the batches: what it sums up, and where."""

    tokens: Mapping[str, int]
    """Group → rows that its buffer holds; groups that are not here are left to another pass."""
    spilled: frozenset[str] = frozenset()
    """Groups whose sum is kept away from the model's device."""
    slots: int = 0
    """Products of the widest spilled input that may be under way to their sums at one time."""


def sum_bytes(width: Width) -> int:
    """Bytes of a sum (d, d) in float64."""
    return 8 * width.d * width.d


def buffer_tokens(width: Width) -> int:
    """Rows of a buffer that takes at most a quarter of what its sum takes, or is small."""
    return min(TOKENS, max(LEAST_TOKENS, 2 * width.d // width.itemsize))


def plan_passes(widths: Mapping[str, Width], max_memory: int) -> list[Pass]:
    """Split the groups, in order, into passes whose sums and buffers fit ``max_memory`` bytes.

    Raises:
        ConstraintError: one sum alone is larger; names its layer.
    """
    for group, width in widths.items():
        if sum_bytes(width) > max_memory:
            raise ConstraintError(
                f"{group}: its covariance takes {sum_bytes(width):,} bytes; max_memory is {max_memory:,}"
            )
    whole = sum(map(sum_bytes, widths.values())) <= max_memory
    # An eighth is left to the buffers, unless all sums fit at once: a pass costs more than short buffers do.
    limit = max_memory if whole else max_memory - max_memory // 8
    waves: list[dict[str, Width]] = [{}]
    used = 0
    for group, width in widths.items():
        if waves[-1] and used + sum_bytes(width) > limit:
            waves.append({})
            used = 0
        waves[-1][group] = width
        used += sum_bytes(width)
    return [_with_buffers(wave, max_memory) for wave in waves]


def _with_buffers(wave: Mapping[str, Width], max_memory: int) -> Pass:
    left = max_memory - sum(map(sum_bytes, wave.values()))
    tokens = left // _row_bytes(wave)
    return Pass({group: min(tokens, buffer_tokens(width)) for group, width in wave.items()})


def plan_spill(widths: Mapping[str, Width], max_memory: int) -> Pass:
    """One pass within ``max_memory`` bytes: buffers first (every time one is full its product must travel), then as
    many sums as still fit; the others are kept elsewhere.

    Raises:
        ConstraintError: one product is larger; names its layer.
    """
    single = plan_passes(widths, max_memory)
    if len(single) == 1:
        return single[0]
    widest = max(map(sum_bytes, widths.values()))
    slots = 2 if 2 * widest <= max_memory // 2 else 1
    left = max_memory - slots * widest
    tokens = min(SPILLED_TOKENS, left // 2 // _row_bytes(widths))
    left -= tokens * _row_bytes(widths)
    spilled = set()
    for group, width in widths.items():
        if sum_bytes(width) <= left:
            left -= sum_bytes(width)
        else:
            spilled.add(group)
    return Pass(dict.fromkeys(widths, tokens), frozenset(spilled), slots)


def _row_bytes(widths: Mapping[str, Width]) -> int:
    """Bytes of one token's row in every buffer, with its weight."""
    return sum(width.d * width.itemsize + 8 for width in widths.values())
