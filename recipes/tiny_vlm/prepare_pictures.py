"""Collect named pictures (clip art, stamps, emoji) to align the projector with, and split off pictures to test it on.

    python recipes/tiny_vlm/prepare_pictures.py --output DIR [--from DIR] [--packages DIR] [--commit]

Writes DIR/pictures.jsonl, one picture a line: {"id", "image", "name", "tags", "source", "split"}.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import html
import io
import json
import random
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).resolve().parent
DEBIAN = ("openclipart-svg", "tuxpaint-stamps-default")
ICON_SETS = {  # npm packages of one JSON file each; the names of the icons are the emoji's English names
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/noto-v1": "1.2.5",
    "@iconify-json/twemoji": "1.2.5",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/openmoji": "1.2.29",
    "@iconify-json/emojione": "1.2.3",
    "@iconify-json/game-icons": "1.2.4",
}
SIDE = 128
HELD_OUT = 200
CALIBRATION = 128

JUNK_TITLE = re.compile(
    r"part of|theme|icons?\b|collection|cliparts?\b|gramastar|\bsvg\b|submission|sibmission|untitled|symbol.?signs"
    r"|unsorted|iconset|https?:|www\.|@|illustration|\bmime\b|openclipart|architett|rollandin",
    re.IGNORECASE,
)
_QUALIFIERS = """
bw b w amp contour outline outlined silhouette simple stylized small big large color coloured colored colour
black white and the a an vector drawing clip art symbol sign icon clipart new old version cartoon line logo left
right
"""
QUALIFIERS = frozenset(_QUALIFIERS.split())
_JUNK_TAGS = """
hash icon icons theme shape shapes sign symbol special menu unsorted action filesystem mimetypes computer_icons
signs_and_symbols lemon_theme_icon magick geometry stars gradients mapsym map_symbol webpage card simple
bordered ornamental subnational appicon stock openclipart symbols buttons button flowchart arrowshape networksym
weathersym musicsym coloring hotel device work day place back creation historic miscellany logos logo pattern
people recreation office education transport special holiday entertainment equipment activities activity desktop
led security
"""
JUNK_TAGS = frozenset(_JUNK_TAGS.split())
SKIP_FOLDERS = re.compile(
    r"^(shapes/(stars|callouts|arrows)|special|computer/(icons|buttons|folders|diagrams)|buttons|recreation/games/cards"
    r"|signs_and_symbols/(map_symbols|flags/(semaphore|signal))|logos|geography/maps|transportation/roadsigns)"
)
_CONCRETE_TAGS = """
animal mammal bird insect fish plant flower tree fruit vegetable food beverage dessert building house tool
transport transportation boat vehicle music sports weather astronomy toy clothing hardware weapon game party
furniture
"""
CONCRETE_TAGS = frozenset(_CONCRETE_TAGS.split())
PLAIN_FOLDERS = re.compile(
    r"openclipart/(animals|buildings|containers|electronics|food|plants|recreation|tools|transportation|office"
    r"|people/clothing|science|computer/hardware|education|decorations)"
)
SKIP_EMOJI = re.compile(
    r"skin-tone|keycap|-(light|medium|dark)$|^(input|japanese|letter|squared|regional|black|white)-|button|arrow|square$"
    r"|-(stencil|logo|suit)$|oclock|thirty|^abstract|^card-|symbol|sign$|hair|family|couple|kiss-|facing|^hexagram|^trigram"
)


# Names that a person looking at the picture would not give, found by reading the list.
_NO_QUESTION = """
another apple; adventurer hat; ball form; bus lane; bus opposite; cone soft; cycle lane; cycle route; curve
ahead; crossroads; dream flower; empty tomb; evolution steps; film; flute in; food; football pitch; general;
glossy paper; golf symbols; grounded; guitar profile; hat clothing; hearth; heart tiles; hub; ink; judo;
knitting; liberty; manager; mascot; mobile; mm gun; mouse scroll; my house; no cycles; no entry; note; paper
side; pass either; piano theory; projectile; reaching; road signs; running free; rugby; sailing heel; sailing
sunset; sandwich one; spider sword; street; study; tie clothing; tile orange; tool; tools; trumpet pocket; unit
blocks; workstation; wedding; wing; three eyes; thanksgiving spread; plain tree; lock open; paint; panel; reed;
scale; virus; pop can; sleeping; mortar; park; flat screen; closed box; electric lighter; chess game;
construction hammer; road runner; heart cluster; wall
"""
NO_QUESTION = frozenset(name.strip() for name in _NO_QUESTION.replace("\n", " ").split(";"))


@dataclass(frozen=True)
class Picture:
    """A named picture.

    ``group`` ties variants of one drawing together, so that no split divides them; ``titled`` tells a name that its
    author gave from one taken from a tag.
    """

    id: str
    name: str
    tags: tuple[str, ...]
    source: str
    group: str
    titled: bool = True
    split: str = "train"
    image: str = ""


def clean_title(title: str, known: frozenset[str] | None = None) -> str | None:
    """A short lower-case noun phrase from a title or file name, or None for a title that names nothing.

    Args:
        title: as found: may hold entities, underscores, brackets, numbers, a prefix "Clipart by …".
        known: words taken for English; any other word makes the title useless. None accepts every word.
    """
    text = html.unescape(html.unescape(title))
    if JUNK_TITLE.search(text):
        return None
    text = re.sub(r"\([^)]*\)|\[[^]]*\]", " ", text)
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    text = re.sub(r"[_\-–—/.,:;!?\"]+|\d+\w*|\b\w*\d+\b", " ", text)
    words = [word.strip("'") for word in text.lower().split()]
    while words and (words[-1] in QUALIFIERS or len(words[-1]) < 2):
        words.pop()
    while words and (words[0] in {"contour", "outline", "simple", "stylized", "a", "an", "the"} or len(words[0]) < 2):
        words.pop(0)
    if not 1 <= len(words) <= 4 or not all(re.fullmatch(r"[a-z][a-z']+", word) for word in words):
        return None
    if known is not None and not all(word in known or word.removesuffix("'s") in known for word in words):
        return None
    name = " ".join(words)
    return name if 3 <= len(name) <= 32 and not all(word in QUALIFIERS for word in words) else None


def base_name(name: str) -> str:
    """The name without qualifiers and plural endings: what two drawings of the same thing share."""
    words = [word for word in name.split() if word not in QUALIFIERS] or name.split()
    return " ".join(
        word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in words
    )


def english_words(packages: Path, minimum: int = 3) -> frozenset[str]:
    """Words that stand in lower case at least ``minimum`` times in the English Wikipedia summaries."""
    from build import WIKIPEDIA

    summaries = json.loads((packages / WIKIPEDIA).read_text(encoding="utf-8"))
    counts: collections.Counter[str] = collections.Counter()
    for entry in summaries.values():
        counts.update(re.findall(r"\b[a-z][a-z']+\b", f"{entry['extract']} {entry.get('description') or ''}"))
    return frozenset(word for word, count in counts.items() if count >= minimum)


def _clean_tags(tags: Iterable[str], known: frozenset[str], name: str) -> tuple[str, ...]:
    kept: list[str] = []
    for tag in tags:
        cleaned = clean_title(tag, known) if tag and tag not in JUNK_TAGS else None
        if cleaned and cleaned not in JUNK_TAGS and cleaned != name and cleaned not in kept:
            kept.append(cleaned)
    return tuple(kept)


def openclipart(root: Path, known: frozenset[str]) -> Iterator[tuple[Picture, Path]]:
    """Pictures of Debian's ``openclipart-svg`` (public domain), named by the title, or the file where titles repeat."""
    from xml.etree import ElementTree

    folder = root / "usr/share/openclipart/svg"
    found = []
    for path in sorted(folder.rglob("*.svg")):
        relative = path.relative_to(folder).as_posix()
        if path.is_symlink() or SKIP_FOLDERS.match(relative):
            continue
        try:
            work = ElementTree.parse(path).getroot().find(".//{*}Work")
        except ElementTree.ParseError:
            continue
        title = (work.findtext("{*}title") or "").strip() if work is not None else ""
        tags = [(tag.text or "").strip() for tag in work.findall("{*}subject//{*}li")] if work is not None else []
        found.append((path, relative, title, tags))
    counts = collections.Counter(title for _, _, title, _ in found)
    for path, relative, title, tags in found:
        stem = re.sub(r"_(architett|archite|rollandin).*|_{2,}.*|_+$", "", path.stem)
        folders = relative.split("/")[:-1]
        national_flag = re.match(r"signs_and_symbols/flags/(africa|america|asia|europe|oceania)/[^/]+\.svg$", relative)
        if national_flag:
            country = stem.replace("_", " ").strip()
            if not re.fullmatch(r"[a-z][a-z ]{2,24}", country):
                continue
            name: str | None = f"flag of {country.title()}"
        elif relative.startswith("signs_and_symbols/flags"):
            continue
        else:
            name = clean_title(title, known) if counts[title] <= 5 else None
            name = name or clean_title(stem, known)
        titled = bool(name)
        if not name:  # an odd or foreign title: the most particular tag that is an English word names it
            general = {base_name(part.replace("_", " ")) for part in folders}
            particular = _clean_tags(reversed(tags), known, "")
            name = next((tag for tag in particular if base_name(tag) not in general), None)
        if not name:
            continue
        hypernyms = [
            part.replace("_", " ").rstrip("s") for part in folders if part not in ("unsorted", "signs_and_symbols")
        ]
        identity = "openclipart/" + relative.removesuffix(".svg")
        yield (
            Picture(
                identity, name, _clean_tags([*tags, *hypernyms], known, name), "openclipart", base_name(name), titled
            ),
            path,
        )


def stamps(root: Path, known: frozenset[str]) -> Iterator[tuple[Picture, Path]]:
    """Pictures of Debian's ``tuxpaint-stamps-default`` (GPL-2), named by the English description ("A carrot.")."""
    folder = root / "usr/share/tuxpaint/stamps"
    for text in sorted(folder.rglob("*.txt")):
        relative = text.relative_to(folder).as_posix()
        image = next((path for path in (text.with_suffix(".png"), text.with_suffix(".svg")) if path.is_file()), None)
        if image is None or relative.startswith("symbols/"):
            continue
        sentence = text.read_text(encoding="utf-8", errors="replace").split("\n")[0]
        sentence = re.split(r"[.!?(—,]| is | from | to | with | for | called ", sentence.strip())[0]
        name = clean_title(re.sub(r"^(An?|The|Our|Some) ", "", sentence), known) or clean_title(text.stem, known)
        if name:
            hypernyms = [part.rstrip("s") for part in relative.split("/")[:-1]]
            identity = "tuxpaint/" + relative.removesuffix(".txt")
            yield (
                Picture(identity, name, _clean_tags(hypernyms, known, name), "tuxpaint-stamps", base_name(name)),
                image,
            )


def emoji(package: Path, known: frozenset[str]) -> Iterator[tuple[Picture, str]]:
    """Pictures of an Iconify icon set, each with its SVG text; variants by skin tone and direction are left out."""
    icons = json.loads((package / "icons.json").read_text(encoding="utf-8"))
    metadata = json.loads((package / "metadata.json").read_text(encoding="utf-8"))
    categories = {name: category for category, names in metadata.get("categories", {}).items() for name in names}
    prefix = icons["prefix"]
    for key, icon in icons["icons"].items():
        if SKIP_EMOJI.search(key):
            continue
        flag = re.match(r"(?:flag-for-flag|flag-for|flag)-(.+)$|(.+)-flag$", key)
        if flag:
            country = (flag[1] or flag[2]).replace("-", " ")
            if len(country.split()) > 2 or key in ("black-flag", "white-flag", "triangular-flag"):
                continue
            name: str | None = f"flag of {country.title()}"
        else:
            name = clean_title(key, known)
        if not name:
            continue
        category = categories.get(key, "").replace("&", " ").split()
        tags = _clean_tags([word.rstrip("s").lower() for word in category], known, name)
        width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}" '
            f'width="{width}" height="{height}" color="black">{icon["body"]}</svg>'
        )
        yield Picture(f"{prefix}/{key}", name, tags, prefix, base_name(name)), svg


def render(source: Path | str, side: int = SIDE) -> Image.Image:
    """A square RGB picture of ``side`` pixels on white: the drawing's bounding box, centred, with a margin of 4 %.

    Raises:
        ValueError: the drawing is broken or empty.
    """
    if isinstance(source, Path) and source.suffix == ".png":
        image = Image.open(source).convert("RGBA")
        image.thumbnail((4 * side, 4 * side), Image.Resampling.BOX)
    else:
        import resvg_py

        where: dict[str, Any] = {"svg_path": str(source)} if isinstance(source, Path) else {"svg_string": source}
        size = 2 * side
        data = resvg_py.svg_to_bytes(**where, width=size, height=size, dpi=90.0, skip_system_fonts=True)
        image = Image.open(io.BytesIO(bytes(data))).convert("RGBA")
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image.getchannel("A"))
    box = flat.convert("L").point([255] * 251 + [0] * 5).getbbox()
    if box is None or box[2] - box[0] < 4 or box[3] - box[1] < 4:
        raise ValueError("the drawing is empty")
    flat = flat.crop(box)
    inner = side - 2 * round(0.04 * side)
    scale = inner / max(flat.size)
    flat = flat.resize([max(1, round(length * scale)) for length in flat.size], Image.Resampling.LANCZOS)
    square = Image.new("RGB", (side, side), "white")
    square.paste(flat, ((side - flat.width) // 2, (side - flat.height) // 2))
    return square


def difference_hash(image: Image.Image) -> bytes:
    """256 bits: whether each pixel of a 17 x 16 grey thumbnail is brighter than its right neighbour."""
    grey = image.convert("L").resize((17, 16), Image.Resampling.BOX)
    pixels = grey.tobytes()
    rows = [pixels[17 * row : 17 * row + 17] for row in range(16)]
    return bytes(int(row[column] > row[column + 1] + 2) for row in rows for column in range(16))


def _render_to(job: tuple[Path | str, Path]) -> bytes | None:
    source, target = job
    try:
        image = render(source)
    except (ValueError, OSError, SyntaxError):
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    image.save(target)
    return difference_hash(image)


def near_duplicates(hashes: Sequence[bytes], others: Sequence[bytes], share: float = 0.25) -> list[bool]:
    """For each of ``hashes``, whether one of ``others`` differs in at most ``share`` of the bits set in either."""
    import numpy as np

    if not hashes or not others:
        return [False] * len(hashes)
    left = np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(len(hashes), -1).astype(np.float32)
    right = np.frombuffer(b"".join(others), dtype=np.uint8).reshape(len(others), -1).astype(np.float32)
    both = left @ right.T
    either = left.sum(1)[:, None] + right.sum(1)[None] - both
    return [bool(value) for value in (either - both <= share * either).any(axis=1)]


def plain_name(picture: Picture, known: frozenset[str]) -> bool:
    """Whether the name is fit for a question: one or two plain words, from a folder of depictions of things."""
    words = picture.name.split()
    return (
        picture.source == "openclipart"
        and picture.titled
        and picture.name not in NO_QUESTION
        and len(words) <= 2
        and not picture.name.startswith("flag of")
        and not set(words) & QUALIFIERS
        and all(word in known for word in words)
        and re.match(PLAIN_FOLDERS, picture.id) is not None
    )


def split(
    pictures: Sequence[Picture], eligible: frozenset[str], seed: int = 0, held_out: int = HELD_OUT
) -> list[Picture]:
    """Mark ``held_out`` groups of eligible names as held out, one picture of each; the rest of these groups is dropped.

    A group is everything of the same collection with the same base name, so no drawing has a variant on both sides.
    Pictures of other collections (emoji, stamps) keep their names: other drawings of, at times, the same thing.

    Args:
        eligible: ids that may be held out.
    """
    groups = sorted({picture.group for picture in pictures if picture.id in eligible})
    random.Random(seed).shuffle(groups)
    chosen: dict[str, str] = {}
    for group in groups[:held_out]:
        chosen[group] = min(picture.id for picture in pictures if picture.id in eligible and picture.group == group)
    result = []
    for picture in pictures:
        if picture.source == "openclipart" and picture.group in chosen:
            if picture.id == chosen[picture.group]:
                result.append(replace(picture, split="held_out"))
        else:
            result.append(replace(picture, split="train"))
    return result


def make_choices(pictures: Sequence[Picture], seed: int = 0) -> dict[str, list[str]]:
    """Four names for each picture, the right one among them; the wrong ones come from unlike pictures of the same list.

    Unlike: another top folder, and no word shared between names and tags.
    """
    generator = random.Random(seed)

    def words(picture: Picture) -> set[str]:
        return {base_name(word) for phrase in (picture.name, *picture.tags) for word in phrase.split()}

    result = {}
    for picture in pictures:
        folder = picture.id.split("/")[1]
        others = [
            other.name for other in pictures if other.id.split("/")[1] != folder and not words(other) & words(picture)
        ]
        names = [picture.name, *generator.sample(sorted(set(others)), 3)]
        generator.shuffle(names)
        result[picture.id] = names
    return result


def fetch_debian(folder: Path) -> Path:
    """Download and unpack the two Debian packages below ``folder`` (no root needed); what is there is kept."""
    for name in DEBIAN:
        target = folder / name
        if target.is_dir():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", name], cwd=folder, check=True)
        archive = next(folder.glob(f"{name}_*.deb"))
        temporary = folder / f".{name}.partial"
        subprocess.run(["dpkg-deb", "-x", str(archive), str(temporary)], check=True)
        temporary.rename(target)
    return folder


def fetch_icon_sets(folder: Path) -> list[Path]:
    """Download and unpack the icon sets below ``folder`` with npm; what is there is kept."""
    import tarfile

    folder.mkdir(parents=True, exist_ok=True)
    result = []
    for name, version in ICON_SETS.items():
        stem = f"{name.removeprefix('@').replace('/', '-')}-{version}"
        target = folder / stem
        if not target.is_dir():
            subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=folder, check=True)
            temporary = folder / f".{stem}.partial"
            with tarfile.open(folder / f"{stem}.tgz") as archive:
                archive.extractall(temporary, filter="data")
            temporary.rename(target)
        result.append(target / "package")
    return result


def prepare(output: Path, debian: Path, icon_sets: Sequence[Path], packages: Path, seed: int = 0) -> list[Picture]:
    """Collect, render, drop duplicates, split; write ``pictures.jsonl`` and ``images/`` below ``output``."""
    known = english_words(packages)
    sources: list[tuple[Picture, Path | str]] = [
        *openclipart(debian / DEBIAN[0], known),
        *stamps(debian / DEBIAN[1], known),
    ]
    for package in icon_sets:
        sources.extend(emoji(package, known))
    jobs, pictures = [], []
    for picture, source in sources:
        number = hashlib.sha256(picture.id.encode()).hexdigest()[:16]
        image = f"images/{number[:2]}/{number}.png"
        pictures.append(replace(picture, image=image))
        jobs.append((source, output / image))
    with ProcessPoolExecutor() as pool:
        hashes = list(pool.map(_render_to, jobs, chunksize=32))
    kept: list[Picture] = []
    hash_of: dict[str, bytes] = {}
    seen: set[tuple[bytes, str]] = set()
    for picture, value in zip(pictures, hashes, strict=True):
        if value is not None and (value, picture.name) not in seen:
            seen.add((value, picture.name))
            hash_of[picture.id] = value
            kept.append(picture)
    eligible = frozenset(picture.id for picture in kept if plain_name(picture, known))
    marked = split(kept, eligible, seed)
    held_out = [hash_of[picture.id] for picture in marked if picture.split == "held_out"]
    train = [picture for picture in marked if picture.split == "train"]
    close = near_duplicates([hash_of[picture.id] for picture in train], held_out)
    dropped = {picture.id for picture, near in zip(train, close, strict=True) if near}
    result = [picture for picture in marked if picture.id not in dropped]
    lines = [
        json.dumps(
            {"id": p.id, "image": p.image, "name": p.name, "tags": list(p.tags), "source": p.source, "split": p.split}
        )
        for p in result
    ]
    output.mkdir(parents=True, exist_ok=True)
    (output / "pictures.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    counts = collections.Counter((picture.source, picture.split) for picture in result)
    print(
        f"{len(result)} pictures ({len(dropped)} near-duplicates of held-out ones dropped)",
        dict(sorted(counts.items())),
    )
    return result


def write_subset(
    working: Path, pictures: Sequence[Picture], known: frozenset[str], target: Path, seed: int = 0
) -> None:
    """Write the small public-domain subset for later stages: ``held_out.jsonl``, ``calibration.jsonl``, ``images/``.

    The calibration pictures are training pictures; they carry no choices. A held-out picture's ``name_trained`` tells
    whether another drawing of that name, from the emoji or the stamps, was trained on.
    """
    held_out = sorted((p for p in pictures if p.split == "held_out"), key=lambda p: p.id)
    choices = make_choices(held_out, seed)
    candidates = [
        p
        for p in pictures
        if p.split == "train"
        and p.source == "openclipart"
        and len(p.name.split()) <= 3
        and not p.name.startswith("flag of")
        and p.name not in NO_QUESTION
        and set(p.tags) & CONCRETE_TAGS
    ]
    candidates.sort(key=lambda p: (not p.titled, hashlib.sha256(f"{seed} {p.id}".encode()).digest()))
    seen: collections.Counter[str] = collections.Counter()
    calibration: list[Picture] = []
    for most in (1, 2, 3):  # as many different names as there are, then second and third drawings of one thing
        for picture in candidates:
            if len(calibration) < CALIBRATION and seen[picture.group] < most and picture not in calibration:
                seen[picture.group] += 1
                calibration.append(picture)
    calibration.sort(key=lambda p: p.id)
    trained = {picture.group for picture in pictures if picture.split == "train"}
    images = target / "images"
    images.mkdir(parents=True, exist_ok=True)
    for file, subset in (("held_out.jsonl", held_out), ("calibration.jsonl", calibration)):
        rows = []
        for picture in subset:
            name = re.sub(r"[^a-z0-9]+", "_", picture.id.removeprefix("openclipart/").lower()).strip("_") + ".png"
            with Image.open(working / picture.image) as image:
                small = image.convert("RGB").resize((112, 112), Image.Resampling.LANCZOS)
                small.quantize(64, dither=Image.Dither.NONE).save(images / name, optimize=True)
            row: dict[str, Any] = {"id": picture.id, "image": f"images/{name}", "name": picture.name}
            if picture.id in choices:
                row["choices"] = choices[picture.id]
                row["name_trained"] = picture.group in trained
            rows.append(json.dumps(row))
        (target / file).write_text("\n".join(rows) + "\n", encoding="utf-8")


def main() -> None:
    """Fetch what is missing, prepare the pictures, write the committed subset when asked to."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="the working folder for pictures.jsonl and images/")
    parser.add_argument("--from", type=Path, dest="debian", help="folder with the two Debian packages unpacked")
    parser.add_argument(
        "--packages", type=Path, help="where the Python packages are unpacked (default: OUTPUT/packages)"
    )
    parser.add_argument("--icons", type=Path, help="folder with the icon sets (default: OUTPUT/icons)")
    parser.add_argument("--commit", action="store_true", help=f"also renew {HERE.name}/pictures, the committed subset")
    arguments = parser.parse_args()
    from build import fetch_packages

    packages = fetch_packages(arguments.packages or arguments.output / "packages")
    debian = arguments.debian or fetch_debian(arguments.output / "debian")
    icons = fetch_icon_sets(arguments.icons or arguments.output / "icons")
    pictures = prepare(arguments.output, debian, icons, packages)
    if arguments.commit:
        write_subset(arguments.output, pictures, english_words(packages), HERE / "pictures")


if __name__ == "__main__":
    main()
