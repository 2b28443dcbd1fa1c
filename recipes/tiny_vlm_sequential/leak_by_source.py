"""Of a run's KORE starts, the mean leak of A on each source of its covariances alone, as CSV."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from statistics import fmean

import torch

from kore_fast.constraint import CovarianceStore
from kore_fast.constraint.leak import leak_report
from kore_fast.modules.adapter_files import read_adapter


def main(arguments: list[str] | None = None) -> None:
    """Print a row for each source and start of the run's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run whose stages covariance and init are done")
    run = parser.parse_args(arguments).run
    store = CovarianceStore.load(run / "covariance")
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["source", "start", "leak"])
    for source in store.sources:
        alone = {**dict.fromkeys(store.sources, 0.0), source: 1.0}
        for folder in sorted(path.parent for path in (run / "init").glob("*/adapter_model.safetensors")):
            A = read_adapter(folder).A
            # A's leak depends on no weight.
            weights = {layer: torch.zeros(1, factor.shape[1]) for layer, factor in A.items()}
            leaks = [found.leak for found in leak_report(A, weights, store, alone)]
            writer.writerow([source, folder.name, f"{fmean(leaks):.4f}"])


if __name__ == "__main__":
    main()
