"""Factors, solves and products: the vendor's accuracy, any strides, and no factor where there is none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from kore_fast.ops.dense import factorize_, product, solve, solve_lower, subtract_product_
from kore_fast.ops.native.nullspace import unavailable

needs_native = pytest.mark.skipif(unavailable(torch.device("cpu")) is not None, reason="no native kernels")


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


def strided(rows: int, columns: int, layout: str, seed: int = 0) -> torch.Tensor:
    """Random (rows, columns) float64 in a layout."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "columns":
        return torch.randn(columns, rows, dtype=torch.float64, generator=generator).mT
    if layout == "apart":
        return torch.randn(rows, 2 * columns, dtype=torch.float64, generator=generator)[:, ::2]
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator)


LAYOUTS = ["rows", "columns", "apart"]


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 7), (100, 257, 3), (3, 257, 100), (72, 600, 91), (4, 0, 5)])
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_product(shape: tuple[int, int, int], left: str, right: str) -> None:
    n, k, m = shape
    A, B = strided(n, k, left), strided(k, m, right, seed=1)
    # Of k products each sum is off by at most k u Σ|ab|, in any order.
    bound = 2 * (k + 1) * torch.finfo(torch.float64).eps * (A.abs() @ B.abs()) + 1e-300
    assert ((product(A, B) - A @ B).abs() <= bound).all()
    for layout in LAYOUTS:
        X = strided(n, m, layout, seed=2)
        expected = X - A @ B
        subtract_product_(X, A, B)
        assert ((X - expected).abs() <= bound + 1e-15 * expected.abs()).all()


@pytest.mark.parametrize("d", [1, 7, 24, 255, 256, 257, 700])
@pytest.mark.parametrize("columns", [1, 8, 25, 80])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_solve_lower(d: int, columns: int, layout: str) -> None:
    L = torch.linalg.cholesky(definite(d))
    V = strided(d, columns, layout)
    before = V.clone()
    spoilt = L + torch.full_like(L, float("nan")).triu(1)
    ours, vendors = solve_lower(spoilt, V), torch.linalg.solve_triangular(L, V, upper=False)
    assert torch.equal(V, before)
    # Backward errors: the solution's own may differ by the condition number.
    off = torch.linalg.norm(L @ ours - V)
    assert off <= 2 * torch.linalg.norm(L @ vendors - V) + 1e-15 * torch.linalg.norm(V)


def test_more_columns_than_go_through_at_once() -> None:
    L = torch.linalg.cholesky(definite(1000))
    V = strided(1000, 2300, "rows")
    assert torch.allclose(solve_lower(L, V), torch.linalg.solve_triangular(L, V, upper=False), rtol=1e-9, atol=1e-9)


def test_nan_stays_in_its_column() -> None:
    L, V = torch.linalg.cholesky(definite(300)), strided(300, 30, "rows")
    V[100, 3] = float("nan")
    found = solve_lower(L, V).isnan()
    assert found[100:, 3].all()
    assert not found[:, :3].any()
    assert not found[:, 4:].any()


@needs_native
@pytest.mark.parametrize("limit", ["generic", "avx2", "avx512"])
def test_every_instruction_set(limit: str) -> None:
    code = """
import torch
from kore_fast.ops.dense import factorize_, product, solve
torch.manual_seed(0)
A = torch.randn(700, 700, dtype=torch.float64)
C, V = A @ A.T + torch.eye(700), A[:, :50]
L = factorize_(C.clone())
assert torch.allclose(L.tril() @ L.tril().T, C, rtol=1e-12, atol=1e-10)
assert torch.allclose(C @ solve(L, V), V, rtol=1e-6, atol=1e-8)
assert torch.allclose(product(A, V), A @ V, rtol=1e-12, atol=1e-11)
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env={**os.environ, "KORE_FAST_CPU": limit}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_native
def test_same_bits_with_any_number_of_threads() -> None:
    L, V = torch.linalg.cholesky(definite(700)), strided(700, 100, "rows")
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((solve(L, V), product(L, V)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for pair in found[1:] for one, other in zip(found[0], pair, strict=True))


@needs_native
def test_arguments_that_do_not_fit_are_refused() -> None:
    L, V = torch.eye(4, dtype=torch.float64), torch.ones(5, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="want L"):
        torch.ops.kore_fast.solve_triangular_native(L, V, False)
    with pytest.raises(RuntimeError, match="want A"):
        torch.ops.kore_fast.product_native(L, V)
    with pytest.raises(RuntimeError, match="want A"):
        torch.ops.kore_fast.product_native(L.float(), L.float())
    with pytest.raises(RuntimeError, match="want X"):
        torch.ops.kore_fast.subtract_product_native_(V, L, L)
