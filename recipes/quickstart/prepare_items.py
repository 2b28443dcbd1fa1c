"""Makes the quickstart's items from Debian's package wesnoth-1.16-data: units of a game, each with a picture and prose.

    python recipes/quickstart/prepare_items.py                     # the committed 64, into recipes/quickstart/data
    python recipes/quickstart/prepare_items.py --all --out DIR     # every usable unit

The package is fetched with apt-get (no root needed), or read from a folder that it was unpacked into (--from DIR).
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from kore_fast.data.items import load_items
from kore_fast.files import inside, write_jsonl, write_text

from wml import Tag, parse

PACKAGE = "wesnoth-1.16-data"
GAME = Path("usr/share/games/wesnoth/1.16")
LICENCE = "GPL-2.0-or-later"
SIZE = 160
BACKGROUND = (226, 226, 226)
# The game's own name where it has a readable one; these races have none, or one that is no plain word.
RACE_NAMES = {"bats": "bat", "mechanical": "mechanical", "monster": "monster", "dunefolk": "dunefolk"}
TYPOGRAPHY = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "\u00a0": " "})


@dataclass(frozen=True)
class Unit:
    """A unit of the game with all that an item needs, and the picture's credit if the game names one."""

    record: dict[str, Any]
    picture: Path
    portrait: bool
    credit: str | None

    @property
    def race(self) -> str:
        return str(self.record["facts"]["race"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, help=f"folder that {PACKAGE} was unpacked into")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--count", type=int, default=64, help="how many units, of races as varied as there are")
    parser.add_argument("--all", action="store_true", help="every usable unit instead")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        package = arguments.source or download(Path(work))
        units, skipped = read_units(package)
        chosen = units if arguments.all else choose(units, arguments.count)
        write(package, chosen, arguments.out)
    load_items(arguments.out / "items.jsonl")
    print(f"{len(chosen)} items written to {arguments.out} ({len(units)} usable units)")
    for reason, count in sorted(skipped.items()):
        print(f"  left out: {count} with {reason}")


def download(work: Path) -> Path:
    """Fetch and unpack the package into ``work`` with Debian's own tools."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise SystemExit(f"apt-get and dpkg-deb are needed to fetch {PACKAGE}; unpack it elsewhere and give --from DIR")
    subprocess.run(["apt-get", "download", PACKAGE], cwd=work, check=True)
    package = next(work.glob(f"{PACKAGE}_*.deb"))
    subprocess.run(["dpkg-deb", "-x", str(package), str(work / "package")], check=True)
    return work / "package"


def read_units(package: Path) -> tuple[list[Unit], Counter[str]]:
    """All usable units in order of their id, and how many were left out for which reason."""
    core = package / GAME / "data/core"
    if not core.is_dir():
        raise SystemExit(f"{package} does not hold {GAME}; give the folder that {PACKAGE} was unpacked into")
    races = {tag.keys["id"]: tag.keys for tag in _walk(parse(_read(core / "units.cfg")), "race") if "id" in tag.keys}
    tags = {}
    for path in sorted(core.glob("units/**/*.cfg")):
        for tag in _walk(parse(_read(path)), "unit_type"):
            tags[tag.keys["id"]] = (tag, path.relative_to(core.parent.parent))
    display = {identity: _words(_keys(tag, tags).get("name", "")) for identity, (tag, _) in tags.items()}
    repeated = Counter(name.casefold() for name in display.values())
    credits = read_credits(_read(core / "images/portraits/ARTISTS"))
    units, skipped, taken = [], Counter[str](), set[Path]()
    # Lower levels first: where several units share a portrait it belongs to the first, the others show their sprite.
    for identity in sorted(tags, key=lambda identity: (int(_keys(tags[identity][0], tags).get("level", 0)), identity)):
        tag, source = tags[identity]
        keys = _keys(tag, tags)
        prose = _words(re.sub(r"<[^>]*>", "", keys.get("description", "")))
        if len(prose.split()) < 15:
            skipped["no prose"] += 1
            continue
        if repeated[display[identity].casefold()] > 1:
            skipped["a name that another unit has too"] += 1
            continue
        if not {"race", "level", "alignment", "hitpoints", "cost"} <= keys.keys():
            skipped["a missing fact"] += 1
            continue
        found = find_picture(core / "images", keys, taken)
        if found is None:
            skipped["no picture of its own"] += 1
            continue
        picture, portrait = found
        taken.add(picture)
        slug = re.sub(r"[^a-z0-9]+", "_", display[identity].lower()).strip("_")
        credit = credits.get(_portrait_key(picture.parent.name, picture.stem)) if portrait else None
        by = f" by {credit}" if credit else ""
        record = {
            "id": slug,
            "name": display[identity],
            "type": "unit",
            "image": f"images/{slug}.jpg",
            "text": prose,
            "facts": facts(tag, keys, races, display),
            "source": f"The Battle for Wesnoth 1.16: {source.as_posix()}; {picture.relative_to(core).as_posix()}{by}",
            "licence": LICENCE,
        }
        units.append(Unit(record, picture, portrait, credit))
    return sorted(units, key=lambda unit: str(unit.record["id"])), skipped


def facts(tag: Tag, keys: dict[str, str], races: dict[str, dict[str, str]], display: dict[str, str]) -> dict[str, Any]:
    """A unit's facts, in readable words."""
    race = keys["race"]
    readable = _words(races.get(race, {}).get("male_name", "")).split("^")[-1].lower()
    found: dict[str, Any] = {
        "race": RACE_NAMES.get(race) or readable or race,
        "level": int(keys["level"]),
        "alignment": keys["alignment"],
        "hit_points": int(keys["hitpoints"]),
        "cost": int(keys["cost"]),
        "movement": int(keys["movement"]),
    }
    for attack in tag.all("attack"):
        weapon = _words(attack.keys.get("description", "")) or attack.keys.get("name", "")
        if attack.keys.get("range") in ("melee", "ranged") and weapon and "{" not in weapon:
            found.setdefault(f"{attack.keys['range']}_weapon", weapon.lower())
    advances = [display[one.strip()] for one in keys.get("advances_to", "").split(",") if one.strip() in display]
    if advances:
        found["advances_to"] = advances
    return found


def find_picture(images: Path, keys: dict[str, str], taken: set[Path]) -> tuple[Path, bool] | None:
    """The unit's portrait if no other unit has it, else its sprite; and whether it is a portrait."""
    for key in ("profile", "image"):
        # What follows ~ or { changes colours or mirrors the picture inside the game.
        path = images / re.split(r"[~{]", keys.get(key, ""))[0]
        if path.is_file() and path not in taken:
            return path, key == "profile"
    return None


def read_credits(artists: str) -> dict[tuple[str, frozenset[str]], str]:
    """The game's list of portrait painters, as (folder, words of the file's name) → painter."""
    credits: dict[tuple[str, frozenset[str]], str] = {}
    painter, group = "", ""
    for line in artists.split("Outdated versions:")[0].splitlines():
        text = line.strip()
        if not text:
            painter = group = ""
        elif not line.startswith((" ", "\t")) and ("/" in text or (text.endswith(":") and not painter)):
            painter = text.rstrip(":")
        elif text.rstrip(":") != text or (painter and not line.startswith(" ")):
            group = text.rstrip(":")
        elif painter:
            words = re.sub(r"\(.*?\)|male and female|and alternates?|alternates?|\b\d\b", "", text.lower())
            for part in re.split(r"/| and ", words):
                credits.setdefault(_portrait_key(group, part), painter)
    return credits


def _portrait_key(group: str, words: str) -> tuple[str, frozenset[str]]:
    folders = {"human": "humans", "elve": "elves", "goblin": "goblins", "merfolk": "merfolk", "undead": "undead"}
    folders |= {"orc": "orcs", "drake": "drakes", "saurian": "saurians", "dwar": "dwarves"}
    folder = next((name for word, name in folders.items() if group.lower().startswith(word)), "other")
    # Under "Others" the list names the kind ("Naga Fighter") where the file has it in its folder (nagas/fighter.png).
    kind = {"nagas": "naga", "trolls": "troll", "woses": "wose", "wolves": "wolf"}.get(group, "")
    plain = re.split(r"[^a-z]+", f"{kind} {words}".lower().replace("female", ""))
    return folder, frozenset(plain) - {"", "of", "at", "the"}


def choose(units: list[Unit], count: int) -> list[Unit]:
    """``count`` units with a portrait whose painter the game names, going round the races."""
    usable = [unit for unit in units if unit.portrait and unit.credit]
    by_race: dict[str, list[Unit]] = {}
    for unit in sorted(usable, key=lambda unit: hashlib.sha256(str(unit.record["id"]).encode()).hexdigest()):
        by_race.setdefault(unit.race, []).append(unit)
    chosen: list[Unit] = []
    while len(chosen) < count and any(by_race.values()):
        for race in sorted(by_race):
            if by_race[race] and len(chosen) < count:
                chosen.append(by_race[race].pop(0))
    return sorted(chosen, key=lambda unit: str(unit.record["id"]))


def write(package: Path, units: list[Unit], out: Path) -> None:
    """Write items, pictures, the licence and the wordings; pictures of an earlier preparation are removed."""
    items = out / "items.jsonl"
    if items.exists():
        for item in load_items(items, check_images=False):
            inside(out, item.image).unlink(missing_ok=True)
    (out / "images").mkdir(parents=True, exist_ok=True)
    for unit in units:
        shrink(unit.picture).save(out / str(unit.record["image"]), quality=88, optimize=True)
    write_jsonl(items, [unit.record for unit in units])
    write_text(out / "LICENSE", _read(package / GAME / "data/COPYING.txt"))
    write_text(out / "wordings.yaml", _read(Path(__file__).parent / "data/wordings.yaml"))


def shrink(path: Path) -> Image.Image:
    """The picture on a plain background, cut to what is painted, at most ``SIZE`` pixels a side; sprites grow to it."""
    with Image.open(path) as opened:
        image = opened.convert("RGBA")
    box = image.getchannel("A").getbbox()
    image = image.crop(box) if box else image
    scale = SIZE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)
    square = Image.new("RGB", (SIZE, SIZE), BACKGROUND)
    square.paste(image, ((SIZE - image.width) // 2, SIZE - image.height), image)
    return square


def _walk(tag: Tag, name: str) -> Iterable[Tag]:
    for child in tag.children:
        if child.name == name:
            yield child
        yield from _walk(child, name)


def _keys(tag: Tag, tags: dict[str, tuple[Tag, Path]]) -> dict[str, str]:
    """A unit's keys over those of the unit that it is derived from, if any."""
    base = next(tag.all("base_unit"), None)
    if base is None or base.keys["id"] == tag.keys["id"]:
        return tag.keys
    return _keys(tags[base.keys["id"]][0], tags) | tag.keys


def _words(text: str) -> str:
    """Plain words: no line breaks, straight quotation marks, no translator's context before ``^``."""
    return " ".join(re.sub(r"^[\w+ ]*\^", "", text.strip()).translate(TYPOGRAPHY).split())


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


if __name__ == "__main__":
    main()
