"""Factors: the paper's, from any mix of ranks and weights, by one solve a distinct input."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kore_fast.constraint import CovarianceStore, KoreConfig, collect_covariance, kore_factors, select_linears
from kore_fast.constraint import factors as module
from kore_fast.constraint.factors import Solve
from kore_fast.errors import ConstraintError
from kore_fast.ops.dense import product
from kore_fast.ops.factors import nullspace_factors, thin_factors

RANK = 8


def wide_factors(weight: torch.Tensor, P: torch.Tensor, rank: int) -> torch.Tensor:
    """B·A of the paper's step 3, by the full SVD of W0·P."""
    U, S, Vh = torch.linalg.svd(weight @ P)
    root = S[:rank].sqrt()
    return (U[:, :rank] * root) @ (root[:, None] * Vh[:rank])


def test_factors_are_the_paper_s(tiny_model: nn.Module, store: CovarianceStore) -> None:
    factors, _ = kore_factors(tiny_model, KoreConfig(rank=RANK), store)
    assert list(factors) == select_linears(tiny_model)
    for name, f in factors.items():
        W0 = tiny_model.get_submodule(name).weight.double()
        _, vectors = torch.linalg.eigh(store.covariance(name))
        basis = vectors[:, :RANK]
        P = basis @ basis.T
        scale = float((W0 @ P).abs().max())
        assert float((f.B0 @ f.A - W0 @ P).abs().max()) < 1e-10 * scale
        assert float((f.B0 @ f.A - wide_factors(W0, P, RANK)).abs().max()) < 1e-10 * scale
        assert float((f.A @ P - f.A).abs().max()) < 1e-10 * float(f.A.abs().max())
        S = torch.linalg.svdvals(W0 @ basis)
        gram = f.A @ f.A.T
        assert torch.allclose(gram.diagonal(), S, rtol=1e-9)
        assert float((gram - torch.diag(gram.diagonal())).abs().max()) < 1e-10 * float(S[0])


def test_thin_factors_of_a_wide_and_a_tall_weight() -> None:
    torch.manual_seed(0)
    for shape in ((5, 30), (30, 12)):
        W0 = torch.randn(shape, dtype=torch.float64)
        basis, _ = torch.linalg.qr(torch.randn(shape[1], 5, dtype=torch.float64))
        f = nullspace_factors(W0, basis)
        assert f.A.shape == (5, shape[1])
        assert f.B0.shape == (shape[0], 5)
        assert torch.allclose(f.B0 @ f.A, W0 @ basis @ basis.T, atol=1e-12)


def test_layers_that_share_across_module_order() -> None:
    """A store whose groups are not in the model's order is still the model's."""

    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.a(x) + self.c(x)
            return self.b(first)

    model = Crossed()
    made = collect_covariance(model, [{"x": torch.randn(40, 6)}], target_modules=["a", "b", "c"])
    assert made.groups == {"a": ("a", "c"), "b": ("b",)}
    factors, _ = kore_factors(model, KoreConfig(rank=2, target_modules=["a", "b", "c"]), made)
    assert list(factors) == ["a", "b", "c"]


def test_sources_are_mixed_as_asked(tiny_model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    one = collect_covariance(tiny_model, [batch], source="one")
    two = collect_covariance(tiny_model, [{"input_ids": torch.randint(4, 250, (4, 40))}], source="two")
    both = one.merge(two)
    alone, _ = kore_factors(tiny_model, KoreConfig(rank=RANK), one)
    chosen, _ = kore_factors(tiny_model, KoreConfig(rank=RANK, source_weights={"two": 0}), both)
    mixed, _ = kore_factors(tiny_model, KoreConfig(rank=RANK), both)
    name = select_linears(tiny_model)[0]
    product = [f[name].B0 @ f[name].A for f in (alone, chosen, mixed)]
    assert torch.allclose(product[0], product[1], atol=1e-9)
    assert float((product[0] - product[2]).abs().max()) > 1e-4


def with_spectrum(n: int, values: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(len(values))
    U, _ = torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
    return (U * values) @ V.T


@pytest.mark.parametrize("decades", [0, 4, 7, 10])
def test_small_singular_values_are_right(decades: int) -> None:
    """Twice the error of the product's own SVD at most; the Gram matrix loses them."""
    wanted = torch.logspace(0, -decades, 24, dtype=torch.float64)
    product, basis = with_spectrum(200, wanted), torch.linalg.qr(torch.randn(60, 24, dtype=torch.float64)).Q

    def error(found: torch.Tensor) -> float:
        return float(((found - wanted) / wanted).abs().max())

    (factors,) = thin_factors([product], basis)
    found = error(factors.A.square().sum(1))
    assert found <= max(2 * error(torch.linalg.svdvals(product)), 1e-14)
    gram = torch.linalg.eigvalsh(product.T @ product).flip(0).clamp_min(0).sqrt()
    assert decades < 4 or error(gram) > 1000 * found
    assert factors.B0 is not None
    assert float((factors.B0 @ factors.A - product @ basis.T).abs().max()) < 1e-14


def test_layers_together_are_the_layers_alone() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(20, 6, dtype=torch.float64)).Q
    weights = [torch.randn(n, 20, dtype=torch.float64) for n in (9, 30, 7, 12)]
    ranks = [6, 3, 6, 3]
    products = [product(weight, basis[:, :rank]) for weight, rank in zip(weights, ranks, strict=True)]
    together, bare = thin_factors(products, basis), thin_factors(products, basis, b0=False)
    for number, rank in enumerate(ranks):
        alone = nullspace_factors(weights[number], basis[:, :rank])
        assert torch.equal(together[number].A, alone.A)
        assert torch.equal(together[number].B0, alone.B0)
        assert torch.equal(bare[number].A, alone.A)
        assert bare[number].B0 is None


def test_without_any_weight_nothing_is_divided_by_zero() -> None:
    basis = torch.linalg.qr(torch.randn(10, 3, dtype=torch.float64)).Q
    factors = nullspace_factors(torch.zeros(4, 10), basis)
    assert not factors.A.any()
    assert not factors.B0.any()


def test_ranks_by_layer_share_a_solve(
    tiny_model: nn.Module, store: CovarianceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = select_linears(tiny_model)
    ranks = {name: 3 + 2 * (number % 5) for number, name in enumerate(names)}
    solved: list[tuple[int, int]] = []

    def counted(C: torch.Tensor, rank: int, **given: Any) -> Any:
        solved.append((C.shape[0], rank))
        return real(C, rank, **given)

    real = module.nullspace
    monkeypatch.setattr(module, "nullspace", counted)
    factors, leaks = kore_factors(tiny_model, KoreConfig(rank=1), store, ranks=ranks)
    wanted = [(store.widths[g], max(ranks[name] for name in members)) for g, members in store.groups.items()]
    assert sorted(solved) == sorted(wanted)
    assert len(solved) == len(store.groups) == 8
    assert list(factors) == [leak.layer for leak in leaks] == names
    for leak in leaks:
        name, r = leak.layer, ranks[leak.layer]
        values, vectors = torch.linalg.eigh(store.covariance(name))
        WP = tiny_model.get_submodule(name).weight.double() @ vectors[:, :r] @ vectors[:, :r].T
        A, B0 = factors[name].A, factors[name].B0
        assert A.shape == (r, vectors.shape[0])
        assert float((B0 @ A - WP).abs().max()) < 1e-10 * float(WP.abs().max())
        assert leak.rank == r
        tail = float(values[:r].sum() / values.sum())
        assert leak.tail_energy == pytest.approx(tail, rel=1e-6, abs=1e-15)
        assert (leak.d_out, leak.d_in) == tiny_model.get_submodule(name).weight.shape


def test_ranks_that_do_not_fit_are_refused(tiny_model: nn.Module, store: CovarianceStore) -> None:
    names = select_linears(tiny_model)
    config, ranks = KoreConfig(rank=1), dict.fromkeys(names, 4)
    del ranks[names[2]]
    with pytest.raises(ConstraintError, match=rf"{names[2]}: has no rank"):
        kore_factors(tiny_model, config, store, ranks=ranks)
    with pytest.raises(ConstraintError, match="lm_head: has a rank, but is not among"):
        kore_factors(tiny_model, config, store, ranks={**dict.fromkeys(names, 4), "lm_head": 4})
    for rank, said in ((0, "below 1"), (17, "larger than")):
        with pytest.raises(ConstraintError, match=rf"k_proj: rank {rank} is {said}.*d_out 16"):
            kore_factors(tiny_model, config, store, ranks={**dict.fromkeys(names, 4), names[1]: rank})


class Casts(TorchDispatchMode):
    """Casts to float64 of a weight's shape, and how many of them live at a time."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes, self.casts, self.most = shapes, 0, 0
        self.living: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        copied = func is torch.ops.aten._to_copy.default and out.dtype == torch.float64
        if copied and tuple(out.shape) in self.shapes:
            self.casts += 1
            self.living = [ref for ref in self.living if ref() is not None] + [weakref.ref(out)]
            self.most = max(self.most, len(self.living))
        return out


def test_bfloat16_weights_are_cast_one_at_a_time(tiny_model: nn.Module, store: CovarianceStore) -> None:
    tiny_model.to(torch.bfloat16)
    names = select_linears(tiny_model)
    weights = {name: tiny_model.get_submodule(name).weight for name in names}
    with Casts({tuple(w.shape) for w in weights.values()}) as casts:
        factors, _ = kore_factors(tiny_model, KoreConfig(rank=RANK), store)
    assert casts.casts >= len(names)
    assert casts.most == 1
    assert all(w.dtype == torch.bfloat16 for w in weights.values())
    for name, f in factors.items():
        _, vectors = torch.linalg.eigh(store.covariance(name))
        basis = vectors[:, :RANK]
        WP = weights[name].detach().double() @ basis @ basis.T
        assert float((f.B0 @ f.A - WP).abs().max()) < 1e-10 * float(WP.abs().max())


def test_the_costliest_come_first_with_their_costs(tiny_model: nn.Module, store: CovarianceStore) -> None:
    seen: list[Solve] = []

    def progress(solves: Any) -> Any:
        seen.extend(solves)
        return solves

    kore_factors(tiny_model, KoreConfig(rank=RANK), store, progress=progress)
    assert sorted(s.group for s in seen) == sorted(store.groups)
    assert [s.cost for s in seen] == sorted((s.cost for s in seen), reverse=True)
    by_group = {s.group: s.cost for s in seen}
    block = "model.language_model.layers.0"
    # Width 64: down_proj, 64 → 32. Width 32: q 32, k 16, v 16.
    assert by_group[f"{block}.mlp.down_proj"] == 64**3 + 32 * 64 * RANK
    assert by_group[f"{block}.self_attn.q_proj"] == 32**3 + (32 + 16 + 16) * 32 * RANK


def test_an_unknown_method_is_refused(tiny_model: nn.Module, store: CovarianceStore) -> None:
    with pytest.raises(ValueError, match="quantum"):
        kore_factors(tiny_model, KoreConfig(rank=RANK, method="quantum"), store)
