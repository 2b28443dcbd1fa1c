"""A checkpoint of a collection: its sums and its place in the batches, so that a killed one loses minutes at most.

``<folder>/`` holds two slots, ``a/`` and ``b/``, written in turn: the sums first, ``slot.json`` last, so that a kill at
any moment leaves the other slot whole; and ``done/``, the sums of passes that are finished. Under torchrun every rank
has such a folder, ``rank-0-of-2/``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kore_fast.constraint.inputs import Batch, Width
from kore_fast.constraint.sums import Sums
from kore_fast.errors import ConstraintError, DataError
from kore_fast.files import atomic_path, read_json, write_json

logger = logging.getLogger(__name__)

_FORMAT = "kore_fast.collection/1"
_SLOT = "slot.json"
# Between two checkpoints passes so many times the time that the last one took: at most a twentieth goes into them.
_RARER = 20.0


@dataclass(frozen=True)
class Place:
    """How far a collection is: the pass, and the batches (rounds of batches, under torchrun) that are behind it."""

    number: int
    batches: int


@dataclass(frozen=True)
class Found:
    """A whole slot."""

    place: Place
    folder: Path
    about: dict[str, Any]

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """See `DistinctInputs.groups`."""
        return {group: tuple(members) for group, members in self.about["groups"].items()}

    @property
    def widths(self) -> dict[str, Width]:
        """See `DistinctInputs.widths`."""
        return {group: Width(*width) for group, width in self.about["widths"].items()}

    def restore(self, sums: Sums) -> None:
        """Put back what was summed up in this pass."""
        for group, state in self.about["sums"].items():
            tensors = load_file(self.folder / state["file"])
            sums.restore(group, self.widths[group], tensors, state)

    def done(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Of earlier passes, by group: the packed sums that this rank owns, and all counts."""
        packed, counts = {}, {}
        for group, done in self.about["done"].items():
            counts[group] = torch.tensor(done["count"], dtype=torch.float64)
            if done["file"] is not None:
                packed[group] = load_file(self.folder.parent / "done" / done["file"])["packed"]
        return packed, counts

    def check_batch(self, batch: Batch) -> None:
        """Refuse batches that are not those before the interruption.

        Raises:
            ConstraintError: the last batch behind the checkpoint is another one now.
        """
        if batch_digest(batch) != self.about["last_batch"]:
            raise ConstraintError(
                f"{self.folder.parent}: batch {self.place.batches} is not the one that was collected before the "
                "interruption; give the same batches in the same order, or delete the folder to begin anew"
            )


class Checkpoint:
    """Where a collection is kept while it runs."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], seconds: float, rank: int = 0, world: int = 1):
        """``identity``: what must be the same for a checkpoint to be continued (JSON). ``seconds``: least time between
        two; 0 for one after every batch."""
        self._parent = folder if world > 1 else None
        self.folder = folder / f"rank-{rank}-of-{world}" if world > 1 else folder
        self._identity = {"format": _FORMAT, **json.loads(json.dumps(identity)), "ranks": [rank, world]}
        self._seconds = seconds
        self._keep_both = world > 1
        self._next = time.monotonic() + seconds
        self._slot = "a"
        self._done: dict[str, dict[str, Any]] = {}

    def found(self) -> list[Found]:
        """Whole slots, the newest first.

        Raises:
            ConstraintError: they are of another model, source, or of other options; names what differs.
        """
        found = [f for f in map(self._open, ("a", "b")) if f is not None]
        return sorted(found, key=lambda f: (f.place.number, f.place.batches), reverse=True)

    def _open(self, slot: str) -> Found | None:
        path = self.folder / slot / _SLOT
        if not path.exists():
            return None
        try:
            about = read_json(path)
            differing = [k for k, v in self._identity.items() if about["identity"].get(k) != v]
            if not differing:
                place = Place(*about["place"])
                sizes = {path.parent / s["file"]: s["bytes"] for s in about["sums"].values()}
                whole = all(file.stat().st_size == size for file, size in sizes.items())
                done = [done["file"] for done in about["done"].values() if done["file"] is not None]
                whole = whole and all((self.folder / "done" / file).exists() for file in done)
                if not whole:
                    raise ValueError("a file has another size")
                return Found(place, path.parent, about)
        except (DataError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s: not a whole checkpoint (%s); it is passed over", path, error)
            return None
        key = differing[0]
        raise ConstraintError(
            f"{path}: the checkpoint was made with another {key} ({about['identity'].get(key)!r:.80}, now "
            f"{self._identity[key]!r:.80}); delete {self.folder} to begin anew, or give another folder"
        )

    def continued(self, found: Found) -> None:
        """Go on from ``found``: the other slot is written next."""
        self._slot = "b" if found.folder.name == "a" else "a"
        self._done = dict(found.about["done"])

    def due(self) -> bool:
        """Whether it is time for another."""
        return time.monotonic() >= self._next

    def write(
        self,
        place: Place,
        groups: Mapping[str, Sequence[str]],
        widths: Mapping[str, Width],
        sums: Sums | None,
        last_batch: Batch | None,
    ) -> None:
        """Write a slot, whole or not at all.

        Raises:
            DataError: the disk is full or the folder cannot be written.
        """
        started = time.monotonic()
        folder = self.folder / self._slot
        _remove(folder, first=_SLOT)
        names = {group: f"{number:05d}.safetensors" for number, group in enumerate(groups)}
        states = {}
        for group, tensors, about in sums.states() if sums is not None else ():
            _save(folder / names[group], tensors)
            states[group] = {**about, "file": names[group], "bytes": (folder / names[group]).stat().st_size}
        write_json(
            folder / _SLOT,
            {
                "identity": self._identity,
                "place": [place.number, place.batches],
                "groups": groups,
                "widths": widths,
                "sums": states,
                "done": self._done,
                "last_batch": None if last_batch is None else batch_digest(last_batch),
            },
        )
        self._slot = "b" if self._slot == "a" else "a"
        if not self._keep_both:
            _remove(self.folder / self._slot, first=_SLOT)
        now = time.monotonic()
        self._next = now + (max(self._seconds, _RARER * (now - started)) if self._seconds else 0.0)

    def keep(
        self, groups: Iterable[str], packed: Mapping[str, torch.Tensor], counts: Mapping[str, torch.Tensor]
    ) -> None:
        """Keep what finished passes gave, for every later slot."""
        for number, group in enumerate(groups):
            if group not in counts or group in self._done:
                continue
            file = f"{number:05d}.safetensors" if group in packed else None
            if file is not None:
                _save(self.folder / "done" / file, {"packed": packed[group]})
            self._done[group] = {"file": file, "count": counts[group].tolist()}

    def remove(self) -> None:
        """Delete what was written here, and nothing else."""
        for folder in (self.folder / "a", self.folder / "b", self.folder / "done"):
            _remove(folder, first=_SLOT)
        with suppress(OSError):  # not empty, or not there
            self.folder.rmdir()
        if self._parent is not None:
            with suppress(OSError):  # another rank's folder is still there
                self._parent.rmdir()


def batch_digest(batch: Batch) -> str:
    """Hex SHA-256 over a batch's names and tensors."""
    digest = hashlib.sha256()
    for key, value in sorted(batch.items()):
        digest.update(key.encode())
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def _remove(folder: Path, first: str) -> None:
    """Delete a folder of ours, the file that makes it count first."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir(), key=lambda path: path.name != first):
        path.unlink()
    with suppress(OSError):
        folder.rmdir()
