"""The tiny VLM: names, the split, the committed pictures and projector; the real build is marked end_to_end."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kore_fast.data.old_knowledge import read_pictures

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "tiny_vlm"


def load(name: str) -> ModuleType:
    """A recipe's script as a module, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"tiny_vlm_{name}", RECIPE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


prepare_pictures = load("prepare_pictures")
build = load("build")
evaluate_grounding = load("evaluate_grounding")


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("Microphone Stand", "microphone stand"),
        ("Croissant (B &amp; W)", "croissant"),
        ("contour_cheetah", "cheetah"),
        ("Flat_Cake_bw", "flat cake"),
        ("Rubik's Cube Simple", "rubik's cube"),
        ("AfricanDrum2", "african"),
        ("dog-01", "dog"),
        ("Part of the Flat Icon Collection (Wed Aug 25 23:29:46 2004)", None),
        ("Clipart by Nicu Buculei - smiley111", None),
        ("gramastar", None),
        ("untitled", None),
        ("ralf@ark.in-berlin.de", None),
        ("0815", None),
        ("", None),
        ("a picture of a very long winding mountain road", None),
        ("danger général", None),
    ],
)
def test_clean_title(title: str, name: str | None) -> None:
    assert prepare_pictures.clean_title(title) == name


def test_clean_title_keeps_to_the_known_words() -> None:
    known = frozenset({"red", "apple"})
    assert prepare_pictures.clean_title("Red Apple", known) == "red apple"
    assert prepare_pictures.clean_title("Cavallo", known) is None


def test_base_name_joins_variants() -> None:
    assert len({prepare_pictures.base_name(name) for name in ("apple", "apples", "apple outline", "big apple")}) == 1
    assert prepare_pictures.base_name("glass") == "glass"


def picture(identity: str, name: str, tags: tuple[str, ...] = ()) -> Any:
    source = identity.split("/")[0]
    return prepare_pictures.Picture(identity, name, tags, source, prepare_pictures.base_name(name))


def test_split_leaves_no_variant_of_a_held_out_drawing_in_training() -> None:
    pictures = [
        picture(f"openclipart/food/{name}_{n}", name)
        for name in ["apple", "pear", "plum", "fig", "kiwi"]
        for n in (1, 2)
    ]
    pictures += [picture("openclipart/food/apples", "apples"), picture("noto/apple", "apple")]
    eligible = frozenset(p.id for p in pictures if p.source == "openclipart")
    result = prepare_pictures.split(pictures, eligible, seed=3, held_out=2)
    held_out = {p.group for p in result if p.split == "held_out"}
    training = {p.group for p in result if p.split == "train" and p.source == "openclipart"}
    assert len(held_out) == 2
    assert sum(p.split == "held_out" for p in result) == 2
    assert not held_out & training
    assert any(p.id == "noto/apple" and p.split == "train" for p in result)
    assert result == prepare_pictures.split(pictures, eligible, seed=3, held_out=2)


def test_near_duplicates_are_found_and_others_left() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = (torch.rand(2, 32, 32, generator=generator) * 255).to(torch.uint8)
    one, other = (Image.fromarray(page.numpy()).resize((128, 128), Image.Resampling.BICUBIC) for page in noise)
    changed = one.copy()
    changed.paste(255, (0, 0, 12, 12))
    hashes = [prepare_pictures.difference_hash(image) for image in (one, other, changed)]
    assert prepare_pictures.near_duplicates([hashes[1], hashes[2]], [hashes[0]]) == [False, True]
    assert prepare_pictures.near_duplicates(hashes, []) == [False, False, False]


def test_choices_are_of_clearly_different_things() -> None:
    pictures = [
        picture(f"openclipart/{folder}/{name}", name, (folder,))
        for folder, names in {"animals": "cat dog", "food": "apple soup", "tools": "saw axe", "music": "harp"}.items()
        for name in names.split()
    ]
    choices = prepare_pictures.make_choices(pictures, seed=1)
    folder_of = {p.name: p.id.split("/")[1] for p in pictures}
    for one in pictures:
        names = choices[one.id]
        assert len(set(names)) == 4
        assert [folder_of[name] for name in names].count(folder_of[one.name]) == 1
    assert len({choices[p.id].index(p.name) for p in pictures}) > 1


def test_render_centres_a_png_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    image.paste((200, 0, 0, 255), (10, 10, 20, 30))
    image.save(tmp_path / "bar.png")
    square = prepare_pictures.render(tmp_path / "bar.png")
    assert square.size == (128, 128)
    assert square.getpixel((0, 0)) == (255, 255, 255)
    assert square.getpixel((64, 64)) == (200, 0, 0)
    buffer = io.BytesIO()
    Image.new("RGBA", (30, 30), (0, 0, 0, 0)).save(buffer, "PNG")
    (tmp_path / "empty.png").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="empty"):
        prepare_pictures.render(tmp_path / "empty.png")


def test_committed_pictures_are_whole_small_and_apart() -> None:
    folder = RECIPE / "pictures"
    questions = read_pictures(folder / "held_out.jsonl", need_choices=True)
    calibration = [json.loads(line) for line in (folder / "calibration.jsonl").read_text().splitlines()]
    assert (len(questions), len(calibration)) == (200, 128)
    assert all(len(question.choices) == 4 for question in questions)
    places = [question.answer for question in questions]
    assert min(places.count(place) for place in range(4)) > 30
    assert len({question.name for question in questions}) == 200
    held_out = {prepare_pictures.base_name(question.name) for question in questions}
    assert not held_out & {prepare_pictures.base_name(row["name"]) for row in calibration}
    named = {question.path.resolve() for question in questions} | {
        (folder / row["image"]).resolve() for row in calibration
    }
    assert named == {path.resolve() for path in (folder / "images").iterdir()}
    for path in named:
        with Image.open(path) as image:
            image.load()
            assert image.size == (112, 112)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 1_500_000
    assert "public domain" in (folder / "SOURCES.md").read_text().lower()
    assert all(row["id"].startswith("openclipart/") for row in calibration)
    assert all(question.id.startswith("openclipart/") for question in questions)


def test_projector_has_llava_s_shape_and_fits_the_limit() -> None:
    weights = load_file(build.PROJECTOR)
    width = 384 * len(build.FEATURE_LAYERS)
    assert {name: tuple(value.shape) for name, value in weights.items()} == {
        "linear_1.weight": (576, width),
        "linear_1.bias": (576,),
        "linear_2.weight": (576, 576),
        "linear_2.bias": (576,),
    }
    assert all(value.isfinite().all() for value in weights.values())
    assert build.PROJECTOR.stat().st_size <= 4 * 2**20


def test_a_killed_build_leaves_no_folder_and_a_finished_one_replaces_the_old(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def write(text: str, fail: bool = False) -> None:
        with build._whole_folder(target, "file") as folder:
            (folder / "file").write_text(text)
            if fail:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write("half", fail=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".model.abc.partial").mkdir()
    write("first")
    write("second")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "file").read_text() == "second"


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with (
        pytest.raises(FileExistsError, match="not made by this script"),
        build._whole_folder(tmp_path / "mine", "*.json") as folder,
    ):
        (folder / "a.json").write_text("{}")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_derangement_moves_every_picture() -> None:
    order = evaluate_grounding.derangement(200)
    assert sorted(order) == list(range(200))
    assert all(place != value for place, value in enumerate(order))


def test_open_naming_is_word_bounded() -> None:
    assert evaluate_grounding.names_it("The picture shows two Apples.", "apple")
    assert not evaluate_grounding.names_it("The picture shows a pineapple.", "apple")


@pytest.fixture(scope="module")
def built_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.build(tmp_path_factory.mktemp("tiny_vlm") / "model")


@pytest.mark.end_to_end
def test_the_real_model_builds_loads_offline_and_speaks(built_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    stamp = (built_model / "model.safetensors").stat().st_mtime_ns
    assert build.build(built_model) == built_model
    assert (built_model / "model.safetensors").stat().st_mtime_ns == stamp

    model = AutoModelForImageTextToText.from_pretrained(built_model)
    processor = AutoProcessor.from_pretrained(built_model)
    assert 150e6 < sum(parameter.numel() for parameter in model.parameters()) < 160e6
    listed = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    plain = [{"role": "user", "content": "<image>\nWhat?"}]
    prompt = processor.apply_chat_template(listed, add_generation_prompt=True)
    assert prompt == processor.apply_chat_template(plain, add_generation_prompt=True)
    inputs = processor(images=[Image.new("RGB", (90, 120), "red")], text=[prompt], return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == build.IMAGE_TOKENS

    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = processor.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        answer = model.generate(**asked, max_new_tokens=16)[0, asked["input_ids"].shape[1] :]
    assert processor.tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
