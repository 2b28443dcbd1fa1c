"""The spectra's table and plot: made from their files, equal on equal numbers, clear about broken ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kore_fast.constraint.spectrum import Spectrum, write_spectra
from kore_fast.errors import DataError
from kore_fast.report.figures import DARK
from kore_fast.report.spectrum import draw_tails, spectrum_table

PREFIX = "model.layers"


def found(exponent: float = 4.0) -> list[Spectrum]:
    """Two decoder layers: attention's input shared by three linears, singular in one of the two; a wide input."""
    result = []
    for n in (0, 1):
        attention = tuple(f"{PREFIX}.{n}.self_attn.{name}_proj" for name in "qkv")
        values = torch.logspace(-exponent, 0, 8, dtype=torch.float64)
        result.append(Spectrum(attention[0], attention, 8, 16 * (n + 1), values * (torch.arange(8) >= 2 * n)))
        down = f"{PREFIX}.{n}.mlp.down_proj"
        result.append(Spectrum(down, (down,), 20, 50, torch.linspace(1, 2, 20, dtype=torch.float64)))
    return result


def test_a_line_for_each_kind_with_its_worst(tmp_path: Path) -> None:
    write_spectra(found(), tmp_path, [4, 10])
    lines = spectrum_table(tmp_path).splitlines()
    assert " ".join(lines[0].split()) == "input of inputs width tokens/width κ effective rank tail at 4 tail at 10"
    attention, down = (line.split("  ") for line in lines[2:4])
    attention, down = ([cell.strip() for cell in line if cell.strip()] for line in (attention, down))
    assert attention[:5] == ["q_proj, k_proj, v_proj", "2", "8", "2", "∞"]
    assert down[:5] == ["down_proj", "2", "20", "2.5", "2"]
    worst = max(spectrum.tail_energy(4) for spectrum in found() if spectrum.d == 8)
    assert float(attention[6]) == pytest.approx(worst, rel=0.05)
    assert attention[7] == "–"
    assert float(down[7]) == pytest.approx(found()[1].tail_energy(10), rel=0.05)
    assert max(map(len, lines)) <= 100


def test_the_plot_is_of_its_numbers_only(tmp_path: Path) -> None:
    pictures = []
    for name, exponent in (("one", 4.0), ("two", 4.0), ("other", 3.0)):
        write_spectra(found(exponent), tmp_path / name, [4])
        pictures.append(draw_tails(tmp_path / name).read_bytes())
    assert pictures[0].startswith(b"\x89PNG")
    assert b"Software" not in pictures[0]
    assert pictures[0] == pictures[1]
    assert pictures[0] != pictures[2]
    assert draw_tails(tmp_path / "one", DARK).read_bytes() != pictures[0]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["spectrum.csv", "tails.csv", "tails.png"]


def test_names_that_mean_something_elsewhere_are_shown(tmp_path: Path) -> None:
    write_spectra([Spectrum("a$x_\x1b$", ("a$x_\x1b$",), 3, 9, torch.ones(3, dtype=torch.float64))], tmp_path)
    assert draw_tails(tmp_path).read_bytes().startswith(b"\x89PNG")
    assert "\x1b" not in spectrum_table(tmp_path)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"spectrum\.csv: missing.*kore-fast spectrum"):
        spectrum_table(tmp_path)
    write_spectra(found(), tmp_path, [4])
    (tmp_path / "tails.csv").unlink()
    with pytest.raises(DataError, match=r"tails\.csv: missing"):
        draw_tails(tmp_path)
    (tmp_path / "tails.csv").write_text("shares,d_in,rank,energy\nother,3,1,0.5\n")
    with pytest.raises(DataError, match=r"tails\.csv: .*not of"):
        draw_tails(tmp_path)
    text = (tmp_path / "spectrum.csv").read_text()
    (tmp_path / "spectrum.csv").write_text(text.replace(",20,", ",wide,", 1))
    with pytest.raises(DataError, match=r"spectrum\.csv, row 4: .*wide.*kore-fast spectrum"):
        spectrum_table(tmp_path)
