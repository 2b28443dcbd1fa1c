"""The low end of a spectrum by shift-inverted block Krylov iteration, in plain PyTorch.

Inverting C turns its low end into its high end. A shift just below the smallest eigenvalue spreads it: where the low
eigenvalues differ by a tenth, 2 to 3 columns a direction reach what takes 6 to 8 without. The shift needs the smallest
eigenvalue, which the first blocks give, and a second factorisation, whose success proves that the shift is below it.

Sources: block Krylov methods for low-rank approximation, Musco and Musco, arXiv 1504.05477; rational Krylov with full
reorthogonalisation, Ruhe 1984.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from kore_fast.ops.certificate import EPS, slack
from kore_fast.ops.cholesky import factorize_, solve
from kore_fast.ops.covariance import covariance_update_, finalize, new_count

# Blocks before the shift is chosen: their smallest Ritz value is a few hundredths above the smallest eigenvalue.
_FIRST_BLOCKS = 3
# How far below that Ritz value the shift is tried first.
_SHIFT = 0.93
# Where the first third of the low eigenvalues span more than this factor, a shift gains less than it costs.
_FLAT = 1.3


class LowEnd(NamedTuple):
    """Ritz vectors of C for its r smallest eigenvalues."""

    basis: torch.Tensor
    """(d, r) orthonormal."""
    values: torch.Tensor
    """(r,) their Ritz values, ascending."""
    residuals: torch.Tensor
    """(r,) ‖C û − θ û‖."""


class KrylovSpace:
    """An orthonormal basis Q (d, columns) that grows by blocks, with C Q and Qᵀ C Q as soon as they are asked for."""

    def __init__(self, C: torch.Tensor) -> None:
        self._C = C
        # Rows are the vectors: a new block is appended without a copy of the others.
        self._vectors = C.new_empty(0, len(C))
        self._products = C.new_empty(0, len(C))
        self._projected = C.new_empty(0, 0)
        self.columns = 0
        self.shift = 0.0

    @property
    def Q(self) -> torch.Tensor:
        """(d, columns)."""
        return self._vectors[: self.columns].mT

    def append(self, block: torch.Tensor) -> None:
        """Take in orthonormal columns (d, b) that are orthogonal to Q."""
        end = self.columns + block.shape[1]
        self._vectors = _with_room(self._vectors, end)
        self._vectors[self.columns : end] = block.mT
        self.columns = end

    def _project(self) -> torch.Tensor:
        """Qᵀ C Q, whose rows for new vectors are computed all at once."""
        done = len(self._projected)
        if done < self.columns:
            self._products = _with_room(self._products, self.columns)
            torch.mm(self._vectors[done : self.columns], self._C, out=self._products[done : self.columns])
            grown = self._C.new_empty(self.columns, self.columns)
            grown[:done, :done] = self._projected
            grown[done:] = self._products[done : self.columns] @ self.Q
            grown[:done, done:] = grown[done:, :done].mT
            self._projected = grown
        return (self._projected + self._projected.mT) / 2

    def values(self) -> torch.Tensor:
        """All Ritz values, ascending: each at least the eigenvalue of C of its place."""
        return torch.linalg.eigvalsh(self._project())

    def low_end(self, rank: int) -> LowEnd:
        """The Ritz vectors of the ``rank`` smallest."""
        values, turned = torch.linalg.eigh(self._project())
        values, turned = values[:rank], turned[:, :rank]
        basis = self.Q @ turned
        residuals = torch.linalg.vector_norm(self._products[: self.columns].mT @ turned - basis * values, dim=0)
        return LowEnd(basis, values, residuals)


def krylov_spaces(C: torch.Tensor, rank: int, generator: torch.Generator) -> Iterator[KrylovSpace]:
    """The space after every block, from ``rank`` columns on, for the bottom-``rank`` space of ``C`` (d, d) float64.

    It is one space that grows. It ends where it would hold half of all directions: a full decomposition is then no
    dearer.

    Raises:
        ArithmeticError: C cannot be factorised: it is not positive semi-definite to working precision.
    """
    d = len(C)
    block = max(4, -(-rank // 3))
    factor = _factor(C, 0.0)
    if factor is None:
        raise ArithmeticError("C has no Cholesky factor: it is not positive semi-definite to working precision")
    space = KrylovSpace(C)
    start = None
    while space.columns + block <= max(d // 2, 2 * rank):
        if start is None:
            start = torch.randn(d, block, generator=generator, dtype=C.dtype, device=C.device)
        start = _orthonormal(solve(factor, start), space.Q)
        space.append(start)
        if space.columns == _FIRST_BLOCKS * block:
            values = space.values()
            if float(values[-1]) <= slack(C):
                start = None
            else:
                factor = _shifted(C, factor, values, space)
        if space.columns >= rank:
            yield space


def _factor(C: torch.Tensor, shift: float) -> torch.Tensor | None:
    """Of C − σ I; lightly regularised where σ = 0."""
    S = C.clone()
    diagonal = S.diagonal()
    if shift == 0:
        # Relative to each entry, so that massive coordinates do not drown the others, and never nothing.
        diagonal.add_(4 * len(C) * EPS * (diagonal + diagonal.mean()))
    else:
        diagonal.sub_(shift)
    return factorize_(S)


def _shifted(C: torch.Tensor, unshifted: torch.Tensor, values: torch.Tensor, space: KrylovSpace) -> torch.Tensor:
    """A factor at a shift just below the smallest eigenvalue; the unshifted one where that gains nothing."""
    smallest = float(values[0])
    if smallest <= slack(C) or float(values[len(values) // _FIRST_BLOCKS - 1]) > _FLAT * smallest:
        return unshifted
    shift = _SHIFT * smallest
    for _ in range(3):
        factor = _factor(C, shift)
        if factor is not None:
            space.shift = shift
            return factor
        shift *= _SHIFT
    return unshifted


def _with_room(rows: torch.Tensor, wanted: int) -> torch.Tensor:
    if wanted <= len(rows):
        return rows
    larger = rows.new_empty(max(wanted, 2 * len(rows)), rows.shape[1])
    larger[: len(rows)] = rows
    return larger


def _orthonormal(V: torch.Tensor, against: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the columns of ``V`` (d, b), orthogonal to ``against``: block Gram-Schmidt, twice."""
    for _ in range(2):
        if against.shape[1]:
            V = V - against @ (against.mT @ V)
        V = cholesky_qr(V)
    return V


def cholesky_qr(V: torch.Tensor) -> torch.Tensor:
    """One round of CholeskyQR, or Householder's QR where the Gram matrix of ``V`` (d, b) is too near singular for it.

    Two rounds make the columns orthonormal to working precision (Fukaya et al. 2014).
    """
    V = V / torch.linalg.vector_norm(V, dim=0).clamp(min=torch.finfo(V.dtype).tiny)
    gram = V.new_zeros(V.shape[1], V.shape[1])
    covariance_update_(gram, new_count(device=V.device), V)
    L, failed = torch.linalg.cholesky_ex(finalize(gram))
    if int(failed) != 0 or float(L.diagonal().min()) < 1e-7:
        return torch.linalg.qr(V)[0]
    return torch.linalg.solve_triangular(L.mT, V, upper=True, left=False)
