"""The covariance store: sums of x xᵀ by distinct input and by source, mergeable by addition, in safetensors files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kore_fast.errors import StoreError
from kore_fast.files import atomic_path
from kore_fast.ops.covariance import NONFINITE, TOKENS, WEIGHT

_FORMAT = "kore_fast.covariance/1"


@dataclass(frozen=True)
class _Saved:
    """A sum that stays in its file until it is needed."""

    path: Path
    key: str

    def read(self) -> torch.Tensor:
        try:
            with safe_open(str(self.path), framework="pt") as file:
                return file.get_tensor(self.key)
        except (OSError, SafetensorError) as error:
            raise StoreError(
                f"{self.path}: the sum {self.key} cannot be read any more ({error}); the file changed after it was "
                "opened: collect it again"
            ) from None


@dataclass(frozen=True)
class Part:
    """One addend of a source's covariance: the packed lower triangle (in memory or in a file) and its count."""

    packed: torch.Tensor | _Saved
    count: torch.Tensor

    def read(self) -> torch.Tensor:
        return self.packed.read() if isinstance(self.packed, _Saved) else self.packed


def unpack(packed: torch.Tensor, d: int) -> torch.Tensor:
    """The symmetric (d, d) matrix of which ``packed`` (d(d+1)/2,) holds the rows of the lower triangle, one after the
    other."""
    C = packed.new_zeros(d, d)
    start = 0
    for i in range(d):
        C[i, : i + 1] = packed[start : start + i + 1]
        start += i + 1
    return C + torch.tril(C, -1).mT


@dataclass
class CovarianceStore:
    """Uncentred second moments C = Σ w·x xᵀ of the inputs of a model's linear layers.

    A *group* is a distinct input, named after the first layer that reads it: q, k and v share one, gate and up share
    one. A *source* is a kind of old knowledge. Sums are float64, kept per source, so that any mix can be made later.
    Sums that were loaded stay in their file until a layer's covariance is asked for: 16·d² bytes at a time.
    A store may be the share of one rank of several: all groups, some of the sums. Merged shares are the whole.
    """

    model: str
    """Fingerprint of the model that was read (`constraint.fingerprint`)."""
    groups: dict[str, tuple[str, ...]]
    widths: dict[str, int]
    sources: dict[str, dict[str, Any]]
    """Source → what it is (free-form, JSON)."""
    parts: dict[tuple[str, str], list[Part]] = field(repr=False)
    """(source, group) → addends."""

    @property
    def layers(self) -> list[str]:
        """Every layer that the store covers."""
        return [layer for members in self.groups.values() for layer in members]

    def group_of(self, layer: str) -> str:
        """The group whose covariance ``layer`` reads.

        Raises:
            StoreError: the store has no such layer.
        """
        for group, members in self.groups.items():
            if layer in members:
                return group
        raise StoreError(
            f"{layer}: the covariance store has no such layer (it has {len(self.layers)}, such as "
            f"{self.layers[0] if self.layers else 'none'}); collect covariances with the same target_modules"
        )

    def shared_inputs(self, layers: Iterable[str]) -> list[list[str]]:
        """Of ``layers``, those that read one tensor, two and more."""
        wanted = set(layers)
        found = [[layer for layer in members if layer in wanted] for members in self.groups.values()]
        return [members for members in found if len(members) > 1]

    def count(self, layer: str, source: str | None = None) -> torch.Tensor:
        """(3,) float64: tokens, summed weight, dropped rows (see `ops.covariance`), of one source or of all."""
        group = self.group_of(layer)
        counts = [
            part.count
            for name in ([source] if source is not None else self.sources)
            for part in self.parts.get((name, group), [])
        ]
        return torch.stack(counts).sum(0) if counts else torch.zeros(3, dtype=torch.float64)

    def tokens(self, layer: str) -> int:
        """Tokens behind the layer's covariance, over all sources."""
        return int(self.count(layer)[TOKENS])

    def covariance(self, layer: str, weights: Mapping[str, float] | None = None) -> torch.Tensor:
        """(d, d) float64: Σ_s w_s · C_s / n_s, the weighted mean over sources of their second moment per token.

        Args:
            weights: w_s by source, 0 or more, default 1 for each, so that a source counts the same however long it is.
                (The paper pools 4 sources of 64 samples each, which is near to that.)

        Raises:
            StoreError: an unknown layer or source, weights that are all zero, a source without tokens.
        """
        group = self.group_of(layer)
        chosen = self.mix(weights)
        total = torch.zeros(self.widths[group], self.widths[group], dtype=torch.float64)
        for source, weight in chosen.items():
            if (source, group) not in self.parts:
                raise StoreError(
                    f"{layer}: its sum from source {source!r} is in another rank's share; load or merge the shares of "
                    "all ranks"
                )
            parts = self.parts[(source, group)]
            n = float(sum(float(part.count[WEIGHT]) for part in parts))
            if n <= 0:
                raise StoreError(f"{layer}: source {source!r} has no tokens in the store; collect it again")
            packed = torch.stack([part.read() for part in parts]).sum(0) if len(parts) > 1 else parts[0].read()
            total += unpack(packed, self.widths[group]) * (weight / n)
        return total / sum(chosen.values())

    def mix(self, weights: Mapping[str, float] | None = None) -> dict[str, float]:
        """The sources that a covariance is made of, those of weight 0 left out, with their weights (default 1).

        Raises:
            StoreError: an unknown source, a weight below zero, or none above.
        """
        if weights is None:
            return dict.fromkeys(self.sources, 1.0)
        unknown = sorted(set(weights) - set(self.sources))
        if unknown:
            raise StoreError(f"source weights name {unknown}; the store has {sorted(self.sources)}")
        weights = {**dict.fromkeys(self.sources, 1.0), **weights}
        chosen = {source: float(weight) for source, weight in weights.items() if weight > 0}
        if not chosen or not min(weights.values()) >= 0:
            raise StoreError(f"source weights {dict(weights)}: want none below zero and at least one above")
        return chosen

    def merge(self, *others: CovarianceStore) -> CovarianceStore:
        """The sum of stores of one model: sources of the same name add up, others stand beside each other.

        Raises:
            StoreError: made for different models or with different groups of layers.
        """
        sources = dict(self.sources)
        parts = {key: list(value) for key, value in self.parts.items()}
        for other in others:
            if other.model != self.model:
                raise StoreError(
                    f"stores of different models do not add: fingerprints {self.model[:12]}… and {other.model[:12]}…"
                )
            if other.groups != self.groups or other.widths != self.widths:
                raise StoreError("stores over different layers do not add: collect both with the same target_modules")
            for source, about in other.sources.items():
                sources.setdefault(source, about)
            for key, value in other.parts.items():
                parts.setdefault(key, []).extend(value)
        return CovarianceStore(self.model, dict(self.groups), dict(self.widths), sources, parts)

    def fingerprint(self) -> str:
        """Hex SHA-256 over model, groups, sources and counts: names what an adapter was made from."""
        digest = hashlib.sha256(json.dumps([self.model, self.groups, self.sources], sort_keys=True).encode())
        for (source, group), parts in sorted(self.parts.items()):
            counts = torch.stack([part.count for part in parts]).sum(0)
            digest.update(f"{source}/{group}/{counts.tolist()}".encode())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all: triangles in float64, everything else in its header."""
        tensors: dict[str, torch.Tensor] = {}
        counts: dict[str, list[float]] = {}
        for (source, group), parts in self.parts.items():
            key = f"{source}/{group}"
            tensors[key] = torch.stack([part.read() for part in parts]).sum(0) if len(parts) > 1 else parts[0].read()
            counts[key] = torch.stack([part.count for part in parts]).sum(0).tolist()
        header = {
            "format": _FORMAT,
            "model": self.model,
            "groups": self.groups,
            "widths": self.widths,
            "sources": self.sources,
            "counts": counts,
        }
        with atomic_path(path) as temporary:
            try:
                # One entry: safetensors writes several in any order, and equal stores are to be equal files.
                save_file(tensors, temporary, metadata={"store": json.dumps(header)})
            except SafetensorError as error:
                # safetensors wraps the operating system's error (a full disk) in its own.
                raise OSError(str(error)) from error

    @classmethod
    def load(cls, path: str | Path) -> CovarianceStore:
        """Open a store: a file, or a folder whose ``*.safetensors`` are added up.

        Raises:
            StoreError: nothing there, a truncated or foreign file, files that do not add.
        """
        path = Path(path)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files:
            raise StoreError(f"{path}: no covariance files here; make them with `kore-fast covariance`")
        stores = [cls._load_file(file) for file in files]
        return stores[0].merge(*stores[1:])

    @classmethod
    def _load_file(cls, path: Path) -> CovarianceStore:
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                keys = set(file.keys())
        except FileNotFoundError:
            raise StoreError(f"{path}: no such file; make it with `kore-fast covariance`") from None
        except SafetensorError as error:
            raise StoreError(f"{path}: not a whole safetensors file ({error}); delete it and collect again") from None
        header = json.loads(metadata.get("store", "{}"))
        if header.get("format") != _FORMAT:
            raise StoreError(f"{path}: not a covariance store (format {header.get('format')!r}, want {_FORMAT!r})")
        groups = {group: tuple(members) for group, members in header["groups"].items()}
        parts = {}
        for source in header["sources"]:
            for group in groups:
                key = f"{source}/{group}"
                if key not in header["counts"]:
                    continue  # one rank's share
                if key not in keys:
                    raise StoreError(f"{path}: the sum of {group} from source {source!r} is missing; collect again")
                count = torch.tensor(header["counts"][key], dtype=torch.float64)
                parts[(source, group)] = [Part(_Saved(path, key), count)]
        return cls(header["model"], groups, dict(header["widths"]), dict(header["sources"]), parts)


def check_finite(layer: str, count: torch.Tensor) -> None:
    """Refuse a covariance from which rows were dropped.

    Raises:
        StoreError: some activations were NaN or infinite; names the layer and how many.
    """
    dropped = int(count[NONFINITE])
    if dropped:
        raise StoreError(
            f"{layer}: {dropped} of {dropped + int(count[TOKENS])} tokens had NaN or infinite activations; load the "
            "model in float32 or bfloat16 instead of float16, and look for broken calibration samples"
        )


def tokens_needed(store: CovarianceStore, layers: Iterable[str], per_width: int = 4) -> dict[str, int]:
    """Layers whose covariance rests on fewer than ``per_width``·d tokens → how many tokens more it takes.

    With fewer than d tokens C has exact zeros where nothing was seen; a few times d are needed before the low
    eigenvalues say something about the next input.
    """
    missing = {}
    for layer in layers:
        wanted = per_width * store.widths[store.group_of(layer)]
        if store.tokens(layer) < wanted:
            missing[layer] = wanted - store.tokens(layer)
    return missing
