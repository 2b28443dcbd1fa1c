"""The stages of a recipe: what each reads and writes, and on which options it depends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from kore_fast.augmentation.foresight import rough_seconds
from kore_fast.augmentation.plan import AugmentationPlan
from kore_fast.data.evoke import read_evoke_questions
from kore_fast.data.items import load_items
from kore_fast.data.questions import read_questions
from kore_fast.errors import DataError
from kore_fast.files import inside, read_jsonl
from kore_fast.recipe import work
from kore_fast.recipe.materials import (
    earlier_adapter,
    earlier_covariance,
    earlier_questions,
    samples_file,
    targets_key,
)
from kore_fast.recipe.retention import FOLDER, benchmark_files, to_try_again
from kore_fast.recipe.runner import Stage
from kore_fast.recipe.schema import BASE, MEMORY_ONLY, Method, Recipe

KINDS = ("augment", "covariance", "init", "train", "evaluate", "report")
JUDGE_PLACE = {"base_url", "api_key_env", "timeout", "attempts"}
"""Options of a judge that say where it is, and nothing about its judgement."""


def build_stages(recipe: Recipe, run: Path) -> list[Stage]:
    """Every stage of the recipe, in an order in which each finds its inputs made."""
    model = Path(recipe.model_path())
    models = [model] if model.exists() else []
    if recipe.after is not None:
        models.append(earlier_adapter(recipe))
    items = recipe.resolve(recipe.items)
    stages = [augment_stage(items, recipe.augmentation, recipe.resolve, run, recipe.name)]
    covariances: list[Path] = []
    if recipe.covariance is not None:
        covariances = [run / "covariance"]
        earlier = [earlier_covariance(recipe)] if recipe.after is not None else []
        old = [p for p in (recipe.old_knowledge.texts, recipe.old_knowledge.pictures) if p is not None]
        old += [source.file for source in recipe.covariance.sources.values() if source.file is not None]
        stages.append(
            Stage(
                "covariance",
                options={
                    "covariance": recipe.covariance.model_dump(mode="json", exclude={"checkpoint_seconds"}),
                    "seed": recipe.seed,
                    **_base(recipe),
                    "precision": recipe.training.precision,
                },
                inputs=[*models, *earlier, *_read(recipe, *old)],
                work=lambda folder, progress: work.covariance(recipe, folder, progress),
                produces=[f"{source}.safetensors" for source in recipe.covariance.sources],
                seconds=60,
            )
        )
    for method_name, method in recipe.methods.items():
        stages += _method_stages(recipe, run, method_name, method, models, covariances)
    evaluated = [run / "evaluate" / method_name for method_name in (BASE, *recipe.methods)]
    stages.append(_evaluate_stage(recipe, run, BASE, None, models))
    stages += [_evaluate_stage(recipe, run, n, m, models) for n, m in recipe.methods.items()]
    started = {recipe.start_of(name) for name, method in recipe.methods.items() if method.way.starts != "nothing"}
    made = [run / "init" / name / "leak.csv" for name in sorted(started)]
    made += [run / "train" / name / "loss.csv" for name in recipe.methods]
    stages.append(
        Stage(
            "report",
            options={"title": recipe.title or recipe.name, "note": recipe.note, "model": recipe.model_path()},
            inputs=[*evaluated, *made],
            work=lambda folder, progress: work.report(recipe, run),
            produces=("report.html", "results.csv"),
            seconds=5,
        )
    )
    order = {kind: place for place, kind in enumerate(KINDS)}
    return sorted(stages, key=lambda stage: order[stage.kind])


def augment_stage(
    items: Path, plan: AugmentationPlan, resolve: Callable[[str | Path], Path], run: Path, name: str
) -> Stage:
    """Items → samples; needs neither a model nor the rest of a recipe."""
    there = plan.resolved(resolve)
    # Found pictures are held against the items' own, which are put beside them.
    pictures = [] if plan.image_search is None else _pictures_of(items)
    return Stage(
        "augment",
        options={"augmentation": plan.decisive(), "name": name},
        inputs=[items, *beside_items(items), *there.files(), *pictures],
        work=lambda folder, progress: work.augment(items, there, run, folder, progress, name),
        produces=("samples.json", "knowledge.json", "questions.jsonl", "summary.json", "card.json"),
        seconds=rough_seconds(items, there),
        open_ends=work.unanswered,
    )


def _method_stages(
    recipe: Recipe, run: Path, name: str, method: Method, models: list[Path], covariances: list[Path]
) -> Iterator[Stage]:
    init = run / "init" / recipe.start_of(name)
    steps = method.steps or recipe.training.steps
    shared = {"seed": recipe.seed_of(method), **_base(recipe)}
    starts = method.way.starts != "nothing"
    old = [p for p in (recipe.old_knowledge.texts, recipe.old_knowledge.pictures) if p is not None]
    # LoRA-Null's released form reads the samples themselves again.
    again = method.kind == "lora_null" and method.null_covariance != "store"
    if starts and recipe.start_of(name) == name:
        chosen = recipe.start_options(method)
        weights = recipe.source_weights(method)
        yield Stage(
            f"init/{name}",
            options={**shared, "method": chosen, "weights": weights, "targets": targets_key(recipe, method)},
            inputs=[*models, *covariances, *(_read(recipe, *old) if again else [])],
            work=lambda folder, progress: work.init(recipe, run, method, folder, progress),
            produces=("adapter_model.safetensors", "adapter_config.json", "leak.csv"),
            seconds=25,
        )
    data = samples_file(recipe, run, method)
    yield Stage(
        f"train/{name}",
        options={
            **shared,
            "method": method.model_dump(mode="json"),
            "training": recipe.training.model_dump(mode="json", exclude=MEMORY_ONLY),
        },
        inputs=[
            *models,
            *([init] if starts else []),
            *([*covariances, *_read(recipe, *old)] if method.old_samples else []),
            data,
            *_pictures_of(recipe.resolve(recipe.items)),
        ],
        work=lambda folder, progress: work.train(recipe, run, name, method, folder, progress),
        produces=("loss.csv", method.way.saves),
        # Epochs are of samples that are not counted here.
        seconds=None if steps is None else 0.55 * steps * recipe.training.samples_a_step,
    )


def _base(recipe: Recipe) -> dict[str, object]:
    """What decides the model beside its folder's content."""
    path = recipe.model_path()
    return {"model": "" if Path(path).exists() else path, **recipe.model.model_dump(include={"dtype", "max_pixels"})}


def _evaluate_stage(recipe: Recipe, run: Path, name: str, method: Method | None, models: list[Path]) -> Stage:
    old = [p for p in (recipe.old_knowledge.texts, recipe.old_knowledge.held_out_pictures) if p is not None]
    trained = [] if method is None else [run / "train" / name, run / "evaluate" / BASE]
    return Stage(
        f"evaluate/{name}",
        options={
            "evaluation": _measured(recipe),
            "seed": recipe.seed,
            **_base(recipe),
            "precision": recipe.training.precision,
        },
        inputs=[
            *models,
            run / "augment" / "questions.jsonl",
            *_pictures_of(recipe.resolve(recipe.items)),
            *_read(recipe, *old),
            *earlier_asked(recipe),
            *evoke_asked(recipe),
            *benchmark_files(recipe),
            *trained,
        ],
        work=lambda folder, progress: work.evaluate(recipe, run, name, method, folder, progress),
        produces=("scores.json",),
        seconds=75 if recipe.evaluation.retention is None else None,
        open_ends=lambda _: to_try_again(run / FOLDER / name),
    )


def _measured(recipe: Recipe) -> dict[str, object]:
    """The options of an evaluation that decide its figures: of a judge its name, not where it is."""
    options = recipe.evaluation.model_dump(mode="json", exclude={"retention": {"judge": JUDGE_PLACE, "data": True}})
    if options["retention"] is None:
        del options["retention"]  # what was measured before there were benchmarks stays
    return options


def earlier_asked(recipe: Recipe) -> list[Path]:
    """The questions of an earlier run that are asked again, and their pictures."""
    file, root = earlier_questions(recipe)
    if file is None:
        return []
    if not file.is_file():
        return [file]
    asked = read_questions(file) if file.stat().st_size else []
    return [file, *(inside(root, image) for image in sorted({question.image for question in asked}))]


def evoke_asked(recipe: Recipe) -> list[Path]:
    """EVOKE's evaluation file, and the pictures that its questions show."""
    if recipe.evaluation.evoke is None:
        return []
    file = recipe.resolve(recipe.evaluation.evoke)
    if not file.is_file():
        return [file]
    questions = read_evoke_questions(file, check_images=False)[: recipe.evaluation.evoke_questions]
    return [file, *(inside(file.parent, image) for image in sorted({question.image for question in questions}))]


def _read(recipe: Recipe, *files: Path) -> list[Path]:
    """Files of old knowledge, and the pictures that they name."""
    resolved = [recipe.resolve(file) for file in files]
    return [path for file in resolved for path in (file, *pictures_in(file))]


def beside_items(items: Path) -> list[Path]:
    """Files beside an items file that count with it, where they are there."""
    beside = (items.with_name("wordings.yaml"), items.with_name(f"{items.stem}.names.json"))
    return [file for file in beside if file.exists()]


def item_pictures(items: Path) -> list[Path]:
    """The pictures that an items file names, there or not; none of a file that cannot be read."""
    try:
        found = load_items(items, check_images=False, skip=lambda problem: None)
    except DataError:
        return []
    paths = []
    for image in sorted({item.image for item in found}):
        with suppress(DataError, OSError, RuntimeError, ValueError):  # a circle of links, a null byte
            paths.append(inside(items.parent, image))
    return paths


def _pictures_of(items: Path) -> list[Path]:
    """The pictures of an items file that are there; the stage that writes samples says which are not."""
    paths = []
    for path in item_pictures(items):
        with suppress(OSError, ValueError):
            paths += [path] if path.is_file() else []
    return paths


def pictures_in(file: Path) -> list[Path]:
    """The pictures that a .jsonl file names; none for another kind of file."""
    if file.suffix != ".jsonl" or not file.is_file():
        return []
    return sorted({file.parent / row["image"] for _, row in read_jsonl(file) if "image" in row})
