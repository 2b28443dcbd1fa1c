from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from kore_fast.augmentation.images.store import Outcome, PictureStore
from kore_fast.errors import DataError


def test_an_entry_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PictureStore(tmp_path)
    before = Outcome(url="https://a.example/1.png", reason="before")
    store.save_outcome("ab12", before)

    def interrupted(*_: Any) -> None:
        # All is written by now, and nothing of it under the final name.
        assert store.outcome("ab12") == before
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(DataError, match=r"ab12\.json: could not be written \(No space left on device\)"):
        store.save_outcome("ab12", Outcome(url="https://a.example/1.png", reason="after"))
    assert store.outcome("ab12") == before
    assert not list(tmp_path.rglob("*.partial"))
