"""What a way to train has to answer; the loop and the recipe's stages know no more of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from kore_fast.errors import ConstraintError
from kore_fast.modules.adapter import WEIGHTS, is_kore_adapter, load_kore_model

if TYPE_CHECKING:
    from kore_fast.training.loop import TrainingOptions

WeightChange = Callable[[], torch.Tensor]
"""W − W0 of a layer (d_out, d_in) as it is at the moment of the call, differentiable."""


@dataclass(frozen=True)
class StartOptions:
    """What decides where a method starts; a method reads what it knows."""

    layers: Sequence[str] = ()
    """Names of the linear layers to adapt."""
    target_modules: str | list[str] = ""
    """The same as a pattern, for an adapter's configuration."""
    rank: int = 0
    alpha: float | None = None
    """Default: the rank, a scaling of 1."""
    lora_dropout: float = 0.0
    frozen_a: bool = False
    """LoRA and LoRA-Null: A stays as it starts."""
    modules_to_save: Sequence[str] | None = None
    """Modules trained in full beside the adapter."""
    seed: int = 0
    """Of a random A."""
    covariance: Callable[[str], torch.Tensor] | None = None
    """Layer → its covariance (d_in, d_in) of old knowledge, for methods that need one."""
    input_of: Callable[[str], str] = str
    """Layer → a name for its input, the same for layers that read one tensor; default each its own."""
    corda_mode: Literal["kpm", "ipm"] = "kpm"
    """CorDA: adapt the directions that old knowledge uses least (knowledge-preserved), or most."""
    effective_rank: int | float | None = None
    """OSF: singular directions kept as they are, a number or a share; default half of them."""


class TrainingMethod(ABC):
    """One way to train a base model. Its objects hold no state: everything is in the model and in files."""

    kind: ClassVar[str]
    """Its name in a recipe."""
    title: ClassVar[str]
    """Its name in prose."""
    starts: ClassVar[Literal["adapter", "null space", "nothing"]] = "adapter"
    """Whether training begins from an adapter's folder that is made before: by `make_start`, or by the constraint."""
    saves: ClassVar[Literal["adapter", "model"]] = "adapter"
    """What `save` writes: an adapter's folder for the untouched base, or a whole model's."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Options of a recipe that must be given."""
    takes: ClassVar[frozenset[str]] = frozenset()
    """Options of a recipe that may be given, beside those of every method."""
    uses_covariance: ClassVar[bool] = False
    """Whether its start is computed from covariances of old knowledge."""
    shows_base: ClassVar[bool] = False
    """Whether a model in training can compute what the untouched base does, see `as_base`."""
    spreads: ClassVar[bool] = False
    """Whether it was held against one process where FSDP2 or ZeRO-3 spreads the parameters over several."""
    lowest_peft: ClassVar[tuple[int, int]] = (0, 18)

    def check_available(self) -> None:
        """Raises `ConstraintError` when the installed PEFT is too old for the method."""
        found = tuple(int(part) for part in version("peft").split(".")[:2])
        if found < self.lowest_peft:
            wanted = ".".join(map(str, self.lowest_peft))
            raise ConstraintError(
                f"{self.title} (kind {self.kind!r}) needs PEFT {wanted} or newer and {version('peft')} is installed: "
                f"pip install 'peft>={wanted}'"
            )

    def make_start(self, base: nn.Module, options: StartOptions, folder: Path) -> PeftModel:
        """Write into ``folder`` what `open` begins from, made from ``base``, which is used up.

        Returns:
            The base with the adapter as it starts, for a look at its A.

        Raises:
            NotImplementedError: of a method that does not start from an "adapter"; nobody asks one that.
        """
        raise NotImplementedError(f"{self.kind} has no start of its own")

    @abstractmethod
    def open(self, base: nn.Module, options: StartOptions, start: Path | None) -> nn.Module:
        """``base`` (used up) with gradients on exactly what the method trains; it computes what the base does.

        Args:
            start: the folder of `make_start` (or of the constraint), where the method `starts` from one.
        """

    def check(self, model: nn.Module, options: TrainingOptions) -> None:  # noqa: B027 (most promise nothing)
        """Before, while and after training: raises `ConstraintError` for a broken promise of the method."""

    def optimizer(self, model: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer | None:
        """The method's own optimiser; None for AdamW."""
        return None

    @abstractmethod
    def restore(self, model: nn.Module, checkpoint: Path) -> None:
        """Put a checkpoint's weights into the model that is trained."""

    @abstractmethod
    def weight_changes(self, model: nn.Module) -> dict[str, WeightChange]:
        """W − W0 by the name of each layer that the method changes (not modules trained in full beside an adapter).

        To be called on what `open` returns: W as it is then counts as W0.
        """

    def as_base(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within it the model computes what the untouched base does.

        Raises:
            NotImplementedError: of a method whose `shows_base` is false; who needs the base loads it again.
        """
        raise NotImplementedError(f"{self.kind}: only a second copy of the base computes what the base does")

    @abstractmethod
    def save(self, model: nn.Module, folder: Path, start: Path | None) -> None:
        """Write the trained model into ``folder``, as `saves` says."""

    @abstractmethod
    def load(self, folder: Path, load_base: Callable[[str | Path | None], nn.Module]) -> nn.Module:
        """What `save` wrote as a model for evaluation: an adapter on its base, unmerged.

        Args:
            load_base: loads a model from a folder, the base (used up) for None.
        """

    def added_parameters(self, folder: Path) -> int:
        """Parameters that a server must hold beside the base's to use what was saved without merging it."""
        return 0


class AdapterMethod(TrainingMethod):
    """What all methods share that train and save an adapter of PEFT's."""

    shows_base = True

    def restore(self, model: nn.Module, checkpoint: Path) -> None:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, load_file(checkpoint / WEIGHTS))

    def as_base(self, model: nn.Module) -> AbstractContextManager[None]:
        assert isinstance(model, PeftModel)
        return model.disable_adapter()

    def save(self, model: nn.Module, folder: Path, start: Path | None) -> None:
        assert isinstance(model, PeftModel)
        model.save_pretrained(str(folder))
        remove_model_card(folder)

    def load(self, folder: Path, load_base: Callable[[str | Path | None], nn.Module]) -> nn.Module:
        return open_adapter(load_base(None), folder).eval()

    def added_parameters(self, folder: Path) -> int:
        return sum(tensor.numel() for tensor in load_file(folder / WEIGHTS).values())


def open_adapter(base: nn.Module, folder: Path, *, is_trainable: bool = False) -> nn.Module:
    """An adapter's folder on its base: of `get_kore_model`, with its promises, or any other of PEFT's."""
    if is_kore_adapter(folder):
        return load_kore_model(base, folder, is_trainable=is_trainable)
    return PeftModel.from_pretrained(base, str(folder), is_trainable=is_trainable)


def on_device_of(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments with their tensors where the model's parameters are."""
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def is_within(parameter: str, modules: Iterable[str]) -> bool:
    """Whether a parameter's name is that of one within a module of the given names, or of these as ends of names."""
    return any(f".{module}." in f".{parameter}" for module in modules)


def remove_model_card(folder: Path) -> None:
    """PEFT writes a template with nothing filled in."""
    (folder / "README.md").unlink(missing_ok=True)
