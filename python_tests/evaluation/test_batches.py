"""Batches that run out of memory are halved, for good; nothing is lost, and one that is too much is named."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from kore_fast.errors import KoreError
from kore_fast.evaluation.batches import BatchSize, is_out_of_memory
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
