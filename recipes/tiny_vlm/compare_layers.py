"""Which layer of the vision tower tells best what a drawing shows: match drawings of one thing in two styles.

python recipes/tiny_vlm/compare_layers.py --pictures DIR --packages DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.nn import functional

import build
from align import load_pixels, read_pictures

REFERENCE, OTHERS = "noto", ("twemoji", "openclipart", "openmoji")


def main() -> None:
    """Print, for each layer and other collection, how often the nearest emoji is the one of the same name."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--pictures", type=Path, required=True, help="the folder that prepare_pictures.py wrote")
    parser.add_argument("--packages", type=Path, required=True, help="where the packages are unpacked")
    arguments = parser.parse_args()
    named = {
        source: {row["name"]: row for row in read_pictures(arguments.pictures) if row["source"] == source}
        for source in (REFERENCE, *OTHERS)
    }
    tower = build.load_vision_tower(build.fetch_packages(arguments.packages))

    def features(source: str, names: list[str]) -> torch.Tensor:
        batches = []
        for start in range(0, len(names), 64):
            rows = [named[source][name] for name in names[start : start + 64]]
            pixels = torch.stack([load_pixels(arguments.pictures / row["image"]) for row in rows])
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                states = tower(pixels, output_hidden_states=True).hidden_states
            batches.append(torch.stack([state[:, 1:].float().mean(dim=1) for state in states]))
        return torch.cat(batches, dim=1)

    print("layer " + " ".join(f"{other:>12}" for other in OTHERS))
    shares = {}
    for other in OTHERS:
        names = sorted(name for name in named[REFERENCE] if name in named[other] and not name.startswith("flag"))
        left, right = features(other, names), features(REFERENCE, names)
        for layer in range(1, left.shape[0]):
            both = torch.cat([left[layer], right[layer]])
            both = functional.normalize((both - both.mean(0)) / both.std(0), dim=1)
            nearest = (both[: len(names)] @ both[len(names) :].T).argmax(dim=1)
            shares[layer, other] = float((nearest == torch.arange(len(names))).float().mean())
    for layer in range(1, 13):
        print(f"{layer:5} " + " ".join(f"{shares[layer, other]:12.3f}" for other in OTHERS))


if __name__ == "__main__":
    main()
