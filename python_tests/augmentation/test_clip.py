"""The CLIP filter: what is chosen (with vectors known beforehand), its cache, and open_clip's real code on random
weights where open_clip is installed; `test_torchvision_operators.py` installs it into an environment of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from kore_fast.augmentation import clip
from kore_fast.augmentation.clip import Clip, ClipOptions
from kore_fast.errors import DataError
from kore_fast.files import sha256_file

# Vectors by colour; the toy model sees a picture's first pixel.
VECTORS = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "orange": (0.8, 0.6, 0.0),
    "brown": (0.6, 0.8, 0.0),
    "pink": (0.9, 0.0, 0.43589),
    "blue": (0.0, 0.0, 1.0),
}


class Toy:
    """Stands for a loaded model: known vectors, and a count of what it was asked."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.asked: list[str] = []
        self.colours = {Image.new("RGB", (1, 1), name).getpixel((0, 0)): name for name in VECTORS}

    def model(self) -> clip._Model:
        return clip._Model(
            prepare=lambda image: self.colours[image.getpixel((0, 0))],
            pictures=lambda names: self.rows(names),
            texts=lambda texts: self.rows([text.split()[-1] for text in texts]),
        )

    def rows(self, names: list[str]) -> np.ndarray:
        self.batches.append(len(names))
        self.asked += names
        return np.array([VECTORS[name] for name in names], dtype=np.float32)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    made = Toy()
    monkeypatch.setattr(clip, "_load", lambda options: made.model())
    return made


def picture(folder: Path, colour: str, size: int = 4, *, name: str | None = None) -> Path:
    path = folder / f"{name or f'{colour}{size}'}.png"
    Image.new("RGB", (size, size), colour).save(path)
    return path


def test_the_two_most_similar_are_kept_best_first(tmp_path: Path, toy: Toy) -> None:
    own = picture(tmp_path, "red")
    found = [picture(tmp_path, colour) for colour in ("blue", "brown", "pink", "orange", "green")]
    with Clip(None, tmp_path / "cache") as judge:
        choice = judge.closest(own, found)
    assert [(one.path.stem, one.score) for one in choice.kept] == [("pink4", 0.9), ("orange4", 0.8)]
    assert [one.sha256 for one in choice.kept] == [sha256_file(one.path) for one in choice.kept]
    assert {one.path.stem: (one.score, one.reason) for one in choice.dropped} == {
        "blue4": (0.0, "others fit better"),
        "brown4": (0.6, "others fit better"),
        "green4": (0.0, "others fit better"),
    }


def test_the_items_own_picture_is_left_out_by_its_bytes_and_by_its_likeness(tmp_path: Path, toy: Toy) -> None:
    own = picture(tmp_path, "red")
    copy, again = picture(tmp_path, "red", name="copy"), picture(tmp_path, "red", 5)
    assert sha256_file(copy) == sha256_file(own) != sha256_file(again)
    with Clip(None, tmp_path / "cache") as judge:
        choice = judge.closest(own, [copy, again, picture(tmp_path, "orange")])
    assert [one.path.stem for one in choice.kept] == ["orange4"]
    assert [one.reason for one in choice.dropped] == ["the item's own picture", "the item's own picture, saved again"]


def test_one_picture_is_not_kept_twice(tmp_path: Path, toy: Toy) -> None:
    own = picture(tmp_path, "red")
    found = [picture(tmp_path, "orange"), picture(tmp_path, "orange", name="copy"), picture(tmp_path, "orange", 7)]
    with Clip(None, tmp_path / "cache") as judge:
        choice = judge.closest(own, [*found, picture(tmp_path, "brown")])
    assert [one.score for one in choice.kept] == [0.8, 0.6]
    assert sorted(one.reason.partition(", ")[2] or one.reason for one in choice.dropped) == [
        "orange4.png once more",
        "saved again",
    ]


def test_only_the_first_five_are_looked_at(tmp_path: Path, toy: Toy) -> None:
    own = picture(tmp_path, "red")
    far = [picture(tmp_path, "green", size) for size in range(1, 6)]
    with Clip(ClipOptions(identical=0), tmp_path / "cache") as judge:
        choice = judge.closest(own, [*far, picture(tmp_path, "pink")])
    assert choice.dropped[-1] == clip.Dropped(tmp_path / "pink4.png", "not among the first 5")
    assert "pink" not in toy.asked


def test_equal_scores_are_ordered_by_hash_whatever_the_order_found(tmp_path: Path, toy: Toy) -> None:
    own = picture(tmp_path, "red")
    # Equally far from red, but not from each other.
    found = [picture(tmp_path, colour) for colour in ("green", "blue")]
    expected = sorted(sha256_file(path) for path in found)
    for number, order in enumerate((found, found[::-1])):
        with Clip(None, tmp_path / f"cache{number}") as judge:
            assert [one.sha256 for one in judge.closest(own, order).kept] == expected


def test_a_broken_candidate_is_dropped_with_the_reason_and_a_broken_own_picture_is_an_error(
    tmp_path: Path, toy: Toy
) -> None:
    broken, missing = tmp_path / "broken.png", tmp_path / "missing.png"
    broken.write_bytes(picture(tmp_path, "green").read_bytes()[:40])
    own, good = picture(tmp_path, "red"), picture(tmp_path, "pink")
    with Clip(None, tmp_path / "cache") as judge:
        choice = judge.closest(own, [broken, missing, good])
        assert [one.path for one in choice.kept] == [good]
        assert "not a whole picture" in choice.dropped[0].reason
        assert "cannot be read" in choice.dropped[1].reason
        assert set(judge.warm([broken, missing, good])) == {broken, missing}
        with pytest.raises(DataError, match=r"broken\.png: not a whole picture"):
            judge.closest(broken, [good])
        with pytest.raises(DataError, match=r"missing\.png: cannot be read"):
            judge.closest(missing, [good])


def test_the_picture_that_fits_a_text(tmp_path: Path, toy: Toy) -> None:
    found = [picture(tmp_path, colour) for colour in ("blue", "orange", "pink")]
    with Clip(None, tmp_path / "cache") as judge:
        choice = judge.best_for_text("something red", found)
        assert [(one.path.stem, one.score) for one in choice.kept] == [("pink4", 0.9)]
        assert len(judge.best_for_text("something red", found, keep=3).kept) == 3
        assert judge.best_for_text("something red", []).kept == ()


def test_what_is_in_the_cache_is_not_computed_again(tmp_path: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [picture(tmp_path, colour) for colour in VECTORS]
    with Clip(ClipOptions(batch_size=4), tmp_path / "cache") as judge:
        assert judge.warm(found, ["a red", "a blue", "a red"]) == {}
        assert toy.batches == [4, 2, 2]
        first = judge.closest(found[0], found[1:]), judge.best_for_text("a blue", found)

    def refuse(options: ClipOptions) -> clip._Model:
        raise AssertionError("the model is not needed")

    monkeypatch.setattr(clip, "_load", refuse)
    with Clip(ClipOptions(batch_size=2), tmp_path / "cache") as judge:
        assert (judge.closest(found[0], found[1:]), judge.best_for_text("a blue", found)) == first
    with (
        pytest.raises(AssertionError, match="not needed"),
        Clip(ClipOptions(pretrained="another"), tmp_path / "cache") as judge,
    ):
        judge.closest(found[0], found[1:])


def test_no_batch_is_larger_than_asked_for(tmp_path: Path, toy: Toy) -> None:
    found = (picture(tmp_path, list(VECTORS)[number % 6], 1 + number) for number in range(50))
    with Clip(ClipOptions(batch_size=8), tmp_path / "cache") as judge:
        judge.warm(found)
    assert toy.batches == [8] * 6 + [2]


KILLED = """
import sys, time
from pathlib import Path
import numpy as np
from kore_fast.augmentation import clip

def pictures(sizes):
    print(len(sizes), flush=True)
    time.sleep(0.05)
    return np.array([[1 / size, (1 - size**-2) ** 0.5] for size in sizes], dtype=np.float32)

clip._load = lambda options: clip._Model(lambda image: image.width, pictures, lambda texts: None)
folder = Path(sys.argv[1])
with clip.Clip(clip.ClipOptions(batch_size=3), sys.argv[2]) as judge:
    judge.warm(sorted(folder.glob("*.png")))
"""


def test_a_killed_run_loses_a_batch_at_most_and_ends_with_the_same_vectors(tmp_path: Path) -> None:
    for number in range(1, 40):
        picture(tmp_path, "red", number)

    def start(cache: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(tmp_path / cache)]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}
        )

    def rows(cache: str) -> list[Any]:
        kept = clip._Cache(tmp_path / cache / "clip.sqlite")
        found = kept._base.execute("SELECT * FROM vectors ORDER BY weights, kind, key").fetchall()
        kept.close()
        return found

    whole = start("whole")
    assert whole.communicate()[0].split() == ["3"] * 13
    killed = start("killed")
    assert killed.stdout is not None
    for _ in range(5):
        killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    kept = len(rows("killed"))
    assert 12 <= kept < 39
    assert kept % 3 == 0
    again = start("killed")
    assert again.communicate()[0].split() == ["3"] * ((39 - kept) // 3)
    assert rows("killed") == rows("whole")


def test_a_damaged_cache_says_which_file_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "clip.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(DataError, match=r"clip\.sqlite: the cache .* may be deleted"):
        Clip(None, tmp_path)


def test_unfiltered_keeps_the_searchs_order_without_scores_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip, "_load", lambda options: pytest.fail("no model is wanted"))
    own = picture(tmp_path, "red")
    found = [picture(tmp_path, "red", name="copy"), *[picture(tmp_path, c) for c in ("blue", "green", "pink")]]
    with Clip(ClipOptions(unfiltered=True), tmp_path / "cache") as judge:
        assert judge.warm(found) == {}
        choice = judge.closest(own, found)
        assert [(one.path, one.score) for one in choice.kept] == [(found[1], None), (found[2], None)]
        assert [one.reason for one in choice.dropped] == ["the item's own picture", "enough were found before it"]
        assert judge.best_for_text("anything", found).kept[0].path == found[0]
        assert judge.card()["filtered"] is False
        assert "not scored" in judge.card()["note"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"keep": 6}, "'keep' is 6"), ({"models": "x"}, "models"), ({"batch_size": 0}, "batch_size")],
)
def test_options_refuse_what_makes_no_sense(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ClipOptions.model_validate(wrong)


@pytest.mark.parametrize("pretrained", ["weights/clip.safetensors", "clip.safetensors"])
def test_a_missing_weights_file_names_it_and_both_ways_on(tmp_path: Path, pretrained: str) -> None:
    own, other = picture(tmp_path, "red"), picture(tmp_path, "blue")
    with (
        Clip(ClipOptions(pretrained=pretrained), tmp_path / "cache") as judge,
        pytest.raises(DataError, match=rf"'ViT-L-14-336'.*{pretrained}.*\.safetensors file, or set 'unfiltered: true'"),
    ):
        judge.closest(own, [other])


def test_weights_that_may_be_a_pickle_are_refused_with_the_line_that_converts_them(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    old = tmp_path / "clip.pt"
    torch.save({"state_dict": {"weight": torch.arange(6.0).reshape(2, 3).T}}, old)
    own, other = picture(tmp_path, "red"), picture(tmp_path, "blue")
    with (
        Clip(ClipOptions(pretrained=str(old)), tmp_path / "cache") as judge,
        pytest.raises(DataError, match="may be a pickle") as caught,
    ):
        judge.closest(own, [other])
    line = str(caught.value).partition('python -c "')[2].rstrip('"')
    subprocess.run([sys.executable, "-c", line], check=True)
    assert torch.equal(load_file(tmp_path / "clip.safetensors")["weight"], torch.arange(6.0).reshape(2, 3).T)


def test_weights_that_are_not_there_are_no_pictures_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def refuse(options: ClipOptions) -> clip._Model:
        tried.append(options.pretrained)
        raise DataError("the hub is out of reach")

    monkeypatch.setattr(clip, "_load", refuse)
    own, *found = [picture(tmp_path, colour) for colour in ("red", "blue", "green", "pink")]
    contents = {path.name: path.read_bytes() for path in found}
    with Clip(None, tmp_path / "cache") as judge:
        for ask in (
            lambda: judge.warm([own, *found]),
            lambda: judge.closest(own, found),
            lambda: judge.best_for_text("a pink animal", found),
            lambda: judge.compute("picture", contents),
        ):
            with pytest.raises(DataError, match="out of reach"):
                ask()
    # Once each, not once a picture: every try may be a download.
    assert len(tried) == 4


def test_without_open_clip_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    own, other = picture(tmp_path, "red"), picture(tmp_path, "blue")
    with (
        Clip(None, tmp_path / "cache") as judge,
        pytest.raises(DataError, match=r'pip install "kore-fast\[clip\]"; or set unfiltered'),
    ):
        judge.closest(own, [other])


# From here on with open_clip itself.

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny architecture ``tiny-clip``, known to open_clip, and random weights as a file."""
    open_clip = pytest.importorskip("open_clip")
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-clip.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(0)
    save_file(open_clip.create_model("tiny-clip").state_dict(), folder / "tiny.safetensors")
    return folder


def noise(folder: Path, count: int) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        pixels = rng.integers(0, 256, (40 + number, 60, 3), dtype=np.uint8)
        paths.append(folder / f"noise{number:02}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def test_scores_are_those_of_open_clip(tmp_path: Path, tiny_clip: Path) -> None:
    import open_clip
    import torch

    options = ClipOptions(model="tiny-clip", pretrained=str(tiny_clip / "tiny.safetensors"), batch_size=4, device="cpu")
    own, *found = noise(tmp_path, 6)
    model, _, prepare = open_clip.create_model_and_transforms("tiny-clip", pretrained=options.pretrained)
    model.eval()
    with torch.inference_mode():
        seen = torch.cat([model.encode_image(prepare(Image.open(path))[None]) for path in (own, *found)]).double()
        said = model.encode_text(open_clip.get_tokenizer("tiny-clip")(["a small bird"])).double()
    expected = torch.nn.functional.cosine_similarity(seen[:1], seen[1:])
    fitting = torch.nn.functional.cosine_similarity(said, seen[1:])
    with Clip(options.model_copy(update={"keep": 5, "identical": 0.0}), tmp_path / "cache") as judge:
        scores = {one.path: one.score for one in judge.closest(own, found).kept}
        texts = {one.path: one.score for one in judge.best_for_text("a small bird", found, keep=5).kept}
        assert judge.card()["weights"] == f"tiny-clip, sha256 {sha256_file(tiny_clip / 'tiny.safetensors')}"
    assert len(scores) == len(texts) == 5
    for place, path in enumerate(found):
        assert scores[path] == pytest.approx(float(expected[place]), abs=1e-4)
        assert texts[path] == pytest.approx(float(fitting[place]), abs=1e-4)


def test_the_batch_makes_no_difference_beyond_rounding(tmp_path: Path, tiny_clip: Path) -> None:
    found = noise(tmp_path, 7)
    vectors = []
    for size in (1, 3, 7):
        options = ClipOptions(
            model="tiny-clip", pretrained=str(tiny_clip / "tiny.safetensors"), batch_size=size, device="cpu"
        )
        with Clip(options, tmp_path / f"cache{size}") as judge:
            judge.warm(found)
            kept = judge._cache.read(judge.weights, "picture", map(sha256_file, found))
        vectors.append(np.stack([kept[sha256_file(path)] for path in found]))
    assert np.allclose(np.linalg.norm(vectors[0], axis=1), 1, atol=1e-6)
    for other in vectors[1:]:
        assert np.abs(other - vectors[0]).max() < 1e-5


def test_a_folder_brings_architecture_and_weights(tmp_path: Path, tiny_clip: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": {}}))
    found = noise(tmp_path, 4)
    options = ClipOptions(model=f"local-dir:{folder}", device="cpu")
    with Clip(options, tmp_path / "a") as judge, pytest.raises(DataError, match=r"one \.safetensors .* found \[\]"):
        judge.closest(found[0], found[1:])
    weights = (tiny_clip / "tiny.safetensors").read_bytes()
    (folder / "open_clip_model.safetensors").write_bytes(weights)
    named = ClipOptions(model="tiny-clip", pretrained=str(tiny_clip / "tiny.safetensors"), device="cpu")
    with Clip(options, tmp_path / "b") as one, Clip(named, tmp_path / "c") as other:
        assert one.closest(found[0], found[1:]) == other.closest(found[0], found[1:])
        assert str(tmp_path) not in json.dumps([one.card(), other.card()])


def test_other_weights_are_other_scores(tmp_path: Path, tiny_clip: Path) -> None:
    from safetensors.torch import load_file, save_file

    found = noise(tmp_path, 3)
    changed = tmp_path / "changed.safetensors"
    weights = load_file(tiny_clip / "tiny.safetensors")
    save_file({key: value.flip(-1).contiguous() for key, value in weights.items()}, changed)
    scores = []
    for path in (tiny_clip / "tiny.safetensors", changed):
        with Clip(ClipOptions(model="tiny-clip", pretrained=str(path), device="cpu"), tmp_path / "cache") as judge:
            scores.append({one.path: one.score for one in judge.closest(found[0], found[1:]).kept})
    assert scores[0] != scores[1]


def test_weights_of_another_architecture_are_an_error_not_random_scores(tmp_path: Path, tiny_clip: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_clip / "tiny.safetensors")
    weights.pop("visual.proj")
    save_file(weights, tmp_path / "less.safetensors")
    found = noise(tmp_path, 2)
    options = ClipOptions(model="tiny-clip", pretrained=str(tmp_path / "less.safetensors"), device="cpu")
    with Clip(options, tmp_path / "cache") as judge, pytest.raises(DataError, match=r"less\.safetensors.*visual\.proj"):
        judge.closest(found[0], found[1:])


def test_an_unknown_model_is_named_with_its_neighbours(tmp_path: Path, tiny_clip: Path) -> None:
    found = noise(tmp_path, 2)
    with (
        Clip(ClipOptions(model="ViT-L-14-366"), tmp_path / "cache") as judge,
        pytest.raises(DataError, match=r"did you mean .*ViT-L-14-336"),
    ):
        judge.closest(found[0], found[1:])


def test_a_hub_out_of_reach_names_model_weights_and_both_ways_on(
    tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    found = noise(tmp_path, 2)
    started = time.monotonic()
    with Clip(ClipOptions(model="ViT-B-32"), tmp_path / "cache") as judge, pytest.raises(DataError) as caught:
        judge.closest(found[0], found[1:])
    assert time.monotonic() - started < 60
    for part in ("'ViT-B-32', weights 'openai'", "Tried the hub", ".safetensors file", "'unfiltered: true'"):
        assert part in str(caught.value)


def test_named_weights_that_want_quick_gelu_get_it(
    tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    asked: list[Any] = []

    def create(model: str, **settings: Any) -> Any:
        asked.append((settings["pretrained"], settings["force_quick_gelu"]))
        raise RuntimeError("enough")

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", create)
    for options in (
        ClipOptions(),
        ClipOptions(model="ViT-B-32", pretrained="laion2b_s34b_b79k"),
        ClipOptions(quick_gelu=False),
    ):
        with pytest.raises(DataError, match="enough"):
            clip._load(options)
    assert asked == [("openai", True), ("laion2b_s34b_b79k", False), ("openai", False)]
