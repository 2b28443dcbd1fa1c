"""A recipe's schema. Unknown keys are refused, with the nearest known one; paths are relative to the recipe's file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from torch import nn

from kore_fast.augmentation.options import Branch
from kore_fast.augmentation.plan import AugmentationPlan
from kore_fast.errors import ConstraintError, DataError
from kore_fast.evaluation.lmms import Judge, choose
from kore_fast.recipe.study import BASE

if TYPE_CHECKING:
    from kore_fast.training.methods import TrainingMethod


def _number(value: Any) -> Any:
    # YAML 1.1 reads 2e-4 as a string.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Number = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[Number, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


def _rank(value: Any) -> int | dict[str, Any] | None:
    from kore_fast.constraint.ranks import FixedRank, parse_rank_choice

    if value is None:
        return None
    try:
        choice = parse_rank_choice(value)
    except ConstraintError as error:
        raise ValueError(str(error)) from None
    return choice.rank if isinstance(choice, FixedRank) else dict(value)


Rank = Annotated[int | dict[str, Any] | None, PlainValidator(_rank)]
"""A number, or by spectrum ``{energy: 1e-4}`` or ``{parameters: 8000000}``, see `KoreConfig`."""


def _directions(value: Any) -> int | float | None:
    number = _number(value)
    if number is None or (isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < 1):
        return number
    if isinstance(number, int | float) and not isinstance(number, bool) and number >= 1 and number == int(number):
        return int(number)
    raise ValueError("want a number of directions, 1 or more, or a share of them between 0 and 1")


class Section(BaseModel):
    """A part of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSection(Section):
    """The base model."""

    path: str
    """A folder, or a hub name."""
    build: Path | None = None
    """A Python file that makes the folder when it is missing or stale; called with ``--output <path>``."""
    config: Path | None = None
    """The architecture as transformers' configuration in JSON: a dry run builds the model from it without weights, and
    the weights, when they are there, must have it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in memory. A and B are float32 in any case."""
    projector: str = "multi_modal_projector"
    """Name (or its end) of the module that brings pictures into the language model."""
    max_pixels: Count | None = None
    """Of a picture as the processor passes it on, where it takes pictures of any size (Qwen2.5-VL)."""


class OldKnowledge(Section):
    """Where old knowledge comes from, to calibrate on and (held out) to measure retention on."""

    texts: Path | None = None
    """JSON lines of title and text, or a JSON object from title to extract; split by title."""
    pictures: Path | None = None
    """JSON lines of id, image and name, to calibrate on."""
    held_out_pictures: Path | None = None
    """The same with choices, to measure on."""


class CalibrationSource(Section):
    """Samples of one kind of old knowledge for the covariance."""

    kind: Literal["text", "chat", "pictures", "samples"]
    """``text``: passages. ``chat``: questions with the model's own answers. ``pictures``: pictures with their names.
    ``samples``: conversations of ``file``."""
    samples: Count = 128
    max_tokens: Count = 128
    """Of a text, or of a generated answer."""
    weight: Annotated[Number, Field(ge=0)] = 1.0
    """Of this source in the mix, see `CovarianceStore.covariance`."""
    positions: dict[Literal["prompt", "picture", "answer"], Annotated[Number, Field(ge=0)]] = {}
    """Weight of a position by what it is; default 1."""
    file: Path | None = None
    """Of kind ``samples``: conversations in LLaVA's format, of which ``samples`` are drawn by the recipe's seed."""
    images: Path | None = None
    """The folder that their pictures are below; default the file's."""

    @model_validator(mode="after")
    def _consistent(self) -> CalibrationSource:
        if (self.kind == "samples") != (self.file is not None):
            raise ValueError("kind 'samples' and a 'file' go together")
        return self


class LayerChoice(Section):
    """Which of the layers are constrained and adapted; what is left out stays as it is."""

    depth: Literal["all", "first third", "middle third", "last third"] = "all"
    """Of the decoder's blocks; of 32, the thirds are blocks 0-9, 10-20 and 21-31."""
    part: Literal["all", "attention", "mlp"] = "all"
    """Of a block."""


class CovarianceSection(Section):
    """What old knowledge the null space is computed from."""

    sources: dict[str, CalibrationSource]
    batch_size: Count = 16
    max_memory: Count | None = None
    """Bytes for sums and buffers; see `collect_covariance`."""
    checkpoint_seconds: Annotated[Number, Field(ge=0)] = 120.0
    """Least time between two checkpoints of a source; 0 for one after every batch."""
    target_modules: str | list[str] | None = None
    layers: LayerChoice | None = None
    """Which of those layers; default all."""


class EwcSection(Section):
    """A penalty on changes that old knowledge is sensitive to, see `training.retention.ewc`."""

    strength: Annotated[Number, Field(ge=0)]
    """λ of λ/2·Σ F∘(W − W0)²."""
    samples: Count = 64
    """Old samples that the Fisher is a mean over, at most."""


class LwfSection(Section):
    """Distillation to the base's answers on the new inputs, see `training.retention.lwf`."""

    weight: Annotated[Number, Field(ge=0)] = 1.0
    """Against the loss."""
    temperature: Positive = 2.0


class Method(Section):
    """One way to train: what is trained, from where, on what. `training.methods` says what each kind takes."""

    kind: Literal["full", "osf", "lora", "lora_fa", "pissa", "corda", "lora_null", "mica", "kore"]
    learning_rate: Positive
    rank: Rank = None
    alpha: Positive | None = None
    """Of an adapter, KORE's excepted; default the rank, a scaling of 1."""
    freeze_a: bool | None = None
    """Default: KORE yes, LoRA and LoRA-Null no. LoRA with a frozen random A and KORE with a trained A are ablations,
    LoRA-Null with a frozen A is its version 2."""
    corda_mode: Literal["kpm", "ipm"] | None = None
    """CorDA: ``kpm`` (default) adapts the directions that old knowledge uses least, ``ipm`` those it uses most."""
    null_covariance: Literal["released", "store"] | None = None
    """LoRA-Null: ``released`` (default) sums its own covariances in float16 as its code does, ``store`` has KORE's."""
    effective_rank: Annotated[int | float | None, PlainValidator(_directions)] = None
    """OSF: singular directions that stay as they are, a number or a share below 1; default half of them."""
    replay: Annotated[Number, Field(gt=0, lt=1)] | None = None
    """Share of old samples, the covariance's, among those that are trained on."""
    ewc: EwcSection | None = None
    lwf: LwfSection | None = None
    samples: Literal["augmented", "knowledge"] = "augmented"
    """``knowledge``: the items' raw text, one question each, without augmentation."""
    branches: Annotated[list[Branch], Field(min_length=1)] | None = None
    """Of the augmented samples, those of these branches only; default all."""
    layers: LayerChoice | None = None
    """Which of the recipe's layers are adapted; default all."""
    source_weights: dict[str, Annotated[Number, Field(ge=0)]] | None = None
    """Weights of the covariance's sources for this method's start, those taken over from an earlier run among them;
    those not named weigh nothing. Default the sources' own."""
    lora_dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    projector_learning_rate: Positive | None = None
    """Train the multimodal projector too, in full, with this learning rate (the paper: 2e-5)."""
    steps: Count | None = None
    """Default: training.steps."""
    seed: int | None = None
    """Of a random A and of the order of samples; default the recipe's."""

    @property
    def way(self) -> TrainingMethod:
        """How it is trained, behind the interface that all share."""
        from kore_fast.training.methods import METHODS

        return METHODS[self.kind]

    @property
    def frozen_a(self) -> bool:
        """Whether A stays as it starts."""
        return self.kind in ("kore", "lora_fa") if self.freeze_a is None else self.freeze_a

    @property
    def old_samples(self) -> str | None:
        """The option that needs samples of old knowledge, if there is one."""
        return "replay" if self.replay is not None else "ewc" if self.ewc is not None else None

    @model_validator(mode="after")
    def _consistent(self) -> Method:
        from kore_fast.modules.adapter import refuse_dropout, refuse_weight_decay

        way = self.way
        if self.kind == "kore" or (self.kind == "lora" and self.frozen_a):
            try:
                refuse_dropout(self.lora_dropout)
                refuse_weight_decay(self.weight_decay)
            except ConstraintError as error:
                raise ValueError(str(error)) from None
        for name in sorted(way.needs):
            if getattr(self, name) is None:
                raise ValueError(f"kind {self.kind!r} needs a {name}")
        for name in sorted(_OF_SOME_KINDS - way.needs - way.takes):
            if getattr(self, name) != type(self).model_fields[name].default:
                reason = _REASONS.get((self.kind, name), "")
                raise ValueError(f"{name!r} means nothing for {way.title}{reason}; leave it out")
        if self.branches is not None and self.samples == "knowledge":
            raise ValueError("'branches' are of augmented samples; raw knowledge has none")
        if self.source_weights is not None and not way.uses_covariance:
            raise ValueError(f"'source_weights' means nothing for {way.title}, whose start uses no covariance")
        if isinstance(self.rank, dict) and self.kind != "kore":
            raise ValueError(f"a rank by spectrum is KORE's; {way.title} takes a number")
        return self


# Options that some kinds know and others do not, see `TrainingMethod.takes`.
_OF_SOME_KINDS = {
    "alpha",
    "corda_mode",
    "effective_rank",
    "freeze_a",
    "lora_dropout",
    "null_covariance",
    "projector_learning_rate",
    "rank",
    "weight_decay",
}
_NO_DROPOUT = ", as what is taken out of the base has no dropout"
_REASONS = {
    ("kore", "alpha"): ", whose scaling is 1",
    ("lora_fa", "freeze_a"): ", whose A is always frozen",
    ("mica", "freeze_a"): ", which freezes B and trains A",
    ("osf", "rank"): ", which takes effective_rank",
    ("osf", "projector_learning_rate"): ", whose adapter in PEFT cannot hold a projector",
    **{
        (kind, "lora_dropout"): ", as what is taken out of the base has no dropout"
        for kind in ("pissa", "corda", "lora_null")
    },
}


class TrainingSection(Section):
    """Settings that all methods share."""

    steps: Count | None = None
    epochs: Positive | None = None
    """Instead of ``steps``: how often each sample is seen; the steps are ⌈samples · epochs / samples a step⌉."""
    batch_size: Count = 8
    accumulation: Count = 1
    """``batch_size`` · ``accumulation`` samples make a step, the same ones on however many processes."""
    per_device: Count | None = None
    """Samples that one process takes at a time, at most; default ``batch_size``. It changes memory, not the step."""
    gradient_checkpointing: bool = False
    """Compute each block's forward pass again in the backward one instead of keeping it: a third more time."""
    warmup_ratio: Annotated[Number, Field(ge=0, lt=1)] = 0.03
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """``auto``: bfloat16 where the machine computes in it."""
    checkpoint_every: Count = 25

    @model_validator(mode="after")
    def _consistent(self) -> TrainingSection:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give one of 'steps' and 'epochs'")
        return self

    @property
    def samples_a_step(self) -> int:
        """Over all processes."""
        return self.batch_size * self.accumulation

    def steps_for(self, samples: int) -> int:
        """Of a run over so many samples."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return math.ceil(samples * self.epochs / self.samples_a_step)


MEMORY_ONLY = {"per_device", "gradient_checkpointing", "checkpoint_every"}
"""Options of `TrainingSection` that change what a training takes and not what comes of it, to rounding: one that was
left half-finished for want of memory goes on with another of these."""


class SamplesSection(Section):
    """Training samples that are there already, such as KORE-74K, instead of what an augmentation would write."""

    file: Path
    """In LLaVA's format."""
    images: Path | None = None
    """The folder that their pictures are below; default the file's."""
    count: Count | None = None
    """How many there are, for a dry run before they are there."""


class After(Section):
    """An earlier run, on which this one goes on: it starts from that run's model, and its old knowledge counts too."""

    run: Path
    """Its folder."""
    method: str = "kore"
    """Of that run: the adapter that is in the model from the start."""
    weights: dict[str, Annotated[Number, Field(ge=0)]] = {}
    """Of that run's covariance sources; default 1 each."""
    images: Path | None = None
    """The folder that the pictures of its questions are below. With it they are asked again: what became of them?"""


class StudyJob(Section):
    """What a method of an expanded study is; see `study.expand`."""

    method: str
    learning_rate: Number
    seed: int


class StudySection(Section):
    """Makes a recipe a study: its methods may give ``learning_rates`` and ``seeds``, for ``kore-fast compare``."""

    seeds: list[int] = [0]
    """Of every method that gives none itself."""
    match: str | None = None
    """The method whose best adaptation the learning rates of all are matched to; default: each method's own best."""
    results: Path | None = None
    """Folder for the kept scores and the comparison; default ``compare`` in the run's folder."""
    experiments: dict[str, list[str]] = {}
    """Heading → methods that are shown in a table and a plot of their own, such as a sweep over ranks."""
    depends_on: list[Path] = []
    """Further files that decide the scores; those kept from before a change of theirs are made anew."""
    keep_weights: bool = True
    """False removes what a job trained once its scores are kept."""
    jobs: dict[str, StudyJob] = {}
    """Filled when the recipe is loaded."""


class RetentionSection(Section):
    """The retention benchmarks, by lmms-eval; see `evaluation.lmms.evaluate_retention`."""

    benchmarks: list[str] | None = None
    """Their names; default the paper's twelve, whose mean is K.R."""
    data: Path | None = None
    """A folder of data for each; what is not there comes from the hub."""
    hub: bool = True
    judge: Judge | None = None
    """For the four that need one, which are missing without."""
    limit: Count | None = None
    """Only the first so many questions of each: no benchmark's score, and no K.R."""
    max_new_tokens: Count = 1024

    @model_validator(mode="after")
    def _consistent(self) -> RetentionSection:
        try:
            choose(self.benchmarks)
        except DataError as error:
            raise ValueError(str(error).removeprefix("retention: ")) from None
        if not self.hub and self.data is None:
            raise ValueError("'hub' false leaves no data: give a folder as 'data'")
        return self


class EvaluationSection(Section):
    """What is measured on every method and on the base."""

    seed: int = 0
    """Chooses the held-out texts and questions; apart from the run's seed, so that seeds are measured on the same."""
    batch_size: Count = 32
    max_new_tokens: Count = 32
    questions: Count | None = None
    """Of the held-out questions, at most so many; default all."""
    capitals: bool = True
    texts: Annotated[int, Field(ge=0)] = 128
    """Held-out passages for loss and drift."""
    text_tokens: Count = 128
    pictures: Annotated[int, Field(ge=0)] = 200
    """Held-out pictures to name."""
    drift_samples: Annotated[int, Field(ge=0)] = 64
    """Of the base's answers and of its descriptions, how many drift is measured on."""
    evoke: Path | None = None
    """EVOKE's evaluation file, for a recipe whose items are EVOKE's; asked with EVOKE's 128 new tokens."""
    evoke_questions: Count | None = None
    """Of EVOKE's questions the first so many; default all."""
    retention: RetentionSection | None = None
    """Benchmarks beside the held-out parts above; default none."""


class Recipe(Section):
    """Everything that a run needs to know."""

    name: str
    title: str = ""
    note: str = ""
    """What a reader of the report should know about this recipe's limits."""
    seed: int = 0
    model: ModelSection
    items: Path
    augmentation: AugmentationPlan = AugmentationPlan()
    after: After | None = None
    """Inject on top of an earlier run. Its covariances are taken over, those of ``covariance`` are added to them: give
    the earlier run's samples there, as a source of kind ``samples``, to keep what it has injected."""
    samples: SamplesSection | None = None
    """What is trained on instead of the augmentation's samples."""
    where: dict[str, str] = {}
    """File or folder → where to get it, for what does not come with the recipe."""
    old_knowledge: OldKnowledge = OldKnowledge()
    covariance: CovarianceSection | None = None
    methods: dict[str, Method]
    training: TrainingSection
    evaluation: EvaluationSection = EvaluationSection()
    study: StudySection | None = None
    base_folder: Path
    """The recipe's own folder; set when it is loaded."""

    def resolve(self, path: Path | str) -> Path:
        """A path of the recipe, relative to its folder."""
        return (self.base_folder / path).resolve()

    def data(self) -> dict[str, Path]:
        """Key → every file and folder that it names and does not make itself."""
        old = {f"old_knowledge.{key}": getattr(self.old_knowledge, key) for key in OldKnowledge.model_fields}
        given: dict[str, Path | None] = {"items": self.items, "model.config": self.model.config, **old}
        if self.samples is not None:
            given |= {"samples.file": self.samples.file, "samples.images": self.samples.images}
        if self.after is not None:
            given |= {"after.run": self.after.run, "after.images": self.after.images}
        for name, source in (self.covariance.sources if self.covariance else {}).items():
            key = f"covariance.sources.{name}"
            given |= {f"{key}.file": source.file, f"{key}.images": source.images}
        given["evaluation.evoke"] = self.evaluation.evoke
        if self.evaluation.retention is not None:
            given["evaluation.retention.data"] = self.evaluation.retention.data
        return {key: path for key, path in given.items() if path is not None}

    def where_to_get(self, path: Path | str) -> str:
        """What the recipe says about a file that is missing; empty where it says nothing."""
        wanted = self.resolve(path)
        for named, text in self.where.items():
            there = self.resolve(named)
            if there == wanted or there in wanted.parents or named == str(path):
                return text
        return ""

    @property
    def targets(self) -> str | list[str] | None:
        """The layers that are constrained or adapted, before ``covariance.layers`` chooses; see `select_linears`."""
        return self.covariance.target_modules if self.covariance else None

    def targets_of(self, model: nn.Module, method: Method | None = None) -> str | list[str] | None:
        """`targets`; where ``covariance.layers`` or the method's choose among them, their names in this model."""
        from kore_fast.constraint.selection import narrow, select_linears

        choices = [choice for choice in self.layer_choices(method) if choice is not None]
        if not choices:
            return self.targets
        every = select_linears(model, self.targets)
        # Each by the whole model's blocks.
        kept = [set(narrow(every, choice.depth, choice.part)) for choice in choices]
        return [name for name in every if all(name in names for names in kept)]

    def layer_choices(self, method: Method | None = None) -> list[LayerChoice | None]:
        """What narrows the targets: the covariance's choice, then the method's."""
        return [self.covariance.layers if self.covariance else None, method.layers if method else None]

    def taken_over(self) -> list[str]:
        """The sources of an earlier run's store, beside which this one's are put; none before that run is there."""
        if self.after is None:
            return []
        return sorted(file.stem for file in (self.resolve(self.after.run) / "covariance").glob("*.safetensors"))

    def source_weights(self, method: Method | None = None) -> dict[str, float] | None:
        """Weight of each source in the covariance, as the method wants it; one that is not named weighs 1."""
        if self.covariance is None:
            return None
        if method is not None and method.source_weights is not None:
            return dict.fromkeys([*self.taken_over(), *self.covariance.sources], 0.0) | method.source_weights
        earlier = self.after.weights if self.after is not None else {}
        return {**earlier, **{name: s.weight for name, s in self.covariance.sources.items()}}

    def bf16(self) -> bool:
        """Whether to compute in bfloat16 on this machine."""
        from kore_fast.modules.loading import preferred_precision

        if self.training.precision == "auto":
            return preferred_precision() == torch.bfloat16
        return self.training.precision == "bf16"

    def seed_of(self, method: Method) -> int:
        """Of a random A and of the order of samples."""
        return self.seed if method.seed is None else method.seed

    def trained_whole(self, method: Method) -> list[str] | None:
        """Modules that are trained in full beside the adapter."""
        return [self.model.projector] if method.projector_learning_rate is not None else None

    def start_options(self, method: Method) -> dict[str, Any]:
        """What decides the adapter that a method starts from."""
        chosen = {"kind", "rank", "alpha", "lora_dropout", "corda_mode", "null_covariance", "layers", "source_weights"}
        options = method.model_dump(mode="json", include=chosen)
        # A null space has no chance in it.
        seed = None if method.kind == "kore" else self.seed_of(method)
        return {**options, "frozen_a": method.frozen_a, "whole": self.trained_whole(method), "seed": seed}

    def start_of(self, name: str) -> str:
        """The method whose start ``name`` trains from: the first with the same options for it, so that a grid of
        learning rates takes one solve."""
        wanted = self.start_options(self.methods[name])
        return next(other for other, method in self.methods.items() if self.start_options(method) == wanted)

    def has_start(self, name: str) -> bool:
        """Whether the method's stage ``init`` makes something to start from."""
        return self.methods[name].way.starts != "nothing"

    def model_path(self) -> str:
        """The model's folder, or its hub name."""
        folder = self.resolve(self.model.path)
        return str(folder) if self.model.build or folder.exists() else self.model.path

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for name, method in self.methods.items():
            if name == BASE or not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"method {name!r}: name it with letters, digits, '-', '_' ('base' is taken)")
            if method.way.uses_covariance and self.covariance is None:
                raise ValueError(f"method {name!r} needs covariances: add a 'covariance' section")
            unknown = set(method.source_weights or ()) - set(self.covariance.sources if self.covariance else ())
            if unknown and self.after is None:  # of an earlier run's, `check_after` knows more
                raise ValueError(f"method {name!r}: source_weights names {sorted(unknown)[0]!r}, which is no source")
            if self.after is not None and method.kind == "osf":
                raise ValueError(
                    f"method {name!r}: OSF's adapter is no LoRA, so that it and the earlier run's cannot become one "
                    "for the untouched base: take another kind, or inject with OSF in one run"
                )
            if method.old_samples is not None and self.covariance is None:
                raise ValueError(
                    f"method {name!r}: {method.old_samples} draws on the samples of old knowledge that covariances "
                    "are made from: add a 'covariance' section with its sources"
                )
        if self.study is not None:
            known = {job.method for job in self.study.jobs.values()}
            named = [*(["match"] if self.study.match not in (None, *known) else [])]
            named += [n for n, group in self.study.experiments.items() if not known.issuperset(group)]
            if named:
                raise ValueError(
                    f"study: {named[0]!r} names a method that is not there; methods: {', '.join(sorted(known))}"
                )
        if self.model.dtype != "float32" and self.training.precision == "fp32":
            raise ValueError("model.dtype bfloat16 computes in bfloat16: leave training.precision at auto or bf16")
        if self.covariance is not None:
            needs = {"text": "texts", "chat": "texts", "pictures": "pictures"}
            for name, source in self.covariance.sources.items():
                if source.kind in needs and getattr(self.old_knowledge, needs[source.kind]) is None:
                    raise ValueError(f"covariance source {name!r} needs old_knowledge.{needs[source.kind]}")
        return self
