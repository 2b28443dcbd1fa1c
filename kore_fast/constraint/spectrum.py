"""Spectra: how much room old knowledge leaves in each distinct input, and how well its covariance is known."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kore_fast.constraint.store import CovarianceStore
from kore_fast.errors import ConstraintError
from kore_fast.files import write_text
from kore_fast.ops.covariance import TOKENS

TABLE = "spectrum.csv"
TAILS = "tails.csv"
# Of a curve in `TAILS`, spread evenly over the logarithm of the rank.
_POINTS = 64


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The eigenvalues of one distinct input's covariance, and what they say."""

    group: str
    """The distinct input's name: the first layer that reads it."""
    layers: tuple[str, ...]
    """The layers in question that read it."""
    d: int
    """Its width."""
    tokens: int
    """Tokens behind the covariance; C is singular below d of them."""
    eigenvalues: torch.Tensor
    """(d,) float64 on the CPU, ascending, as computed: the zeros of a singular C are rounding, of either sign."""

    @cached_property
    def values(self) -> torch.Tensor:
        """(d,) the eigenvalues without rounding: 0 where they cannot be told from 0 (d·ε·λ_max, as in NumPy's
        ``matrix_rank``), and for the d − tokens lowest, as no more than ``tokens`` rows make C."""
        floor = self.d * torch.finfo(torch.float64).eps * self.eigenvalues[-1].clamp(min=0)
        known = torch.arange(self.d) >= self.d - self.tokens
        return torch.where(known & (self.eigenvalues > floor), self.eigenvalues, 0.0)

    @property
    def condition_number(self) -> float:
        """κ = λ_max / λ_min; infinite for a singular C."""
        smallest, largest = float(self.values[0]), float(self.values[-1])
        return largest / smallest if smallest > 0 else math.inf

    @cached_property
    def effective_rank(self) -> float:
        """exp(−Σ p ln p), p the eigenvalues' shares of the trace: 1…d, and 0 for C = 0 (Roy & Vetterli, "The effective
        rank", EUSIPCO 2007)."""
        return float(torch.special.entr(self.shares).sum().exp()) if self.trace > 0 else 0.0

    @property
    def tokens_per_width(self) -> float:
        """Tokens a dimension: below 1 C is singular, a few are needed to know its low eigenvalues."""
        return self.tokens / self.d

    @property
    def trace(self) -> float:
        """tr C."""
        return float(self.values.sum())

    @cached_property
    def shares(self) -> torch.Tensor:
        """(d,) share of tr C in each direction, ascending; zeros for C = 0."""
        return self.values / self.trace if self.trace > 0 else self.values

    @cached_property
    def tails(self) -> torch.Tensor:
        """(d + 1,) share of tr C in the bottom-r space, for r = 0…d."""
        return torch.cat([self.shares.new_zeros(1), self.shares.cumsum(0)])

    def tail_energy(self, rank: int) -> float:
        """Share of tr C that the bottom-``rank`` space carries, 0 ≤ rank ≤ d.

        Raises:
            ConstraintError: a rank outside 0…d.
        """
        if not 0 <= rank <= self.d:
            raise ConstraintError(f"{self.group}: rank {rank} is outside 0…{self.d}, the input's width")
        return float(self.tails[rank])


def spectra(
    store: CovarianceStore,
    source_weights: Mapping[str, float] | None = None,
    layers: Iterable[str] | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[Iterable[str]], Iterable[str]] | None = None,
) -> list[Spectrum]:
    """The spectrum of every distinct input that ``layers`` read, in the store's order; float64 on ``device``.

    Args:
        source_weights: see `CovarianceStore.covariance`; tokens of a source with weight 0 do not count.
        layers: default all of the store.

    Raises:
        StoreError: the store lacks a layer, or its sources do not fit the weights.
        ConstraintError: a covariance holds NaN or infinite values.
    """
    chosen = None if layers is None else set(layers)
    for layer in sorted(chosen or ()):
        store.group_of(layer)
    members = {
        group: tuple(name for name in names if chosen is None or name in chosen)
        for group, names in store.groups.items()
    }
    sources = store.mix(source_weights)
    groups = [group for group, names in members.items() if names]
    found = []
    for group in progress(groups) if progress else groups:
        C = store.covariance(group, source_weights).to(device)
        if not bool(torch.isfinite(C).all()):
            raise ConstraintError(f"{group}: its covariance holds NaN or infinite values; collect it again")
        tokens = sum(int(store.count(group, source)[TOKENS]) for source in sources)
        found.append(Spectrum(group, members[group], len(C), tokens, torch.linalg.eigvalsh(C).cpu()))
    return found


def write_spectra(found: Sequence[Spectrum], folder: str | Path, ranks: Sequence[int] = ()) -> None:
    """Write ``spectrum.csv``, a row a layer, and ``tails.csv``, the energy of each distinct input's tail by its rank.

    Args:
        ranks: of the table's columns ``tail_energy_<rank>``; empty where the input is narrower.

    Raises:
        ConstraintError: a rank below 1 or above every width.
        DataError: the folder cannot be written.
    """
    check_ranks(ranks, max((spectrum.d for spectrum in found), default=0))
    rows = [{"layer": layer, **_row(spectrum, ranks)} for spectrum in found for layer in spectrum.layers]
    columns = ["layer", *_COLUMNS, *(f"tail_energy_{rank}" for rank in ranks)]
    write_text(Path(folder) / TABLE, _csv(columns, rows))
    write_text(Path(folder) / TAILS, _csv(["shares", "d_in", "rank", "energy"], _tails(found)))


def check_ranks(ranks: Sequence[int], widest: int) -> None:
    """Raises `ConstraintError` for a rank outside 1…``widest``."""
    for rank in ranks:
        if not 1 <= rank <= widest:
            raise ConstraintError(f"rank {rank}: want 1…{widest}, the widest input")


_COLUMNS: dict[str, Callable[[Spectrum], Any]] = {
    "shares": lambda s: s.group,
    "d_in": lambda s: s.d,
    "tokens": lambda s: s.tokens,
    "tokens_per_width": lambda s: s.tokens_per_width,
    "lambda_min": lambda s: float(s.values[0]),
    "lambda_max": lambda s: float(s.values[-1]),
    "condition_number": lambda s: s.condition_number,
    "effective_rank": lambda s: s.effective_rank,
}


def _row(spectrum: Spectrum, ranks: Sequence[int]) -> dict[str, Any]:
    energies = {f"tail_energy_{r}": spectrum.tail_energy(r) if r <= spectrum.d else None for r in ranks}
    return {**{name: value(spectrum) for name, value in _COLUMNS.items()}, **energies}


def _tails(found: Sequence[Spectrum]) -> Iterator[dict[str, Any]]:
    for spectrum in found:
        spread = torch.logspace(0, math.log10(spectrum.d), _POINTS, dtype=torch.float64)
        for rank in sorted({1, *spread.round().int().clamp(1, spectrum.d).tolist(), spectrum.d}):
            energy = spectrum.tail_energy(rank)
            yield {"shares": spectrum.group, "d_in": spectrum.d, "rank": rank, "energy": energy}


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
