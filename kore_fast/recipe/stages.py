"""The stages of a recipe: what each reads, writes and calls. They meet in the run's folder and nowhere else."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kore_fast.errors import ConstraintError, RecipeError
from kore_fast.files import read_json, read_jsonl, write_json, write_jsonl, write_text
from kore_fast.progress import Progress
from kore_fast.recipe.runner import Stage
from kore_fast.recipe.schema import CalibrationSource, Method, Recipe

if TYPE_CHECKING:
    from peft import PeftModel

    from kore_fast.constraint import CovarianceStore
    from kore_fast.modules.adapter import KorePeftModel

KINDS = ("augment", "covariance", "init", "train", "evaluate", "report")
BASE = "base"


def prepare(recipe: Recipe) -> None:
    """Make the model's folder where the recipe says how, and find what is wrong before any long work.

    Raises:
        KoreError: an item, a picture or a text that cannot be used, a rank too large for the model.
    """
    from kore_fast.data.items import load_items
    from kore_fast.data.old_knowledge import read_pictures, read_texts

    load_items(recipe.resolve(recipe.items))
    if recipe.model.build is not None:
        script = recipe.resolve(recipe.model.build)
        if not script.is_file():
            raise RecipeError(f"model.build: {script} is not there")
        command = [sys.executable, str(script), "--output", recipe.model_path()]
        status = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
        if status:
            raise RecipeError(f"{script} could not build the model: it ended with status {status}, see above")
    old = recipe.old_knowledge
    if old.texts is not None:
        read_texts(recipe.resolve(old.texts), held_out=True)
    if old.pictures is not None:
        read_pictures(recipe.resolve(old.pictures), check_images=True)
    if old.held_out_pictures is not None:
        read_pictures(recipe.resolve(old.held_out_pictures), need_choices=True, check_images=True)
    _check_ranks(recipe)


def _check_ranks(recipe: Recipe) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    from kore_fast.constraint import select_linears

    try:
        config = AutoConfig.from_pretrained(recipe.model_path())
        family = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        with torch.device("meta"):
            model = family.from_config(config)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise RecipeError(f"model.path: no model that transformers loads at {recipe.model_path()} ({reason})") from None
    shapes = {name: model.get_submodule(name).weight.shape for name in select_linears(model, _targets(recipe))}
    narrowest = min(shapes, key=lambda name: min(shapes[name]))
    for name, method in recipe.methods.items():
        if method.rank is not None and method.rank > min(shapes[narrowest]):
            raise ConstraintError(
                f"method {name!r}: rank {method.rank} is larger than the width of {narrowest} "
                f"{tuple(shapes[narrowest])}; choose at most {min(shapes[narrowest])}"
            )


def build_stages(recipe: Recipe, run: Path) -> list[Stage]:
    """Every stage of the recipe, in an order in which each finds its inputs made."""
    model = Path(recipe.model_path())
    models = [model] if model.exists() else []
    items = recipe.resolve(recipe.items)
    wordings = items.parent / "wordings.yaml"
    name = recipe.model_path() if not models else ""
    stages = [
        Stage(
            "augment",
            options={"augmentation": recipe.augmentation.model_dump(mode="json")},
            inputs=[items, *([wordings] if wordings.exists() else [])],
            work=lambda folder, progress: augment_stage(recipe, folder),
            produces=("samples.json", "knowledge.json", "questions.jsonl", "summary.json"),
            seconds=3,
        )
    ]
    covariances: list[Path] = []
    if recipe.covariance is not None:
        covariances = [run / "covariance"]
        old = [p for p in (recipe.old_knowledge.texts, recipe.old_knowledge.pictures) if p is not None]
        stages.append(
            Stage(
                "covariance",
                options={"covariance": recipe.covariance.model_dump(mode="json"), "seed": recipe.seed, "model": name},
                inputs=[*models, *_read(recipe, *old)],
                work=lambda folder, progress: covariance_stage(recipe, folder, progress),
                produces=[f"{source}.safetensors" for source in recipe.covariance.sources],
                seconds=60,
            )
        )
    for method_name, method in recipe.methods.items():
        stages += _method_stages(recipe, run, method_name, method, models, covariances)
    evaluated = [run / "evaluate" / method_name for method_name in (BASE, *recipe.methods)]
    stages.append(_evaluate_stage(recipe, run, BASE, None, models))
    stages += [_evaluate_stage(recipe, run, n, m, models) for n, m in recipe.methods.items()]
    started = {start_of(recipe, name) for name, method in recipe.methods.items() if method.kind != "full"}
    made = [run / "init" / name / "leak.csv" for name in sorted(started)]
    made += [run / "train" / name / "loss.csv" for name in recipe.methods]
    stages.append(
        Stage(
            "report",
            options={"title": recipe.title or recipe.name, "note": recipe.note, "model": recipe.model_path()},
            inputs=[*evaluated, *made],
            work=lambda folder, progress: report_stage(recipe, run),
            produces=("report.html", "results.csv"),
            seconds=5,
        )
    )
    order = {kind: place for place, kind in enumerate(KINDS)}
    return sorted(stages, key=lambda stage: order[stage.kind])


def _method_stages(
    recipe: Recipe, run: Path, name: str, method: Method, models: list[Path], covariances: list[Path]
) -> Iterator[Stage]:
    init = run / "init" / start_of(recipe, name)
    steps = method.steps or recipe.training.steps
    shared = {"seed": _seed(recipe, method), "model": recipe.model_path() if not models else ""}
    if method.kind != "full" and start_of(recipe, name) == name:
        chosen = _start_options(recipe, method)
        weights = recipe.covariance and {n: s.weight for n, s in recipe.covariance.sources.items()}
        yield Stage(
            f"init/{name}",
            options={**shared, "method": chosen, "weights": weights, "targets": _targets(recipe)},
            inputs=[*models, *covariances],
            work=lambda folder, progress: init_stage(recipe, run, method, folder, progress),
            produces=("adapter_model.safetensors", "adapter_config.json", "leak.csv"),
            seconds=25,
        )
    data = "samples.json" if method.samples == "augmented" else "knowledge.json"
    yield Stage(
        f"train/{name}",
        options={
            **shared,
            "method": method.model_dump(mode="json"),
            "training": recipe.training.model_dump(mode="json"),
        },
        inputs=[
            *models,
            *([] if method.kind == "full" else [init]),
            run / "augment" / data,
            *_pictures_in(recipe.resolve(recipe.items)),
        ],
        work=lambda folder, progress: train_stage(recipe, run, name, method, folder, progress),
        produces=("loss.csv", "model" if method.kind == "full" else "adapter"),
        seconds=0.55 * steps * recipe.training.batch_size,
    )


def _evaluate_stage(recipe: Recipe, run: Path, name: str, method: Method | None, models: list[Path]) -> Stage:
    old = [p for p in (recipe.old_knowledge.texts, recipe.old_knowledge.held_out_pictures) if p is not None]
    trained = [] if method is None else [run / "train" / name, run / "evaluate" / BASE]
    return Stage(
        f"evaluate/{name}",
        options={
            "evaluation": recipe.evaluation.model_dump(mode="json"),
            "seed": recipe.seed,
            "model": recipe.model_path() if not models else "",
            "precision": recipe.training.precision,
        },
        inputs=[
            *models,
            run / "augment" / "questions.jsonl",
            *_pictures_in(recipe.resolve(recipe.items)),
            *_read(recipe, *old),
            *trained,
        ],
        work=lambda folder, progress: evaluate_stage(recipe, run, name, method, folder, progress),
        produces=("scores.json",),
        seconds=75,
    )


def _read(recipe: Recipe, *files: Path) -> list[Path]:
    """Files of old knowledge, and the pictures that they name."""
    resolved = [recipe.resolve(file) for file in files]
    return [path for file in resolved for path in (file, *_pictures_in(file))]


def _pictures_in(file: Path) -> list[Path]:
    """The pictures that a .jsonl file names; none for another kind of file."""
    if file.suffix != ".jsonl" or not file.is_file():
        return []
    return sorted({file.parent / row["image"] for _, row in read_jsonl(file) if "image" in row})


def augment_stage(recipe: Recipe, folder: Path) -> None:
    """Items → samples.json, knowledge.json, questions.jsonl, summary.json."""
    from kore_fast.augmentation import augment
    from kore_fast.augmentation.wordings import wordings_beside
    from kore_fast.data.items import load_items
    from kore_fast.data.questions import write_questions
    from kore_fast.data.samples import write_samples

    path = recipe.resolve(recipe.items)
    made = augment(load_items(path), recipe.augmentation, wordings=wordings_beside(path))
    write_samples(folder / "samples.json", made.samples)
    write_samples(folder / "knowledge.json", made.knowledge)
    write_questions(folder / "questions.jsonl", made.questions)
    write_json(folder / "summary.json", made.summary)


def covariance_stage(recipe: Recipe, folder: Path, progress: Progress) -> None:
    """Old knowledge → one store a source. A source whose file is whole is not collected again."""
    from kore_fast.constraint import CovarianceStore, collect_covariance
    from kore_fast.constraint.collection import warn_if_few_tokens
    from kore_fast.modules.loading import load_model, load_processor

    assert recipe.covariance is not None
    processor = load_processor(recipe.model_path())
    model: nn.Module | None = None
    for name, source in recipe.covariance.sources.items():
        path = folder / f"{name}.safetensors"
        if path.exists():
            continue
        model = model or load_model(recipe.model_path())
        batches = _calibration(recipe, name, source, model, processor, folder, progress)
        store = collect_covariance(
            model,
            batches,
            source=name,
            target_modules=_targets(recipe),
            about=source.model_dump(mode="json"),
            memory_limit=recipe.covariance.memory_limit,
            progress=lambda items: progress(items, len(batches), f"covariance of {name}"),  # noqa: B023
            warn_few_tokens=False,
        )
        store.save(path)
    warn_if_few_tokens(CovarianceStore.load(folder))


def _calibration(
    recipe: Recipe,
    name: str,
    source: CalibrationSource,
    model: nn.Module,
    processor: Any,
    folder: Path,
    progress: Progress,
) -> list[dict[str, Any]]:
    from kore_fast.data.conversations import by_length, collate, encode, encode_texts, tokenizer_of
    from kore_fast.data.old_knowledge import chat_questions, picture_prompts, read_pictures, read_texts, sample
    from kore_fast.evaluation.generation import Prompt, generate_answers
    from kore_fast.evaluation.naming import OPENING, name_phrase

    assert recipe.covariance is not None
    old = recipe.old_knowledge
    if source.kind == "pictures":
        pictures = sample(read_pictures(recipe.resolve(_given(old.pictures))), source.samples, recipe.seed)
        prompts = picture_prompts()
        encoded = [
            encode(
                processor,
                [("user", f"<image>\n{prompts[i % len(prompts)]}"), ("assistant", f"{OPENING} {name_phrase(p.name)}.")],
                [p.path],
            )
            for i, p in enumerate(pictures)
        ]
    else:
        texts = read_texts(recipe.resolve(_given(old.texts)), held_out=False)
        if source.kind == "text":
            chosen = sample([text.text for text in texts], source.samples, recipe.seed)
            encoded = encode_texts(processor, chosen, source.max_tokens)
        else:
            questions = chat_questions([text.title for text in texts], source.samples, recipe.seed)
            answered = folder / f"{name}.jsonl"
            if not answered.exists():
                answers = generate_answers(
                    model,
                    processor,
                    [Prompt(question.text) for question in questions],
                    max_new_tokens=source.max_tokens,
                    bf16=_bf16(recipe),
                    progress=progress,
                    label=f"the model's own answers for {name}",
                )
                pairs = zip(questions, answers, strict=True)
                write_jsonl(answered, ({"id": q.id, "question": q.text, "answer": a} for q, a in pairs if a))
            rows = [row for _, row in read_jsonl(answered)]
            encoded = [encode(processor, [("user", r["question"]), ("assistant", r["answer"])]) for r in rows]
    pad = tokenizer_of(processor).pad_token_id
    return [
        # The head is not needed to see the inputs of the layers below it.
        {**collate([encoded[i] for i in rows], pad, position_weights=source.positions), "logits_to_keep": 1}
        for rows in by_length([len(e) for e in encoded], recipe.covariance.batch_size)
    ]


def init_stage(recipe: Recipe, run: Path, method: Method, folder: Path, progress: Progress) -> None:
    """Covariances → an adapter to start from, and the leak of its A in every layer."""
    from kore_fast.constraint import CovarianceStore
    from kore_fast.constraint.leak import LayerLeak, leak_report
    from kore_fast.modules.adapter import lora_layers
    from kore_fast.modules.loading import load_model

    model = load_model(recipe.model_path())
    store = CovarianceStore.load(run / "covariance") if recipe.covariance else None
    weights = {n: s.weight for n, s in recipe.covariance.sources.items()} if recipe.covariance else None
    rows: list[dict[str, Any]] = []
    if method.kind == "kore":
        assert store is not None
        adapted = _kore_start(recipe, method, model, store, weights, progress)
        rows = adapted.kore["leaks"]
    else:
        adapted = _lora_start(recipe, method, model)
        if store is not None:
            layers = lora_layers(adapted)
            A = {name: layer.lora_A["default"].weight for name, layer in layers.items()}
            base = {name: layer.get_base_layer().weight for name, layer in layers.items()}
            rows = [asdict(leak) for leak in leak_report(A, base, store, weights)]
    adapted.save_pretrained(str(folder))
    # PEFT's model card template, with nothing filled in.
    (folder / "README.md").unlink(missing_ok=True)
    write_text(folder / "leak.csv", _csv(rows, [f.name for f in fields(LayerLeak)]))


def _kore_start(
    recipe: Recipe,
    method: Method,
    model: nn.Module,
    store: CovarianceStore,
    weights: dict[str, float] | None,
    progress: Progress,
) -> KorePeftModel:
    from kore_fast.constraint import KoreConfig, get_kore_model

    assert method.rank is not None
    config = KoreConfig(
        rank=method.rank,
        target_modules=_targets(recipe),
        source_weights=weights,
        train_a=not method.frozen_a,
        modules_to_save=_trained_whole(method),
    )

    def show(layers: Iterable[str]) -> Iterable[str]:
        listed = list(layers)
        return progress(listed, len(listed), "null spaces")

    return get_kore_model(model, config, store, progress=show)


def _lora_start(recipe: Recipe, method: Method, model: nn.Module) -> PeftModel:
    from peft import LoraConfig, get_peft_model

    from kore_fast.constraint.selection import select_linears, target_pattern
    from kore_fast.modules.adapter import as_kore_model, model_lora_a_hash

    assert method.rank is not None
    names = select_linears(model, _targets(recipe))
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha or method.rank,
        lora_dropout=method.lora_dropout,
        target_modules=target_pattern(names, [name for name, _ in model.named_modules()]),
        modules_to_save=_trained_whole(method),
    )
    torch.manual_seed(_seed(recipe, method))
    adapted = get_peft_model(model, config)
    if not method.frozen_a:
        return adapted
    kore = {"format": "kore_fast.adapter/1", "rank": method.rank, "train_a": False}
    return as_kore_model(adapted, {**kore, "lora_a_sha256": model_lora_a_hash(adapted)})


def train_stage(recipe: Recipe, run: Path, name: str, method: Method, folder: Path, progress: Progress) -> None:
    """Start and samples → a trained adapter (or a whole model), and the loss log."""
    from kore_fast.data.conversations import ConversationDataset
    from kore_fast.data.samples import read_samples
    from kore_fast.modules.loading import load_model, load_processor
    from kore_fast.training.loop import TrainingOptions, train, write_loss

    data = run / "augment" / ("samples.json" if method.samples == "augmented" else "knowledge.json")
    root = recipe.resolve(recipe.items).parent
    dataset = ConversationDataset(load_processor(recipe.model_path()), read_samples(data, root), root)
    model = load_model(recipe.model_path())
    if method.kind == "full":
        model = _unfreeze(model, _targets(recipe), projector=method.projector_learning_rate is not None)
    else:
        model = _load_adapter(model, run / "init" / start_of(recipe, name), is_trainable=True)
    options = TrainingOptions(
        learning_rate=method.learning_rate,
        steps=method.steps or recipe.training.steps,
        batch_size=recipe.training.batch_size,
        accumulation=recipe.training.accumulation,
        warmup_ratio=recipe.training.warmup_ratio,
        weight_decay=method.weight_decay,
        seed=_seed(recipe, method),
        bf16=_bf16(recipe),
        checkpoint_every=recipe.training.checkpoint_every,
        projector_learning_rate=method.projector_learning_rate,
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = train(model, dataset, options, folder / "checkpoints", progress=progress, label=f"train {name}")
    model.save_pretrained(str(folder / ("model" if method.kind == "full" else "adapter")))  # type: ignore[operator]
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    write_loss(folder / "loss.csv", rows)
    write_json(
        folder / "settings.json",
        {
            "trained_parameters": trained,
            "samples": method.samples,
            "sample_count": len(dataset.samples),
            "batch_size": recipe.training.batch_size * recipe.training.accumulation,
            "steps": options.steps,
            "learning_rate": options.learning_rate,
            "rank": method.rank,
            "frozen_a": method.kind != "full" and method.frozen_a,
        },
    )
    shutil.rmtree(folder / "checkpoints")


def evaluate_stage(
    recipe: Recipe, run: Path, name: str, method: Method | None, folder: Path, progress: Progress
) -> None:
    """A model → its predictions and scores.json."""
    from kore_fast.data.old_knowledge import capital_questions, read_pictures, read_texts, sample
    from kore_fast.data.questions import read_questions
    from kore_fast.evaluation.suite import Suite, evaluate
    from kore_fast.modules.loading import load_model, load_processor

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
        bf16=_bf16(recipe),
    )
    base = load_model(recipe.model_path())
    settings: dict[str, Any] = {}
    model = base
    if method is not None:
        trained = run / "train" / name
        settings = read_json(trained / "settings.json")
        if method.kind == "full":
            model = load_model(trained / "model")
        else:
            model = _load_adapter(load_model(recipe.model_path()), trained / "adapter").merge_and_unload()  # type: ignore[operator]
    metrics = evaluate(
        model,
        base,
        load_processor(recipe.model_path()),
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
            "seed": recipe.seed if method is None else _seed(recipe, method),
            "trained_parameters": settings.pop("trained_parameters", 0),
            "settings": settings,
            "metrics": metrics,
        },
    )


def report_stage(recipe: Recipe, run: Path) -> None:
    """Everything above → report/."""
    from kore_fast.report import build_report

    build_report(run, title=recipe.title or recipe.name, base_model=recipe.model_path(), note=recipe.note)


def _load_adapter(model: nn.Module, folder: Path, *, is_trainable: bool = False) -> nn.Module:
    from peft import PeftModel

    from kore_fast.modules.adapter import is_kore_adapter, load_kore_model

    if is_kore_adapter(folder):
        return load_kore_model(model, folder, is_trainable=is_trainable)
    return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)


def _unfreeze(model: nn.Module, targets: str | list[str] | None, *, projector: bool) -> nn.Module:
    """Full fine-tuning of the linears that adapters would be put on; the head and embeddings stay."""
    from kore_fast.constraint import select_linears

    for name in select_linears(model, targets):
        model.get_submodule(name).requires_grad_(True)
    if projector:
        for name, parameter in model.named_parameters():
            if "multi_modal_projector" in name:
                parameter.requires_grad_(True)
    return model


def start_of(recipe: Recipe, name: str) -> str:
    """The method whose start ``name`` trains from: the first with the same options for it, so that a grid of learning
    rates takes one solve."""
    wanted = _start_options(recipe, recipe.methods[name])
    return next(other for other, method in recipe.methods.items() if _start_options(recipe, method) == wanted)


def _start_options(recipe: Recipe, method: Method) -> dict[str, Any]:
    options = method.model_dump(mode="json", include={"kind", "rank", "alpha", "lora_dropout"})
    # A null space has no chance in it.
    seed = None if method.kind == "kore" else _seed(recipe, method)
    return {**options, "frozen_a": method.frozen_a, "whole": _trained_whole(method), "seed": seed}


def _seed(recipe: Recipe, method: Method) -> int:
    return recipe.seed if method.seed is None else method.seed


def _trained_whole(method: Method) -> list[str] | None:
    return ["multi_modal_projector"] if method.projector_learning_rate is not None else None


def _targets(recipe: Recipe) -> str | list[str] | None:
    return recipe.covariance.target_modules if recipe.covariance else None


def _bf16(recipe: Recipe) -> bool:
    from kore_fast.modules.loading import preferred_precision

    if recipe.training.precision == "auto":
        return preferred_precision() == torch.bfloat16
    return recipe.training.precision == "bf16"


def _given(path: Path | None) -> Path:
    assert path is not None, "the recipe's schema checks it"
    return path


def _csv(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
