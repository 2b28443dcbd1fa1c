"""OpenAI's Batch API against a server on loopback that has it."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason='needs openai: pip install "kore-fast[augment]"')
pytest.importorskip("json_repair", reason='needs json-repair: pip install "kore-fast[augment]"')

from kore_fast.augmentation.language import LanguageModelError, LanguageModelWriter, batch
from kore_fast.data.items import Item
from python_tests.augmentation.language.server import Reply, Script, Server, error, task_of
from python_tests.augmentation.language.test_writer import PER_ITEM, items, options, texts, written


def writer_for(server: Server, folder: Path, **changes: Any) -> LanguageModelWriter:
    given = options(server, batch_api=True, batch_poll=0.01, **changes)
    return LanguageModelWriter(given, folder / "requests.sqlite")


def batched(folder: Path, script: Script | None = None, **changes: Any) -> tuple[Server, LanguageModelWriter, Any]:
    with Server(script) as server:
        writer = writer_for(server, folder, **changes)
        return server, writer, writer.prepare(items(4))


def test_two_rounds_give_the_same_texts_as_asking_one_by_one(tmp_path: Path) -> None:
    server, writer, totals = batched(tmp_path / "batch")
    calm = written(tmp_path / "calm")
    assert texts(writer, items(4)) == calm["texts"]
    assert writer.summary() == calm["summary"]
    assert len(server.batches) == 2
    assert totals["requests"] == totals["answers"] == len(server.requests) == 4 * PER_ITEM
    assert totals["prompt_tokens"] == 400 * PER_ITEM
    assert not batch.state_path(writer.cache.path).exists()
    # The two ways share the cache.
    with Server() as other:
        again = LanguageModelWriter(options(other), tmp_path / "batch" / "requests.sqlite")
        assert again.prepare(items(4))["requests"] == 0
    assert writer_for(server, tmp_path / "batch").prepare(items(4))["cached"] == 4 * PER_ITEM


class Held(Item):
    """An item that can be counted while it is held."""

    __hash__ = object.__hash__


class Walked:
    """Items that are made anew whenever they are gone through; counts how many are held at once."""

    def __init__(self) -> None:
        self.times = self.most_held = 0
        self._held: weakref.WeakSet[Held] = weakref.WeakSet()

    def __iter__(self) -> Iterator[Held]:
        self.times += 1
        for item in items(40):
            held = Held.model_validate(item.model_dump())
            self._held.add(held)
            self.most_held = max(self.most_held, len(self._held))
            yield held


def test_items_that_can_be_read_again_are_not_held_and_a_stream_will_do(tmp_path: Path) -> None:
    walked = Walked()
    with Server() as server:
        totals = writer_for(server, tmp_path / "again").prepare(walked)
        assert (totals["items"], totals["answers"]) == (40, 40 * PER_ITEM)
        assert walked.times > 2
        assert walked.most_held <= 5
        stream = (item for item in items(40))
        assert writer_for(server, tmp_path / "stream").prepare(stream)["answers"] == 40 * PER_ITEM
    assert len(server.requests) == 80 * PER_ITEM


def test_the_same_request_of_two_items_is_ordered_once(tmp_path: Path) -> None:
    twins = [items(1)[0].model_copy(update={"image": f"{n}.png"}) for n in range(5)]
    with Server() as server:
        assert writer_for(server, tmp_path).prepare(twins)["items"] == 5
    assert len(server.requests) == PER_ITEM


def test_what_failed_is_asked_again_by_the_same_writer(tmp_path: Path) -> None:
    with Server(lambda body, times: error(400, "not now")) as server:
        writer = writer_for(server, tmp_path)
        assert writer.prepare(items(1))["failed"] == 3
        server.script = lambda body, times: Reply()
        assert writer.prepare(items(1))["answers"] == PER_ITEM


def test_files_are_bounded(tmp_path: Path) -> None:
    server, writer, _ = batched(tmp_path, batch_requests=5, batch_bytes=9000)
    sizes = [len(server.files[one["input_file_id"]]) for one in server.batches.values()]
    counts = [server.files[one["input_file_id"]].count(b'"custom_id"') for one in server.batches.values()]
    assert sum(counts) == 4 * PER_ITEM
    assert max(counts) <= 5
    assert max(sizes) <= 9000
    assert texts(writer, items(4)) == written(tmp_path / "calm")["texts"]


def test_what_failed_or_cannot_be_used_comes_again_in_the_next_round(tmp_path: Path) -> None:
    def script(body: dict[str, Any], times: int) -> Reply:
        if len(body["messages"]) == 2 and task_of(body) == "summary":
            return Reply(content="{}")
        if times == 0 and task_of(body) == "quadruplets":
            return error(500, "oops")
        if "fact 3 of Gor2" in body["messages"][1]["content"]:
            return error(400, "no such thing")
        return Reply()

    server, writer, totals = batched(tmp_path, script)
    assert totals["failed"] == 1
    assert totals["asked_again"] == 4
    assert totals["retries"] == 4
    assert totals["answers"] == 4 * PER_ITEM - 1
    rejects = json.loads(texts(writer, items(4)))[1]
    assert [(one["item"], one["branch"]) for one in rejects] == [("i2", "dialogue")]
    assert "no such thing" in rejects[0]["reason"]
    assert len(server.requests) == 4 * PER_ITEM + 8


class KilledError(BaseException):
    pass


@pytest.mark.parametrize(
    "call", ["files.create", "batches.list", "batches.create", "batches.retrieve", "download", "take"]
)
def test_a_killed_run_waits_for_the_same_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The process ends right after each of its steps in turn, in the first and in the second round."""
    from openai.resources import AsyncBatches, AsyncFiles

    owners = {"files": AsyncFiles, "batches": AsyncBatches}
    for place in (1, 2):
        folder = tmp_path / str(place)
        with Server() as server, monkeypatch.context() as patch:
            left = [place]

            def end(left: list[int] = left) -> None:
                left[0] -= 1
                if left[0] == 0:
                    raise KilledError

            if call == "download":
                real_download = batch._download

                async def download(*given: Any, end: Any = end, real: Any = real_download) -> None:
                    await real(*given)
                    end()

                patch.setattr(batch, "_download", download)
            elif call == "take":
                real_take = LanguageModelWriter.take

                def take(*given: Any, end: Any = end, real: Any = real_take) -> bool:
                    taken = real(*given)
                    end()
                    return bool(taken)

                patch.setattr(LanguageModelWriter, "take", take)
            else:
                owner, name = call.split(".")
                real = getattr(owners[owner], name)

                if name == "list":

                    def listed(*given: Any, end: Any = end, real: Any = real, **named: Any) -> Any:
                        end()
                        return real(*given, **named)

                    patch.setattr(owners[owner], name, listed)
                else:

                    async def called(*given: Any, end: Any = end, real: Any = real, **named: Any) -> Any:
                        made = await real(*given, **named)
                        end()
                        return made

                    patch.setattr(owners[owner], name, called)
            with pytest.raises(KilledError):
                writer_for(server, folder).prepare(items(4))
            patch.undo()
            writer = writer_for(server, folder)
            writer.prepare(items(4))
            assert len(server.requests) == 4 * PER_ITEM, "something was ordered twice"
            assert len(server.batches) == 2
            assert texts(writer, items(4)) == written(folder / "calm")["texts"]


def test_a_refused_file_is_said_plainly(tmp_path: Path) -> None:
    with Server() as server:
        server._files_and_batches = lambda *given: (404, b'{"error": {"message": "no files here"}}')  # type: ignore[method-assign]
        with pytest.raises(LanguageModelError, match="refuses a file or batch"):
            writer_for(server, tmp_path).prepare(items(1))


def test_the_estimate_counts_rounds(tmp_path: Path) -> None:
    with Server() as server:
        writer = writer_for(server, tmp_path)
        assert writer.estimate(items(2)).batches == 2
        writer.prepare(items(2))
        assert writer.estimate(items(2)).batches == 0
