"""The low end of a spectrum by shift-inverted block Krylov iteration, in plain PyTorch.

Inverting C turns its low end into its high end. A shift just below the smallest eigenvalue spreads it: where the low
eigenvalues differ by a tenth, 2 to 3 columns a direction reach what takes 6 to 8 without. The shift needs the smallest
eigenvalue, which the first blocks give, and a second factorisation, whose success proves that the shift is below it.

Sources: block Krylov methods for low-rank approximation, Musco and Musco, arXiv 1504.05477; rational Krylov with full
reorthogonalisation, Ruhe 1984.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kore_fast.ops.certificate import EPS, slack
from kore_fast.ops.covariance import covariance_update_, finalize, new_count

# Blocks before the shift is chosen: their smallest Ritz value is a few hundredths above the smallest eigenvalue.
_FIRST_BLOCKS = 3
# How far below that Ritz value the shift is tried first.
_SHIFT = 0.93
# Where the first third of the low eigenvalues span more than this factor, a shift gains less than it costs.
_FLAT = 1.3


@dataclass(frozen=True)
class LowEnd:
    """Ritz vectors of C for its r smallest eigenvalues."""

    basis: torch.Tensor
    """(d, r) orthonormal, ascending."""
    values: torch.Tensor
    """(r,) their Ritz values."""
    residuals: torch.Tensor
    """(d, r) C û − θ û."""
    next_value: float
    """The Ritz value after the last."""
    columns: int
    """Of the Krylov space it was taken from."""
    shift: float


def low_ends(C: torch.Tensor, rank: int, block: int, generator: torch.Generator) -> Iterator[LowEnd]:
    """Better and better approximations of the bottom-``rank`` space of ``C`` (d, d) float64, a block at a time.

    Ends where the Krylov space would hold half of all directions: a full decomposition is then no dearer.

    Raises:
        ArithmeticError: C cannot be factorised: it is not positive semi-definite to working precision.
    """
    d = C.shape[0]
    inverse = _Inverse(C, 0.0)
    space = _Space(C)
    new = None
    null = slack(C)
    while space.columns + block <= max(d // 2, 2 * rank):
        if new is None:
            new = torch.randn(d, block, generator=generator, dtype=C.dtype, device=C.device)
        new = _orthonormal(inverse(new), space.Q)
        if float(space.add(new)) <= block * null:
            # A true null space: the iteration would find no more of it than it began with, fresh directions do.
            new = None
        if space.blocks == _FIRST_BLOCKS:
            inverse = _shifted(C, inverse, space.values(), block)
        if space.columns > rank:
            yield space.low_end(rank, inverse.shift)


class _Inverse:
    """V ↦ (C − σ I)⁻¹ V by Cholesky; lightly regularised where σ = 0."""

    def __init__(self, C: torch.Tensor, shift: float) -> None:
        self.shift = shift
        S = C.clone()
        diagonal = S.diagonal()
        if shift == 0:
            # Relative to each entry, so that massive coordinates do not drown the others, and never nothing.
            diagonal.add_(4 * len(C) * EPS * (diagonal + diagonal.mean()))
        else:
            diagonal.sub_(shift)
        self._L, failed = torch.linalg.cholesky_ex(S)
        if int(failed) != 0:
            raise ArithmeticError(f"no Cholesky factor at shift {shift:g}: leading minor {int(failed)} is not positive")

    def __call__(self, V: torch.Tensor) -> torch.Tensor:
        half = torch.linalg.solve_triangular(self._L, V, upper=False)
        return torch.linalg.solve_triangular(self._L.mT, half, upper=True)


def _shifted(C: torch.Tensor, unshifted: _Inverse, values: torch.Tensor, block: int) -> _Inverse:
    """The inverse at a shift just below the smallest eigenvalue; the unshifted one where that gains nothing."""
    smallest = float(values[0])
    if smallest <= slack(C) or float(values[block - 1]) > _FLAT * smallest:
        return unshifted
    shift = _SHIFT * smallest
    for _ in range(3):
        try:
            return _Inverse(C, shift)
        except ArithmeticError:
            shift *= _SHIFT
    return unshifted


class _Space:
    """An orthonormal basis Q that grows by blocks, with C Q and Qᵀ C Q."""

    def __init__(self, C: torch.Tensor) -> None:
        self._C = C
        self.Q: torch.Tensor | None = None
        self._CQ: torch.Tensor | None = None
        self._T: torch.Tensor | None = None
        self.blocks = 0

    @property
    def columns(self) -> int:
        return 0 if self.Q is None else self.Q.shape[1]

    def add(self, new: torch.Tensor) -> torch.Tensor:
        """Take a block in; returns its leak."""
        C_new = self._C @ new
        self.blocks += 1
        if self.Q is None or self._CQ is None or self._T is None:
            self.Q, self._CQ, self._T = new, C_new, new.mT @ C_new
            return self._T.trace()
        side = self.Q.mT @ C_new
        corner = new.mT @ C_new
        self._T = torch.cat([torch.cat([self._T, side], 1), torch.cat([side.mT, corner], 1)])
        self.Q, self._CQ = torch.cat([self.Q, new], 1), torch.cat([self._CQ, C_new], 1)
        return corner.trace()

    def values(self) -> torch.Tensor:
        assert self._T is not None
        return torch.linalg.eigvalsh((self._T + self._T.mT) / 2)

    def low_end(self, rank: int, shift: float) -> LowEnd:
        assert self.Q is not None
        assert self._CQ is not None
        assert self._T is not None
        values, vectors = torch.linalg.eigh((self._T + self._T.mT) / 2)
        chosen = vectors[:, :rank]
        basis = self.Q @ chosen
        residuals = self._CQ @ chosen - basis * values[:rank]
        return LowEnd(basis, values[:rank], residuals, float(values[rank]), self.columns, shift)


def _orthonormal(V: torch.Tensor, against: torch.Tensor | None) -> torch.Tensor:
    """An orthonormal basis of the columns of ``V`` (d, b), orthogonal to ``against``: block Gram-Schmidt, twice."""
    for _ in range(2):
        if against is not None:
            V = V - against @ (against.mT @ V)
        V = cholesky_qr(V)
    return V


def cholesky_qr(V: torch.Tensor) -> torch.Tensor:
    """One round of CholeskyQR (Fukaya et al. 2014: two make V orthonormal to working precision), or Householder's QR
    where the Gram matrix of ``V`` (d, b) is too near singular for it."""
    V = V / torch.linalg.vector_norm(V, dim=0).clamp(min=torch.finfo(V.dtype).tiny)
    gram = V.new_zeros(V.shape[1], V.shape[1])
    covariance_update_(gram, new_count(device=V.device), V)
    L, failed = torch.linalg.cholesky_ex(finalize(gram))
    if int(failed) != 0 or float(L.diagonal().min()) < 1e-7:
        return torch.linalg.qr(V)[0]
    return torch.linalg.solve_triangular(L.mT, V, upper=True, left=False)
