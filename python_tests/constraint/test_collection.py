"""Collection: sums independent of batching and passes, inputs told apart by identity, clean up after failure."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kore_fast.constraint import CovarianceStore, collect_covariance
from kore_fast.constraint.collection import warn_if_few_tokens
from kore_fast.data.conversations import collate, encode
from kore_fast.errors import ConstraintError, StoreError

LAYER = "model.language_model.layers.{}.{}"


class Sharing(nn.Module):
    """x is read by `a` and `far`; `near` reads a copy; `after` reads x changed in place; names say nothing of it."""

    def __init__(self, *, in_place: bool = False) -> None:
        super().__init__()
        # `far` stands before `a`, so that the order of names is not the order of reading.
        self.far, self.near = nn.Linear(6, 4), nn.Linear(6, 4)
        self.a, self.after = nn.Linear(6, 4), nn.Linear(6, 4)
        self.in_place = in_place

    def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        x = x * 1.0
        total = self.a(x)
        if self.in_place:
            x.add_(1)
        total = total + self.far(x)
        return total + self.near(x.clone()) + self.after(x.mul_(2))


class Interleaved(nn.Module):
    """Module order one, three, two; run in the order one, two, three, where one and three read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.three, self.two = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) + self.two(x.relu()) + self.three(x)


def all_linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def pictured(processor: Any, folder: Any, texts: list[str]) -> list[Any]:
    colours = ["red", "green", "blue", "orange"]
    return [
        encode(
            processor,
            [("user", f"<image>\n{text}"), ("assistant", "Moss.")],
            [folder / "images" / f"{colours[i % 4]}.png"],
        )
        for i, text in enumerate(texts)
    ]


def batches(encoded: list[Any], size: int, side: str = "right", **weights: Any) -> list[dict[str, torch.Tensor]]:
    return [
        collate(encoded[start : start + size], 0, side=side, **weights)  # type: ignore[arg-type]
        for start in range(0, len(encoded), size)
    ]


def assert_same(one: CovarianceStore, other: CovarianceStore, bound: float) -> None:
    assert one.groups == other.groups
    for group in one.groups:
        wanted = one.covariance(group)
        assert float((wanted - other.covariance(group)).abs().max()) <= bound * float(wanted.abs().max())
        assert torch.equal(one.count(group), other.count(group))


@pytest.fixture
def encoded(tiny_processor: Any, knowledge_folder: Any) -> list[Any]:
    return pictured(tiny_processor, knowledge_folder, ["What?", "What is it, then?", "Say it.", "Who lives here now?"])


def doubled(made: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """For a model in float64, whose sums are exact to its rounding whatever computes them."""
    return [{**batch, "pixel_values": batch["pixel_values"].double()} for batch in made]


def test_sums_are_those_of_the_inputs(tiny_model: nn.Module, encoded: list[Any]) -> None:
    tiny_model.double()
    seen: dict[str, list[torch.Tensor]] = {}
    names = [LAYER.format(0, "self_attn.q_proj"), LAYER.format(1, "mlp.down_proj")]
    handles = [
        tiny_model.get_submodule(n).register_forward_pre_hook(
            lambda _, args, n=n: seen.setdefault(n, []).append(args[0].detach().double())
        )
        for n in names
    ]
    with torch.no_grad():
        for batch in doubled(batches(encoded, 1)):
            tiny_model(**batch)
    for handle in handles:
        handle.remove()
    store = collect_covariance(tiny_model, doubled(batches(encoded, 1)))
    for name in names:
        x = torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in seen[name]])
        wanted = x.T @ x / len(x)
        assert store.tokens(name) == len(x) == sum(len(e) for e in encoded)
        assert float((store.covariance(name) - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())


# On the left, padding shifts the positions, whose rotations transformers computes in float32.
@pytest.mark.parametrize(("side", "bound"), [("right", 1e-11), ("left", 1e-6)])
def test_batch_size_does_not_matter(tiny_model: nn.Module, encoded: list[Any], side: str, bound: float) -> None:
    tiny_model.double()
    small, large = (
        collect_covariance(tiny_model, doubled(made)) for made in (batches(encoded, 1), batches(encoded, 4, side))
    )
    assert len({len(e) for e in encoded}) > 1
    assert_same(small, large, bound)


def test_readers_of_one_tensor_share(tiny_model: nn.Module, encoded: list[Any]) -> None:
    store = collect_covariance(tiny_model, batches(encoded, 4))
    groups = list(store.groups.values())
    assert len(groups) == 2 * 4
    for layer in range(2):
        attention, mlp = f"{LAYER.format(layer, 'self_attn')}.", f"{LAYER.format(layer, 'mlp')}."
        assert tuple(attention + n for n in ("q_proj", "k_proj", "v_proj")) in groups
        assert (attention + "o_proj",) in groups
        assert tuple(mlp + n for n in ("gate_proj", "up_proj")) in groups
        assert (mlp + "down_proj",) in groups


def test_sharing_is_seen_not_guessed() -> None:
    model = Sharing()
    store = collect_covariance(model, [{"x": torch.randn(5, 6)}], target_modules=all_linears(model))
    assert sorted(map(sorted, store.groups.values())) == [["a", "far"], ["after"], ["near"]]


def test_a_tensor_changed_in_place_is_another_input() -> None:
    model = Sharing(in_place=True)
    model.double()
    x = torch.randn(50, 6, dtype=torch.float64)
    store = collect_covariance(model, [{"x": x}], target_modules=all_linears(model))
    assert all(len(members) == 1 for members in store.groups.values())
    for name, rows in {"a": x, "far": x + 1, "near": x + 1, "after": 2 * (x + 1)}.items():
        wanted = rows.double().T @ rows.double() / 50
        assert torch.allclose(store.covariance(name), wanted, rtol=1e-10, atol=1e-10), name


def test_layers_called_by_keyword_are_seen() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(input=x)

    assert collect_covariance(ByKeyword(), [{"x": torch.randn(7, 3)}], target_modules=["one"]).tokens("one") == 7


def test_max_memory_gives_the_same_sums(tiny_model: nn.Module, encoded: list[Any]) -> None:
    made = batches(encoded, 2)
    whole = collect_covariance(tiny_model, made)
    passes: list[int] = []

    def again() -> list[dict[str, torch.Tensor]]:
        passes.append(1)
        return made

    limited = collect_covariance(tiny_model, again, max_memory=8 * 64 * 64)
    assert len(passes) > 2
    assert_same(whole, limited, 1e-6)  # shorter buffers: other sums of float32 before promotion


def test_every_pass_tells_inputs_apart_alike() -> None:
    """A pass that leaves out the layer read between two others must not take them for sharers."""
    model = Interleaved()
    made = [{"x": torch.randn(9, 6)}, {"x": torch.randn(4, 6)}]
    whole = collect_covariance(model, made, target_modules=all_linears(model))
    limited = collect_covariance(model, made, target_modules=all_linears(model), max_memory=2 * 8 * 36)
    assert_same(whole, limited, 1e-6)


def test_an_iterator_serves_one_pass_only(tiny_model: nn.Module, encoded: list[Any]) -> None:
    once: Iterator[Any] = iter(batches(encoded, 2))
    assert collect_covariance(tiny_model, once).tokens(LAYER.format(0, "self_attn.q_proj")) == sum(map(len, encoded))
    with pytest.raises(ConstraintError, match="passes over the batches"):
        collect_covariance(tiny_model, iter(batches(encoded, 2)), max_memory=8 * 64 * 64)


def test_small_batches_wait_for_each_other() -> None:
    """Token by token, with padding and weights: the same sums as all at once, in fewer calls than batches."""
    model = nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 3)).double()
    x, mask, weights = torch.randn(60, 5, 40, dtype=torch.float64), torch.rand(60, 5) > 0.3, torch.rand(60, 5)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    def split(size: int) -> list[dict[str, torch.Tensor]]:
        names = ("x", "attention_mask", "token_weights")
        return [
            dict(zip(names, t, strict=True)) for t in zip(*(v.split(size) for v in (x, mask, weights)), strict=True)
        ]

    targets = ["inner.0", "inner.2"]
    one, many = (collect_covariance(Named(), split(size), target_modules=targets) for size in (60, 1))
    w = (mask * weights).double()
    wanted = torch.einsum("btd,bt,bte->de", x, w, x) / w.sum()
    assert torch.allclose(one.covariance("inner.0"), wanted, rtol=1e-12, atol=1e-14)
    for layer in targets:
        assert torch.allclose(many.covariance(layer), one.covariance(layer), rtol=1e-12, atol=1e-14)
        assert torch.allclose(many.count(layer), one.count(layer), rtol=1e-13, atol=0)


def test_an_iterator_is_enough_where_sums_may_go_to_a_folder(
    tiny_model: nn.Module, encoded: list[Any], tmp_path: Path
) -> None:
    tiny_model.double()
    made = doubled(batches(encoded, 1))
    given: dict[str, Any] = {"max_memory": 3 * 8 * 64 * 64, "spill": tmp_path / "sums"}
    assert_same(collect_covariance(tiny_model, made), collect_covariance(tiny_model, iter(made), **given), 1e-13)
    assert list((tmp_path / "sums").iterdir()) == []
    assert not any(thread.name == "covariance sums" for thread in threading.enumerate())


def test_spilling_that_means_nothing(tiny_model: nn.Module, encoded: list[Any], tmp_path: Path) -> None:
    with pytest.raises(ConstraintError, match="without max_memory"):
        collect_covariance(tiny_model, batches(encoded, 1), spill=tmp_path)
    with pytest.raises(ConstraintError, match="the model is on the CPU already"):
        collect_covariance(tiny_model.train(), batches(encoded, 1), spill="cpu", max_memory=10**6)
    assert_clean(tiny_model)


def test_limit_below_one_covariance_names_the_layer(tiny_model: nn.Module, encoded: list[Any]) -> None:
    with pytest.raises(ConstraintError, match=r"down_proj.*max_memory is 8,192"):
        collect_covariance(tiny_model, batches(encoded, 2), max_memory=8 * 32 * 32)


def test_token_weights(tiny_model: nn.Module, encoded: list[Any]) -> None:
    """Weight 0 leaves a position out, a weight w counts it w times."""
    zero = collect_covariance(tiny_model, batches(encoded, 1, position_weights={"prompt": 0, "picture": 0}))
    name = LAYER.format(0, "self_attn.q_proj")
    assert zero.tokens(name) == sum(int((e.kinds == 2).sum()) for e in encoded)
    answers = zero.count(name)[1]
    mixed = collect_covariance(tiny_model, batches(encoded, 1, position_weights={"prompt": 0, "picture": 0.25}))
    pictures = sum(int((e.kinds == 1).sum()) for e in encoded)
    assert pictures == 4 * len(encoded)
    assert float(mixed.count(name)[1]) == float(answers) + 0.25 * pictures
    tiny_model.double()
    twice = batches(encoded, 1, position_weights={"prompt": 2, "picture": 2, "answer": 2})
    plain = batches(encoded, 1)
    one, other = (collect_covariance(tiny_model, doubled(made)).covariance(name) for made in (twice, plain))
    assert torch.allclose(one, other, rtol=1e-12, atol=1e-15)


def assert_clean(model: nn.Module) -> None:
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.training


def test_broken_activations_name_the_layer(tiny_model: nn.Module, encoded: list[Any]) -> None:
    with torch.no_grad():
        tiny_model.get_submodule(LAYER.format(1, "input_layernorm")).weight[3] = float("nan")
    tiny_model.train()
    with pytest.raises(StoreError, match=r"layers\.1\.self_attn\.q_proj: \d+ of \d+ tokens had NaN"):
        collect_covariance(tiny_model, batches(encoded, 2))
    assert_clean(tiny_model)


def test_hooks_and_mode_are_restored(tiny_model: nn.Module, encoded: list[Any]) -> None:
    tiny_model.train()
    collect_covariance(tiny_model, batches(encoded, 2))
    assert_clean(tiny_model)
    broken = [*batches(encoded, 2), {"input_ids": torch.tensor([[10**6]])}]
    with pytest.raises(Exception, match="index out of range"):
        collect_covariance(tiny_model, broken)
    assert_clean(tiny_model)


def test_nothing_to_collect(tiny_model: nn.Module, encoded: list[Any]) -> None:
    with pytest.raises(ConstraintError, match="no calibration batches"):
        collect_covariance(tiny_model, [])

    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    with pytest.raises(ConstraintError, match="unused: no batch reached this layer"):
        collect_covariance(Lazy(), [{"x": torch.ones(1, 2)}], target_modules=["used", "unused"])


def test_mask_that_does_not_fit_a_layer_names_it(tiny_model: nn.Module, encoded: list[Any]) -> None:
    with pytest.raises(ConstraintError, match=r"vision_tower.*does not have one row per token"):
        collect_covariance(tiny_model, batches(encoded, 2), target_modules=r".*vision_tower.*q_proj")


def test_sharing_that_changes_is_refused() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(x) + self.two(x if len(x) == 1 else x.clone())

    with pytest.raises(ConstraintError, match="two: read the same input as one in one batch and as two"):
        collect_covariance(Fickle(), [{"x": torch.ones(1, 2)}, {"x": torch.ones(2, 2)}], target_modules=["one", "two"])


def test_few_tokens_are_a_warning_that_says_how_many(
    tiny_model: nn.Module, encoded: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        store = collect_covariance(tiny_model, batches(encoded[:1], 1))
    tokens = len(encoded[0])
    assert f"has {tokens} tokens for width 64 and needs {4 * 64 - tokens} more" in caplog.text
    caplog.clear()
    enough = collect_covariance(tiny_model, batches(encoded * 4, 4))
    assert enough.tokens(LAYER.format(0, "mlp.down_proj")) >= 256
    caplog.clear()
    warn_if_few_tokens(enough)
    assert not caplog.records
    assert store.sources == {"calibration": {}}
