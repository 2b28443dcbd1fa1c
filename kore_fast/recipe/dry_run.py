"""A dry run: the model without weights, and everything that can be known of a run before it is paid for.

Counts (parameters, steps, sums, files) follow from the model's architecture and are exact. Memory and time are
estimates from these counts and are marked so; nothing here was measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from kore_fast.constraint.budget import plan_passes
from kore_fast.constraint.inputs import Width
from kore_fast.constraint.ranks import parse_rank_choice
from kore_fast.constraint.selection import select_linears
from kore_fast.errors import ConstraintError, KoreError
from kore_fast.files import iterate_json
from kore_fast.modules.adapter import WEIGHTS
from kore_fast.recipe.checks import check_after, check_projector, check_ranks, missing_data, model_without_weights
from kore_fast.recipe.materials import earlier_adapter
from kore_fast.recipe.schema import Method, Recipe
from kore_fast.recipe.sizes import Layer, Sizes, sizes_of

_GIB = 2**30
# Of a conversation beside its picture, where the data is not there to look: KORE-74K's length is not measured here.
_TEXT_TOKENS = 128
# A third to a half of the peak is usual in training at these sizes; 312 TFLOP/s is an A100's peak in bfloat16.
_PEAK, _USED = 312e12, 0.4


@dataclass
class DryRun:
    """What was found out."""

    problems: list[str] = field(default_factory=list)
    """What is wrong whatever comes: the run would fail."""
    missing: list[str] = field(default_factory=list)
    """Files that are not there yet, each with where to get it; ``run`` refuses until they are."""
    sections: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)
    """Heading → (what, how much)."""
    trained: dict[str, int] = field(default_factory=dict)
    """Method → trained parameters, all of them."""
    trained_adapter: dict[str, int] = field(default_factory=dict)
    """Method → those of the adapter alone."""
    steps: dict[str, int] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether nothing known is wrong; missing data is only told."""
        return not self.problems

    def text(self) -> str:
        """For a terminal."""
        lines = []
        for heading, rows in self.sections:
            wide = max(len(what) for what, _ in rows)
            lines += [heading, *(f"  {what:<{wide}}  {how_much}" for what, how_much in rows), ""]
        for heading, texts in (("Not there yet", self.missing), ("Wrong", self.problems)):
            if texts:
                lines += [heading, *(f"  {text}" for text in texts), ""]
        lines.append("Passed: nothing known is wrong" if self.passed else "Failed: see above")
        if self.passed and self.missing:
            lines[-1] += "; `kore-fast run` starts when the files above are there"
        return "\n".join(lines)


def dry_run(recipe: Recipe, gpus: tuple[int, ...] = (1, 8, 16)) -> DryRun:
    """Look at a recipe without weights, data or a hub; under a minute for a 13B model on a CPU.

    Args:
        gpus: how many GPUs memory and time are estimated for.
    """
    found = DryRun(missing=missing_data(recipe))
    runs = Counter([job.method for job in recipe.study.jobs.values()] if recipe.study else list(recipe.methods))
    recipe = _one_of_each(recipe)
    if not Path(recipe.model_path()).exists() and recipe.model.build is None:
        hint = recipe.where_to_get(recipe.model.path)
        found.missing.append(f"model.path: {recipe.model.path} is no folder here; {hint or 'it is taken from the hub'}")
    try:
        model = model_without_weights(recipe)
        shape = _Shape.of(recipe, model)
    except KoreError as error:
        found.problems.append(str(error))
        return found
    for check in (check_ranks, check_projector):
        try:
            check(recipe, model)
        except KoreError as error:
            found.problems.append(str(error))
    try:
        check_after(recipe)
    except KoreError as error:
        found.problems.append(str(error))
    samples, tokens = _data(recipe, shape, found)
    shapes = {name: shape.of_method(recipe, model, method) for name, method in recipe.methods.items()}
    sizes = {name: shapes[name].sizes(recipe, method) for name, method in recipe.methods.items()}
    found.trained = {name: one.all_trained for name, one in sizes.items()}
    found.trained_adapter = {name: one.trained for name, one in sizes.items()}
    found.sections.append(("Model", list(_model_rows(recipe, model, shape))))
    found.sections.append(("Trained", list(_trained_rows(recipe, sizes, samples, runs, found))))
    if recipe.covariance is not None:
        found.sections.append(("Covariance", list(_covariance_rows(recipe, shape, tokens, found))))
    found.sections.append(("Disk", list(_disk_rows(recipe, shape, sizes, runs))))
    for name, method in recipe.methods.items():
        rows = list(_memory_rows(recipe, shapes[name], method, sizes[name], tokens, gpus))
        found.sections.append((f"Memory per GPU while {name} trains (estimate, not measured)", rows))
    if found.steps:
        rows = list(_time_rows(recipe, shape, tokens, sizes, found.steps, gpus))
        found.sections.append((f"Time (estimate: operations at {_USED:.0%} of an A100's 312 TFLOP/s)", rows))
    return found


def _one_of_each(recipe: Recipe) -> Recipe:
    """A study with one run of each of its methods, under the method's own name: rates and seeds take the same."""
    if recipe.study is None:
        return recipe
    first: dict[str, Method] = {}
    for name, method in recipe.methods.items():
        first.setdefault(recipe.study.jobs[name].method, method)
    return recipe.model_copy(update={"methods": first})


@dataclass(frozen=True)
class _Shape:
    """What the estimates need of an architecture."""

    parameters: int
    decoder: int
    """Parameters of the layers that every token goes through, the head not included."""
    layers: dict[str, Layer]
    """Those that are constrained."""
    inputs: dict[str, int]
    """First reader of a distinct input → its width."""
    blocks: int
    hidden: int
    intermediate: int
    key_values: int
    vocabulary: int
    image_tokens: int
    projector: int

    @classmethod
    def of(cls, recipe: Recipe, model: nn.Module) -> _Shape:
        config: Any = model.config
        text = config.get_text_config()
        names = select_linears(model, recipe.targets_of(model))
        layers = {
            name: Layer(int(m.out_features), int(m.in_features), 0 if m.bias is None else m.bias.numel())
            for name, m in _linears(model, names)
        }
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        get_decoder = getattr(model, "get_decoder", None)
        decoder = get_decoder() if get_decoder is not None else None
        counted = decoder if isinstance(decoder, nn.Module) else model
        embeddings = sum(m.weight.numel() for m in counted.modules() if isinstance(m, nn.Embedding))
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            decoder=sum(p.numel() for p in counted.parameters()) - embeddings,
            layers=layers,
            inputs=_distinct_inputs(layers),
            blocks=int(text.num_hidden_layers),
            hidden=int(text.hidden_size),
            intermediate=int(text.intermediate_size),
            key_values=int(heads) * (int(text.hidden_size) // int(text.num_attention_heads)),
            vocabulary=int(text.vocab_size),
            image_tokens=_image_tokens(recipe, config),
            projector=sum(p.numel() for n, p in model.named_parameters() if f".{recipe.model.projector}." in f".{n}"),
        )

    def of_method(self, recipe: Recipe, model: nn.Module, method: Method) -> _Shape:
        """The same with the layers that a method adapts."""
        return replace(
            self, layers={n: self.layers[n] for n in select_linears(model, recipe.targets_of(model, method))}
        )

    def sizes(self, recipe: Recipe, method: Method) -> Sizes:
        """What the method trains, holds and writes, where these are its layers."""
        return sizes_of(
            method,
            self.layers,
            parameters=self.parameters,
            projector=self.projector if method.projector_learning_rate is not None else 0,
            itemsize=_itemsize(recipe),
        )


def _itemsize(recipe: Recipe) -> int:
    return 2 if recipe.model.dtype == "bfloat16" else 4


def _linears(model: nn.Module, names: list[str]) -> Iterator[tuple[str, Any]]:
    for name in names:
        yield name, model.get_submodule(name)


# Layers of one block that read one tensor, in the families that transformers names alike.
_SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


def _distinct_inputs(layers: dict[str, Layer]) -> dict[str, int]:
    """By name, as nothing runs here; a collection finds them by the tensors."""
    found = {}
    for name, layer in layers.items():
        prefix, _, last = name.rpartition(".")
        leader = f"{prefix}.{_SHARED.get(last, last)}"
        if leader == name or leader not in layers:
            found[name] = layer.d_in
    return found


def _image_tokens(recipe: Recipe, config: Any) -> int:
    """Tokens of one picture in the language model; 0 where there are no pictures."""
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return 0
    patch = int(vision.patch_size)
    merged = int(getattr(vision, "spatial_merge_size", 0))
    if merged:
        # Qwen2.5-VL's own limit is 16384 tokens.
        pixels = recipe.model.max_pixels or 16384 * (patch * merged) ** 2
        return pixels // (patch * merged) ** 2
    return (int(vision.image_size) // patch) ** 2


@dataclass(frozen=True)
class _Samples:
    """Training samples of methods on augmented ones."""

    count: int | None
    source: str
    """Where the number is from, in words."""
    branches: Counter[str] | None = None
    """Branch → samples, where there is a file to count them in."""

    def of(self, method: Method) -> int | None:
        """How many the method trains on; None where nobody can say yet."""
        if method.samples != "augmented":
            return None
        if method.branches is None:
            return self.count
        return None if self.branches is None else sum(self.branches[branch] for branch in method.branches)


def _data(recipe: Recipe, shape: _Shape, found: DryRun) -> tuple[_Samples, int]:
    """(training samples, tokens of one)."""
    tokens = shape.image_tokens + _TEXT_TOKENS
    given = recipe.samples
    if given is None:
        return _Samples(None, "the augmentation writes them"), tokens
    file, told = recipe.resolve(given.file), _Samples(given.count, "as the recipe says")
    if not file.exists():
        return told, tokens
    branches: Counter[str] = Counter()
    try:
        for _, row in iterate_json(file):
            branches[str(row.get("branch") if isinstance(row, dict) else None)] += 1
    except KoreError as error:
        found.problems.append(str(error))
        return told, tokens
    counted = _Samples(branches.total(), f"counted in {file.name}", branches)
    if given.count is not None and counted.count != given.count:
        found.problems.append(f"samples.file: {file} holds {counted.count:,} samples, the recipe says {given.count:,}")
    for name, method in recipe.methods.items():
        if counted.of(method) == 0:
            wanted = ", ".join(method.branches) if method.branches else "any branch"
            found.problems.append(f"method {name!r}: {file} holds no sample of {wanted}")
    return counted, tokens


def _model_rows(recipe: Recipe, model: nn.Module, shape: _Shape) -> Iterator[tuple[str, str]]:
    yield "class", type(model).__name__
    yield "parameters", f"{shape.parameters:,} ({shape.parameters / 1e9:.2f}B)"
    names = list(shape.layers)
    yield "constrained layers", f"{len(names)}, from {names[0]} to {names[-1]}"
    widths = sorted(set(shape.inputs.values()))
    counts = ", ".join(f"{list(shape.inputs.values()).count(width)} of width {width:,}" for width in widths)
    yield "distinct inputs", f"{len(shape.inputs)}: {counts}"
    yield "projector", f"{recipe.model.projector}: {_millions(shape.projector)}"
    if shape.image_tokens:
        most = "" if recipe.model.max_pixels is None else f" at most, with max_pixels {recipe.model.max_pixels:,}"
        yield "tokens of a picture", f"{shape.image_tokens}{most}"


def _trained_rows(
    recipe: Recipe, sizes: dict[str, Sizes], samples: _Samples, runs: Counter[str], found: DryRun
) -> Iterator[tuple[str, str]]:
    training = recipe.training
    for name, one in sizes.items():
        also = f" + {_millions(one.projector)} projector = {_millions(one.all_trained)}" if one.projector else ""
        yield name, f"{_millions(one.trained)} trained{also} ({one.how})"
    if recipe.study is not None:
        yield "runs", f"{runs.total()} at most, {len(runs)} methods: those at a rate that is not chosen need one seed"
    yield "samples", samples.source if samples.count is None else f"{samples.count:,} ({samples.source})"
    each = f"{training.samples_a_step} samples a step"
    for name, method in recipe.methods.items():
        known = samples.of(method)
        if method.steps is not None or training.steps is not None:
            found.steps[name] = method.steps or training.steps_for(0)
        elif known is not None:
            found.steps[name] = training.steps_for(known)
        else:
            yield f"steps of {name}", f"{training.epochs:g} epochs of samples that are not counted yet, {each}"
            continue
        epochs = f", {training.epochs:g} epochs" if training.epochs is not None and method.steps is None else ""
        epochs += f" of {known:,} samples" if epochs and method.branches is not None else ""
        warmup = max(1, round(training.warmup_ratio * found.steps[name]))
        yield f"steps of {name}", f"{found.steps[name]:,} ({warmup:,} of warm-up), {each}{epochs}"


def _covariance_rows(recipe: Recipe, shape: _Shape, tokens: int, found: DryRun) -> Iterator[tuple[str, str]]:
    assert recipe.covariance is not None
    sources = recipe.covariance.sources
    total = sum(source.samples for source in sources.values())
    listed = ", ".join(f"{name} {source.samples}" for name, source in sources.items())
    yield "samples", f"{total}: {listed}"
    itemsize = _itemsize(recipe)
    widths = {name: Width(width, itemsize) for name, width in shape.inputs.items()}
    held = sum(8 * width * width for width in shape.inputs.values())
    passes = 1
    if recipe.covariance.max_memory is not None:
        try:
            passes = len(plan_passes(widths, recipe.covariance.max_memory))
        except ConstraintError as error:
            found.problems.append(f"covariance.max_memory: {error}")
    limit = "" if recipe.covariance.max_memory is None else f" at most {recipe.covariance.max_memory / _GIB:.1f} GiB,"
    yield "memory for sums", f"{held / _GIB:.1f} GiB in float64 for one source;{limit} {passes} pass(es) over it"
    yield "beside the weights", f"{shape.parameters * itemsize / _GIB:.1f} GiB in {recipe.model.dtype}"
    widest = max(shape.inputs.values())
    seen = sum(_tokens_of(source, tokens) for source in sources.values())
    enough = "enough" if seen >= 4 * widest else "few: the null space will hold directions that were merely not seen"
    yield "tokens (estimate)", f"{seen:,}, {seen / widest:.1f} for each of {widest:,} dimensions: {enough}"


def _tokens_of(source: Any, tokens: int) -> int:
    return int(source.samples * (tokens if source.kind in ("samples", "pictures") else source.max_tokens))


def _disk_rows(recipe: Recipe, shape: _Shape, sizes: dict[str, Sizes], runs: Counter[str]) -> Iterator[tuple[str, str]]:
    total = 0
    if recipe.covariance is not None:
        one = sum(8 * (width * (width + 1) // 2) for width in shape.inputs.values())
        count = len(recipe.covariance.sources)
        total += one * count
        yield "covariance store", f"{one * count / _GIB:.1f} GiB: {count} source(s) of {one / _GIB:.1f} GiB"
        held = sum(8 * width * width for width in shape.inputs.values())
        yield "while it is collected", f"{held / _GIB:.1f} GiB more for a checkpoint, twice while one is written"
        total += 2 * held
    for name, method in recipe.methods.items():
        of = sizes[name]
        # What a job of a study trained goes when it was measured, if the recipe says so.
        kept = 1 if recipe.study is not None and not recipe.study.keep_weights else runs[name]
        parts = [(method.way.saves if kept == 1 else f"in {kept} {method.way.saves}s", kept * of.saved_bytes)]
        if of.start_bytes and recipe.start_of(name) == name:
            parts.append(("start", of.start_bytes))
        # Trainer keeps two.
        parts.append(("for two checkpoints while it trains", 2 * of.checkpoint_bytes))
        if of.fisher_bytes:
            parts.append(("for the Fisher while it trains", of.fisher_bytes))
        total += sum(size for _, size in parts)
        yield name, ", ".join(f"{size / _GIB:.2f} GiB {what}" for what, size in parts)
    yield "in all", f"{total / _GIB:.0f} GiB at most"


def _memory_rows(
    recipe: Recipe, shape: _Shape, method: Method, sizes: Sizes, tokens: int, gpus: tuple[int, ...]
) -> Iterator[tuple[str, str]]:
    terms = {"EWC": method.ewc is not None, "LwF": method.lwf is not None and not method.way.shows_base}
    beside = recipe.after is not None and method.way.saves == "adapter"  # a model trained in full has it folded in
    for count in gpus:
        most = recipe.training.per_device or recipe.training.batch_size
        rounds = -(-recipe.training.samples_a_step // (most * count))
        at_a_time = -(-recipe.training.samples_a_step // (rounds * count))
        activations = _activation_bytes(recipe, shape, method, tokens) * at_a_time + _product_bytes(
            recipe, shape, method, sizes
        )
        each = f"{at_a_time} sample(s) × {rounds} round(s) a step"
        for name, (by_weights, by_gradients, by_moments) in _parallel(count, method):
            parts = {
                "weights": sizes.base_bytes / by_weights,
                "adapter": sizes.adapter_bytes / by_weights,
                **({"earlier adapter": _earlier_bytes(recipe, sizes) / by_weights} if beside else {}),
                "gradients": sizes.gradient_bytes / by_gradients,
                "optimizer": sizes.moment_bytes / by_moments,
                "activations": activations,
            }
            if sizes.kept_bytes:
                parts[" and ".join(term for term, on in terms.items() if on)] = sizes.kept_bytes
            listed = ", ".join(f"{what} {share / _GIB:.1f}" for what, share in parts.items())
            yield f"{count} × {name}", f"{sum(parts.values()) / _GIB:.0f} GiB: {listed}; {each}"


def _earlier_bytes(recipe: Recipe, sizes: Sizes) -> int:
    """Of the adapter that the earlier run has trained, held in float32; before it is there, one like this run's."""
    file = earlier_adapter(recipe) / WEIGHTS
    return file.stat().st_size if file.is_file() else sizes.adapter_bytes


def _parallel(count: int, method: Method) -> list[tuple[str, tuple[int, int, int]]]:
    """Ways to train the method on so many GPUs → what weights, gradients and moments are divided by."""
    if count == 1:
        return [("alone", (1, 1, 1))]
    spread = method.way.spreads and method.ewc is None and method.lwf is None
    return [("DDP", (1, 1, 1)), *([("FSDP2", (count,) * 3), ("ZeRO-3", (count,) * 3)] if spread else [])]


def _activation_bytes(recipe: Recipe, shape: _Shape, method: Method, tokens: int) -> int:
    """Of one sample: what the decoder's backward pass needs, and the logits of its answers.

    A frozen linear keeps nothing of its input, a trained B keeps r values a token; what stays are the inputs of norms
    and products: in bfloat16 4 hidden, q, k, v and attention's output, 3 intermediate.
    """
    rank = 0 if method.rank is None else parse_rank_choice(method.rank).lowest
    inside = 4 * shape.hidden + 2 * (shape.hidden + shape.key_values) + 3 * shape.intermediate
    per_block = len(shape.layers) / shape.blocks
    inside += int(per_block * rank) if rank else 2 * shape.hidden + shape.intermediate
    kept = 2 * shape.hidden if recipe.training.gradient_checkpointing else 2 * inside
    working = 2 * inside if recipe.training.gradient_checkpointing else 0
    answers = min(tokens, _TEXT_TOKENS)
    return int(tokens * (shape.blocks * kept + working) + answers * shape.vocabulary * 10)


def _product_bytes(recipe: Recipe, shape: _Shape, method: Method, sizes: Sizes) -> int:
    """Of OSF, whatever the batch: it puts the factors of each layer together anew in every forward pass, in float32,
    and keeps them for the backward one."""
    if method.kind != "osf":
        return 0
    return 4 * sizes.passed // (shape.blocks if recipe.training.gradient_checkpointing else 1)


def _time_rows(
    recipe: Recipe, shape: _Shape, tokens: int, sizes: dict[str, Sizes], steps_of: dict[str, int], gpus: tuple[int, ...]
) -> Iterator[tuple[str, str]]:
    if recipe.covariance is not None:
        seen = sum(_tokens_of(source, tokens) for source in recipe.covariance.sources.values())
        work = 2 * shape.decoder * seen
        # x xᵀ in float32, which tensor cores do not do exactly: an A100's 19.5 TFLOP/s.
        exact = 2 * seen * sum(width * width for width in shape.inputs.values())
        yield (
            "covariance",
            f"{_hours(work / (_PEAK * _USED) + exact / (19.5e12 * _USED))} on one GPU, loading not counted",
        )
    passes = 4 if recipe.training.gradient_checkpointing is False else 6
    for name, steps in steps_of.items():
        # Forward, and backward to the input through what is frozen too; a trained weight's own gradient comes on top.
        each = passes * (shape.decoder + sizes[name].passed) + 2 * sizes[name].all_trained
        work = each * tokens * steps * recipe.training.samples_a_step
        listed = ", ".join(f"{_hours(work / (count * _PEAK * _USED))} on {count}" for count in gpus)
        yield f"train {name}", f"{listed} GPU(s), at {tokens} tokens a sample"
    yield "not estimated", "null spaces, evaluation, reading of pictures, waiting between nodes"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{max(1, round(seconds / 60))} min"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f}M"
