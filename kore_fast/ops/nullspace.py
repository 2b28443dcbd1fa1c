"""Truncated null-space extraction: the r directions that old inputs use least (KORE, arXiv 2510.19316, step 2)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import Literal, get_args

import torch

from kore_fast.ops.certificate import candidate, prove, room_below, slack
from kore_fast.ops.complement import complement
from kore_fast.ops.dense import product
from kore_fast.ops.krylov import KrylovSpace, LowEnd, krylov_spaces, top_spaces
from kore_fast.ops.reference import nullspace as reference

logger = logging.getLogger(__name__)

Method = Literal["auto", "reference", "truncated", "complement"]
# Below, or where more than an eighth of all directions are sought, a full decomposition is taken. Against the search
# for the smallest it is as fast at a width of 576, half as fast at 1536; against that for the largest as fast at 768.
_LEAST_WIDTH, _LARGEST_SHARE = 768, 0.125
_ASYMMETRY = 1e-6
# A proof is tried once the leak should fall by no more than this share of the tolerance.
_PROMISING = 0.15


@dataclass(frozen=True)
class NullSpace:
    """The bottom-r space of a covariance, with what certifies it.

    Only the span is canonical: eigenvectors of close eigenvalues turn freely, so compare leaks, never vectors. Of a
    complement the columns are no Ritz vectors at all: its first ones leak what their values add up to, and that is not
    the least that so few can leak.
    """

    basis: torch.Tensor
    """Û (*batch, d, r) float64, orthonormal columns, smallest eigenvalue (of a complement: ûᵀCû) first."""
    eigenvalues: torch.Tensor
    """(*batch, r) ûᵀCû, ascending: Ritz values, but of a complement."""
    largest: torch.Tensor
    """(*batch,) the largest eigenvalue of C; by an iteration from below, to a few digits."""
    leak: torch.Tensor
    """(*batch,) tr(ÛᵀCÛ)."""
    bound: torch.Tensor
    """(*batch,) no r orthonormal directions leak less: proved up to rounding, which it allows for."""
    energy: torch.Tensor
    """(*batch,) tr(ÛᵀCÛ) / tr(C): the share of the old inputs' energy that the space still carries."""
    orthogonality: torch.Tensor
    """(*batch,) max |ÛᵀÛ − I|; of a complement an estimate of its Frobenius norm, which is larger."""
    method: str
    """The path that computed it; of a batch those of all, where they differ."""
    reason: str
    """Why that path."""


def nullspace(
    C: torch.Tensor,
    rank: int,
    *,
    method: Method = "auto",
    oversample: int | None = None,
    tolerance: float = 0.02,
    generator: torch.Generator | None = None,
    span_only: bool = False,
) -> NullSpace:
    """Span of the ``rank`` eigenvectors of ``C`` with the smallest eigenvalues.

    Args:
        C: (*batch, d, d) symmetric positive semi-definite, float64 (or another float type, computed in float64).
        rank: r, 1 ≤ r ≤ d.
        method: ``"reference"`` is a full float64 ``eigh``. ``"truncated"`` is shift-inverted block Krylov (see
            `kore_fast.ops.krylov`), which stops when the leak is proved to be at most (1 + tolerance) times the least
            possible; where no proof comes, the reference follows, with a warning in the log. ``"complement"`` finds
            the d − r largest in the same way, and returns what is orthogonal to them (see `kore_fast.ops.complement`);
            it does not notice negative eigenvalues. ``"auto"`` chooses by width and rank.
        oversample: columns of the Krylov space beyond those sought before its first test; default as many again.
        tolerance: relative, see there.
        generator: of the random start, on C's device; default one with seed 0, so that results repeat.
        span_only: the columns and their eigenvalues are not wanted one by one, nor the first of them for a smaller
            rank: ``"auto"`` may take the complement.

    Raises:
        ValueError: C not square, not symmetric, not finite, or with a negative diagonal entry or eigenvalue; a rank
            outside 1…d; an unknown method; a tolerance not above 0.
    """
    _check(C, rank, method, tolerance, oversample)
    batch, d = C.shape[:-2], C.shape[-1]
    if generator is None:
        generator = torch.Generator(C.device).manual_seed(0)
    solved = [
        _solve(one.to(torch.float64), rank, method, oversample, tolerance, generator, span_only)
        for one in C.detach().reshape(-1, d, d)
    ]

    def stacked(name: str) -> torch.Tensor:
        parts: list[torch.Tensor] = [getattr(space, name) for space in solved]
        return torch.stack(parts).reshape((*batch, *parts[0].shape))

    names = ("basis", "eigenvalues", "largest", "leak", "bound", "energy", "orthogonality")
    return NullSpace(
        **{name: stacked(name) for name in names},
        method=", ".join(dict.fromkeys(space.method for space in solved)),
        reason="; ".join(dict.fromkeys(space.reason for space in solved)),
    )


def _check(C: torch.Tensor, rank: int, method: str, tolerance: float, oversample: int | None) -> None:
    d = C.shape[-1] if C.dim() else 0
    if C.dim() < 2 or C.shape[-2] != d or C.numel() == 0:
        raise ValueError(f"nullspace: C has shape {tuple(C.shape)}, want (*batch, d, d)")
    if not 1 <= rank <= d:
        raise ValueError(f"nullspace: rank {rank} is outside 1…{d}, the width of C")
    if method not in get_args(Method):
        raise ValueError(f"nullspace: unknown method {method!r}; choose {', '.join(map(repr, get_args(Method)))}")
    if not tolerance > 0:
        raise ValueError(f"nullspace: tolerance {tolerance}, want above 0")
    if oversample is not None and oversample < 0:
        raise ValueError(f"nullspace: oversample {oversample}, want at least 0")
    for one in C.detach().reshape(-1, d, d):
        least, most = map(float, one.aminmax())
        if not (isfinite(least) and isfinite(most)):
            raise ValueError("nullspace: C holds NaN or infinite values")
        if bool((one.diagonal() < 0).any()):
            raise ValueError("nullspace: C has a negative diagonal entry; a covariance has none")
        asymmetry = _asymmetry(one)
        if asymmetry > _ASYMMETRY * float(one.diagonal().max()):
            raise ValueError(
                f"nullspace: C is not symmetric (entries differ by {asymmetry:.3g}); mirror sums with finalize first"
            )


def _asymmetry(C: torch.Tensor) -> float:
    """max |C − Cᵀ|; by blocks, as reading columns of a large C misses the cache at every element."""
    block = 256 if C.device.type == "cpu" else 4096
    edges = range(0, len(C), block)
    return max(
        float((C[i : i + block, j : j + block] - C[j : j + block, i : i + block].mT).abs().max())
        for i in edges
        for j in edges
        if j <= i
    )


def _solve(
    C: torch.Tensor,
    rank: int,
    method: Method,
    oversample: int | None,
    tolerance: float,
    generator: torch.Generator,
    span_only: bool,
) -> NullSpace:
    """The ladder for one C (d, d): an iteration → more of it → float64 eigh → the same on the CPU."""
    d = C.shape[-1]
    if method == "auto":
        if d >= _LEAST_WIDTH and rank <= _LARGEST_SHARE * d:
            method = "truncated"
        elif d >= _LEAST_WIDTH and d - rank <= _LARGEST_SHARE * d and span_only:
            method = "complement"
        else:
            return _reference(C, rank, f"rank {rank} of width {d}: an iteration is for wider ones and smaller ranks")
    if method == "reference":
        return _reference(C, rank, "asked for")
    try:
        iterated = _complement if method == "complement" else _truncated
        space = iterated(C, rank, oversample, tolerance, generator)
        if space is not None:
            return space
        why = f"the {method} path proved no leak within {tolerance:g} of the least"
    except (ArithmeticError, torch.linalg.LinAlgError) as error:
        why = f"the {method} path failed: {error}"
    logger.warning("nullspace, width %d, rank %d: %s; falling back on a full decomposition", d, rank, why)
    return _reference(C, rank, why)


def _truncated(
    C: torch.Tensor, rank: int, oversample: int | None, tolerance: float, generator: torch.Generator
) -> NullSpace | None:
    found = _proved(C, krylov_spaces(C, rank, generator), rank, oversample, tolerance)
    if found is None:
        return None
    low, bound, reason = found
    return _certified(C, low.basis, low.values, _largest(C), max(bound, 0.0), "truncated", reason)


def _complement(
    C: torch.Tensor, rank: int, oversample: int | None, tolerance: float, generator: torch.Generator
) -> NullSpace | None:
    left_out, N, trace = len(C) - rank, -C, float(C.diagonal().sum())
    if left_out == 0:
        U, bound, largest, reason = C[:, :0], trace, _largest(C), "the whole space"
    else:
        found = _proved(N, top_spaces(N, left_out, generator), left_out, oversample, tolerance, trace)
        if found is None:
            return None
        low, bound, reason = found
        U, largest = low.basis, low.values[0].abs()
    made = complement(C, U)
    measured = made.leak, made.orthogonality
    return _certified(C, made.basis, made.quotients, largest, max(bound, 0.0), "complement", reason, measured)


def _proved(
    C: torch.Tensor,
    spaces: Iterator[KrylovSpace],
    rank: int,
    oversample: int | None,
    tolerance: float,
    trace: float = 0.0,
) -> tuple[LowEnd, float, str] | None:
    """The first low end of C whose leak is proved, with the bound on it and a reason; None if none is.

    ``trace`` is 0 where C is a covariance; where it is the negative of one, that one's trace: added to tr ÛᵀCÛ it gives
    the leak of the complement.
    """
    rounding = slack(C)
    enough = 2 * rank if oversample is None else rank + oversample
    leaks: list[float] = []
    for space in spaces:
        values = space.values()[:rank]
        leaks.append(trace + float(values.sum()))
        if space.columns < enough:
            continue
        if leaks[-1] <= 4 * rank * rounding:
            return space.low_end(rank), 0.0, f"a null space to working precision, {space.columns} columns"
        room = room_below(leaks[-1], tolerance, rank, slack(C, float(values[-1])))
        if room <= 0:
            raise ArithmeticError(f"a leak of {leaks[-1]:.3g} within {tolerance:g} is finer than float64 can prove")
        if _still_to_fall(leaks) > _PROMISING * tolerance * leaks[-1]:
            continue
        low = space.low_end(rank)
        bound = prove(C, low.basis, candidate(low.values, low.residuals, room), space.spare())
        logger.debug("nullspace: %d columns, shift %g, leak %g: bound %s", space.columns, space.shift, leaks[-1], bound)
        if bound is not None:
            shift = f" at shift {space.shift:.3g}" if space.shift else ""
            return low, trace + bound, f"proved after {space.columns} columns{shift}"
        # The leak no longer falls, and yet: of eigenvalues that repeat, the iteration finds as many as a block has.
        space.fresh = True
    return None


def _still_to_fall(leaks: list[float]) -> float:
    """By how much a sequence of leaks should fall yet, as a geometric series; infinite where it does not tell."""
    if len(leaks) < 3:
        return torch.inf
    before, last = (max(high - low, 0.0) for high, low in pairwise(leaks[-3:]))
    if last == 0:
        return 0.0
    return last * last / (before - last) if before > last else torch.inf


def _reference(C: torch.Tensor, rank: int, reason: str) -> NullSpace:
    """By ``eigh``, on the CPU where the device's fails; its result is checked like any other."""
    where = "reference"
    try:
        basis, values, largest = reference.nullspace(C, rank)
    except RuntimeError as error:
        if C.device.type == "cpu":
            raise
        logger.warning("nullspace: eigh failed on %s (%s); using the CPU", C.device, error)
        where = "reference on the CPU"
        basis, values, largest = (part.to(C.device) for part in reference.nullspace(C.cpu(), rank))
    if float(values[0]) < -_ASYMMETRY * float(largest.abs()):
        raise ValueError(f"nullspace: C has the negative eigenvalue {float(values[0]):.3g}; a covariance has none")
    # eigh is backward stable: each eigenvalue is off by at most about d u ‖C‖.
    bound = max(float(values.clamp(min=0).sum()) - rank * slack(C), 0.0)
    return _certified(C, basis, values, largest, bound, where, reason)


def _certified(
    C: torch.Tensor,
    basis: torch.Tensor,
    values: torch.Tensor,
    largest: torch.Tensor,
    bound: float,
    method: str,
    reason: str,
    measured: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> NullSpace:
    """What was found, with its leak and orthogonality, ``measured`` or to be measured on C itself.

    Raises:
        ArithmeticError: not orthonormal or not finite: nothing that follows could be trusted.
    """
    if measured is None:
        eye = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
        measured = (basis * product(C, basis)).sum(), (basis.mT @ basis - eye).abs().max()
    leak, orthogonality = measured
    if not (bool(torch.isfinite(leak)) and float(orthogonality) < 1e-8):
        raise ArithmeticError(
            f"nullspace: the {method} path gave no orthonormal basis (off by {float(orthogonality):.3g}, leak "
            f"{float(leak):.3g}); width {C.shape[-1]}, rank {basis.shape[1]}"
        )
    trace = C.diagonal().sum()
    return NullSpace(
        basis=basis.contiguous(),
        eigenvalues=values.contiguous(),
        largest=largest,
        leak=leak,
        bound=torch.as_tensor(bound, dtype=leak.dtype, device=leak.device),
        energy=torch.where(trace > 0, leak / trace, torch.zeros_like(trace)),
        orthogonality=orthogonality,
        method=method,
        reason=reason,
    )


def _largest(C: torch.Tensor) -> torch.Tensor:
    """The largest eigenvalue, from below: the largest Ritz value of a small block Krylov space."""
    generator = torch.Generator(C.device).manual_seed(0)
    V = torch.randn(len(C), min(8, -(-len(C) // 4)), generator=generator, dtype=C.dtype, device=C.device)
    blocks = [torch.linalg.qr(V)[0]]
    for _ in range(2):
        blocks.append(torch.linalg.qr(C @ blocks[-1])[0])
    Q = torch.linalg.qr(torch.cat(blocks, 1))[0]
    return torch.linalg.eigvalsh(Q.mT @ (C @ Q))[-1]
