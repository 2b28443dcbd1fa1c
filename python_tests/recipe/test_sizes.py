"""Sizes that a dry run tells, against models that are opened and files that are written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kore_fast.constraint.selection import select_linears, target_pattern
from kore_fast.modules.loading import load_model
from kore_fast.recipe.dry_run import _Shape
from kore_fast.recipe.loading import load_recipe
from kore_fast.recipe.schema import Method
from kore_fast.recipe.sizes import Layer, sizes_of
from kore_fast.training.methods.interface import StartOptions
from python_tests import families
from python_tests.conftest import recipe_text


def read_bytes(folder: Path) -> int:
    files = [load_file(path) for path in folder.glob("*.safetensors")]
    return sum(tensor.numel() * tensor.element_size() for file in files for tensor in file.values())


def held_bytes(model: nn.Module) -> int:
    """Parameters once each, and what OSF keeps in buffers."""
    kept = {id(p): p for p in model.parameters()}
    kept |= {id(buffer): buffer for name, buffer in model.named_buffers() if "_osf_" in name}
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


OPTIONS = [
    {"kind": "full"},
    {"kind": "full", "projector_learning_rate": 1e-4},
    {"kind": "osf"},
    {"kind": "osf", "effective_rank": 0.1},
    {"kind": "osf", "effective_rank": 5},
    {"kind": "lora", "rank": 4},
    {"kind": "lora", "rank": 4, "projector_learning_rate": 1e-4},
    {"kind": "lora", "rank": 4, "freeze_a": True},
    {"kind": "lora_fa", "rank": 4},
    {"kind": "mica", "rank": 4},
    {"kind": "pissa", "rank": 4},
    {"kind": "corda", "rank": 4},
    {"kind": "lora_null", "rank": 4},
    {"kind": "lora_null", "rank": 4, "freeze_a": True},
    {"kind": "lora", "rank": 4, "layers": {"part": "mlp"}},
]


CASES = [pytest.param("llava", options, id=f"llava {options}") for options in OPTIONS]
# Its k and v are narrower than q, and have biases.
CASES += [
    pytest.param("qwen", {"kind": kind, **rank}, id=f"qwen {kind}")
    for kind, rank in (("full", {}), ("osf", {}), ("lora", {"rank": 4}))
]


@pytest.mark.parametrize(("family", "options"), CASES)
def test_they_are_what_a_model_takes(
    family: str, options: dict[str, object], tmp_path: Path, knowledge_folder: Path
) -> None:
    folder = (families.build_llava if family == "llava" else families.build_qwen)(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(recipe_text(folder, knowledge_folder))
    projector = "model.visual.merger" if family == "qwen" else "multi_modal_projector"
    recipe = load_recipe(
        tmp_path, {"model.dtype": "bfloat16", "model.projector": projector, "training.precision": "bf16"}
    )
    method = Method.model_validate({"learning_rate": 1e-3, **options})
    base = load_model(folder, torch.bfloat16)
    shape = _Shape.of(recipe, base)
    sizes = shape.of_method(recipe, base, method).sizes(recipe, method)

    layers = select_linears(base, recipe.targets_of(base, method))
    start_options = StartOptions(
        layers=layers,
        target_modules=target_pattern(layers, [name for name, _ in base.named_modules()]),
        rank=method.rank if isinstance(method.rank, int) else 0,
        frozen_a=method.frozen_a,
        modules_to_save=[projector] if method.projector_learning_rate else None,
        covariance=lambda name: torch.diag(torch.rand(base.get_submodule(name).in_features).double() + 0.1),  # type: ignore[arg-type, call-overload]
        effective_rank=method.effective_rank,
    )
    way, start = method.way, None
    if way.starts == "adapter":
        start = tmp_path / "start"
        way.make_start(load_model(folder, torch.bfloat16), start_options, start)
        assert sizes.start_bytes == read_bytes(start)
    model = way.open(base, start_options, start)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # as the stage does
    assert sizes.all_trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes.base_bytes + sizes.adapter_bytes == held_bytes(model)
    way.save(model, tmp_path / "saved", start)
    assert sizes.saved_bytes == read_bytes(tmp_path / "saved")


def test_what_is_added_to_a_loss_is_held_too() -> None:
    layers = {"one": Layer(3, 5), "two": Layer(7, 2)}

    def kept(**options: object) -> int:
        method = Method.model_validate({"learning_rate": 1e-3, **options})
        return sizes_of(method, layers, parameters=100, projector=0, itemsize=2).kept_bytes

    fisher = 4 * (3 * 5 + 7 * 2)
    assert kept(kind="lora", rank=2) == 0
    assert kept(kind="lora", rank=2, ewc={"strength": 1}) == fisher
    # The weights that a change is told from.
    assert kept(kind="full", ewc={"strength": 1}) == kept(kind="pissa", rank=2, ewc={"strength": 1}) == 2 * fisher
    # An adapter is switched off to see the base; without one a second base is there.
    assert kept(kind="lora", rank=2, lwf={}) == 0
    assert kept(kind="full", lwf={}) == 2 * 100


def test_by_hand_osf_of_one_layer() -> None:
    """6 × 4, a quarter of the four directions stays: three of 6 + 4 + 1 numbers are trained, and frozen as they were;
    of the longer side the one that stays."""
    method = Method.model_validate({"kind": "osf", "learning_rate": 1e-3, "effective_rank": 0.25})
    sizes = sizes_of(method, {"one": Layer(6, 4)}, parameters=24, projector=0, itemsize=2)
    assert sizes.trained == 3 * 11
    assert sizes.adapter_bytes == 4 * 33 + 4 * (33 + 1 * 6)
    assert sizes.saved_bytes == 4 * 33
    assert sizes.checkpoint_bytes == 12 * 33
