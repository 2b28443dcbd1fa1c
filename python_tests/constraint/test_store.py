"""The store: additive, lazy, mixed by weight, and clear about files and models that do not fit."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kore_fast.constraint import CovarianceStore, collect_covariance
from kore_fast.constraint.store import check_finite, tokens_needed, unpack
from kore_fast.errors import DataError, StoreError


class Two(nn.Module):
    """Two layers that share an input and one of another width."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.c = nn.Linear(5, 3), nn.Linear(5, 7), nn.Linear(7, 2)
        self.double()  # sums are exact to its rounding whatever computes them

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x).sum() + self.c(self.b(x)).sum()


LAYERS = ["a", "b", "c"]


def rows(seed: int, n: int = 20) -> torch.Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed)).double()


def store(seed: int, source: str = "text", n: int = 20, **given: Any) -> CovarianceStore:
    return collect_covariance(Two(), [{"x": rows(seed, n)}], source=source, target_modules=LAYERS, **given)


def moment(x: torch.Tensor) -> torch.Tensor:
    return x.double().T @ x.double() / len(x)


def test_unpacking_mirrors_the_rows_of_the_lower_triangle() -> None:
    C = torch.randn(6, 6, dtype=torch.float64)
    C = C + C.T
    rows, columns = torch.tril_indices(6, 6)
    assert torch.equal(unpack(C[rows, columns], 6), C)


def test_saved_and_loaded(tmp_path: Path) -> None:
    made = store(0, about={"kind": "text", "samples": 3})
    made.save(tmp_path / "text.safetensors")
    found = CovarianceStore.load(tmp_path / "text.safetensors")
    assert (found.model, found.groups, found.widths, found.sources) == (
        made.model,
        {"a": ("a", "b"), "c": ("c",)},
        {"a": 5, "c": 7},
        {"text": {"kind": "text", "samples": 3}},
    )
    for layer in LAYERS:
        assert torch.equal(found.covariance(layer), made.covariance(layer))
        assert torch.equal(found.count(layer), made.count(layer))
    assert found.fingerprint() == made.fingerprint()
    assert found.group_of("b") == "a"
    assert sorted(found.layers) == LAYERS


def test_equal_stores_are_equal_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        store(0).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_merging_adds(tmp_path: Path) -> None:
    joint = collect_covariance(Two(), [{"x": rows(0)}, {"x": rows(1, 30)}], source="text", target_modules=LAYERS)
    merged = store(0).merge(store(1, n=30))
    merged.save(tmp_path / "merged.safetensors")
    for found in (merged, CovarianceStore.load(tmp_path / "merged.safetensors")):
        for layer in LAYERS:
            assert torch.allclose(found.covariance(layer), joint.covariance(layer), rtol=1e-13, atol=1e-15)
            assert torch.equal(found.count(layer), joint.count(layer))
        assert found.fingerprint() == joint.fingerprint()


def test_a_folder_is_the_sum_of_its_files(tmp_path: Path) -> None:
    store(0, "text").save(tmp_path / "text.safetensors")
    store(1, "chat").save(tmp_path / "chat.safetensors")
    (tmp_path / "notes.txt").write_text("not a store")
    found = CovarianceStore.load(tmp_path)
    assert set(found.sources) == {"text", "chat"}
    assert found.tokens("a") == 40
    assert torch.allclose(found.covariance("a", {"text": 1, "chat": 0}), moment(rows(0)), rtol=1e-12)
    assert torch.allclose(found.covariance("b", {"text": 0, "chat": 1}), moment(rows(1)), rtol=1e-12)


def test_mixing_weighs_sources_not_tokens() -> None:
    merged = store(0, "text", 20).merge(store(1, "chat", 600))
    one, other = moment(rows(0)), moment(rows(1, 600))
    assert torch.allclose(merged.covariance("a"), (one + other) / 2, rtol=1e-12)
    assert torch.allclose(merged.covariance("a", {"text": 3, "chat": 1}), (3 * one + other) / 4, rtol=1e-12)
    assert torch.allclose(merged.covariance("a", {"text": 3}), (3 * one + other) / 4, rtol=1e-12)


@pytest.mark.parametrize(
    ("weights", "named"),
    [({"txet": 1}, "txet"), ({"text": -1}, "below zero"), ({"text": 0}, "above"), ({"text": float("nan")}, "nan")],
)
def test_weights_that_mean_nothing(weights: dict[str, float], named: str) -> None:
    with pytest.raises(StoreError, match=named):
        store(0).covariance("a", weights)


def test_unknown_layer_is_named() -> None:
    with pytest.raises(StoreError, match="lm_head: the covariance store has no such layer"):
        store(0).covariance("lm_head")


def test_source_without_tokens_is_named() -> None:
    empty = collect_covariance(
        Two(), [{"x": rows(0), "token_weights": torch.zeros(20)}], source="none", target_modules=LAYERS
    )
    with pytest.raises(StoreError, match="'none' has no tokens"):
        empty.covariance("a")


def test_stores_of_other_models_or_layers_do_not_add(tmp_path: Path) -> None:
    other = collect_covariance(Two(seed=1), [{"x": rows(0)}], target_modules=LAYERS)
    with pytest.raises(StoreError, match="different models"):
        store(0).merge(other)
    fewer = collect_covariance(Two(), [{"x": rows(0)}], target_modules=["a", "b"])
    fewer.model = store(0).model
    with pytest.raises(StoreError, match="different layers"):
        store(0).merge(fewer)
    store(0).save(tmp_path / "one.safetensors")
    other.save(tmp_path / "two.safetensors")
    with pytest.raises(StoreError, match="different models"):
        CovarianceStore.load(tmp_path)


def test_files_that_are_no_stores(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="kore-fast covariance"):
        CovarianceStore.load(tmp_path)
    with pytest.raises(StoreError, match=r"nowhere\.safetensors: no such file"):
        CovarianceStore.load(tmp_path / "nowhere.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.ones(3)}, foreign)
    with pytest.raises(StoreError, match=r"foreign\.safetensors: not a covariance store"):
        CovarianceStore.load(foreign)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_truncated_file(tmp_path: Path, share: float) -> None:
    path = tmp_path / "text.safetensors"
    store(0).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(StoreError, match=r"text\.safetensors: not a whole safetensors file"):
        CovarianceStore.load(path)


def test_missing_sum_is_named(tmp_path: Path) -> None:
    path = tmp_path / "text.safetensors"
    store(0).save(path)
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    del tensors["text/c"]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(StoreError, match="the sum of c from source 'text' is missing"):
        CovarianceStore.load(path)


def test_sums_stay_in_the_file_until_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "text.safetensors"
    store(0).save(path)
    found = CovarianceStore.load(path)
    path.unlink()
    assert found.tokens("a") == 20
    assert found.fingerprint() == store(0).fingerprint()
    with pytest.raises(StoreError, match=r"text\.safetensors: the sum text/a cannot be read any more"):
        found.covariance("a")


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["os.replace", "os.fsync", "kore_fast.constraint.store.save_file"])
def test_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    path = tmp_path / "text.safetensors"
    store(0).save(path)
    before = path.read_bytes()
    monkeypatch.setattr(place, full_disk)
    with pytest.raises(DataError, match=r"text\.safetensors: could not be written \(No space left"):
        store(1).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["text.safetensors"]


def test_fingerprint_tells_sources_and_counts_apart() -> None:
    fingerprints = {
        made.fingerprint()
        for made in (
            store(0),
            store(0, n=21),
            store(0, "chat"),
            store(0, about={"samples": 3}),
            store(0).merge(store(1, "chat")),
        )
    }
    assert len(fingerprints) == 5


def test_dropped_rows_are_refused_by_layer() -> None:
    check_finite("a", torch.tensor([5.0, 5.0, 0.0]))
    with pytest.raises(StoreError, match="a: 2 of 7 tokens had NaN"):
        check_finite("a", torch.tensor([5.0, 5.0, 2.0]))


def test_tokens_needed_counts_what_is_missing() -> None:
    made = store(0)
    assert tokens_needed(made, made.layers) == {"c": 8}
    assert tokens_needed(made, ["b", "c"], per_width=5) == {"b": 5, "c": 15}


def test_header_is_json_not_pickle(tmp_path: Path) -> None:
    path = tmp_path / "text.safetensors"
    store(0).save(path)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert json.loads(header["__metadata__"]["store"])["counts"]["text/a"] == [20, 20, 0]
    assert header["text/a"]["dtype"] == "F64"
