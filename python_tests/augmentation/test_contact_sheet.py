from __future__ import annotations

import base64
import hashlib
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kore_fast.augmentation.contact_sheet import ContactSheet, visible
from kore_fast.augmentation.provenance import PictureSource, Provenance
from kore_fast.data.samples import Sample

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7*7 }} </script> \x00\x1b[31m \u202egnp"


def sample(
    identity: str, branch: str = "vqa", image: Any = "a.png", item: str = "owl", answer: str = "An owl."
) -> Sample:
    mark = "<image>\n" * (1 if isinstance(image, str) else len(image or []))
    turns = [{"from": "human", "value": f"{mark}What is {identity}?"}, {"from": "gpt", "value": answer}]
    return Sample.model_validate(
        {"id": identity, "image": image, "conversations": turns, "item": item, "branch": branch}
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    Image.new("RGBA", (600, 300), (200, 30, 30, 128)).save(tmp_path / "a.png")
    Image.new("RGB", (40, 90), "blue").save(tmp_path / "b.png")
    return tmp_path


class Page(HTMLParser):
    """Elements with their attributes, and the text inside each article."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def build(root: Path, samples: list[tuple[Sample, Provenance | None]], **options: Any) -> Page:
    sheet = ContactSheet(**options)
    for one, origin in samples:
        sheet.add(one, origin)
    sheet.write(root / "sheet.html", root, names={"owl": "Tawny Owl"})
    return Page(root / "sheet.html")


def test_rounds_pictures_and_provenance_are_shown(root: Path) -> None:
    source = PictureSource(
        False, "wikimedia", "https://example.org/p?a=1&b=2", "A. Author", "CC0-1.0", "owl bird", 0.8125
    )
    page = build(
        root, [(sample("s1", image=["a.png", "b.png"]), Provenance("model-x", (source,), "supported", ("repaired",)))]
    )
    for part in (
        "Tawny Owl",
        "What is s1?",
        "An owl.",
        "found by wikimedia",
        "CC0-1.0",
        "A. Author",
        "0.812",
        "model-x",
        "supported",
        "repaired",
    ):
        assert part in page.text
    assert "<image>" not in page.text
    pictures = page.of("img")
    assert len(pictures) == 2
    for picture in pictures:
        kind, data = str(picture["src"]).split(",")
        assert kind == "data:image/jpeg;base64"
        assert base64.b64decode(data).startswith(b"\xff\xd8")
    assert [link["href"] for link in page.of("a")] == ["https://example.org/p?a=1&b=2"]
    assert page.of("article")[0]["data-flags"] == '["repaired"]'


def test_the_choice_is_bounded_and_does_not_depend_on_the_order(root: Path) -> None:
    samples = [(sample(f"s{n}", "vqa" if n % 3 else "caption", answer=f"No {n}."), None) for n in range(200)]
    samples += [(sample(f"f{n}"), Provenance(flags=("low clip",))) for n in range(30)]
    page = build(root, samples, per_branch=5)
    assert len(page.of("article")) == 15
    flagged = [card for card in page.of("article") if card["data-flags"] != "[]"]
    assert len(flagged) == 5
    random.Random(0).shuffle(samples)
    assert build(root, samples, per_branch=5).source == page.source
    assert build(root, samples, per_branch=5, seed=1).source != page.source
    assert "15 of 230 samples" in page.text


def test_nothing_that_came_from_data_is_markup(root: Path) -> None:
    source = PictureSource(False, HOSTILE, f"javascript:alert(3)//{HOSTILE}", HOSTILE, HOSTILE, HOSTILE, None)
    one = sample(HOSTILE, HOSTILE, item=HOSTILE, answer=HOSTILE)
    sheet = ContactSheet()
    sheet.add(one, Provenance(HOSTILE, (source,), HOSTILE, (HOSTILE,)))
    sheet.write(root / "sheet.html", root, title=HOSTILE, names={HOSTILE: HOSTILE})
    page = Page(root / "sheet.html")
    assert len(page.of("script")) == 1
    assert [set(picture) for picture in page.of("img")] == [{"src", "alt", "loading"}]
    assert not page.of("a")
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    for letter in ("\x00", "\x1b", "\u202e"):
        assert letter not in page.source
    assert "{{ 7*7 }}" in page.text
    script = page.source.split("<script>")[1].split("</script>")[0]
    policy = next(str(m["content"]) for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy


def test_a_picture_that_cannot_be_shown_is_said_in_its_place(root: Path) -> None:
    (root / "broken.png").write_bytes((root / "a.png").read_bytes()[:60])
    page = build(root, [(sample(n, image=n), None) for n in ("no.png", "broken.png", "../a.png")])
    assert not page.of("img")
    for part in ("no image 'no.png'", "image 'broken.png' cannot be decoded", "'../a.png' leaves its folder"):
        assert part in page.text


def test_visible_text_keeps_what_can_be_read() -> None:
    assert visible("Grüße, 東京\n\tمرحبا 🙂") == "Grüße, 東京\n\tمرحبا 🙂"
    assert visible("\x07\u200f\ud800\u00a0") == "␇⟨U+200F⟩⟨U+D800⟩ "


def test_an_empty_sheet_is_a_page_too(root: Path) -> None:
    assert ContactSheet().write(root / "sheet.html", root) == 0
    assert "0 of 0 samples" in Page(root / "sheet.html").text
