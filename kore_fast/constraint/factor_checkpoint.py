"""Finished null spaces on disk, so that an interrupted initialisation goes on at the next distinct input.

``<folder>/00012.factors.safetensors``: the factors of the layers that read one input; in the header their leaks and
what they were made from. A file is whole or not there. Ranks may share the folder or have each their own.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from kore_fast.constraint.leak import LayerLeak
from kore_fast.files import atomic_path

logger = logging.getLogger(__name__)

_FORMAT = "kore_fast.factors/1"
_END = ".factors.safetensors"
_OURS = re.compile(rf"\d+{re.escape(_END)}|\.\d+{re.escape(_END)}\.partial")


class FactorCheckpoint:
    """The files of one initialisation. ``identity``: what every file depends on (JSON)."""

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self._identity = {"format": _FORMAT, **json.loads(json.dumps(identity))}

    def found(self, inputs: Sequence[Mapping[str, int]]) -> set[int]:
        """Which of ``inputs`` (layer → rank) are there, by number. Others' files are passed over, with a log line."""
        found, reasons = set(), []
        for number, members in enumerate(inputs):
            path = self._path(number)
            if not path.exists():
                continue
            reason = self._differs(path, members)
            if reason is None:
                found.add(number)
            else:
                reasons.append(reason)
        if reasons:
            logger.warning(
                "%s: %d finished inputs cannot be used (%s); they are solved anew",
                self.folder,
                len(reasons),
                reasons[0],
            )
        return found

    def _differs(self, path: Path, members: Mapping[str, int]) -> str | None:
        """Why a file is not one of this initialisation."""
        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {})["factors"])
                wanted = {**self._identity, "members": dict(members)}
                for key, value in wanted.items():
                    if header["identity"].get(key) != value:
                        return f"another {key}"
                for name, rank in members.items():
                    if file.get_slice(f"{name}/A").get_shape()[0] != rank:
                        return f"{name} has another shape"
                if set(header["leaks"]) != set(members):
                    return "its leaks are of other layers"
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{path.name} is not whole: {error}"
        return None

    def write(
        self,
        number: int,
        members: Mapping[str, int],
        tensors: Mapping[str, torch.Tensor],
        leaks: Mapping[str, LayerLeak],
    ) -> None:
        """Keep a finished input: ``tensors`` by ``"layer/A"`` and ``"layer/B0"``.

        Raises:
            DataError: the disk is full or the folder cannot be written.
        """
        header = {
            "identity": {**self._identity, "members": dict(members)},
            "leaks": {name: asdict(leak) for name, leak in leaks.items()},
        }
        with atomic_path(self._path(number)) as temporary:
            try:
                save_file(
                    {name: tensor.contiguous() for name, tensor in tensors.items()},
                    temporary,
                    metadata={"factors": json.dumps(header)},
                )
            except SafetensorError as error:
                raise OSError(str(error)) from error

    def read(self, number: int) -> tuple[dict[str, torch.Tensor], dict[str, LayerLeak]]:
        """What `write` kept."""
        with safe_open(str(self._path(number)), framework="pt") as file:
            header = json.loads(file.metadata()["factors"])
        leaks = {name: LayerLeak(**leak) for name, leak in header["leaks"].items()}
        return load_file(self._path(number)), leaks

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}{_END}"


def remove_factors(folder: str | Path) -> None:
    """Delete what a `FactorCheckpoint` wrote into ``folder``, and the folder where nothing else is in it."""
    folder = Path(folder)
    with suppress(OSError):  # not there, or not empty; another rank may be at it too
        for path in sorted(folder.iterdir()):
            if _OURS.fullmatch(path.name):
                path.unlink(missing_ok=True)
        folder.rmdir()
