from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kore_fast.data.samples import Sample, Turn, read_samples, stream_samples, validate_sample, write_samples
from kore_fast.errors import DataError


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": "human" if place % 2 == 0 else "gpt", "value": value} for place, value in enumerate(values)]


def record(identity: Any = "s1", image: Any = "a.png", conversations: Any = None, **more: Any) -> dict[str, Any]:
    return {
        "id": identity,
        "image": image,
        "conversations": turns("<image>\nWhat is it?", "An owl.") if conversations is None else conversations,
    } | more


@pytest.fixture
def root(tmp_path: Path) -> Path:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    return tmp_path


def save(root: Path, records: Any) -> Path:
    path = root / "samples.json"
    path.write_text(json.dumps(records))
    return path


def refusal(root: Path, *records: Any, image_root: Path | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read_samples(save(root, list(records)), image_root)
    return str(caught.value)


def test_a_users_own_llava_file_loads(root: Path) -> None:
    text_only = {"id": 7, "conversations": turns("Hello.", "Good day."), "model": "none", "height": 3}
    pair = record("two", ["a.png", "a.png"], turns("<image>\n<image>\nDo they differ?", "No."))
    samples = read_samples(save(root, [record(), text_only, pair]), root)
    assert [sample.id for sample in samples] == ["s1", "7", "two"]
    assert [sample.images for sample in samples] == [("a.png",), (), ("a.png", "a.png")]
    assert samples[0].branch is None
    assert samples[0].conversations[1] == Turn(speaker="gpt", value="An owl.")


def test_what_is_written_reads_back_one_sample_a_line(root: Path) -> None:
    samples = [Sample.model_validate(record(f"s{place}", item="owl", branch="vqa")) for place in range(3)]
    path = root / "out.json"
    write_samples(path, samples)
    assert read_samples(path, root) == samples
    lines = path.read_text().splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("[", "]", 5)
    assert json.loads(lines[1].rstrip(",")) == record("s0", item="owl", branch="vqa")
    write_samples(path, [])
    assert json.loads(path.read_text()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conversations": turns("What is it?", "An owl.")}, "1 image(s), but 0 <image> mark(s)"),
        ({"conversations": turns("<image> <image>", "An owl.")}, "1 image(s), but 2 <image> mark(s)"),
        ({"image": None}, "0 image(s), but 1 <image> mark(s)"),
        ({"conversations": []}, "there are no turns"),
        ({"conversations": turns("<image>\nWhat?")}, "the last human turn has no answer"),
        ({"conversations": turns("<image>\nWhat?", " ")}, "turn 2 is empty"),
        ({"conversations": turns("<image>\n", "An owl.")}, "turn 1 is empty"),
        ({"conversations": turns("What?", "<image> An owl.")}, "turn 2 is an answer and holds <image>"),
        ({"conversations": turns("<image>\nWhat?", "An owl.")[::-1]}, "turn 1 is from 'gpt', expected 'human'"),
        ({"conversations": [{"from": "user", "value": "hm"}]}, "'conversations.0.from': input should be 'human' or"),
        ({"conversations": [{"value": "hm"}]}, "conversations.0: 'from' is missing"),
        ({"conversations": None, "id": " "}, "the id is empty"),
        ({"image": 4}, "'image."),
        ({"system": " "}, "the system turn is empty; leave it out"),
        ({"system": "See <image>."}, "the system turn holds <image>"),
        ({"conversations": turns("<image>\nWhat?", "\ud800")}, "turn 2 holds half a character"),
    ],
)
def test_what_is_wrong_with_a_sample_is_named(root: Path, changes: dict[str, Any], message: str) -> None:
    given = dict(changes)
    said = refusal(root, record(given.pop("id", "s1"), given.pop("image", "a.png"), **given))
    assert message in said
    assert "samples.json" in said
    assert "sample 0, id" in said


def test_a_sample_without_an_id_is_named_by_its_place(root: Path) -> None:
    bare = record()
    del bare["id"]
    assert "sample 1: 'id' is missing" in refusal(root, record(), bare)


def test_repeated_ids_are_refused_in_reading_and_writing(root: Path) -> None:
    assert "id 's1' comes at 0 and again at 1" in refusal(root, record(), record())
    sample = Sample.model_validate(record())
    with pytest.raises(DataError, match="id 's1' comes at 0 and again at 1"):
        write_samples(root / "out.json", [sample, sample])
    assert not (root / "out.json").exists()


def test_pictures_are_looked_at_when_their_folder_is_given(root: Path) -> None:
    (root / "broken.png").write_bytes((root / "a.png").read_bytes()[:40])
    said = refusal(root, record("x", "b.png"), record("y", "../a.png"), record("z", "broken.png"), image_root=root)
    assert "sample 'x': no image 'b.png'" in said
    assert "sample 'y': '../a.png' leaves its folder" in said
    assert "sample 'z': image 'broken.png' cannot be decoded" in said


def test_validate_sample_names_the_sample_and_all_that_is_wrong(root: Path) -> None:
    validate_sample(Sample.model_validate(record()), root)
    bad = Sample.model_validate(record("s9", "b.png", turns("What?", "")))
    with pytest.raises(DataError, match=r"sample 's9': turn 2 is empty; 1 image\(s\).*; no image 'b.png'"):
        validate_sample(bad, root)


def test_an_iterator_is_written_as_a_list_is(root: Path) -> None:
    samples = [Sample.model_validate(record(f"s{place}", item="ü", branch="vqa")) for place in range(3)]
    rows = [json.dumps(sample.to_record(), ensure_ascii=False) for sample in samples]
    write_samples(root / "out.json", iter(samples))
    assert (root / "out.json").read_text(encoding="utf-8") == "[\n" + ",\n".join(rows) + "\n]\n"
    write_samples(root / "out.json", iter([]))
    assert (root / "out.json").read_text(encoding="utf-8") == "[]\n"


def test_streaming_checks_the_whole_file_before_the_first_sample(root: Path) -> None:
    path = save(root, [record("a"), record("b")])
    assert list(stream_samples(path, root)) == read_samples(path, root)
    with pytest.raises(DataError, match=r"sample 1, id 'a': turn 2 is empty[^$]*id 'a' comes at 0 and again at 1"):
        stream_samples(save(root, [record("a"), record("a", conversations=turns("<image>\nWhat?", " "))]))


def test_a_system_turn_is_read_as_the_samples_system_text(root: Path) -> None:
    said = record(conversations=[{"from": "system", "value": "Be brief."}, *turns("<image>\nWhat?", "An owl.")])
    (sample,) = read_samples(save(root, [said]))
    assert (sample.system, len(sample.conversations)) == ("Be brief.", 2)
    write_samples(root / "out.json", [sample])
    assert json.loads((root / "out.json").read_text())[0]["system"] == "Be brief."
    assert read_samples(root / "out.json") == [sample]


def test_a_file_that_is_not_a_list_of_samples(root: Path) -> None:
    with pytest.raises(DataError, match="expected a JSON list of samples, found dict"):
        read_samples(save(root, record()))
    with pytest.raises(DataError, match="there is no sample in it"):
        read_samples(save(root, []))
    with pytest.raises(DataError, match="sample 0"):
        read_samples(save(root, ["text"]))
    with pytest.raises(DataError, match="no such file"):
        read_samples(root / "missing.json")
