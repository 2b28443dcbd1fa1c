"""The blocked factorisation: the vendor's accuracy, and no factor where there is none."""

from __future__ import annotations

import pytest
import torch

from kore_fast.ops.dense import factorize_, solve


def definite(d: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))
    C = (Q * torch.logspace(-8, 0, d, dtype=torch.float64)) @ Q.T
    return (C + C.T) / 2


@pytest.mark.parametrize("d", [1, 40, 512, 513, 769, 1000])
def test_as_accurate_as_the_vendors(d: int) -> None:
    C = definite(d)
    V = torch.randn(d, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    L = factorize_(C.clone())
    assert L is not None
    vendors = torch.linalg.cholesky(C)
    norm = torch.linalg.norm
    least = 1e-16 * float(norm(C))
    assert norm(L.tril() @ L.tril().T - C) <= 2 * max(float(norm(vendors @ vendors.T - C)), least)
    assert norm(C @ solve(L, V) - V) <= 2 * norm(C @ torch.cholesky_solve(V, vendors) - V) + least


def test_only_the_lower_triangle_is_read() -> None:
    C = definite(600)
    spoilt = C.tril() + torch.full_like(C, float("nan")).triu(1)
    one, other = factorize_(C.clone()), factorize_(spoilt)
    assert one is not None
    assert other is not None
    assert torch.equal(one.tril(), other.tril())


@pytest.mark.parametrize("d", [100, 700])
@pytest.mark.parametrize("place", [0, 50, -1])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_no_factor_where_there_is_none(d: int, place: int, value: float) -> None:
    C = definite(d)
    C[place, place] = value
    assert factorize_(C) is None


def test_barely_indefinite_is_told_apart() -> None:
    C = definite(700)
    smallest = float(torch.linalg.eigvalsh(C)[0])
    eye = torch.eye(700, dtype=torch.float64)
    assert factorize_(C - 0.999 * smallest * eye) is not None
    assert factorize_(C - 1.001 * smallest * eye) is None
