"""Checkpoints in the layout of the paper's code, built here, and the adapters made of them: the same function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from kore_fast.constraint.official import import_official
from kore_fast.constraint.selection import decoder_linears
from kore_fast.constraint.verification import verify_adapter
from kore_fast.errors import ConstraintError, DataError
from kore_fast.modules.adapter import is_kore_adapter, load_kore_model, lora_layers
from kore_fast.modules.adapter_files import read_adapter
from kore_fast.modules.loading import load_model
from kore_fast.modules.merging import merge_adapter

IDS = torch.arange(4, 84).reshape(4, 20)
RANK = 4
Tensors = dict[str, torch.Tensor]


class Split(nn.Module):
    """A linear in three parts, as the released code computes it; its ALinear is the paper's B."""

    def __init__(self, linear: nn.Linear, basis: torch.Tensor) -> None:
        super().__init__()
        W0 = linear.weight.detach().double()
        U, S, Vh = torch.linalg.svd(W0 @ basis @ basis.T, full_matrices=False)
        root = S[:RANK].sqrt()
        B0, A0 = U[:, :RANK] * root, root[:, None] * Vh[:RANK]
        self.BLinear = nn.Linear(linear.in_features, RANK, bias=False)
        self.ALinear = nn.Linear(RANK, linear.out_features, bias=linear.bias is not None)
        self.weight_residual = nn.Parameter((W0 - B0 @ A0).float())
        with torch.no_grad():
            self.BLinear.weight.copy_(A0)
            self.ALinear.weight.copy_(B0)
            if linear.bias is not None:
                self.ALinear.bias.copy_(linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ALinear(self.BLinear(x)) + nn.functional.linear(x, self.weight_residual)


def split(model: nn.Module, trained: tuple[str, ...], projector: bool = True) -> nn.Module:
    """The model as the released code would have it after training ``trained`` (ALinear, BLinear) and its projector."""
    torch.manual_seed(3)
    for name in decoder_linears(model):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        basis = torch.linalg.qr(torch.randn(linear.in_features, RANK, dtype=torch.float64))[0]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Split(linear, basis))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f".{part}.weight" in name for part in trained):
                parameter.add_(torch.randn_like(parameter) * parameter.abs().mean())
            elif projector and "multi_modal_projector" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return model.requires_grad_(False)


def llava_layout(model: nn.Module, dtype: torch.dtype) -> Tensors:
    """The state dict under the names of LLaVA's own code, as its checkpoints have them."""
    tensors = {}
    for key, value in model.state_dict().items():
        key = key.replace("model.language_model.", "model.").replace("multi_modal_projector.linear_1", "mm_projector.0")
        key = key.replace("multi_modal_projector.linear_2", "mm_projector.2")
        key = key.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")
        tensors[key] = value.to(dtype) if value.is_floating_point() else value
    return {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}


def write(tensors: Tensors, folder: Path, shards: int = 2) -> Path:
    folder.mkdir()
    keys = sorted(tensors)
    files = {key: f"model-{number % shards + 1:05}-of-{shards:05}.safetensors" for number, key in enumerate(keys)}
    for file in set(files.values()):
        part = {key: tensors[key].contiguous() for key in keys if files[key] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_llama", "lora_r": RANK}))
    return folder


def change(folder: Path, key: str, to: Any) -> None:
    """Replace a tensor by ``to(tensor)``; None takes it out."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if key in tensors:
            value = to(tensors.pop(key))
            if value is not None:
                tensors[key] = value.contiguous()
            save_file(tensors, path, metadata={"format": "pt"})


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def pictures(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(5)
    ids = torch.cat([torch.full((1, 4), 3), IDS[:1]], dim=1)
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=torch.randn(1, 3, 28, 28)).logits


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture
def checkpoint(tiny_model: nn.Module, tmp_path: Path) -> Path:
    return write(llava_layout(split(tiny_model, ("ALinear",)), torch.float32), tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("trained", "found", "rank"),
    [(("ALinear",), "B", RANK), (("BLinear",), "A", RANK), (("ALinear", "BLinear"), "A and B", 2 * RANK)],
)
def test_the_adapter_computes_what_the_checkpoint_computes(
    tiny_model: nn.Module, tiny_model_folder: Path, tmp_path: Path, trained: tuple[str, ...], found: str, rank: int
) -> None:
    theirs = split(tiny_model, trained)
    folder = write(llava_layout(theirs, torch.float32), tmp_path / "checkpoint")
    imported = import_official(folder, tiny_model_folder, tmp_path / "adapter")
    assert set(imported.trained.values()) == {found}
    assert set(imported.ranks.values()) == {rank}
    assert imported.modules == ["multi_modal_projector"]
    assert imported.ignored == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert imported.misfit < 1e-6
    base = load_model(tiny_model_folder)
    assert apart(logits(base), logits(theirs)) > 1e-2
    ours = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert apart(logits(ours), logits(theirs)) < 1e-5
    assert apart(pictures(ours), pictures(theirs)) < 1e-5
    with ours.disable_adapter():
        assert torch.equal(logits(ours), logits(load_model(tiny_model_folder)))
    assert is_kore_adapter(tmp_path / "adapter") == (found == "B")
    if found == "B":
        kore = load_kore_model(load_model(tiny_model_folder), tmp_path / "adapter", is_trainable=True)
        for name, layer in lora_layers(kore).items():
            assert torch.equal(layer.lora_A["default"].weight, theirs.get_submodule(name).BLinear.weight)
            assert not layer.lora_A["default"].weight.requires_grad


@pytest.mark.parametrize("trained", [("ALinear",), ("BLinear",)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_fits_but_for_its_rounding(
    tiny_model: nn.Module, tiny_model_folder: Path, tmp_path: Path, dtype: torch.dtype, trained: tuple[str, ...]
) -> None:
    theirs = split(tiny_model, trained, projector=False)
    folder = write(llava_layout(theirs, dtype), tmp_path / "checkpoint")
    imported = import_official(folder, tiny_model_folder, tmp_path / "adapter")
    assert set(imported.trained.values()) == {"B" if trained == ("ALinear",) else "A"}
    assert imported.dtype == str(dtype).removeprefix("torch.")
    assert imported.modules == []
    eps = torch.finfo(dtype).eps
    assert 0 < imported.misfit < eps
    assert imported.misfit < imported.misfit_of_change
    ours = PeftModel.from_pretrained(load_model(tiny_model_folder), str(tmp_path / "adapter"))
    # What was rounded in the residual weights is not learned knowledge: the adapter leaves most of it out.
    assert apart(logits(ours), logits(theirs)) < 8 * eps


def qwen_layout(model: nn.Module) -> Tensors:
    """The state dict under the names that Qwen2.5-VL had when the released code was written."""
    return {
        key.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value
        for key, value in model.state_dict().items()
    }


def test_qwen_with_its_biases_and_a_trained_a(tmp_path: Path) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    # As in Qwen's own configurations; transformers 4.56 has no default for it.
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, vision_start_token_id=151652)
    base = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    base.save_pretrained(tmp_path / "base")
    theirs = split(load_model(tmp_path / "base"), ("BLinear",))
    tensors = qwen_layout(theirs)
    assert "model.layers.1.self_attn.k_proj.ALinear.bias" in tensors
    assert "visual.merger.mlp.0.weight" in tensors
    imported = import_official(write(tensors, tmp_path / "checkpoint"), tmp_path / "base", tmp_path / "adapter")
    assert set(imported.trained.values()) == {"A"}
    assert imported.modules == []
    ours = PeftModel.from_pretrained(load_model(tmp_path / "base"), str(tmp_path / "adapter"))
    assert apart(logits(ours), logits(theirs)) < 1e-5
    change(tmp_path / "checkpoint", "visual.merger.mlp.0.weight", lambda weight: weight + 0.1)
    assert import_official(tmp_path / "checkpoint", tmp_path / "base", tmp_path / "b").modules == ["visual.merger"]
    change(tmp_path / "checkpoint", "model.layers.1.self_attn.k_proj.ALinear.bias", lambda bias: bias + 0.1)
    with pytest.raises(ConstraintError, match=r"layers\.1\.self_attn\.k_proj: its bias differs from the base's"):
        import_official(tmp_path / "checkpoint", tmp_path / "base", tmp_path / "c")
    # Its folder has no tokenizer.
    found = {check.name: check.status for check in verify_adapter(tmp_path / "adapter", tmp_path / "base")}
    assert (found["layers"], found["function"]) == ("ok", "ok")
    assert merge_adapter(tmp_path / "b", tmp_path / "base", tmp_path / "merged").layers == 14


def test_one_file_and_equal_files(checkpoint: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    tensors: Tensors = {}
    for path in checkpoint.glob("*.safetensors"):
        tensors |= load_file(path)
    save_file(tensors, tmp_path / "all.safetensors", metadata={"format": "pt"})
    import_official(checkpoint, tiny_model_folder, tmp_path / "a")
    import_official(tmp_path / "all.safetensors", tiny_model_folder, tmp_path / "b")
    a, b = read_adapter(tmp_path / "a"), read_adapter(tmp_path / "b")
    assert all(torch.equal(a.A[name], b.A[name]) and torch.equal(a.B[name], b.B[name]) for name in a.A)


def test_another_base(checkpoint: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    other = load_model(tiny_model_folder)
    with torch.no_grad():
        weight = other.get_submodule("model.language_model.layers.1.mlp.up_proj").weight
        weight.add_(torch.randn_like(weight), alpha=1e-3)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ConstraintError, match=r"layers\.1\.mlp\.up_proj: base − weight_residual is not of rank 4"):
        import_official(checkpoint, tmp_path / "other", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("key", "to", "named"),
    [
        ("model.norm.weight", lambda t: t * 1.5, "neither a constrained layer nor the projector"),
        ("model.layers.0.mlp.up_proj.BLinear.weight", lambda _: None, "should be in model-"),
        ("model.layers.0.mlp.up_proj.BLinear.weight", lambda t: t[:, 1:], r"shape \(4, 31\)"),
        ("model.norm.weight", lambda t: t[1:], r"shape \(31,\)"),
    ],
)
def test_faults_name_the_tensor(
    checkpoint: Path, tiny_model_folder: Path, tmp_path: Path, key: str, to: Any, named: str
) -> None:
    change(checkpoint, key, to)
    with pytest.raises((ConstraintError, DataError), match=named) as raised:
        import_official(checkpoint, tiny_model_folder, tmp_path / "adapter")
    assert key in str(raised.value)


def test_what_is_no_such_checkpoint(checkpoint: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises((ConstraintError, DataError)) as raised:
            import_official(path, tiny_model_folder, tmp_path / "adapter")
        return str(raised.value)

    assert "not a checkpoint of the paper's code before its merge" in refused(tiny_model_folder)
    (tmp_path / "empty").mkdir()
    assert "no safetensors file here" in refused(tmp_path / "empty")
    (tmp_path / "empty" / "pytorch_model-00001-of-00002.bin").write_bytes(b"pickle")
    error = refused(tmp_path / "empty")
    assert "not opened here" in error
    assert "weights_only=True" in error
    (checkpoint / "model.safetensors.index.json").unlink()
    for name in ("model.layers.0.mlp.up_proj.weight_residual", "model.layers.0.mlp.gate_proj.weight_residual"):
        change(checkpoint, name, lambda _: None)
    assert "up_proj.weight_residual is missing" in refused(checkpoint) or "gate_proj" in refused(checkpoint)
    save_file({"model.new.weight": torch.ones(2)}, checkpoint / "more.safetensors")
    shard = next(checkpoint.glob("model-*"))
    save_file(load_file(shard), checkpoint / "twice.safetensors")
    assert "is in model-" in refused(checkpoint)


def test_unknown_tensor(checkpoint: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    save_file({"model.new.weight": torch.ones(2)}, checkpoint / "more.safetensors")
    with pytest.raises(ConstraintError, match=r"model\.new\.weight has no counterpart"):
        import_official(checkpoint, tiny_model_folder, tmp_path / "adapter")
