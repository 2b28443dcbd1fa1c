"""The work of each stage: it reads files, calls the rooms below, writes files. Stages meet nowhere else.

Under torchrun each process calls the work of ``covariance``, ``init`` and ``train``; what only one may do is
`by_first`'s.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kore_fast.constraint.distributed import Ranks
from kore_fast.files import read_json, write_json, write_text
from kore_fast.progress import Progress
from kore_fast.recipe.calibration import calibration_batches, write_answers
from kore_fast.recipe.schema import BASE, Method, Recipe

if TYPE_CHECKING:
    from peft import PeftModel

    from kore_fast.augmentation.plan import AugmentationPlan

AUGMENT_CACHE = "augment.cache"
"""In a run's folder: answers and pictures that were paid for, kept whatever becomes of the stage."""


def augment(items: Path, plan: AugmentationPlan, run: Path, folder: Path, progress: Progress, name: str) -> None:
    """Items → samples.json, knowledge.json, questions.jsonl, summary.json and what shows them; ``plan`` is resolved."""
    from kore_fast.augmentation.pipeline import produce

    produce(items, plan, folder, run / AUGMENT_CACHE, name=name, show=progress)


def unanswered(folder: Path) -> str:
    """What a finished augmentation lacks because a server did not answer; empty where nothing is lacking."""
    from kore_fast.augmentation.pipeline import unanswered

    return unanswered(read_json(folder / "summary.json"))


def image_root(recipe: Recipe, run: Path, method: Method) -> Path:
    """The folder that the pictures of a method's samples are below."""
    from kore_fast.augmentation.pipeline import image_root

    items = recipe.resolve(recipe.items)
    if method.samples == "knowledge" or recipe.samples is None:
        return image_root(items, recipe.augmentation, run / "augment")
    return recipe.resolve(recipe.samples.images or recipe.samples.file.parent)


def samples_file(recipe: Recipe, run: Path, method: Method) -> Path:
    """What a method is trained on."""
    if method.samples == "knowledge":
        return run / "augment" / "knowledge.json"
    return run / "augment" / "samples.json" if recipe.samples is None else recipe.resolve(recipe.samples.file)


def targets_key(recipe: Recipe) -> Any:
    """What decides the adapted layers, for a fingerprint."""
    choice = recipe.covariance.layers if recipe.covariance else None
    return recipe.targets if choice is None else [recipe.targets, choice.model_dump(mode="json")]


def _model(recipe: Recipe, *, accelerated: bool = True) -> nn.Module:
    """The model that a run starts from, where there is a GPU on it; under a Trainer that is Trainer's to do."""
    from kore_fast.modules.loading import load_model

    dtype = getattr(torch, recipe.model.dtype)
    if recipe.after is None:
        model = load_model(recipe.model_path(), dtype)
    else:
        # Summed in float32 and rounded once.
        adapted: Any = _load_adapter(load_model(recipe.model_path()), earlier_adapter(recipe))
        model = adapted.merge_and_unload().to(dtype).eval().requires_grad_(False)
    if accelerated and torch.cuda.is_available():
        return model.to(torch.device("cuda", torch.cuda.current_device()))
    return model


def earlier_adapter(recipe: Recipe) -> Path:
    """The adapter that an earlier run has trained, which this one starts with."""
    assert recipe.after is not None
    return recipe.resolve(recipe.after.run) / "train" / recipe.after.method / "adapter"


def earlier_covariance(recipe: Recipe) -> Path:
    """The earlier run's store."""
    assert recipe.after is not None
    return recipe.resolve(recipe.after.run) / "covariance"


def _processor(recipe: Recipe) -> Any:
    from kore_fast.modules.loading import load_processor

    return load_processor(recipe.model_path(), recipe.model.max_pixels)


def covariance(recipe: Recipe, folder: Path, progress: Progress) -> None:
    """Old knowledge → one store a source. A source whose file is whole is not collected again; one that was
    interrupted continues from its checkpoint."""
    from kore_fast.constraint import CovarianceStore, collect_covariance
    from kore_fast.constraint.collection import warn_if_few_tokens

    assert recipe.covariance is not None
    team = Ranks()
    with team.sharing_errors():
        processor = _processor(recipe)
    model: nn.Module | None = None
    for name, source in recipe.covariance.sources.items():
        path, checkpoint = folder / f"{name}.safetensors", folder / f"{name}.checkpoint"
        if not team.by_first(path.exists):
            with team.sharing_errors():
                model = model or _model(recipe)
            if source.kind == "chat":
                team.by_first(partial(write_answers, recipe, name, source, model, processor, folder, progress))
            with team.sharing_errors():
                batches = calibration_batches(recipe, name, source, processor, folder)
            collect_covariance(
                model,
                batches,
                source=name,
                target_modules=recipe.targets_of(model),
                about=source.model_dump(mode="json"),
                max_memory=recipe.covariance.max_memory,
                checkpoint=checkpoint,
                checkpoint_seconds=recipe.covariance.checkpoint_seconds,
                save_to=path,
                progress=lambda items: progress(items, len(batches), f"covariance of {name}"),  # noqa: B023
                warn_few_tokens=False,
            )
        # Of a process that was killed just after it had saved, or of another number of processes.
        team.by_first(partial(shutil.rmtree, checkpoint, ignore_errors=True))
    if recipe.after is not None:
        with team.sharing_errors():
            model = model or _model(recipe)
        team.by_first(partial(_take_over, earlier_covariance(recipe), folder, model))
    team.by_first(lambda: warn_if_few_tokens(CovarianceStore.load(folder)))


def _take_over(earlier: Path, folder: Path, model: nn.Module) -> None:
    """An earlier run's sums beside this one's, as they were measured: through the model before its adapter, which lies
    in their null space and so leaves the next layer's input of old knowledge nearly as it was."""
    from kore_fast.constraint import CovarianceStore
    from kore_fast.constraint.fingerprint import model_fingerprint

    for file in sorted(earlier.glob("*.safetensors")):
        if (folder / file.name).exists():
            continue
        store = CovarianceStore.load(file)
        replace(store, model=model_fingerprint(model, store.layers)).save(folder / file.name)


def init(recipe: Recipe, run: Path, method: Method, folder: Path, progress: Progress) -> None:
    """Covariances → an adapter to start from, and the leak of its A in every layer. Null spaces that an interrupted
    call had solved are not solved again."""
    from kore_fast.modules.adapter import METADATA

    team = Ranks()
    # The last file that an adapter writes: what was killed after it had the adapter whole.
    if method.kind == "kore" and not team.by_first((folder / METADATA).exists):
        _kore_start(recipe, run, method, folder, progress)
    team.by_first(partial(_finish_start, recipe, run, method, folder))


def _finish_start(recipe: Recipe, run: Path, method: Method, folder: Path) -> None:
    """What one process does: every other start, and the leaks as a table."""
    from kore_fast.constraint import CovarianceStore
    from kore_fast.constraint.leak import LayerLeak, leak_report
    from kore_fast.modules.adapter import METADATA, lora_layers

    rows: list[dict[str, Any]] = []
    if method.kind == "kore":
        shutil.rmtree(folder / _FACTORS, ignore_errors=True)
        rows = read_json(folder / METADATA)["leaks"]
    else:
        model = _model(recipe)
        adapted = _lora_start(recipe, method, model)
        if recipe.covariance:
            store = CovarianceStore.load(run / "covariance")
            layers = lora_layers(adapted)
            A = {name: layer.lora_A["default"].weight for name, layer in layers.items()}
            base = {name: layer.get_base_layer().weight for name, layer in layers.items()}
            rows = [asdict(leak) for leak in leak_report(A, base, store, recipe.source_weights)]
        adapted.save_pretrained(str(folder))
    # PEFT's model card template, with nothing filled in.
    (folder / "README.md").unlink(missing_ok=True)
    write_text(folder / "leak.csv", _csv(rows, [f.name for f in fields(LayerLeak)]))


# Finished null spaces, in a stage's folder while it runs.
_FACTORS = "factors.checkpoint"


def _kore_start(recipe: Recipe, run: Path, method: Method, folder: Path, progress: Progress) -> None:
    from kore_fast.constraint import CovarianceStore, KoreConfig, get_kore_model
    from kore_fast.constraint.factors import Solve

    assert method.rank is not None
    with Ranks().sharing_errors():
        model, store = _model(recipe), CovarianceStore.load(run / "covariance")
    config = KoreConfig(
        rank=method.rank,
        target_modules=recipe.targets_of(model),
        source_weights=recipe.source_weights,
        train_a=not method.frozen_a,
        modules_to_save=recipe.trained_whole(method),
    )

    def show(solves: Sequence[Solve]) -> Iterable[Solve]:
        return progress(solves, sum(solve.cost for solve in solves), "null spaces", lambda solve: solve.cost)

    get_kore_model(model, config, store, checkpoint=folder / _FACTORS, save_to=folder, progress=show)


def _lora_start(recipe: Recipe, method: Method, model: nn.Module) -> PeftModel:
    from peft import LoraConfig, get_peft_model

    from kore_fast.constraint.selection import select_linears, target_pattern
    from kore_fast.modules.adapter import as_kore_model, model_lora_a_hash

    assert isinstance(method.rank, int)
    names = select_linears(model, recipe.targets_of(model))
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha or method.rank,
        lora_dropout=method.lora_dropout,
        target_modules=target_pattern(names, [name for name, _ in model.named_modules()]),
        modules_to_save=recipe.trained_whole(method),
    )
    torch.manual_seed(recipe.seed_of(method))
    adapted = get_peft_model(model, config)
    if not method.frozen_a:
        return adapted
    kore = {"format": "kore_fast.adapter/1", "rank": method.rank, "train_a": False}
    return as_kore_model(adapted, {**kore, "lora_a_sha256": model_lora_a_hash(adapted)})


def train(recipe: Recipe, run: Path, name: str, method: Method, folder: Path, progress: Progress) -> None:
    """Start and samples → a trained adapter (or a whole model), and the loss log."""
    from kore_fast.data.conversations import ConversationDataset
    from kore_fast.data.samples import read_samples
    from kore_fast.training.loop import TrainingOptions, train, write_loss

    data, root = samples_file(recipe, run, method), image_root(recipe, run, method)
    dataset = ConversationDataset(_processor(recipe), read_samples(data, root), root)
    model = _model(recipe, accelerated=False)
    if method.kind == "full":
        model = _unfreeze(model, recipe.targets_of(model), recipe.trained_whole(method) or [])
    else:
        model = _load_adapter(model, run / "init" / recipe.start_of(name), is_trainable=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # A step is smaller than bfloat16's spacing.
            parameter.data = parameter.data.float()
    options = TrainingOptions(
        learning_rate=method.learning_rate,
        steps=method.steps or recipe.training.steps_for(len(dataset.samples)),
        batch_size=recipe.training.batch_size,
        accumulation=recipe.training.accumulation,
        per_device=recipe.training.per_device,
        gradient_checkpointing=recipe.training.gradient_checkpointing,
        warmup_ratio=recipe.training.warmup_ratio,
        weight_decay=method.weight_decay,
        seed=recipe.seed_of(method),
        bf16=recipe.bf16(),
        checkpoint_every=recipe.training.checkpoint_every,
        projector_learning_rate=method.projector_learning_rate,
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = train(model, dataset, options, folder / "checkpoints", progress=progress, label=f"train {name}")
    _save_trained(model, folder / ("model" if method.kind == "full" else "adapter"))
    settings = {
        "trained_parameters": trained,
        "samples": method.samples,
        "sample_count": len(dataset.samples),
        "batch_size": recipe.training.samples_a_step,
        "steps": options.steps,
        "learning_rate": options.learning_rate,
        "rank": ", ".join(f"{k}={v}" for k, v in method.rank.items()) if isinstance(method.rank, dict) else method.rank,
        "frozen_a": method.kind != "full" and method.frozen_a,
    }

    def finish() -> None:
        if recipe.after is not None and method.kind != "full":
            from kore_fast.modules.combining import combine_adapters

            shutil.rmtree(folder / "combined", ignore_errors=True)
            combine_adapters(earlier_adapter(recipe), folder / "adapter", folder / "combined")
        (folder / "adapter" / "README.md").unlink(missing_ok=True)
        write_loss(folder / "loss.csv", rows)
        write_json(folder / "settings.json", settings)
        shutil.rmtree(folder / "checkpoints")

    Ranks().by_first(finish)


def _save_trained(model: nn.Module, folder: Path) -> None:
    """What was trained, by one process; where parameters are spread over processes, gathered from all of them."""
    from peft import PeftModel

    from kore_fast.modules.adapter import KorePeftModel, adapter_state
    from kore_fast.modules.saving import save_kore_adapter
    from kore_fast.modules.sharding import first_rank, is_sharded, plain_name, whole

    if isinstance(model, KorePeftModel):
        save_kore_adapter(model, folder)
        return
    given: dict[str, Any] = {}
    if is_sharded(model):
        if isinstance(model, PeftModel):
            given["state_dict"] = adapter_state(model)
        else:
            given["state_dict"] = {plain_name(name): whole(p).detach().cpu() for name, p in model.named_parameters()}
    if first_rank():
        model.save_pretrained(str(folder), **given)  # type: ignore[operator]


def evaluate(recipe: Recipe, run: Path, name: str, method: Method | None, folder: Path, progress: Progress) -> None:
    """A model → its predictions and scores.json."""
    from kore_fast.data.old_knowledge import capital_questions, read_pictures, read_texts, sample
    from kore_fast.data.questions import read_questions
    from kore_fast.evaluation.suite import Suite, evaluate
    from kore_fast.modules.loading import load_model

    options, old = recipe.evaluation, recipe.old_knowledge
    questions = read_questions(run / "augment" / "questions.jsonl")
    suite = Suite(
        questions=sample(questions, options.questions, recipe.evaluation.seed),
        image_root=recipe.resolve(recipe.items).parent,
        capitals=capital_questions() if options.capitals else (),
        texts=sample(read_texts(recipe.resolve(old.texts), held_out=True), options.texts, recipe.evaluation.seed)
        if old.texts
        else (),
        text_tokens=options.text_tokens,
        pictures=read_pictures(recipe.resolve(old.held_out_pictures))[: options.pictures]
        if old.held_out_pictures
        else (),
        drift_samples=options.drift_samples,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        bf16=recipe.bf16(),
    )
    base = _model(recipe)
    settings: dict[str, Any] = {}
    model = base
    if method is not None:
        trained = run / "train" / name
        settings = read_json(trained / "settings.json")
        if method.kind == "full":
            model = load_model(trained / "model").to(next(base.parameters()).device)
        else:
            model = _load_adapter(_model(recipe), trained / "adapter").merge_and_unload()  # type: ignore[operator]
    metrics = evaluate(
        model,
        base,
        _processor(recipe),
        suite,
        folder,
        base_folder=None if method is None else run / "evaluate" / BASE,
        progress=progress,
    )
    write_json(
        folder / "scores.json",
        {
            "method": name,
            "kind": BASE if method is None else method.kind,
            "seed": recipe.seed if method is None else recipe.seed_of(method),
            "trained_parameters": settings.pop("trained_parameters", 0),
            "settings": settings,
            "metrics": metrics,
        },
    )


def report(recipe: Recipe, run: Path) -> None:
    """Everything above → report/."""
    from kore_fast.report import build_report

    build_report(run, title=recipe.title or recipe.name, base_model=recipe.model_path(), note=recipe.note)


def _load_adapter(model: nn.Module, folder: Path, *, is_trainable: bool = False) -> nn.Module:
    from peft import PeftModel

    from kore_fast.modules.adapter import is_kore_adapter, load_kore_model

    if is_kore_adapter(folder):
        return load_kore_model(model, folder, is_trainable=is_trainable)
    return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)


def _unfreeze(model: nn.Module, targets: str | list[str] | None, whole: Sequence[str]) -> nn.Module:
    """Full fine-tuning of the linears that adapters would be put on; the head and embeddings stay."""
    from kore_fast.constraint import select_linears

    for name in select_linears(model, targets):
        model.get_submodule(name).requires_grad_(True)
    for name, parameter in model.named_parameters():
        if any(f".{module}." in f".{name}" for module in whole):
            parameter.requires_grad_(True)
    return model


def _csv(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
