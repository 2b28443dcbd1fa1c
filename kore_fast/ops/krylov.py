"""The low end of a spectrum by shift-inverted block Krylov iteration, in plain PyTorch.

Inverting C turns its low end into its high end. A shift just below the smallest eigenvalue spreads it: where the low
eigenvalues differ by a tenth, 2 to 3 columns a direction reach what takes 6 to 8 without. The first two blocks tell
where the smallest eigenvalue is; a second factorisation, which the shift needs, proves by its success that it is below.

Sources: block Krylov methods for low-rank approximation, Musco and Musco, arXiv 1504.05477; rational Krylov with full
reorthogonalisation, Ruhe 1984.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from kore_fast.ops.certificate import EPS, slack
from kore_fast.ops.covariance import covariance_update_, finalize, new_count
from kore_fast.ops.dense import factorize_, product, solve, solve_lower, subtract_product_

# Where so little of a vector is new, its product with C is computed afresh.
_CANCELLED = 1e-3
# Of the random block, beside products of unit norm.
_TRACE = 1e-12
# How far below the estimate of the smallest eigenvalue the shift is tried first.
_SHIFT = 0.95
# Where the lowest third of the first Ritz values span more than this factor, a shift gains less than it costs.
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
    """An orthonormal basis Q (d, columns) that grows by blocks, with C Q and Qᵀ C Q."""

    def __init__(self, C: torch.Tensor) -> None:
        self._C, self._d = C, len(C)
        # Rows are [q, C q], so that one product does the same to both, and a new block copies no old one.
        self._rows = C.new_empty(0, 2 * self._d)
        self._projected = C.new_empty(0, 0)
        self.columns = 0
        self.shift = 0.0
        self.fresh = False
        """Set by the user: begin the next block at random, for eigenvectors in which the first start had no part."""
        self._spare: torch.Tensor | None = None

    def spare(self) -> torch.Tensor:
        """(d, d) row-major to work in. The same each time: new memory is cleared page by page, which takes a tenth of a
        factorisation and more."""
        if self._spare is None:
            self._spare = torch.empty_like(self._C, memory_format=torch.contiguous_format)
        return self._spare

    def exchange(self, memory: torch.Tensor) -> None:
        """Take ``memory`` (d, d) as the spare one: what was it is in use."""
        self._spare = memory if memory.is_contiguous() else memory.mT

    @property
    def Q(self) -> torch.Tensor:
        """(d, columns)."""
        return self._rows[: self.columns, : self._d].mT

    @property
    def CQ(self) -> torch.Tensor:
        """(d, columns)."""
        return self._rows[: self.columns, self._d :].mT

    def append(self, Y: torch.Tensor, CY: torch.Tensor | None = None) -> torch.Tensor:
        """Take in what Y (d, b) adds to the space; returns its orthonormal basis (d, b).

        Block Gram-Schmidt, twice. What is done to Y is done to C Y, so that no product with C is needed; unless so
        little of Y is new that the rounding of C Y would outweigh it, or there is no C Y.
        """
        multiply = CY is None
        CY = torch.zeros_like(Y) if CY is None else CY
        rows, old = torch.cat([Y.mT, CY.mT], 1), self._rows[: self.columns]
        rows = rows / torch.linalg.vector_norm(rows[:, : self._d], dim=1, keepdim=True)
        new = 1.0
        for _ in range(2):
            if self.columns:
                subtract_product_(rows, product(rows[:, : self._d], old[:, : self._d].mT), old)
            rows, least = self._cholesky_qr(rows)
            new *= least
        if multiply or new < _CANCELLED:
            rows[:, self._d :] = product(self._C, rows[:, : self._d].mT).mT
        end = self.columns + len(rows)
        if end > len(self._rows):
            larger = rows.new_empty(2 * end, 2 * self._d)
            larger[: self.columns] = old
            self._rows = larger
        self._rows[self.columns : end] = rows
        self.columns = end
        return rows[:, : self._d].mT

    def _cholesky_qr(self, rows: torch.Tensor) -> tuple[torch.Tensor, float]:
        """One round of CholeskyQR, or of Householder's QR where the Gram matrix is too near singular for it.

        Two rounds make the vectors orthonormal to working precision (Fukaya et al. 2014). Also returns how small the
        smallest part of a row was that lay in no other's direction.
        """
        norms = torch.linalg.vector_norm(rows[:, : self._d], dim=1, keepdim=True)
        rows = rows / norms.clamp(min=torch.finfo(rows.dtype).tiny)
        gram = rows.new_zeros(len(rows), len(rows))
        covariance_update_(gram, new_count(device=rows.device), rows[:, : self._d].mT)
        L, failed = torch.linalg.cholesky_ex(finalize(gram))
        least = float(L.diagonal().min())
        if int(failed) != 0 or least < 1e-7:
            Q = torch.linalg.qr(rows[:, : self._d].mT)[0]  # the products are made anew
            return torch.cat([Q.mT, torch.zeros_like(Q.mT)], 1), 0.0
        return solve_lower(L, rows), least * float(norms.min())

    def _project(self) -> torch.Tensor:
        """Qᵀ C Q, whose rows for new vectors are computed all at once."""
        done = len(self._projected)
        if done < self.columns:
            grown = self._projected.new_empty(self.columns, self.columns)
            grown[:done, :done] = self._projected
            grown[done:] = product(self._rows[done : self.columns, self._d :], self._rows[: self.columns, : self._d].mT)
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
        rows = product(turned.mT, self._rows[: self.columns])
        basis = rows[:, : self._d].mT
        residuals = torch.linalg.vector_norm(rows[:, self._d :].mT - basis * values, dim=0)
        return LowEnd(basis, values, residuals)


def krylov_spaces(C: torch.Tensor, rank: int, generator: torch.Generator) -> Iterator[KrylovSpace]:
    """The space after every block, from ``rank`` columns on, for the bottom-``rank`` space of ``C`` (d, d) float64.

    It is one space that grows. It ends where it would hold half of all directions: a full decomposition is then no
    dearer.

    Raises:
        ArithmeticError: C cannot be factorised: it is not positive semi-definite to working precision.
    """
    d = len(C)
    block = 16 * -(-rank // 48)  # about a third of the rank, and whole vectors
    inverse = _Inverse.regularized(C)
    if inverse is None:
        raise ArithmeticError("C has no Cholesky factor: it is not positive semi-definite to working precision")
    space = KrylovSpace(C)
    space.fresh = True
    smallest: list[float] = []
    while space.columns + block <= min(d, max(d // 2, 2 * rank)):
        if space.fresh:
            space.fresh = False
            start = torch.randn(d, block, generator=generator, dtype=C.dtype, device=C.device)
        start = space.append(*inverse(start))
        if len(smallest) < 2:
            values = space.values()
            smallest.append(float(values[0]))
            if float(values[-1]) <= slack(C):
                space.fresh = True  # a true null space: fresh directions find more of it than the iteration does
            elif len(smallest) == 2 and float(values[len(values) // 3]) <= _FLAT * smallest[1]:
                shifted = _shifted(C, smallest[0], smallest[1], space.spare())
                if shifted is not None:
                    space.exchange(inverse.factor)
                    inverse, space.shift = shifted, -float(shifted.added[0])
        if space.columns >= rank:
            yield space


def top_spaces(N: torch.Tensor, rank: int, generator: torch.Generator) -> Iterator[KrylovSpace]:
    """`krylov_spaces` for the negative of a covariance: its low end is largest in size, so products alone find it."""
    d = len(N)
    block = 16 * -(-rank // 48)
    space = KrylovSpace(N)
    space.fresh = True
    while space.columns + block <= min(d, max(d // 2, 2 * rank)):
        Y = torch.randn(d, block, generator=generator, dtype=N.dtype, device=N.device)
        if space.fresh:
            space.fresh = False
        else:
            # A trace of the random block, so that products which add nothing (N of low rank) still give directions.
            NV = space.CQ[:, -block:]
            norms = torch.linalg.vector_norm(NV, dim=0).clamp(min=torch.finfo(N.dtype).tiny)
            Y = NV / norms + _TRACE * Y
        space.append(Y)
        if space.columns >= rank:
            yield space


class _Inverse:
    """V ↦ Y = (C + D)⁻¹ V with a diagonal D, and C Y, which is V − D Y."""

    def __init__(self, factor: torch.Tensor, added: torch.Tensor) -> None:
        self.factor = factor
        self.added = added
        """D (d,)."""

    def __call__(self, V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        Y = solve(self.factor, V)
        return Y, V - self.added[:, None] * Y

    @classmethod
    def of(cls, C: torch.Tensor, added: torch.Tensor, memory: torch.Tensor) -> _Inverse | None:
        """In ``memory`` (d, d); None where C + D is not positive definite."""
        S = memory.copy_(C)
        S.diagonal().add_(added)
        factor = factorize_(S)
        return None if factor is None else cls(factor, added)

    @classmethod
    def regularized(cls, C: torch.Tensor) -> _Inverse | None:
        """D relative to each entry, so that massive coordinates do not drown the others, and never nothing."""
        diagonal = C.diagonal()
        return cls.of(
            C,
            4 * len(C) * EPS * (diagonal + diagonal.mean()),
            torch.empty_like(C, memory_format=torch.contiguous_format),
        )


def _shifted(C: torch.Tensor, first: float, second: float, memory: torch.Tensor) -> _Inverse | None:
    """At a shift just below the smallest eigenvalue; None where none is found.

    Args:
        first, second: smallest Ritz values after one block and after two. They approach the eigenvalue about as 1/k²
            (Saad 1980, for a spectrum without a gap), which leaves a third of their difference to go.
        memory: (d, d) for the factor.
    """
    smallest = second - (first - second) / 3
    if smallest <= slack(C):
        return None
    for power in (1, 2, 3):
        inverse = _Inverse.of(C, C.new_full((len(C),), -smallest * _SHIFT**power), memory)
        if inverse is not None:
            return inverse
    return None
