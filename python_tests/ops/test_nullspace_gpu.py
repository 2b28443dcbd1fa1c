"""The null space on a GPU: within its proof, as on a CPU."""

from __future__ import annotations

import pytest
import torch

from kore_fast.ops import nullspace

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("kind", ["power law", "massive directions", "rank-deficient"])
@pytest.mark.parametrize("d", [600, 4096])
def test_within_its_proof(kind: str, d: int) -> None:
    rank = d // 16
    values = {
        "power law": torch.arange(1, d + 1).double() ** -1.5,
        "massive directions": torch.cat([torch.tensor([1.0, 0.3, 0.1]), torch.logspace(-2, -8, d - 3)]).double(),
        "rank-deficient": torch.cat([torch.logspace(0, -6, d // 2), torch.zeros(d - d // 2)]).double(),
    }[kind].cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    Q = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, device="cuda", generator=generator))[0]
    C = (Q * values) @ Q.T
    space = nullspace((C + C.T) / 2, rank, method="truncated")
    least, rounding = float(values.sort().values[:rank].sum()), 1e-11 * float(values.sum())
    assert space.method == "truncated", space.reason
    assert space.basis.is_cuda
    assert float(space.leak) <= 1.02 * least + rounding
    assert float(space.bound) <= least + rounding
    assert float(space.orthogonality) < 1e-12


@pytest.mark.parametrize("left_out", [0, 40])
def test_the_complement_is_within_its_proof(left_out: int) -> None:
    values = torch.cat([torch.tensor([1.0, 0.3, 0.1]), torch.logspace(-2, -8, 797)]).double().cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    Q = torch.linalg.qr(torch.randn(800, 800, dtype=torch.float64, device="cuda", generator=generator))[0]
    C = (Q * values) @ Q.T
    space = nullspace((C + C.T) / 2, 800 - left_out, method="complement")
    least = float(values.sort().values[: 800 - left_out].sum())
    assert space.method == "complement", space.reason
    assert space.basis.is_cuda
    assert float(space.bound) <= least * (1 + 1e-9)
    assert float((space.basis * (C @ space.basis)).sum()) <= 1.02 * least
    assert float(space.orthogonality) < 1e-12


def test_the_same_leak_twice() -> None:
    x = torch.randn(900, 800, dtype=torch.float64, device="cuda")
    one, other = (nullspace(x.T @ x, 40, method="truncated") for _ in range(2))
    assert float(one.leak) == pytest.approx(float(other.leak), rel=1e-9)
