"""The complement of the top space: as good as its proof, orthonormal, and honest about its columns."""

from __future__ import annotations

import pytest
import torch

from kore_fast.ops import nullspace
from kore_fast.ops.complement import complement
from python_tests.ops.test_nullspace import KINDS, made_of


@pytest.mark.parametrize("left_out", [1, 20, 75])
@pytest.mark.parametrize("kind", KINDS)
def test_the_complement_is_within_its_proof(kind: str, left_out: int) -> None:
    d = 600
    C, values = made_of(kind, d, 40)
    space = nullspace(C, d - left_out, method="complement")
    least, rounding = float(values[: d - left_out].sum()), 1e-12 * float(values.sum())
    assert space.method == "complement", space.reason
    assert float(space.leak) == pytest.approx(float((space.basis * (C @ space.basis)).sum()), abs=rounding)
    assert float(space.leak) <= 1.02 * least + rounding
    assert float(space.bound) <= least + rounding
    assert float(space.leak) <= 1.02 * float(space.bound) + rounding
    assert 0.9 * float(values[-1]) <= float(space.largest) <= (1 + 1e-12) * float(values[-1])
    error = (space.basis.T @ space.basis - torch.eye(d - left_out, dtype=torch.float64)).abs().max()
    assert float(error) < 1e-13
    assert float(error) <= float(space.orthogonality) < 1e-12


def test_its_values_are_those_of_its_columns() -> None:
    C, values = made_of("massive directions", 400, 40)
    space = nullspace(C, 380, method="complement")
    quotients = (space.basis * (C @ space.basis)).sum(0)
    assert torch.allclose(space.eigenvalues, quotients, rtol=0, atol=1e-14 * float(values[-1]))
    assert torch.equal(space.eigenvalues, space.eigenvalues.sort().values)
    assert float(space.energy) == pytest.approx(float(space.leak / values.sum()), rel=1e-12)


def test_fewer_tokens_than_dimensions_leave_a_true_null_space() -> None:
    x = torch.randn(30, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 1e4
    for left_out in (30, 40):
        space = nullspace(x.T @ x, 400 - left_out, method="complement")
        assert space.method == "complement"
        assert "null space to working precision" in space.reason
        assert float((x @ space.basis).abs().max()) < 1e-4 * float(x[:, :5].abs().max())
        assert float(space.bound) == 0


@pytest.mark.parametrize("left_out", [0, 1, 20, 48])
@pytest.mark.parametrize(
    "C",
    [
        torch.eye(400) * 3,
        torch.zeros(400, 400),
        torch.ones(400, 400),
        torch.eye(400).double() * 1e-100,
        torch.diag(torch.arange(400) % 2 * 1.0),
        torch.diag(torch.cat([torch.ones(100), torch.full((300,), 1e-3)])),
        torch.diag(torch.cat([torch.logspace(2, 0, 20), torch.full((100,), 0.5), torch.logspace(-1, -3, 280)])),
        torch.diag(torch.cat([torch.ones(1), torch.zeros(399)])),
    ],
    ids=["identity", "zero", "rank one", "tiny", "halves", "repeated", "repeated at the cut", "one channel"],
)
def test_degenerate_covariances(C: torch.Tensor, left_out: int) -> None:
    C = C.double()
    space = nullspace(C, 400 - left_out, method="complement")
    least, trace = float(torch.linalg.eigvalsh(C)[: 400 - left_out].sum()), float(C.trace())
    assert space.method == "complement", space.reason
    assert float(space.leak) <= 1.02 * least + 1e-11 * trace
    assert float(space.bound) <= least + 1e-11 * trace
    error = (space.basis.T @ space.basis - torch.eye(400 - left_out, dtype=torch.float64)).abs().max()
    assert float(error) < 1e-13


@pytest.mark.parametrize("rank", [1, 3, 200, 399, 400])
def test_any_rank_may_be_asked_for(rank: int) -> None:
    C, values = made_of("massive directions", 400, 40)
    space = nullspace(C, rank, method="complement")
    assert space.basis.shape == (400, rank)
    assert float(space.leak) <= 1.02 * float(values[:rank].sum())
    assert float(space.bound) <= (1 + 1e-9) * float(values[:rank].sum())
    assert nullspace(torch.ones(1, 1), 1, method="complement").basis.abs().tolist() == [[1.0]]


def test_the_choice_asks_whether_columns_count() -> None:
    C, _ = made_of("power law", 900, 30)
    assert nullspace(C, 860, span_only=True).method == "complement"
    assert nullspace(C, 860).method == "reference"
    assert nullspace(C, 700, span_only=True).method == "reference"
    assert nullspace(C, 30, span_only=True).method == "truncated"
    assert nullspace(C[:100, :100], 99, span_only=True).method == "reference"


@pytest.mark.parametrize(
    ("kind", "tolerance", "why"),
    [
        ("power law", 1e-13, "finer than float64 can prove"),
        ("repeated", 0.02, "proved no leak within 0.02"),
    ],
)
def test_what_is_not_proved_is_decomposed_in_full(
    kind: str, tolerance: float, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "repeated":  # by an iteration that may not grow far enough to see how often
        C = torch.diag(torch.cat([torch.logspace(2, 0, 20), torch.full((100,), 0.5), torch.logspace(-1, -3, 280)]))
        C, left_out = C.double(), 60
    else:
        C, left_out = made_of(kind, 400, 40)[0], 20
    space = nullspace(C, 400 - left_out, method="complement", tolerance=tolerance)
    assert space.method == "reference"
    assert why in space.reason
    assert "falling back" in caplog.text
    assert float(space.leak) == pytest.approx(float(torch.linalg.eigvalsh(C)[: 400 - left_out].sum()), rel=1e-9)


def test_batches_scales_and_float32() -> None:
    C, values = made_of("power law", 400, 40)
    batch = torch.stack([C, C * 1e12, C * 1e-12]).reshape(3, 1, 400, 400)
    space = nullspace(batch, 380, method="complement")
    assert space.method == "complement"
    assert space.basis.shape == (3, 1, 400, 380)
    for leak, scale in zip(space.leak.flatten().tolist(), (1, 1e12, 1e-12), strict=True):
        assert leak <= 1.02 * scale * float(values[:380].sum())
    single = nullspace(C.float(), 380, method="complement")
    assert single.basis.dtype == torch.float64
    assert float(single.leak) <= 1.02 * float(values[:380].sum())


def test_the_same_generator_gives_the_same_bits() -> None:
    C, _ = made_of("flat power law", 400, 30)
    one, same = (nullspace(C, 370, method="complement") for _ in range(2))
    other = nullspace(C, 370, method="complement", generator=torch.Generator().manual_seed(5))
    assert torch.equal(one.basis, same.basis)
    assert not torch.equal(one.basis, other.basis)


@pytest.mark.parametrize("which", ["first coordinates", "last coordinates", "half in both", "random"])
def test_the_reflection_is_stable_wherever_the_space_lies(which: str) -> None:
    """Among the coordinates that it is reflected to, orthogonal to them, or both."""
    d, k = 50, 8
    eye = torch.eye(d, dtype=torch.float64)
    U = {
        "first coordinates": eye[:, :k],
        "last coordinates": eye[:, -k:],
        "half in both": eye[:, 4 : 4 + k],
        "random": torch.linalg.qr(torch.randn(d, k, generator=torch.Generator().manual_seed(0)).double())[0],
    }[which]
    C, _ = made_of("power law", d, 4)
    made = complement(C, U)
    whole = torch.cat([U, made.basis], 1)
    assert float((whole.T @ whole - eye).abs().max()) < 1e-14
    assert float(made.leak) == pytest.approx(float((made.basis * (C @ made.basis)).sum()), rel=1e-12)
    skew = complement(C, U + 1e-4)
    assert float(skew.orthogonality) > 1e-4
