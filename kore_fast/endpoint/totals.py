"""What a run of requests took: counts, tokens, money."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Totals:
    """Counts of one run; what an earlier run paid for is in ``cached`` only."""

    items: int = 0
    """Items gone through to the end."""
    requests: int = 0
    """Requests sent, repeated ones included."""
    answers: int = 0
    """New usable answers."""
    cached: int = 0
    """Answers (and final refusals) that were there already."""
    retries: int = 0
    """Sent again because the server failed or was too busy."""
    asked_again: int = 0
    """Sent again because the answer could not be used."""
    unusable: int = 0
    """Requests without a usable answer after all asks."""
    failed: int = 0
    """Requests that the server did not answer at all; another run asks them again."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tokens_estimated: int = 0
    """Replies in which the server did not say how many tokens they took; these are counted roughly."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why requests had no usable answer, by task."""

    def add(self, other: dict[str, Any]) -> None:
        """Add the counts of another process, as `take` gave them."""
        for key, value in other.items():
            if key == "reasons":
                self.reasons.update(value)
            else:
                setattr(self, key, getattr(self, key) + value)

    def take(self) -> dict[str, Any]:
        """All counts as plain JSON values, which are zero afterwards."""
        taken: dict[str, Any] = {key: value for key, value in vars(self).items() if isinstance(value, int)}
        taken["reasons"] = dict(self.reasons)
        for key in taken:
            setattr(self, key, Counter() if key == "reasons" else 0)
        return taken

    def as_dict(self, cost: float | None) -> dict[str, Any]:
        """Plain JSON values; ``cost`` None is "unknown"."""
        counts = {key: value for key, value in vars(self).items() if isinstance(value, int)}
        return {**counts, "cost": said_cost(cost), "reasons": dict(sorted(self.reasons.items()))}


def said_cost(cost: float | None) -> float | str:
    """Money to six places, or "unknown": never a zero for what nobody counted."""
    return "unknown" if cost is None else round(cost, 6)


def money(cost: float | None) -> str:
    """A cost for people."""
    return "cost unknown" if cost is None else f"cost {cost:,.4f}" if cost < 1 else f"cost {cost:,.2f}"
