"""Spectra: figures of known matrices, what the store's sources give, and the table and curves that are written."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from kore_fast.constraint import CovarianceStore, collect_covariance
from kore_fast.constraint.spectrum import Spectrum, spectra, write_spectra
from kore_fast.errors import ConstraintError, DataError, StoreError
from kore_fast.ops import nullspace


class Three(nn.Module):
    """Two layers that share an input and one of another width."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(5, 3), nn.Linear(5, 7), nn.Linear(7, 2)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x).sum() + self.c(self.b(x)).sum()


def rows(seed: int, n: int) -> torch.Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed)).double()


def store(n: int = 20, source: str = "text", seed: int = 0) -> CovarianceStore:
    return collect_covariance(Three(), [{"x": rows(seed, n)}], source=source, target_modules=["a", "b", "c"])


def of(values: list[float], tokens: int = 100) -> Spectrum:
    return Spectrum("x", ("x",), len(values), tokens, torch.tensor(values, dtype=torch.float64))


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_figures_of_known_eigenvalues() -> None:
    found = of([1.0, 2.0, 5.0, 8.0], tokens=10)
    assert found.condition_number == 8.0
    assert [found.tail_energy(r) for r in range(5)] == pytest.approx([0, 1 / 16, 3 / 16, 8 / 16, 1])
    p = [1 / 16, 2 / 16, 5 / 16, 8 / 16]
    assert found.effective_rank == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
    assert found.tokens_per_width == 2.5
    for rank in (-1, 5):
        with pytest.raises(ConstraintError, match=f"x: rank {rank} is outside 0…4"):
            found.tail_energy(rank)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_effective_rank_counts_equal_directions(k: int) -> None:
    found = of([0.0] * (8 - k) + [3.0] * k)
    assert found.effective_rank == pytest.approx(k)
    assert found.tail_energy(8 - k) == 0


def test_rounding_of_a_singular_covariance_is_not_a_condition() -> None:
    for noise in (-1e-17, 0.0, 1e-17):
        found = of([noise, 1.0, 2.0])
        assert found.condition_number == math.inf
        assert found.tail_energy(1) == 0
        assert found.effective_rank <= 3
    assert of([1e-12, 1.0, 2.0]).condition_number == pytest.approx(2e12)


def test_no_more_directions_than_tokens() -> None:
    """Sums of single-precision products leave more than float64's rounding where nothing was seen."""
    found = of([-2e-8, 1e-8, 1.0, 3.0], tokens=2)
    assert found.condition_number == math.inf
    assert [found.tail_energy(r) for r in range(5)] == [0, 0, 0, 0.25, 1]
    assert of([1e-8, 1.0, 3.0], tokens=3).condition_number == pytest.approx(3e8)


def test_an_input_that_is_always_zero() -> None:
    found = of([0.0, 0.0])
    assert (found.condition_number, found.effective_rank, found.tail_energy(2)) == (math.inf, 0.0, 0.0)


def test_spectra_are_those_of_the_second_moment() -> None:
    found = spectra(store())
    assert [(s.group, s.layers, s.d, s.tokens) for s in found] == [("a", ("a", "b"), 5, 20), ("c", ("c",), 7, 20)]
    # Independent of the store: squared singular values of the rows.
    wanted = torch.linalg.svdvals(rows(0, 20)).square().flip(0) / 20
    assert torch.allclose(found[0].eigenvalues, wanted, rtol=1e-9)
    for s in found:
        C = store().covariance(s.group)
        for rank in range(1, s.d + 1):
            assert s.tail_energy(rank) == pytest.approx(float(nullspace(C, rank).energy), rel=1e-9, abs=1e-14)
    # c reads b's outputs: affine in 5 dimensions, so at most 6 of 7.
    assert found[1].condition_number == math.inf
    assert found[1].tail_energy(1) < 1e-14


def test_fewer_tokens_than_width_is_singular() -> None:
    found = spectra(store(n=3))[0]
    assert found.tokens_per_width == pytest.approx(0.6)
    assert found.condition_number == math.inf
    assert found.tail_energy(2) < 1e-14
    assert found.tail_energy(3) > 1e-4
    assert 1 < found.effective_rank <= 3 + 1e-9


def test_sources_and_layers_are_chosen() -> None:
    both = store().merge(store(30, "chat", seed=1))
    alone = spectra(store())[0]
    assert torch.equal(spectra(both, {"chat": 0})[0].eigenvalues, alone.eigenvalues)
    assert spectra(both, {"chat": 0})[0].tokens == 20
    assert spectra(both, {"chat": 0.5})[0].tokens == spectra(both)[0].tokens == 50
    assert not torch.allclose(spectra(both)[0].eigenvalues, alone.eigenvalues)
    assert [(s.group, s.layers) for s in spectra(both, layers=["b"])] == [("a", ("b",))]
    with pytest.raises(StoreError, match="no such layer"):
        spectra(both, layers=["b", "z"])
    shown: list[str] = []
    spectra(both, progress=lambda groups: shown.extend(groups) or list(shown))
    assert shown == ["a", "c"]


def test_a_covariance_that_is_not_finite_is_named() -> None:
    broken = store()
    broken.parts[("text", "c")][0].packed[3] = math.nan  # type: ignore[index]
    with pytest.raises(ConstraintError, match="c: its covariance holds NaN"):
        spectra(broken)


def test_written_table_and_curves(tmp_path: Path) -> None:
    found = spectra(store())
    write_spectra(found, tmp_path / "one", [2, 6])
    table = read(tmp_path / "one" / "spectrum.csv")
    assert [(row["layer"], row["shares"], row["d_in"]) for row in table] == [
        ("a", "a", "5"),
        ("b", "a", "5"),
        ("c", "c", "7"),
    ]
    assert float(table[1]["tail_energy_2"]) == found[0].tail_energy(2)
    assert table[1]["tail_energy_6"] == ""
    assert float(table[2]["tail_energy_6"]) == found[1].tail_energy(6)
    assert table[2]["condition_number"] == "inf"
    assert float(table[0]["condition_number"]) == found[0].condition_number
    assert float(table[0]["lambda_min"]) > 0
    curves = read(tmp_path / "one" / "tails.csv")
    for s in found:
        curve = [(int(row["rank"]), float(row["energy"])) for row in curves if row["shares"] == s.group]
        assert curve == [(rank, s.tail_energy(rank)) for rank in range(1, s.d + 1)]
    write_spectra(spectra(store()), tmp_path / "two", [2, 6])
    for name in ("spectrum.csv", "tails.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_curves_of_wide_inputs_are_thinned_from_end_to_end(tmp_path: Path) -> None:
    write_spectra([of([float(value) for value in range(1000)])], tmp_path)
    ranks = [int(row["rank"]) for row in read(tmp_path / "tails.csv")]
    assert (ranks[0], ranks[-1]) == (1, 1000)
    assert ranks == sorted(set(ranks))
    assert 40 < len(ranks) <= 64


def test_what_cannot_be_written(tmp_path: Path) -> None:
    for rank in (0, 8):
        with pytest.raises(ConstraintError, match=f"rank {rank}: want 1…7"):
            write_spectra(spectra(store()), tmp_path, [rank])
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"spectrum\.csv: could not be written"):
        write_spectra(spectra(store()), tmp_path / "file")
