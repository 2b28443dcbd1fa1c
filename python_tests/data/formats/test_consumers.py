"""What other libraries make of the files: ``datasets`` decodes the pictures, TRL's collator takes the rows."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kore_fast.data.formats import FORMATS, convert, detect, parquet
from kore_fast.data.samples import Sample
from kore_fast.errors import DataError
from python_tests.data.formats.test_formats import SAMPLES, root  # noqa: F401  (a fixture)

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def written(root: Path) -> Path:  # noqa: F811
    path = root / "out.parquet"
    FORMATS["parquet"].write(path, SAMPLES, root)
    return path


def test_datasets_decodes_the_pictures_of_a_parquet_file(root: Path, tmp_path: Path) -> None:  # noqa: F811
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(
        "parquet", data_files=str(written(root)), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.num_rows == len(SAMPLES)
    assert [row["id"] for row in loaded] == [one.id for one in SAMPLES]
    for row, one in zip(loaded, SAMPLES, strict=True):
        assert [picture.size for picture in row["images"]] == [Image.open(root / name).size for name in one.images]
    assert loaded[0]["images"][0].getpixel((0, 0)) == (200, 30, 30)
    assert (loaded[0]["item"], loaded[2]["branch"]) == ("a", None)


def test_datasets_decodes_the_paths_of_a_messages_file(root: Path, tmp_path: Path) -> None:  # noqa: F811
    datasets = pytest.importorskip("datasets")
    path = root / "out.jsonl"
    FORMATS["messages"].write(path, SAMPLES, root, absolute_images=True)
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    loaded = loaded.cast_column("images", datasets.List(datasets.Image()))
    assert [len(row["images"]) for row in loaded] == [len(one.images) for one in SAMPLES]
    assert loaded[1]["images"][0].size == (5, 4)


@pytest.mark.parametrize("name", ["llama-factory", "swift"])
def test_datasets_loads_what_the_trainers_load_with_it(name: str, root: Path, tmp_path: Path) -> None:  # noqa: F811
    datasets = pytest.importorskip("datasets")
    path = root / f"out{FORMATS[name].suffix}"
    FORMATS[name].write(path, SAMPLES, root)
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert [row["images"] for row in loaded] == [list(one.images) for one in SAMPLES]
    for row, one in zip(loaded, SAMPLES, strict=True):
        turns = row["messages"][1:] if one.system else row["messages"]
        assert [turn["content"] for turn in turns] == [turn.value for turn in one.conversations]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)


@pytest.mark.parametrize("name", ["parquet", "messages"])
def test_trls_collator_takes_the_rows(name: str, root: Path, tmp_path: Path, tiny_processor: Any) -> None:  # noqa: F811
    trainer = pytest.importorskip("trl.trainer.sft_trainer")
    datasets = pytest.importorskip("datasets")
    samples = [one for one in SAMPLES if one.images]
    path = root / f"trl{FORMATS[name].suffix}"
    FORMATS[name].write(path, samples, root, **({"absolute_images": True} if name == "messages" else {}))
    kind = "parquet" if name == "parquet" else "json"
    rows = datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    rows = rows.cast_column("images", datasets.List(datasets.Image()))
    batch = trainer.DataCollatorForVisionLanguageModeling(tiny_processor)(list(rows))
    pictures = sum(len(one.images) for one in samples)
    image_token = tiny_processor.tokenizer.convert_tokens_to_ids("<image>")
    assert batch["pixel_values"].shape[0] == pictures
    assert int((batch["input_ids"] == image_token).sum()) == 4 * pictures
    text = tiny_processor.tokenizer.decode(batch["input_ids"][0].tolist())
    assert "What is it?" in text
    assert "An owl." in text


def test_pictures_come_out_of_a_parquet_file_again(root: Path, tmp_path: Path) -> None:  # noqa: F811
    path = written(root)
    assert parquet.unpack_images(path, tmp_path / "unpacked") == 2
    for name in ("pictures/a b.png", "ü.png"):
        assert (tmp_path / "unpacked" / name).read_bytes() == (root / name).read_bytes()
    assert parquet.unpack_images(path, tmp_path / "unpacked") == 0
    (tmp_path / "unpacked" / "ü.png").write_bytes(b"other")
    with pytest.raises(DataError, match="is there already with other content"):
        parquet.unpack_images(path, tmp_path / "unpacked")


def foreign(root: Path, content: bytes, path: str | None = "image.png") -> Path:  # noqa: F811
    """A parquet file as another writer makes it: one file name for all, text with marks, no features."""
    messages = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A colour."}]
    table = pa.Table.from_pylist([{"messages": messages, "images": [{"bytes": content, "path": path}]}])
    pq.write_table(table, root / "foreign.parquet")
    return root / "foreign.parquet"


def test_a_foreign_files_pictures_are_named_by_their_content(root: Path, tmp_path: Path) -> None:  # noqa: F811
    buffer = io.BytesIO()
    Image.new("RGB", (3, 3)).save(buffer, "PNG")
    source = foreign(root, buffer.getvalue())
    assert detect(source) == "parquet"
    done = convert(source, root / "out.json", "llava", unpack_to=tmp_path / "unpacked")
    assert (done.samples, done.unpacked) == (1, 1)
    (record,) = json.loads((root / "out.json").read_text())
    assert record["image"].endswith(".png")
    assert (tmp_path / "unpacked" / record["image"]).read_bytes() == buffer.getvalue()
    with pytest.raises(DataError, match=r"no image '[0-9a-f]+\.png' below"):
        FORMATS["parquet"].read(source, root)


def test_pictures_that_are_none_or_leave_the_folder_are_refused(root: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(DataError, match=r"row 0: .*cannot be decoded"):
        parquet.unpack_images(foreign(root, b"not a picture"), tmp_path / "unpacked")
    table = pq.read_table(written(root))
    rows = table.to_pylist()
    rows[0]["images"][0]["path"] = "../out.png"
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), root / "out.parquet")
    with pytest.raises(DataError, match=r"row 0: '\.\./out\.png' leaves its folder"):
        parquet.unpack_images(root / "out.parquet", tmp_path / "unpacked")
    assert not (tmp_path / "out.png").exists()


def test_parquet_wants_the_pictures_folder_and_a_parquet_file(root: Path) -> None:  # noqa: F811
    with pytest.raises(DataError, match="name the folder that they are in"):
        FORMATS["parquet"].write(root / "x.parquet", [Sample.model_validate(SAMPLES[0].to_record())])
    (root / "x.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        FORMATS["parquet"].read(root / "x.parquet")
