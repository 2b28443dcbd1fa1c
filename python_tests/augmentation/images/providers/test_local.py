from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from kore_fast.augmentation.images import ImageSearchOptions
from kore_fast.augmentation.images.fetch import Rejected
from kore_fast.augmentation.images.providers import Found, Local
from kore_fast.errors import DataError


@pytest.fixture
def folder(tmp_path: Path, make: Any) -> Path:
    folder = tmp_path / "pictures"
    (folder / "birds").mkdir(parents=True)
    for seed, name in enumerate(["red_fox.png", "grey-fox.jpg", "birds/red kite.png", "0001.png"], start=1):
        make.draw(seed).save(folder / name)
    (folder / "notes.txt").write_text("red fox")
    rows = [
        {
            "image": "0001.png",
            "title": "A fox in the snow",
            "tags": ["arctic"],
            "licence": "CC0",
            "author": "A. Nobody",
        },
        {"image": "red_fox.png", "source": "https://example.org/fox"},
    ]
    (folder / "index.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def local(folder: Path, **options: Any) -> Local:
    return Local(ImageSearchOptions(folder=str(folder), **options))


def search(folder: Path, query: str, count: int = 10) -> list[str]:
    return [found.url for found in asyncio.run(local(folder).search(query, count))]


def test_words_of_names_titles_and_tags_are_found_and_rare_ones_count_more(folder: Path) -> None:
    assert search(folder, "Red Fox") == ["red_fox.png", "birds/red kite.png", "grey-fox.jpg", "0001.png"]
    # "arctic" is in one picture, "fox" in three.
    assert search(folder, "arctic fox")[0] == "0001.png"
    assert search(folder, "birds") == ["birds/red kite.png"]
    assert search(folder, "fox", 2) == ["grey-fox.jpg", "red_fox.png"]
    assert search(folder, "zebra") == []
    assert search(folder, "FOX!") == search(folder, "fox")


def test_what_the_index_says_comes_with_the_result(folder: Path) -> None:
    snow = asyncio.run(local(folder).search("arctic", 1))[0]
    assert (snow.title, snow.licence, snow.author) == ("A fox in the snow", "CC0", "A. Nobody")
    fox = asyncio.run(local(folder).search("red fox", 1))[0]
    assert (fox.title, fox.source_page) == ("red fox", "https://example.org/fox")


def test_a_wrong_index_lists_its_lines(folder: Path) -> None:
    (folder / "index.jsonl").write_text('{"image": "gone.png"}\n{"image": "0001.png", "license": "x"}\n')
    with pytest.raises(DataError) as caught:
        search(folder, "fox")
    assert "line 1: there is no picture 'gone.png'" in str(caught.value)
    assert "line 2: unknown key 'license'; did you mean 'licence'?" in str(caught.value)


def test_a_folder_that_is_missing_or_empty_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder of pictures"):
        search(tmp_path / "nothing", "fox")
    with pytest.raises(DataError, match="holds no picture"):
        search(tmp_path, "fox")


def test_the_scope_follows_the_folder(folder: Path, make: Any) -> None:
    before = local(folder).scope()
    assert local(folder).scope() == before
    make.draw(9).save(folder / "new.png")
    after = local(folder).scope()
    assert after != before
    (folder / "index.jsonl").write_text("")
    assert local(folder).scope() not in (before, after)


def test_only_files_of_the_folder_are_read_and_only_up_to_the_bound(folder: Path, tmp_path: Path, make: Any) -> None:
    make.draw(1).save(tmp_path / "outside.png")
    os.symlink(tmp_path / "outside.png", folder / "link fox.png")
    assert "link fox.png" not in search(folder, "fox")
    for url, reason in {"../outside.png": "leaves its folder", "gone.png": "no longer"}.items():
        with pytest.raises(Rejected, match=reason):
            asyncio.run(local(folder).download(Found(url=url)))
    with pytest.raises(Rejected, match="more than the 10 bytes"):
        asyncio.run(local(folder, max_bytes=10).download(Found(url="red_fox.png")))
    assert asyncio.run(local(folder).download(Found(url="red_fox.png"))) == (folder / "red_fox.png").read_bytes()
