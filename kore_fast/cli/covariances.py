"""``kore-fast spectrum``: how much room covariances leave."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kore_fast.cli.arguments import device_of, verbose

# Those of `kore-fast spectrum` when none is given.
_RANKS = (16, 64, 256)


def add_spectrum(commands: Any) -> None:
    command = commands.add_parser("spectrum", help="covariances → how much room they leave, layer by layer")
    command.add_argument("store", type=Path, help="a covariance folder or file, or a run's folder")
    command.add_argument(
        "--rank", type=int, nargs="+", metavar="R", help="ranks to show the tail's energy at (default: 16 64 256)"
    )
    command.add_argument(
        "--weight", action="append", default=[], metavar="SOURCE=W", help="a source's weight in the mix (default: 1)"
    )
    command.add_argument("--device", default="cpu", help="where to compute eigenvalues (default: cpu)")
    command.add_argument("--output", type=Path, metavar="DIR", help="default: spectrum/ beside the covariance folder")
    verbose(command)
    command.set_defaults(work=_spectrum)


def _spectrum(options: argparse.Namespace) -> int:
    from kore_fast.constraint.spectrum import check_ranks, spectra, write_spectra
    from kore_fast.constraint.store import CovarianceStore
    from kore_fast.progress import bar
    from kore_fast.report.spectrum import draw_tails, spectrum_table

    path = (options.store / "covariance" if (options.store / "covariance").is_dir() else options.store).resolve()
    store = CovarianceStore.load(path)
    widest = max(store.widths.values())
    ranks = options.rank or [rank for rank in _RANKS if rank < widest]
    check_ranks(ranks, widest)
    found = spectra(
        store,
        _source_weights(options.weight),
        device=device_of(options.device),
        progress=lambda groups: bar(groups, len(store.groups), "spectra"),
    )
    output = options.output or _beside(path) / "spectrum"
    write_spectra(found, output, ranks)
    picture = draw_tails(output)
    print(f"{spectrum_table(output)}\n\nThe table by layer: {output / 'spectrum.csv'}\nThe plot: {picture}")
    return 0


def _source_weights(texts: Sequence[str]) -> dict[str, float] | None:
    from kore_fast.errors import StoreError

    weights = {}
    for text in texts:
        source, _, number = text.rpartition("=")
        try:
            weights[source] = float(number)
        except ValueError:
            source = ""
        if not source:
            raise StoreError(f"--weight {text}: want SOURCE=NUMBER, as in text=2")
    return weights or None


def _beside(store: Path) -> Path:
    """The folder that holds the store: outside a stage's own folder, the content of which later stages depend on."""
    folder = store.parent
    return folder.parent if (folder / "stage.json").is_file() else folder
