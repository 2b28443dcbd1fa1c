"""Batches that run out of memory are halved, for good; nothing is lost, one that is too much is named, and what was
killed goes on in the very parts that it would have had."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kore_fast.errors import DataError, KoreError
from kore_fast.evaluation.batches import BatchSize, Kept, is_out_of_memory
from kore_fast.evaluation.generation import Prompt, generate_answers


def cpu_failure() -> RuntimeError:
    """What torch really says when a CPU has not got the memory."""
    try:
        torch.empty(1 << 60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("an exbibyte was there")


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError("CUDA out of memory"), cpu_failure(), MemoryError()])
def test_a_batch_that_is_too_large_is_halved_and_stays_so(
    failure: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[int] = []

    def work(rows: Sequence[int]) -> list[int]:
        tried.append(len(rows))
        if len(rows) > 2:
            raise failure
        return [row * row for row in rows]

    size = BatchSize(16)
    with caplog.at_level(logging.WARNING):
        done = list(size.run(list(range(11)), work, str))
    assert tried == [11, 5, 2, 2, 2, 2, 2, 1]
    assert [row for rows, _ in done for row in rows] == list(range(11))
    assert [value for _, values in done for value in values] == [n * n for n in range(11)]
    assert [record.message for record in caplog.records] == [
        "Not enough memory for 11 at once: going on with 5",
        "Not enough memory for 5 at once: going on with 2",
    ]
    tried.clear()
    list(size.run(list(range(4)), work, str))
    assert tried == [2, 2]


def test_one_that_is_too_much_alone_is_named_after_what_came_before() -> None:
    def work(rows: Sequence[int]) -> int:
        if 3 in rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return len(rows)

    parts = BatchSize(4).run(range(8), work, lambda row: f"question 'q{row}'")
    assert [list(next(parts)[0]) for _ in range(2)] == [[0, 1], [2]]
    with pytest.raises(KoreError, match=r"question 'q3': not enough memory .*Tried to allocate 2 GiB"):
        next(parts)


def test_other_errors_are_not_taken_for_it() -> None:
    def work(rows: Sequence[int]) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        list(BatchSize(4).run(range(4), work, str))
    assert not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(KoreError, match="batch size of 0"):
        BatchSize(0)


def test_a_failed_attempt_holds_no_tensors() -> None:
    import gc
    import weakref

    held: list[Any] = []

    def work(rows: Sequence[int]) -> None:
        large = torch.empty(1000)
        held.append(weakref.ref(large))
        if len(rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        gc.collect()
        assert all(reference() is None for reference in held[:-1])

    list(BatchSize(4).run(range(4), work, str))
    assert len(held) == 6


def test_answers_are_the_same_on_a_model_that_takes_two_at_once(loud_model: nn.Module, tiny_processor: Any) -> None:
    prompts = [Prompt(f"Who lives on hill {n * 7}?") for n in range(7)]
    calm = generate_answers(loud_model, tiny_processor, prompts, max_new_tokens=6, batch_size=8)
    whole, batches = loud_model.generate, []

    def small(**inputs: Any) -> Any:
        batches.append(len(inputs["input_ids"]))
        if batches[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(**inputs)  # type: ignore[operator]

    loud_model.generate = small  # type: ignore[assignment]
    size = BatchSize(8)
    assert generate_answers(loud_model, tiny_processor, prompts, max_new_tokens=6, batch_size=size) == calm
    assert batches == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert size.size == 1
    assert len(set(calm)) > 3


class Work:
    """Squares of the rows, with room for four at once, killed after so many parts."""

    def __init__(self, parts: int = 1000) -> None:
        self.parts = parts
        self.done: list[list[int]] = []

    def __call__(self, rows: Sequence[int]) -> list[int]:
        if len(rows) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if len(self.done) == self.parts:
            raise KeyboardInterrupt
        self.done.append(list(rows))
        return [row * row for row in rows]

    def on(self, journal: Path | None, asked: Any = "squares") -> list[int]:
        """The results over three batches, of which the first alone has room whole."""
        kept, size = Kept(journal, lambda: asked), BatchSize(8)
        batches = [range(4), range(4, 12), range(12, 20)]
        return [value for rows in batches for _, found in kept.run(size, rows, self, str) for value in found]


@pytest.mark.parametrize("torn", ["", '{"asked": "', '{"asked": "x", "rows": 4, "size": 4, "found": [1]}'])
@pytest.mark.parametrize("parts", range(6))
def test_what_was_killed_goes_on_in_the_parts_of_an_uninterrupted_run(tmp_path: Path, parts: int, torn: str) -> None:
    calm = Work()
    assert calm.on(None) == [row * row for row in range(20)]
    assert [len(part) for part in calm.done] == [4, 4, 4, 4, 4]
    journal = tmp_path / "squares.partial.jsonl"
    first, again = Work(parts), Work()
    if parts < 5:
        with pytest.raises(KeyboardInterrupt):
            first.on(journal)
    else:
        first.on(journal)
    with open(journal, "a") as file:
        file.write(torn)
    assert again.on(journal) == [row * row for row in range(20)]
    assert first.done + again.done == calm.done
    assert journal.read_text().count("\n") == 5
    assert Work(0).on(journal) == [row * row for row in range(20)]


def test_a_smaller_size_is_remembered_also_where_the_next_batch_would_fit(tmp_path: Path) -> None:
    """Memory may have run out of a batch of long rows, and those that follow are short."""

    def work(rows: Sequence[int]) -> int:
        if len(rows) > 2 and 0 in rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if stop and 4 in rows:
            raise KeyboardInterrupt
        done.append(list(rows))
        return len(rows)

    def run() -> None:
        kept, size = Kept(tmp_path / "j.jsonl", lambda: 0), BatchSize(4)
        for rows in (range(4), range(4, 8)):
            list(kept.run(size, rows, work, str))

    done: list[list[int]] = []
    stop = True
    with pytest.raises(KeyboardInterrupt):
        run()
    stop = False
    run()
    assert done == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_journal_of_something_else_is_begun_anew_and_a_foreign_one_refused(tmp_path: Path) -> None:
    journal = tmp_path / "squares.partial.jsonl"
    Work().on(journal)
    other = Work(2)
    with pytest.raises(KeyboardInterrupt):
        other.on(journal, asked=["squares", "of others"])
    assert len(other.done) == journal.read_text().count("\n") == 2
    journal.write_text('{"key": 1}\n')
    with pytest.raises(DataError, match=r"squares\.partial\.jsonl, line 1: not a row"):
        Work().on(journal)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), [0.0, [float("nan")]], {"loss": {"x": float("inf")}}])
def test_what_is_not_finite_is_not_kept_and_told(tmp_path: Path, value: Any) -> None:
    kept = Kept(tmp_path / "kore" / "drift_text.partial.jsonl", lambda: 0)
    with pytest.raises(KoreError, match=r"kore/drift_text\.partial\.jsonl: .*not a finite number.*lower learning rate"):
        list(kept.run(BatchSize(2), range(2), lambda rows: value, str))
    assert (tmp_path / "kore" / "drift_text.partial.jsonl").read_text() == ""
    assert [found for _, found in Kept(None, lambda: 0).run(BatchSize(2), range(2), lambda rows: value, str)] == [value]
