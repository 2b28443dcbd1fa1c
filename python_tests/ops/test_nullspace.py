"""The null space: optimal leak, orthonormal basis, honest certificates, clear refusals."""

from __future__ import annotations

import pytest
import torch

from kore_fast.ops import nullspace


def spectrum(d: int, exponent: float = 8.0, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """C (d, d) with eigenvalues from 1 down to 10^-exponent, and those, ascending."""
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))
    values = torch.logspace(-exponent, 0, d, dtype=torch.float64)
    return (Q * values) @ Q.T, values


@pytest.mark.parametrize("rank", [1, 5, 24])
def test_energy_is_the_least_there_can_be(rank: int) -> None:
    C, values = spectrum(24)
    space = nullspace(C, rank)
    carried = torch.trace(space.basis.T @ C @ space.basis)
    assert float(carried) == pytest.approx(float(values[:rank].sum()), rel=1e-6)
    assert float(space.energy) == pytest.approx(float(values[:rank].sum() / values.sum()), rel=1e-6)
    torch.manual_seed(1)
    other, _ = torch.linalg.qr(torch.randn(24, rank, dtype=torch.float64))
    assert float(torch.trace(other.T @ C @ other)) >= float(carried) - 1e-12


def test_basis_is_orthonormal_and_certified() -> None:
    C, values = spectrum(20)
    space = nullspace(C, 6)
    error = (space.basis.T @ space.basis - torch.eye(6, dtype=torch.float64)).abs().max()
    assert float(error) < 1e-13
    assert float(space.orthogonality) == float(error)
    ritz = (space.basis * (C @ space.basis)).sum(0)
    assert torch.allclose(space.eigenvalues, ritz, rtol=1e-5, atol=1e-16)
    assert torch.equal(space.eigenvalues, space.eigenvalues.sort().values)
    assert float(space.largest) == pytest.approx(float(values[-1]), rel=1e-12)


def test_a_true_null_space_carries_nothing() -> None:
    torch.manual_seed(0)
    x = torch.randn(10, 16, dtype=torch.float64)
    space = nullspace(x.T @ x, 6)
    assert float((x @ space.basis).abs().max()) < 1e-7
    assert abs(float(space.energy)) < 1e-14


def test_span_does_not_depend_on_scale() -> None:
    C, _ = spectrum(15)
    one, other = nullspace(C, 4).basis, nullspace(C * 1e6, 4).basis
    assert torch.allclose(one @ one.T, other @ other.T, atol=1e-6)


def test_batches_are_solved_apart() -> None:
    batch = torch.stack([spectrum(12, seed=s)[0] for s in range(3)])
    together = nullspace(batch, 4)
    assert together.basis.shape == (3, 12, 4)
    for index in range(3):
        alone = nullspace(batch[index], 4)
        P, Q = (b @ b.T for b in (together.basis[index], alone.basis))
        assert torch.allclose(P, Q, atol=1e-8)
        assert float(together.energy[index]) == pytest.approx(float(alone.energy), rel=1e-6)


def test_zero_covariance_has_no_energy() -> None:
    space = nullspace(torch.zeros(5, 5), 2)
    assert float(space.energy) == 0
    assert float(space.orthogonality) < 1e-14


@pytest.mark.parametrize(
    ("C", "rank", "method", "named"),
    [
        (torch.zeros(3, 4), 1, "auto", "(3, 4)"),
        (torch.zeros(3), 1, "auto", "(3,)"),
        (torch.eye(3), 0, "auto", "rank 0"),
        (torch.eye(3), 4, "auto", "rank 4"),
        (torch.eye(3), 2, "lanczos", "'lanczos'"),
        (torch.full((3, 3), float("nan")), 1, "auto", "NaN"),
        (torch.diag(torch.tensor([1.0, float("inf")])), 1, "auto", "infinite"),
    ],
)
def test_refusals_say_what_is_wrong(C: torch.Tensor, rank: int, method: str, named: str) -> None:
    with pytest.raises(ValueError) as caught:
        nullspace(C, rank, method=method)
    assert named in str(caught.value)
