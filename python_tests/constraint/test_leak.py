"""Leak: 1 for a random direction, 0 in a null space, the tail's energy for a null-space basis."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kore_fast.constraint import collect_covariance, leak
from kore_fast.constraint.leak import layer_leak, leak_report
from kore_fast.ops import nullspace


def covariance(d: int, exponent: float) -> torch.Tensor:
    torch.manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))
    return (Q * torch.logspace(-exponent, 0, d, dtype=torch.float64)) @ Q.T


def test_equals_its_definition() -> None:
    torch.manual_seed(1)
    A, C = torch.randn(3, 8), covariance(8, 2)
    wanted = torch.trace(A.double() @ C @ A.double().T) * 8 / (A.double().pow(2).sum() * torch.trace(C))
    assert leak(A, C) == pytest.approx(float(wanted), rel=1e-12)
    assert leak(7 * A, 0.01 * C) == pytest.approx(float(wanted), rel=1e-6)


def test_random_a_leaks_one() -> None:
    torch.manual_seed(2)
    C = covariance(64, 3)
    leaks = torch.tensor([leak(torch.randn(16, 64), C) for _ in range(200)])
    standard_error = float(leaks.std()) / 200**0.5
    assert abs(float(leaks.mean()) - 1) < 4 * standard_error
    assert standard_error < 0.05


def test_basis_leaks_its_tail_energy() -> None:
    C = covariance(32, 6)
    space = nullspace(C, 8)
    assert leak(space.basis.T, C) == pytest.approx(float(space.energy) * 32 / 8, rel=1e-9)
    torch.manual_seed(0)
    x = torch.randn(20, 32, dtype=torch.float64)
    exact = nullspace(x.T @ x, 12)
    assert abs(leak(exact.basis.T, x.T @ x)) < 1e-14


def test_nothing_leaks_from_nothing() -> None:
    assert leak(torch.zeros(2, 4), torch.eye(4)) == 0
    assert leak(torch.ones(2, 4), torch.zeros(4, 4)) == 0


def test_report_of_any_adapter() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.o = nn.Linear(6, 4), nn.Linear(6, 2), nn.Linear(4, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k = self.q(x), self.k(x)
            return self.o(q).sum() + k.sum()

    model = Pair()
    store = collect_covariance(model, [{"x": torch.randn(30, 6)}], target_modules=["q", "k", "o"])
    weights = {name: model.get_submodule(name).weight for name in ("q", "k", "o")}
    A = {"o": torch.randn(2, 4), "k": torch.randn(2, 6)}
    rows = leak_report(A, weights, store)
    assert [(r.layer, r.d_in, r.d_out, r.rank, r.tokens, r.shares) for r in rows] == [
        ("o", 4, 6, 2, 30, "o"),
        ("k", 6, 2, 2, 30, "q"),
    ]
    assert rows[0].leak == leak(A["o"], store.covariance("o"))
    assert rows[1].leak == leak(A["k"], store.covariance("k"))
    assert (rows[0].tail_energy, rows[0].lambda_min, rows[0].lambda_max) == (None, None, None)
    C = store.covariance("q")
    row = layer_leak("q", nullspace(C, 2).basis.T, C, 4, store, nullspace(C, 2))
    assert row.tail_energy is not None
    assert row.leak == pytest.approx(row.tail_energy * 6 / 2, rel=1e-9)
    values = torch.linalg.eigvalsh(C)
    assert row.lambda_min == pytest.approx(float(values[0]), rel=1e-9)
    assert row.lambda_max == pytest.approx(float(values[-1]), rel=1e-9)
