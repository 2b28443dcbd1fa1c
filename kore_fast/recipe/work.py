"""The work of each stage: it reads files, calls the rooms below, writes files. Stages meet nowhere else.

Under torchrun each process calls the work of ``covariance``, ``init`` and ``train``; what only one may do is
`by_first`'s.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from kore_fast.constraint.distributed import Ranks
from kore_fast.files import read_json, write_json, write_text
from kore_fast.modules.sharding import first_rank, wait_for_ranks
from kore_fast.progress import Progress
from kore_fast.recipe.calibration import calibration_batches, old_samples, write_answers
from kore_fast.recipe.materials import (
    base_model,
    chosen_samples,
    earlier_adapter,
    earlier_covariance,
    earlier_questions,
    image_root,
    model_dtype,
    processor_of,
    samples_file,
)
from kore_fast.recipe.methods import fisher, loss_terms, start_options, told
from kore_fast.recipe.retention import FOLDER, measure_benchmarks, with_hars
from kore_fast.recipe.schema import BASE, Method, Recipe

if TYPE_CHECKING:
    from kore_fast.augmentation.plan import AugmentationPlan
    from kore_fast.training.methods import TrainingMethod

AUGMENT_CACHE = "augment.cache"
"""In a run's folder: answers and pictures that were paid for, kept whatever becomes of the stage."""
COST = "cost"
"""In a run's folder: what stages took. It differs from run to run; no stage reads it."""


def augment(items: Path, plan: AugmentationPlan, run: Path, folder: Path, progress: Progress, name: str) -> None:
    """Items → samples.json, knowledge.json, questions.jsonl, summary.json and what shows them; ``plan`` is resolved."""
    from kore_fast.augmentation.pipeline import produce

    produce(items, plan, folder, run / AUGMENT_CACHE, name=name, show=progress)


def unanswered(folder: Path) -> str:
    """What a finished augmentation lacks because a server did not answer; empty where nothing is lacking."""
    from kore_fast.augmentation.pipeline import unanswered

    return unanswered(read_json(folder / "summary.json"))


def covariance(recipe: Recipe, folder: Path, progress: Progress) -> None:
    """Old knowledge → one store a source. A source whose file is whole is not collected again; one that was
    interrupted continues from its checkpoint."""
    from kore_fast.constraint import CovarianceStore, collect_covariance
    from kore_fast.constraint.collection import warn_if_few_tokens

    assert recipe.covariance is not None
    team = Ranks()
    with team.sharing_errors():
        processor = processor_of(recipe)
    model: nn.Module | None = None
    for name, source in recipe.covariance.sources.items():
        path, checkpoint = folder / f"{name}.safetensors", folder / f"{name}.checkpoint"
        if not team.by_first(path.exists):
            with team.sharing_errors():
                model = model or base_model(recipe)
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
            model = model or base_model(recipe)
        team.by_first(partial(_take_over, earlier_covariance(recipe), folder, model))
    team.by_first(lambda: warn_if_few_tokens(CovarianceStore.load(folder)))


def _take_over(earlier: Path, folder: Path, model: nn.Module) -> None:
    """An earlier run's sums beside this one's, as they were measured: through the model before its adapter, which lies
    in their null space and so leaves the next layer's input of old knowledge nearly as it was."""
    from kore_fast.constraint import CovarianceStore
    from kore_fast.constraint.fingerprint import model_fingerprint

    for file in sorted(earlier.glob("*.safetensors")):
        if (folder / file.name).exists():  # of a call that was killed; this run's own have other names (`check_after`)
            continue
        store = CovarianceStore.load(file)
        replace(store, model=model_fingerprint(model, store.layers)).save(folder / file.name)


def init(recipe: Recipe, run: Path, method: Method, folder: Path, progress: Progress) -> None:
    """Covariances → an adapter to start from, and the leak of its A in every layer. Null spaces that an interrupted
    call had solved are not solved again."""
    from kore_fast.modules.adapter import METADATA

    team = Ranks()
    # The last file that an adapter writes: what was killed after it had the adapter whole.
    if method.way.starts == "null space" and not team.by_first((folder / METADATA).exists):
        _kore_start(recipe, run, method, folder, progress)
    team.by_first(partial(_finish_start, recipe, run, method, folder))


def _finish_start(recipe: Recipe, run: Path, method: Method, folder: Path) -> None:
    """What one process does: every other start, and the leaks as a table."""
    from kore_fast.constraint import CovarianceStore
    from kore_fast.constraint.leak import LayerLeak, leak_report
    from kore_fast.modules.adapter import METADATA, lora_layers
    from kore_fast.modules.earlier import put_into

    rows: list[dict[str, Any]] = []
    if method.way.starts == "null space":
        shutil.rmtree(folder / _FACTORS, ignore_errors=True)
        rows = read_json(folder / METADATA)["leaks"]
    else:
        model = base_model(recipe)
        covariances = run / "covariance" if recipe.covariance else None
        options = start_options(recipe, method, model, covariances)
        # A start that is made from weights is made from whole ones.
        adapted = method.way.make_start(put_into(model), options, folder)
        layers = lora_layers(adapted)
        A = {name: layer.lora_A["default"].weight for name, layer in layers.items()}
        # An A of zeros (MiCA's) looks nowhere yet.
        if covariances is not None and any(factor.any() for factor in A.values()):
            base = {name: layer.get_base_layer().weight for name, layer in layers.items()}
            store = CovarianceStore.load(covariances)
            rows = [asdict(leak) for leak in leak_report(A, base, store, recipe.source_weights(method))]
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
        model, store = base_model(recipe), CovarianceStore.load(run / "covariance")
    config = KoreConfig(
        rank=method.rank,
        target_modules=recipe.targets_of(model, method),
        source_weights=recipe.source_weights(method),
        train_a=not method.frozen_a,
        modules_to_save=recipe.trained_whole(method),
    )

    def show(solves: Sequence[Solve]) -> Iterable[Solve]:
        return progress(solves, sum(solve.cost for solve in solves), "null spaces", lambda solve: solve.cost)

    get_kore_model(model, config, store, checkpoint=folder / _FACTORS, save_to=folder, progress=show)


def train(recipe: Recipe, run: Path, name: str, method: Method, folder: Path, progress: Progress) -> None:
    """Start and samples → a trained adapter (or a whole model), and the loss log."""
    from kore_fast.data.conversations import ConversationDataset
    from kore_fast.training.cost import measured
    from kore_fast.training.loop import TrainingOptions, check_spread, last_whole_checkpoint, train, write_loss

    data, root = samples_file(recipe, run, method), image_root(recipe, run, method)
    checkpoints, way = folder / "checkpoints", method.way
    # Before the model is loaded, or a Fisher taken.
    check_spread(way, checkpoints, adds_terms=method.ewc is not None or method.lwf is not None)
    processor, base = processor_of(recipe), base_model(recipe, accelerated=False)
    old = old_samples(recipe, processor, run / "covariance") if method.old_samples else []
    dataset = ConversationDataset(processor, chosen_samples(method, data, root), root, old if method.replay else ())
    start = None if way.starts == "nothing" else run / "init" / recipe.start_of(name)
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
        trained_whole=recipe.trained_whole(method) or (),
        replay=method.replay or 0.0,
    )
    done = last_whole_checkpoint(checkpoints) if first_rank() else None
    with measured() as cost:
        sensitive = fisher(recipe, method, base, processor, old, checkpoints)
        model = way.open(base, start_options(recipe, method, base), start)
        for parameter in model.parameters():
            if parameter.requires_grad:
                # A step is smaller than bfloat16's spacing.
                parameter.data = parameter.data.float()
        terms = loss_terms(method, model, sensitive, lambda: base_model(recipe, accelerated=False))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows = train(
            model, dataset, options, checkpoints, method=way, terms=terms, progress=progress, label=f"train {name}"
        )
    _save_trained(way, model, folder / way.saves, start)

    def finish() -> None:
        if recipe.after is not None and way.saves == "adapter":
            from kore_fast.modules.combining import combine_adapters

            shutil.rmtree(folder / "combined", ignore_errors=True)
            combine_adapters(earlier_adapter(recipe), folder / "adapter", folder / "combined")
        write_loss(folder / "loss.csv", rows)
        write_json(
            folder / "settings.json",
            {
                "trained_parameters": trained,
                "added_parameters": way.added_parameters(folder / way.saves),
                "samples": method.samples,
                "sample_count": len(dataset.samples),
                "old_sample_count": len(old),
                "batch_size": recipe.training.samples_a_step,
                "steps": options.steps,
                "learning_rate": options.learning_rate,
                "rank": method.rank if isinstance(method.rank, int | None) else json.dumps(method.rank),
                "frozen_a": way.saves == "adapter" and method.frozen_a,
                **told(method),
            },
        )
        # Not in the stage's folder, whose files are the same whenever and wherever they are made.
        write_json(
            run / COST / "train" / f"{name}.json",
            {
                "seconds": round(cost.seconds, 3),
                "steps": options.steps - (0 if done is None else int(done.rpartition("-")[2])),
                "peak_memory": cost.peak_memory,
                "device": cost.device,
            },
        )
        shutil.rmtree(checkpoints)

    Ranks().by_first(finish)


def _save_trained(way: TrainingMethod, model: nn.Module, folder: Path, start: Path | None) -> None:
    """What was trained, by one process; where parameters are spread over processes, gathered from all of them."""
    from peft import PeftModel

    from kore_fast.modules.adapter import KorePeftModel, adapter_state
    from kore_fast.modules.saving import save_kore_adapter
    from kore_fast.modules.sharding import is_sharded, plain_name, whole
    from kore_fast.training.methods.interface import remove_model_card

    if not is_sharded(model):
        if first_rank():
            way.save(model, folder, start)
        wait_for_ranks()
        return
    if isinstance(model, KorePeftModel):
        save_kore_adapter(model, folder)
        Ranks().by_first(partial(remove_model_card, folder))
        return
    if isinstance(model, PeftModel):
        state = adapter_state(model)
    else:
        state = {plain_name(name): whole(p).detach().cpu() for name, p in model.named_parameters()}
    if first_rank():
        model.save_pretrained(str(folder), state_dict=state)  # type: ignore[operator]
        remove_model_card(folder)
    wait_for_ranks()


def evaluate(recipe: Recipe, run: Path, name: str, method: Method | None, folder: Path, progress: Progress) -> None:
    """A model → its predictions and scores.json."""
    from kore_fast.data.old_knowledge import capital_questions, read_pictures, read_texts, sample
    from kore_fast.data.questions import Question, read_questions
    from kore_fast.evaluation.suite import Suite, evaluate

    options, old = recipe.evaluation, recipe.old_knowledge

    def questions(file: Path) -> list[Question]:
        # Items without facts, such as EVOKE's, give none.
        found = read_questions(file) if file.stat().st_size else []
        return sample(found, options.questions, recipe.evaluation.seed)

    earlier, earlier_root = earlier_questions(recipe)
    suite = Suite(
        questions=questions(run / "augment" / "questions.jsonl"),
        image_root=recipe.resolve(recipe.items).parent,
        earlier=questions(earlier) if earlier else (),
        earlier_root=earlier_root,
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
    settings: dict[str, Any] = {}
    base: nn.Module | None
    if method is None:
        model = base = base_model(recipe)
    else:
        settings = read_json(run / "train" / name / "settings.json")
        model, base = _trained(recipe, run / "train" / name, method)
    processor = processor_of(recipe)
    metrics = evaluate(
        model,
        base,
        processor,
        suite,
        folder,
        base_folder=None if method is None else run / "evaluate" / BASE,
        progress=progress,
    )
    if options.evoke is not None:
        metrics |= _evaluate_evoke(recipe, model, processor, folder / "evoke", progress)
    if options.retention is not None:
        benchmarks, how = measure_benchmarks(recipe, model, processor, run / FOLDER / name, progress)
        metrics |= benchmarks
        settings |= how
    if method is not None and options.evoke_questions is None:  # as K.R, of all questions or not at all
        metrics = with_hars(metrics, read_json(run / "evaluate" / BASE / "scores.json")["metrics"])
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


def _trained(recipe: Recipe, folder: Path, method: Method) -> tuple[nn.Module, nn.Module | None]:
    """What a method has trained, as it is served: base and adapter, unmerged, in the recipe's dtype. And its base, None
    where that is the same model with the adapter off."""
    from kore_fast.modules.loading import load_model

    base, way = base_model(recipe), method.way

    def load_base(saved: str | Path | None) -> nn.Module:
        return base if saved is None else load_model(saved, model_dtype(recipe))

    # In a weight of bfloat16 a small B·A is lost to rounding.
    model = way.load(folder / way.saves, load_base)
    if way.saves == "adapter":
        return model, None
    return model.to(next(base.parameters()).device), base


def _evaluate_evoke(
    recipe: Recipe, model: nn.Module, processor: Any, folder: Path, progress: Progress
) -> dict[str, Any]:
    """EVOKE's own questions, with its predictions and tables in ``folder``."""
    from kore_fast.data.evoke import read_evoke_questions
    from kore_fast.evaluation.answering import ModelAnswerer
    from kore_fast.evaluation.evoke import evaluate_evoke

    assert recipe.evaluation.evoke is not None
    file = recipe.resolve(recipe.evaluation.evoke)
    answerer = ModelAnswerer(model, processor, batch_size=recipe.evaluation.batch_size, bf16=recipe.bf16())
    questions = read_evoke_questions(file, check_images=False)[: recipe.evaluation.evoke_questions]
    metrics: dict[str, Any] = evaluate_evoke(questions, file.parent, answerer, folder, progress=progress)["metrics"]
    return metrics


def report(recipe: Recipe, run: Path) -> None:
    """Everything above → report/."""
    from kore_fast.report import build_report

    build_report(run, title=recipe.title or recipe.name, base_model=recipe.model_path(), note=recipe.note)


def _csv(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
