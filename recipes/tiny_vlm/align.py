"""Train the projector, and nothing else, so that the frozen language model can name what the frozen vision tower sees.

    python recipes/tiny_vlm/align.py --pictures DIR --work DIR [--packages DIR]

Three steps, each continuing where it was killed: vision features are cached, a contrastive warm-up without the language
model brings them near the embeddings of their names, then the language model's own loss on short answers does the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageEnhance, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from kore_fast.evaluation.naming import name_phrase

import build

VARIANTS = 3  # the picture itself and two altered copies
Features = NDArray[np.float16]


def alter(image: Image.Image, generator: random.Random) -> Image.Image:
    """A copy that shows the same thing: mirrored, turned, shifted, scaled, tinted or grey, by chance."""
    side = image.width
    if generator.random() < 0.5:
        image = ImageOps.mirror(image)
    image = image.rotate(generator.uniform(-12, 12), Image.Resampling.BICUBIC, fillcolor="white")
    scale = generator.uniform(0.7, 1.15)
    size = round(side * scale)
    canvas = Image.new("RGB", (side, side), "white")
    room = abs(side - size)
    offset = [generator.randint(0, room) * (1 if size <= side else -1) for _ in range(2)]
    canvas.paste(image.resize((size, size), Image.Resampling.BICUBIC), (offset[0], offset[1]))
    for enhance in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        canvas = enhance(canvas).enhance(generator.uniform(0.75, 1.25))
    if generator.random() < 0.1:
        canvas = ImageOps.grayscale(canvas).convert("RGB")
    if generator.random() < 0.5:
        tint = tuple(generator.randint(110, 255) for _ in range(3))
        canvas = ImageChops.multiply(canvas, Image.new("RGB", canvas.size, tint))
    return canvas


def read_pictures(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``pictures.jsonl``."""
    return [json.loads(line) for line in (folder / "pictures.jsonl").read_text(encoding="utf-8").splitlines()]


def load_pixels(image: Image.Image | Path) -> Tensor:
    """A picture as the vision tower takes it: (3, 112, 112), normalised."""
    if isinstance(image, Path):
        image = Image.open(image).convert("RGB")
    image = image.resize((build.IMAGE_SIZE, build.IMAGE_SIZE), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(build.IMAGE_MEAN).view(3, 1, 1)) / torch.tensor(build.IMAGE_STD).view(3, 1, 1)


def cache_features(rows: Sequence[dict[str, Any]], folder: Path, packages: Path, target: Path) -> Features:
    """Vision features of every picture and variant, float16, (variants, pictures, 64, layers x 384), on disk.

    Variant 0 of all pictures is done first. A file of finished blocks beside ``target`` lets a killed run continue.
    """
    shape = (VARIANTS, len(rows), build.IMAGE_TOKENS, 384 * len(build.FEATURE_LAYERS))
    progress_path = target.with_suffix(".progress.json")
    key = hashlib.sha256(json.dumps([shape, [row["id"] for row in rows]]).encode()).hexdigest()
    progress = json.loads(progress_path.read_text()) if progress_path.is_file() else {}
    if progress.get("key") != key or not target.is_file():
        progress = {"key": key, "done": 0}
        cache = np.lib.format.open_memmap(target, mode="w+", dtype=np.float16, shape=shape)
    else:
        cache = np.lib.format.open_memmap(target, mode="r+")
    total = VARIANTS * len(rows)
    if progress["done"] < total:
        tower = build.load_vision_tower(packages)
        bar = tqdm(total=total, initial=progress["done"], desc="vision features", unit="picture")
        while progress["done"] < total:
            variant, start = divmod(progress["done"], len(rows))
            stop = min(start + 64, len(rows))
            pixels = []
            for row in rows[start:stop]:
                image = Image.open(folder / row["image"]).convert("RGB")
                if variant:
                    image = alter(image, random.Random(f"{row['id']} {variant}"))
                pixels.append(load_pixels(image))
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                states = tower(torch.stack(pixels), output_hidden_states=True).hidden_states
            joined = torch.cat([states[layer][:, 1:] for layer in build.FEATURE_LAYERS], dim=-1)
            cache[variant, start:stop] = joined.float().numpy().astype(np.float16)
            progress["done"] += stop - start
            bar.update(stop - start)
            if stop == len(rows) or start // 64 % 16 == 15:
                cache.flush()
                progress_path.write_text(json.dumps(progress))
        bar.close()
    return cache


QUESTIONS = {  # question -> forms of the answer; {a} is the name with its article, {tags} a few words that go with it
    "What is in the picture?": ("The picture shows {a}.",),
    "What does the picture show?": ("The picture shows {a}.", "It shows {a}."),
    "What is this?": ("This is {a}.", "It is {a}."),
    "What can you see here?": ("I can see {a}.", "Here you can see {a}."),
    "Describe the picture in one short sentence.": ("The picture shows {a}.", "This is a picture of {a}."),
    "Name the thing in the picture.": ("It is {a}.", "{Name}."),
    "Write a caption.": ("{Name}.", "A picture of {a}."),
    "Which words go with the picture?": ("{tags}.",),
}
HALF_OF_THE_PATCHES = 0.9  # share of the language steps that look at every other patch only, to be faster
QUESTION_WEIGHTS = (6, 2, 2, 1, 2, 1, 1, 1)


class Projector(torch.nn.Module):
    """LLaVA's projector over standardised features; :meth:`folded` gives the weights for features as they come."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear_1 = torch.nn.Linear(width, hidden)
        self.linear_2 = torch.nn.Linear(hidden, hidden)

    def forward(self, features: Tensor) -> Tensor:
        """(…, width) standardised features -> (…, hidden) token embeddings."""
        return self.linear_2(functional.gelu(self.linear_1(features)))

    def folded(self, mean: Tensor, deviation: Tensor) -> dict[str, Tensor]:
        """Weights that take raw features: W (x - mean) / deviation + b."""
        weight = self.linear_1.weight.detach() / deviation
        return {
            "linear_1.weight": weight,
            "linear_1.bias": self.linear_1.bias.detach() - weight @ mean,
            "linear_2.weight": self.linear_2.weight.detach().clone(),
            "linear_2.bias": self.linear_2.bias.detach().clone(),
        }


class Pool(torch.nn.Module):
    """Attention pooling with one learned query; serves the contrastive loss only and is thrown away."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.query = torch.nn.Parameter(torch.zeros(hidden))
        self.scale = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, tokens: Tensor) -> Tensor:
        """(pictures, tokens, hidden) -> (pictures, hidden)."""
        weights = (tokens @ self.query).softmax(dim=-1)
        return (weights[..., None] * tokens).sum(dim=1)


def contrastive_loss(tokens: Tensor, pool: Pool, targets: Tensor, centre: Tensor, names: Sequence[str]) -> Tensor:
    """InfoNCE both ways between pooled picture tokens and embedded names; equal names are positives of each other.

    A small second term keeps the tokens as long as the language model's own embeddings.

    Args:
        tokens: projected, (pictures, tokens, hidden).
        targets: embedded names, (pictures, hidden); ``centre`` is the mean embedding of the vocabulary.
    """
    pictures = functional.normalize(pool(tokens) - centre, dim=-1)
    texts = functional.normalize(targets - centre, dim=-1)
    logits = pictures @ texts.T * pool.scale.exp()
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    label = torch.tensor([numbers[name] for name in names])
    same = (label[:, None] == label[None]).float()
    same = same / same.sum(dim=1, keepdim=True)
    loss = -(same * logits.log_softmax(dim=1)).sum(1).mean() - (same * logits.T.log_softmax(dim=1)).sum(1).mean()
    length = targets.norm(dim=-1).mean()
    return loss / 2 + ((tokens.norm(dim=-1) / length - 1) ** 2).mean()


def embed_phrases(phrases: Sequence[str], tokenizer: Any, embeddings: Tensor) -> Tensor:
    """Mean embedding of each phrase's tokens, written as in running text (with a space before), (phrases, hidden)."""
    rows = []
    for phrase in phrases:
        tokens = tokenizer(f" {phrase}", add_special_tokens=False)["input_ids"]
        rows.append(embeddings[tokens].mean(dim=0))
    return torch.stack(rows)


class Checkpoint:
    """Trainable weights, their Adam moments and the loss log, in safetensors and JSON; written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.weights, self.record = folder / "state.safetensors", folder / "state.json"

    def save(self, modules: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, log: list[Any]) -> None:
        """Write the state after ``step`` steps; the JSON file, renamed last, names the weights it belongs to."""
        tensors = {f"weight.{name}": value.detach().clone() for name, value in modules.named_parameters()}
        for name, parameter in modules.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value.clone()
        target = self.weights.with_name(f"state-{step}.safetensors")
        save_file(tensors, target)
        temporary = self.record.with_suffix(".partial")
        temporary.write_text(json.dumps({"step": step, "weights": target.name, "log": log}))
        temporary.replace(self.record)
        for old in self.weights.parent.glob("state-*.safetensors"):
            if old != target:
                old.unlink()

    def load(self, modules: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, list[Any]]:
        """Restore what was saved; (0, []) when there is nothing."""
        if not self.record.is_file():
            return 0, []
        record = json.loads(self.record.read_text())
        tensors = load_file(self.weights.with_name(record["weights"]))
        for name, parameter in modules.named_parameters():
            parameter.data.copy_(tensors[f"weight.{name}"])
            moments = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = moments
        return record["step"], record["log"]


class Aligner:
    """What both training steps need: features, names and the frozen language model."""

    def __init__(self, rows: Sequence[dict[str, Any]], features: Features, packages: Path, seed: int = 0) -> None:
        self.rows, self.features, self.seed = rows, features, seed
        self.train = [index for index, row in enumerate(rows) if row["split"] == "train"]
        self.tokenizer = build.load_tokenizer(packages)
        self.language_model = build.load_language_model(packages).to(torch.bfloat16).requires_grad_(False)
        self.embeddings = self.language_model.get_input_embeddings().weight.float()
        sample = torch.from_numpy(np.asarray(features[0, self.train[::16]], dtype=np.float32)).flatten(0, 1)
        self.mean, self.deviation = sample.mean(dim=0), sample.std(dim=0)
        self.centre = self.embeddings.mean(dim=0)
        self.targets = embed_phrases([row["name"] for row in rows], self.tokenizer, self.embeddings)
        torch.manual_seed(seed)
        hidden = self.embeddings.shape[1]
        self.projector, self.pool = Projector(features.shape[-1], hidden), Pool(hidden)
        self.modules = torch.nn.ModuleDict({"projector": self.projector, "pool": self.pool})
        with torch.no_grad():  # start from tokens as long as the language model's own embeddings
            tokens = self.projector(self.standardise(self.train[:64], [0] * 64))
            length = self.targets.norm(dim=-1).mean() / tokens.norm(dim=-1).mean()
            self.projector.linear_2.weight.mul_(length)
            self.projector.linear_2.bias.copy_(self.centre)

    def standardise(
        self, indices: Sequence[int], variants: Sequence[int], patches: Sequence[int] | None = None
    ) -> Tensor:
        """Features of some pictures, (pictures, patches, width), float32."""
        raw = np.stack([self.features[variant, index] for variant, index in zip(variants, indices, strict=True)])
        tensor = torch.from_numpy(raw if patches is None else raw[:, patches]).float()
        return (tensor - self.mean) / self.deviation

    def contrastive(self, generator: random.Random, size: int) -> Tensor:
        """The contrastive loss on ``size`` random pictures, on 16 random patches of each."""
        indices = generator.sample(self.train, size)
        variants = [generator.randrange(VARIANTS) for _ in indices]
        patches = generator.sample(range(build.IMAGE_TOKENS), 16)
        tokens = self.projector(self.standardise(indices, variants, patches))
        names = [self.rows[index]["name"] for index in indices]
        return contrastive_loss(tokens, self.pool, self.targets[indices], self.centre, names)

    def answer(self, row: dict[str, Any], forms: Sequence[str], generator: random.Random) -> str:
        """One of the answer's forms, filled in for a picture."""
        name = row["name"]
        tags = [name, *generator.sample(row["tags"], min(2, len(row["tags"])))]
        form = generator.choice(list(forms))
        return form.format(a=name_phrase(name), Name=name[0].upper() + name[1:], tags=", ".join(tags))

    def language(self, generator: random.Random, size: int, patches: int) -> Tensor:
        """The language model's loss on the answers about ``size`` random pictures, all asked the same question.

        ``patches`` of each picture's 64 tokens, in their order, take part: half of them cost half the time.
        """
        indices = generator.sample(self.train, size)
        variants = [generator.randrange(VARIANTS) for _ in indices]
        question = generator.choices(list(QUESTIONS), QUESTION_WEIGHTS)[0]
        places = sorted(generator.sample(range(build.IMAGE_TOKENS), patches))
        tokens = self.projector(self.standardise(indices, variants, places))
        encode = self.tokenizer
        before = encode("<|im_start|>user\n", add_special_tokens=False)["input_ids"]
        after = encode(f"\n{question}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        answers = [
            encode(
                self.answer(self.rows[index], QUESTIONS[question], generator) + "<|im_end|>", add_special_tokens=False
            )["input_ids"]
            for index in indices
        ]
        length = max(len(answer) for answer in answers)
        inputs = torch.tensor([answer + [0] * (length - len(answer)) for answer in answers])
        labels = torch.tensor([answer + [-100] * (length - len(answer)) for answer in answers])
        constant = self.embeddings[torch.tensor(before)].expand(size, -1, -1)
        asked = self.embeddings[torch.tensor(after)].expand(size, -1, -1)
        embedded = torch.cat([constant, tokens, asked, self.embeddings[inputs[:, :-1]]], dim=1).to(torch.bfloat16)
        # Padding stands at the end, where causal attention lets nothing look at it: no mask is needed.
        states = self.language_model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        present = labels != -100
        logits = self.language_model.lm_head(states[:, -length:][present])
        return functional.cross_entropy(logits.float(), labels[present])

    def run(
        self,
        folder: Path,
        phase: str,
        steps: int,
        size: int,
        rate: float,
    ) -> list[Any]:
        """Train one phase, cosine learning rate, from its last checkpoint; returns rows (phase, step, loss, rate)."""
        folder.mkdir(parents=True, exist_ok=True)
        optimizer = torch.optim.AdamW(self.modules.parameters(), lr=rate, weight_decay=0.01)
        checkpoint = Checkpoint(folder)
        step, log = checkpoint.load(self.modules, optimizer)
        bar = tqdm(total=steps, initial=step, desc=phase, unit="step")
        recent: list[float] = []
        while step < steps:
            generator = random.Random(f"{self.seed} {phase} {step}")
            now = rate * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = now
            if phase == "contrastive":
                total = loss = self.contrastive(generator, size)
            else:
                half = step < HALF_OF_THE_PATCHES * steps
                loss = self.language(generator, size, build.IMAGE_TOKENS // 2 if half else build.IMAGE_TOKENS)
                total = loss + 0.1 * self.contrastive(generator, 128)
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            optimizer.step()
            step += 1
            bar.update()
            recent.append(float(loss))
            if step % 20 == 0 or step == steps:
                log.append([phase, step, round(sum(recent) / len(recent), 4), round(now, 8)])
                bar.set_postfix(loss=log[-1][2])
                recent = []
            if step % 100 == 0 or step == steps:
                checkpoint.save(self.modules, optimizer, step, log)
        bar.close()
        return log


def write_projector(aligner: Aligner, target: Path) -> None:
    """Save the folded projector in bfloat16."""
    weights = aligner.projector.folded(aligner.mean, aligner.deviation)
    temporary = target.with_name(f".{target.name}.partial")
    save_file({name: value.to(torch.bfloat16).contiguous() for name, value in weights.items()}, temporary)
    temporary.replace(target)


def main() -> None:
    """Cache, warm up, align, write the projector and the loss log."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--pictures", type=Path, required=True, help="the folder that prepare_pictures.py wrote")
    parser.add_argument("--work", type=Path, required=True, help="for features and checkpoints (3 GB)")
    parser.add_argument("--packages", type=Path, help="where the packages are unpacked (default: WORK/packages)")
    parser.add_argument("--output", type=Path, default=build.PROJECTOR, help="the projector's file")
    parser.add_argument("--contrastive-steps", type=int, default=1000)
    parser.add_argument("--language-steps", type=int, default=440)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    packages = build.fetch_packages(arguments.packages or arguments.work / "packages")
    rows = read_pictures(arguments.pictures)
    features = cache_features(rows, arguments.pictures, packages, arguments.work / "features.npy")
    aligner = Aligner(rows, features, packages)
    log = aligner.run(arguments.work / "contrastive", "contrastive", arguments.contrastive_steps, 256, 1e-3)
    log += aligner.run(arguments.work / "language", "language", arguments.language_steps, 16, 1e-3)
    write_projector(aligner, arguments.output)
    lines = ["phase,step,loss,learning_rate", *(",".join(str(value) for value in row) for row in log)]
    arguments.output.with_name("alignment_loss.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
