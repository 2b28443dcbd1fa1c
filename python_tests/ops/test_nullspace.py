"""The null space: optimal leak, orthonormal basis, honest certificates, clear refusals."""

from __future__ import annotations

import sys

import pytest
import torch

from kore_fast.ops import nullspace
from kore_fast.ops.certificate import Dual, prove
from kore_fast.ops.krylov import krylov_spaces


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
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), 1, "auto", "not symmetric"),
        (torch.diag(torch.tensor([1.0, -1.0])), 1, "auto", "negative diagonal"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 1, "auto", "negative eigenvalue -1"),
        (torch.eye(800) + 2 * torch.ones(800, 800).triu(1) + 2 * torch.ones(800, 800).tril(-1), 8, "auto", "negative"),
    ],
)
def test_refusals_say_what_is_wrong(C: torch.Tensor, rank: int, method: str, named: str) -> None:
    with pytest.raises(ValueError) as caught:
        nullspace(C, rank, method=method)
    assert named in str(caught.value)


def made_of(kind: str, d: int, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """C (d, d) and its eigenvalues, ascending."""
    generator = torch.Generator().manual_seed(seed)
    values = {
        "power law": torch.arange(1, d + 1).double() ** -1.5,
        "flat power law": torch.arange(1, d + 1).double() ** -0.8,
        "massive directions": torch.cat(
            [torch.tensor([1.0, 0.3, 0.1]).double(), torch.logspace(-2, -8, d - 3).double()]
        ),
        "clustered tail": torch.cat([torch.logspace(0, -3, d // 2).double(), torch.full((d - d // 2,), 1e-4).double()]),
        "small cluster": torch.cat(
            [torch.logspace(0, -3, d - 2 * rank).double(), torch.full((2 * rank,), 1e-8).double()]
        ),
        "rank-deficient": torch.cat([torch.logspace(0, -6, d // 2).double(), torch.zeros(d - d // 2).double()]),
        "null space smaller than rank": torch.cat(
            [torch.logspace(0, -6, d - rank // 2).double(), torch.zeros(rank // 2)]
        ),
    }[kind]
    Q, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))
    C = (Q * values) @ Q.T
    return (C + C.T) / 2, values.sort().values


KINDS = [
    "power law",
    "flat power law",
    "massive directions",
    "clustered tail",
    "small cluster",
    "rank-deficient",
    "null space smaller than rank",
]


@pytest.mark.parametrize("kind", KINDS)
def test_the_truncated_path_is_within_its_proof(kind: str) -> None:
    d, rank = 600, 40
    C, values = made_of(kind, d, rank)
    space = nullspace(C, rank, method="truncated")
    least, rounding = float(values[:rank].sum()), 1e-12 * float(values.sum())
    assert space.method == "truncated", space.reason
    assert float(space.leak) == pytest.approx(float(torch.trace(space.basis.T @ C @ space.basis)), abs=rounding)
    assert float(space.leak) <= 1.02 * least + rounding
    assert float(space.bound) <= least + rounding
    assert float(space.leak) <= 1.02 * float(space.bound) + rounding
    assert float(space.orthogonality) < 1e-13
    assert torch.equal(space.eigenvalues, space.eigenvalues.sort().values)
    assert 0.9 * float(values[-1]) <= float(space.largest) <= (1 + 1e-12) * float(values[-1])


@pytest.mark.parametrize("rank", [1, 3, 16, 200, 399, 400])
def test_any_rank_may_be_asked_for(rank: int) -> None:
    C, values = made_of("massive directions", 400, 40)
    space = nullspace(C, rank, method="truncated")
    assert space.basis.shape == (400, rank)
    assert float(space.leak) <= 1.02 * float(values[:rank].sum())
    assert float(space.bound) <= (1 + 1e-9) * float(values[:rank].sum())


def test_a_tighter_tolerance_is_kept() -> None:
    C, values = made_of("power law", 600, 40)
    least = float(values[:40].sum())
    loose, tight = (nullspace(C, 40, method="truncated", tolerance=t) for t in (0.05, 0.001))
    assert float(tight.leak) <= 1.001 * float(tight.bound)
    assert least * 0.999 <= float(tight.bound) <= least
    assert float(loose.bound) <= least


def test_what_float64_cannot_prove_is_decomposed_in_full() -> None:
    """A leak above rounding, a tolerance below it: not to be taken for a null space."""
    C, values = made_of("massive directions", 600, 40)
    space = nullspace(C, 40, method="truncated", tolerance=1e-7)
    assert space.method == "reference"
    assert "finer than float64 can prove" in space.reason
    assert float(space.leak) == pytest.approx(float(values[:40].sum()), rel=1e-6)


def test_fewer_tokens_than_dimensions_leave_a_true_null_space() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 800, dtype=torch.float64, generator=generator)
    x[:, 5] *= 1e4
    x[:, 700] = 0
    space = nullspace(x.T @ x, 30)
    assert space.method == "truncated"
    assert "null space to working precision" in space.reason
    assert float((x @ space.basis).abs().max()) < 1e-4 * float((x[:, :5]).abs().max())
    assert float(space.bound) == 0


@pytest.mark.parametrize(
    "C",
    [
        torch.eye(800) * 3,
        torch.zeros(800, 800),
        torch.ones(800, 800),
        torch.eye(800) * 1e-300,
        torch.diag(torch.arange(800) % 2 * 1.0),
        torch.block_diag(torch.ones(799, 799), torch.zeros(1, 1)),
    ],
    ids=["identity", "zero", "rank one", "tiny", "half a null space", "a dead channel"],
)
@pytest.mark.parametrize("method", ["auto", "truncated"])
def test_degenerate_covariances(C: torch.Tensor, method: str) -> None:
    C = C.double()
    space = nullspace(C, 20, method=method)  # type: ignore[arg-type]
    least = float(torch.linalg.eigvalsh(C)[:20].sum())
    assert float(space.leak) <= 1.02 * least + 1e-11 * float(C.trace())
    assert float(space.bound) <= least + 1e-11 * float(C.trace())
    assert float(space.orthogonality) < 1e-12


def test_products_with_c_come_from_the_solves() -> None:
    """The iteration never multiplies by C: what it keeps in its place must be that product to working precision."""
    C, values = made_of("massive directions", 400, 40)
    checked = 0
    for space in krylov_spaces(C, 40, torch.Generator().manual_seed(0)):
        low = space.low_end(40)
        exact = torch.linalg.vector_norm(C @ low.basis - low.basis * low.values, dim=0)
        assert float((exact - low.residuals).abs().max()) < 1e-13 * float(values[-1])
        assert float((space.Q.T @ space.Q - torch.eye(space.columns)).abs().max()) < 1e-13
        checked += 1
    assert checked > 2


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_truncated_path_does_not_depend_on_scale(scale: float) -> None:
    C, values = made_of("massive directions", 600, 40)
    space = nullspace(C * scale, 40, method="truncated")
    assert space.method == "truncated"
    assert float(space.leak) <= 1.02 * scale * float(values[:40].sum())


def test_the_same_generator_gives_the_same_bits() -> None:
    C, _ = made_of("power law", 500, 30)
    one, same = (nullspace(C, 30, method="truncated") for _ in range(2))
    other = nullspace(C, 30, method="truncated", generator=torch.Generator().manual_seed(5))
    assert torch.equal(one.basis, same.basis)
    assert not torch.equal(one.basis, other.basis)
    assert float(other.leak) == pytest.approx(float(one.leak), rel=0.02)


def test_no_proof_of_what_is_not_so() -> None:
    """A space that lacks one low direction, and candidates of any γ and weights: never a bound above the optimum."""
    C, values = made_of("massive directions", 120, 10)
    vectors = torch.linalg.eigh(C)[1]
    least = float(values[:10].sum())
    lacking = torch.cat([vectors[:, 1:10], vectors[:, 60:61]], 1)
    theta = (lacking * (C @ lacking)).sum(0).sort().values
    proved = 0
    generator = torch.Generator().manual_seed(0)
    for basis in (vectors[:, :10], lacking, torch.linalg.qr(torch.randn(120, 10, generator=generator).double())[0]):
        for gamma in torch.logspace(-9, 0, 40).tolist():
            for extra in (0.0, 1e-9, 1e-8, 1e-6):
                weights = (gamma - (basis * (C @ basis)).sum(0)).clamp(min=0) + extra
                bound = prove(C, basis, Dual(gamma, weights, weights))
                if bound is not None:
                    proved += 1
                    assert bound <= least * (1 + 1e-12)
    assert proved > 10
    assert float(theta.sum()) > 2 * least


def test_the_ladder_says_what_it_did(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    C, values = made_of("power law", 200, 10)

    def fails(*_: object) -> object:
        raise ArithmeticError("no Cholesky factor")

    module = sys.modules["kore_fast.ops.nullspace"]
    monkeypatch.setattr(module, "krylov_spaces", fails)
    space = nullspace(C, 10, method="truncated")
    assert space.method == "reference"
    assert "no Cholesky factor" in space.reason
    assert "falling back" in caplog.text
    assert float(space.leak) == pytest.approx(float(values[:10].sum()), rel=1e-9)
    monkeypatch.undo()
    monkeypatch.setattr(module, "prove", lambda *_: None)
    space = nullspace(C, 10, method="truncated")
    assert space.method == "reference"
    assert "proved no leak" in space.reason


def test_the_choice_is_told() -> None:
    C, _ = made_of("power law", 900, 30)
    assert nullspace(C, 30).method == "truncated"
    assert nullspace(C, 30, method="reference").reason == "asked for"
    few = nullspace(C[:100, :100], 10)
    assert few.method == "reference"
    assert "width 100" in few.reason


@pytest.mark.slow
def test_the_width_where_vendors_indices_overflow() -> None:
    """d = 18944, the widest of Qwen2.5-VL-7B: 6·d² and more no longer fit 32 bits. Takes 9 GB and some minutes."""
    d, rank = 18944, 100
    values = torch.cat([torch.tensor([1.0, 0.3, 0.1]), torch.logspace(-2, -8, d - 3)]).double()
    C = torch.diag(values)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):  # C ← H C H with H = I − 2 v vᵀ, in place
        v = torch.randn(d, generator=generator, dtype=torch.float64)
        v /= v.norm()
        Cv = C @ v
        w = Cv - (v @ Cv) * v
        C.addr_(v, w, alpha=-2).addr_(w, v, alpha=-2)
    least = float(values.sort().values[:rank].sum())
    space = nullspace(C, rank)
    assert space.method == "truncated"
    assert float(space.leak) <= 1.02 * least
    assert float(space.bound) <= least * (1 + 1e-6)
    assert float(space.orthogonality) < 1e-12
