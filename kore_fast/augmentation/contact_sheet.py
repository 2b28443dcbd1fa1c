"""A page to look through samples with their pictures: some of each branch, and the flagged ones first to hand.

The page needs nothing beside it. `ContactSheet` takes samples one by one and keeps the chosen ones only.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import io
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image, ImageOps

from kore_fast.augmentation.chance import rank
from kore_fast.augmentation.provenance import PictureSource, Provenance
from kore_fast.data.images import IMAGE_FORMATS, check_image
from kore_fast.data.items import IMAGE_TOKEN
from kore_fast.data.samples import Sample, Written
from kore_fast.errors import DataError
from kore_fast.files import inside, write_text

THUMBNAIL = 224
PAGE = 24
_TEXT = 4000


@dataclass(frozen=True, order=True)
class _Chosen:
    # Heaps keep the largest first to be pushed out: the order is the rank turned round.
    order: int
    number: int
    sample: Any
    origin: Any


class ContactSheet:
    """Chooses samples as they come: of each branch ``per_branch``, and as many flagged ones, by a hash of their ids.

    The choice depends on the samples and the seed, not on their order. Memory holds what is chosen.
    """

    def __init__(self, *, per_branch: int = 24, seed: int = 0) -> None:
        self._per_branch, self._seed = per_branch, seed
        self._chosen: dict[tuple[str, bool], list[_Chosen]] = {}
        self._branches: dict[str, int] = {}
        self._count = 0

    def add(self, sample: Sample | Written, provenance: Provenance | None = None) -> None:
        """Take up the next sample."""
        origin = provenance or Provenance()
        branch = sample.branch or "other"
        self._count += 1
        self._branches[branch] = self._branches.get(branch, 0) + 1
        heap = self._chosen.setdefault((branch, bool(origin.flags)), [])
        order = -rank(self._seed, sample.id, "contact sheet")
        if len(heap) < self._per_branch:
            heapq.heappush(heap, _Chosen(order, self._count, sample, origin))
        elif self._per_branch and order > heap[0].order:
            heapq.heapreplace(heap, _Chosen(order, self._count, sample, origin))

    def write(
        self,
        path: str | Path,
        image_root: str | Path,
        *,
        title: str = "Contact sheet",
        names: Mapping[str, str] | None = None,
    ) -> int:
        """Write the page and return how many samples it shows; equal inputs give an equal page.

        Args:
            image_root: the folder that the samples' pictures are below; one that is missing or broken is said so in
                its place.
            names: item id → name, for the filter.
        """
        from jinja2 import Environment, StrictUndefined

        names = names or {}
        chosen = [one for heap in self._chosen.values() for one in heap]
        chosen.sort(key=lambda one: (not one.origin.flags, one.sample.branch or "other", -one.order, one.sample.id))
        cards = [_card(one.sample, one.origin, Path(image_root), names) for one in chosen]
        folder = files("kore_fast.augmentation") / "pages"
        script = (folder / "contact_sheet.js").read_text(encoding="utf-8")
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        page = environment.from_string((folder / "contact_sheet.html.j2").read_text(encoding="utf-8")).render(
            title=visible(title),
            cards=cards,
            total=self._count,
            branches=[
                (visible(branch), count, sum(card["branch"] == visible(branch) for card in cards))
                for branch, count in sorted(self._branches.items())
            ],
            items=sorted({(card["item"], card["name"]) for card in cards if card["item"]}, key=lambda pair: pair[::-1]),
            flags=sorted({flag for card in cards for flag in card["flags"]}),
            script=script,
            # Only this script may run, whatever a text in the page says.
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
            page=PAGE,
        )
        write_text(path, page)
        return len(cards)


def visible(text: str) -> str:
    """Text whose control characters, direction marks and half characters can be seen and do nothing."""
    return "".join(_visible(letter) for letter in text)


def _visible(letter: str) -> str:
    if letter in "\n\t" or letter.isprintable() or letter == " ":
        return letter
    code = ord(letter)
    if code < 0x20:
        return chr(0x2400 + code)
    if unicodedata.category(letter) == "Zs":
        return " "
    return f"⟨U+{code:04X}⟩"


def _card(given: Sample | Written, origin: Provenance, root: Path, names: Mapping[str, str]) -> dict[str, Any]:
    sample = given.read() if isinstance(given, Written) else given
    turns = sample.conversations
    item = visible(sample.item or "")
    return {
        "id": visible(sample.id),
        "branch": visible(sample.branch or "other"),
        "item": item,
        "name": visible(names.get(sample.item or "", "")) or item,
        "system": _text(sample.system or ""),
        "rounds": [(_text(turns[place].value), _text(turns[place + 1].value)) for place in range(0, len(turns) - 1, 2)],
        "pictures": [
            _picture(root, image, origin.pictures[place] if place < len(origin.pictures) else None)
            for place, image in enumerate(sample.images)
        ],
        "writer": visible(origin.writer),
        "grounding": visible(origin.grounding or ""),
        "flags": [visible(flag) for flag in origin.flags],
    }


def _text(value: str) -> str:
    text = visible(value.replace(IMAGE_TOKEN, "").strip())
    return text if len(text) <= _TEXT else text[:_TEXT] + " …"


def _picture(root: Path, image: str, source: PictureSource | None) -> dict[str, Any]:
    address, broken = "", ""
    try:
        check_image(root, image)
        address = _thumbnail(inside(root, image))
    except DataError as error:
        broken = visible(str(error))
    facts: list[tuple[str, str]] = []
    if source is not None:
        facts.append(("picture", "the item's own" if source.own else f"found by {source.provider or 'unknown'}"))
        facts.append(("licence", source.licence or "unknown"))
        facts += [
            (label, value)
            for label, value in (
                ("author", source.author),
                ("source", source.source),
                ("searched for", source.query),
                ("CLIP", None if source.clip is None else f"{source.clip:.3f}"),
            )
            if value is not None
        ]
    return {
        "name": visible(image),
        "address": address,
        "broken": broken,
        "facts": [(label, visible(value), _link(value) if label == "source" else "") for label, value in facts],
    }


def _thumbnail(path: Path) -> str:
    with Image.open(path, formats=IMAGE_FORMATS) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGBA")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    # On white: portraits that were cut out would stand on black in a JPEG.
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image.getchannel("A"))
    buffer = io.BytesIO()
    flat.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _link(value: str) -> str:
    """An address that may be followed, or nothing."""
    try:
        parts: Sequence[str] = urlsplit(value)
    except ValueError:
        return ""
    return value if parts[0] in ("http", "https") and parts[1] and value.isprintable() else ""
