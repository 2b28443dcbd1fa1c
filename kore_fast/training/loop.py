"""The loop: transformers' Trainer over a fixed order of batches, resumable to the bit."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kore_fast.allocation import release_freed_memory
from kore_fast.data.conversations import (
    IGNORE,
    ConversationDataset,
    Encoded,
    collate,
    slots,
    tokenizer_of,
    training_order,
)
from kore_fast.errors import ConstraintError
from kore_fast.files import write_text
from kore_fast.modules.adapter import KorePeftModel
from kore_fast.modules.sharding import place_among_ranks, plain_name, sum_over_ranks
from kore_fast.progress import Progress, silent
from kore_fast.training.callback import KoreCallback
from kore_fast.training.methods import METHODS, TrainingMethod
from kore_fast.training.methods.interface import is_within
from kore_fast.training.retention.terms import Batch, Term

LOSS_COLUMNS = ("step", "epoch", "loss", "learning_rate", "grad_norm")
_WHOLE = "one process or DDP"
# Of a whole checkpoint, by how the parameters were spread over processes.
_CHECKPOINT_FILES = {
    _WHOLE: ("*model*.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth"),
    "FSDP2": ("pytorch_model_fsdp*", "optimizer*", "scheduler.pt", "rng_state*.pth"),
    "DeepSpeed": ("latest", "global_step*/*optim_states.pt", "scheduler.pt", "rng_state*.pth"),
}


@dataclass(frozen=True)
class TrainingOptions:
    """One run's settings: AdamW, a cosine schedule after a linear warm-up, gradients clipped at norm 1."""

    learning_rate: float
    steps: int
    batch_size: int = 8
    accumulation: int = 1
    """``batch_size`` · ``accumulation`` samples make a step, shared by all processes."""
    per_device: int | None = None
    """Samples that a process takes at a time, at most; default ``batch_size``."""
    gradient_checkpointing: bool = False
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    seed: int = 0
    bf16: bool = False
    """Compute in bfloat16 under autocast; weights and their updates stay as they are loaded."""
    checkpoint_every: int = 25
    projector_learning_rate: float | None = None
    """Learning rate of modules trained in full beside an adapter (PEFT's ``modules_to_save``) and of
    ``trained_whole``; default the same."""
    trained_whole: Sequence[str] = ()
    """Names of modules, or their ends (``visual.merger``), that the projector's learning rate is for where no adapter
    tells them apart: full fine-tuning's."""
    replay: float = 0.0
    """Share of old samples among those that are trained on (`ConversationDataset.old`)."""


class _Trainer(Trainer):
    """What Trainer leaves to a subclass: our order of batches, loss over answers only, A as it was when resuming."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # `compute_loss` divides by the tokens of the whole step; under transformers 5.5 accelerate would divide the
        # gradient by the number of batches as well.
        self.accelerator.gradient_accumulation_steps = 1
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None:
            keep_weights_under_deepspeed(plugin.deepspeed_config)

    def _get_train_sampler(self, *_: Any, **__: Any) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        labels = inputs.pop("labels")
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
        # The head is a fifth of a small model's work: leave it out where no row of the batch has an answer.
        wanted = (targets != IGNORE).any(dim=0).nonzero().squeeze(-1)
        inputs["logits_to_keep"] = wanted
        outputs = model(**inputs)
        logits, targets = outputs.logits.flatten(0, 1).float(), targets[:, wanted].flatten()
        count = num_items_in_batch if num_items_in_batch is not None else (targets != IGNORE).sum()
        loss = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum") / count
        processes = place_among_ranks()[1]
        for term in self.terms:
            batches = self.args.gradient_accumulation_steps * processes
            loss = loss + term(Batch(self.model, inputs, logits, targets != IGNORE, count, batches))
        # ``count`` is of all processes, whose gradients are averaged.
        loss = loss * processes
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if getattr(self, "optimizer", None) is None:
            self.optimizer: Any = self.method.optimizer(self.model, self.options)
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.options.projector_learning_rate
        if rate is not None:
            names = ("modules_to_save", *self.options.trained_whole)
            whole = {
                id(p) for n, p in self.model.named_parameters() if is_within(plain_name(n), names) and p.requires_grad
            }
            if not whole:
                raise ConstraintError(
                    f"projector_learning_rate={rate}, but nothing that is trained is within {' or '.join(names)}: name "
                    "the projector's module in trained_whole (in a recipe: model.projector)"
                )
            for group in list(optimizer.param_groups):
                moves = [id(parameter) in whole for parameter in group["params"]]
                if any(moves):
                    # An optimiser of a method's own may keep a list with an entry for each parameter.
                    lists = {k: v for k, v in group.items() if isinstance(v, list) and len(v) == len(moves)}
                    moved = {k: [x for x, m in zip(v, moves, strict=True) if m] for k, v in lists.items()}
                    group.update({k: [x for x, m in zip(v, moves, strict=True) if not m] for k, v in lists.items()})
                    optimizer.add_param_group({**group, **moved, "lr": rate})
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if spread_by() is None:
            # Trainer would load a second adapter over the first and make trainable what is frozen.
            self.method.restore(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.method.check(self.model, self.options)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.optimizer is not None:
            move_named_state(self.optimizer, self.args.device)

    method: TrainingMethod = METHODS["lora"]
    terms: Sequence[Term] = ()
    options: TrainingOptions


class _ShowSteps(TrainerCallback):
    """After a step: the progress bar moves, memory is given back; training stops when the loss is no number."""

    def __init__(self, progress: Progress, steps: int, label: str) -> None:
        self._shown = iter(progress(range(steps), steps, label))
        self._at = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # Within a step freed memory is used again; kept from step to step, whose sizes differ, it grows holes.
        release_freed_memory()
        while self._at < state.global_step:
            next(self._shown, None)
            self._at += 1

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        next(self._shown, None)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not torch.isfinite(torch.tensor(loss)):
            raise ConstraintError(
                f"the loss is {loss} at step {state.global_step}: lower the learning rate ({args.learning_rate}) or "
                "train in float32; checkpoints before this step are kept"
            )


def train(
    model: nn.Module,
    dataset: ConversationDataset,
    options: TrainingOptions,
    folder: str | Path,
    *,
    method: TrainingMethod | None = None,
    terms: Sequence[Term] = (),
    progress: Progress = silent,
    label: str = "train",
) -> list[dict[str, Any]]:
    """Train the parameters of ``model`` that require gradients, in place.

    ``folder`` holds checkpoints while it runs; the same call after a kill continues from the last whole one and ends
    with the same weights as a run that was not killed (same machine, same number of threads).

    Args:
        model: a PEFT model or a plain one whose parameters to train require gradients.
        dataset: what to train on; its order is set here from the seed.
        method: how it is trained (`TrainingMethod.open` made the model); default KORE or LoRA for a PEFT model, full
            fine-tuning for another.
        terms: what is added to the loss; the log shows the sum.

    Returns:
        The loss log: a row of `LOSS_COLUMNS` every few steps.

    Raises:
        ConstraintError: weight decay on a KORE adapter; A changed; a loss that is no number; what `check_spread` finds.
    """
    folder = Path(folder)
    # KORE's and LoRA's differ in their start only.
    method = method or METHODS["lora" if isinstance(model, PeftModel) else "full"]
    check_spread(method, folder, adds_terms=bool(terms))
    method.check(model, options)
    rank, processes = place_among_ranks()
    lengths = _lengths(dataset, rank, processes)
    old_lengths = [len(encoded) for encoded in dataset.old]
    per_step = options.batch_size * options.accumulation
    order = training_order(
        lengths,
        options.batch_size,
        options.steps * options.accumulation,
        options.seed,
        old=old_lengths,
        share_old=options.replay,
    )
    firsts = range(0, len(order), options.accumulation)
    steps = [[index for batch in order[at : at + options.accumulation] for index in batch] for at in firsts]
    at_a_time, rounds = share_of_step(per_step, options.per_device or options.batch_size, processes)
    dataset.order = slots(steps, [*lengths, *old_lengths], at_a_time * rounds, processes)
    if spread_by():
        _refuse_uneven_pictures(dataset, at_a_time, processes)
    pad = tokenizer_of(dataset.processor).pad_token_id

    def collator(batch: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        return collate(batch, pad, labels=True)

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=at_a_time,
        gradient_accumulation_steps=rounds,
        average_tokens_across_devices=True,
        # A round without pictures does not reach the projector.
        ddp_find_unused_parameters=options.projector_learning_rate is not None,
        num_train_epochs=1,
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(options.warmup_ratio * options.steps)),
        weight_decay=options.weight_decay,
        bf16=options.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=options.seed,
        save_steps=options.checkpoint_every,
        save_total_limit=2,
        logging_steps=_log_every(options),
        # Trainer would hide a loss that is no number behind the mean of the others.
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[
            _ShowSteps(progress, options.steps, label),
            # Whole checkpoints, and A as it was, where accelerate spreads the model over processes.
            *([KoreCallback()] if processes > 1 and isinstance(model, KorePeftModel) else []),
        ],
    )
    trainer.options, trainer.method, trainer.terms = options, method, terms
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    # Trainer prints each log line; the bar and the loss log are enough.
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    found = last_whole_checkpoint(folder) if rank == 0 else None
    # As rank 0 sees it, when it has removed what is broken.
    step = int(sum_over_ranks(torch.tensor(int(found.rpartition("-")[2]) if found else 0)))
    with _fast_attention(model, bf16=options.bf16):
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}") if step else None)
    method.check(model, options)
    model.eval()
    epochs = per_step * (1 - options.replay) / max(1, len(lengths))
    return [
        {"step": row["step"], "epoch": round(row["step"] * epochs, 4), **{c: row.get(c) for c in LOSS_COLUMNS[2:]}}
        for row in trainer.state.log_history
        if "loss" in row
    ]


def move_named_state(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Put what an optimiser keeps under names on the device, as LoRA-FA's moments: of parameters torch does that itself
    when a checkpoint is loaded."""
    for key, state in optimizer.state.items():
        if isinstance(key, str):
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    state[name] = value.to(device)


def keep_weights_under_deepspeed(config: dict[str, Any]) -> None:
    """Let DeepSpeed compute in bfloat16 by autocast, and leave every weight in the dtype that it has: its own bfloat16
    mode casts all of them, KORE's A, which must not change, among them.

    Args:
        config: DeepSpeed's; changed in place where it asks for that mode.

    Raises:
        ConstraintError: a DeepSpeed without autocast.
    """
    if str(config.get("bf16", {}).get("enabled", False)).lower() != "true":
        return
    if find_spec("deepspeed.runtime.torch_autocast") is None:
        raise ConstraintError(
            f"DeepSpeed {version('deepspeed')} computes in bfloat16 only by casting every weight, lora_A too, which "
            "must not change: pip install -U deepspeed (one with torch_autocast), or set training.precision: fp32"
        )
    config["bf16"] = {**config["bf16"], "enabled": False}
    # No module whose weights would be gathered in bfloat16.
    config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}


def spread_by() -> str | None:
    """What `accelerate launch` was told to spread the parameters with; None where every process has them whole."""
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP2"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "").lower() in ("1", "true"):
            return name
    return None


def check_spread(method: TrainingMethod, checkpoints: Path, *, adds_terms: bool = False) -> None:
    """Whether the parameters may be spread over processes as `accelerate launch` was told to, and whether a run that
    was interrupted can go on so.

    Args:
        checkpoints: the folder that `train` is given.
        adds_terms: EWC or LwF is added to the loss.

    Raises:
        ConstraintError: FSDP's first version; a method or a term that needs whole weights; checkpoints of parameters
            that were spread in another way, or by DeepSpeed over another number of processes.
    """
    _refuse_other_checkpoints(checkpoints)
    by = spread_by()
    if by is None:
        return
    if by == "FSDP2" and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConstraintError("FSDP's first version flattens A together with what is trained: set fsdp_version: 2")
    ddp = "train under DDP (recipes/accelerate/ddp.yaml), where every process has the whole model"
    if not method.spreads:
        raise ConstraintError(
            f"{method.title} (kind {method.kind!r}) needs whole weights, which {by} spreads over processes: {ddp}"
        )
    if adds_terms:
        raise ConstraintError(f"EWC and LwF need whole weights, which {by} spreads over processes: {ddp}")


def _refuse_other_checkpoints(folder: Path) -> None:
    """They are somebody's training: neither read wrongly nor taken for broken ones."""
    now, processes = spread_by() or _WHOLE, place_among_ranks()[1]
    advice = f"or move {folder} away to start anew"
    found = _by_step(folder)
    for checkpoint in found:
        written = _spread_in(checkpoint)
        if written not in (None, now):
            raise ConstraintError(
                f"{checkpoint}: written by training under {written}, and this is {now}; go on as it began, {advice}"
            )
    newest = next((checkpoint for checkpoint in reversed(found) if _is_whole(checkpoint, "DeepSpeed")), None)
    shards = 0 if newest is None else len(list(newest.glob("global_step*/*optim_states.pt")))
    if newest is not None and shards != processes:
        raise ConstraintError(
            f"{newest}: written by DeepSpeed over {shards} processes, and these are {processes}; go on with as many as "
            f"it began with, {advice}"
        )


def _by_step(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def _spread_in(checkpoint: Path) -> str | None:
    """How the parameters were spread over the processes that wrote a checkpoint; None where that does not show."""
    if any(checkpoint.glob("global_step*")):
        return "DeepSpeed"
    if any(checkpoint.glob("pytorch_model_fsdp*")) or any(checkpoint.glob("optimizer.bin")):
        return "FSDP2"
    return _WHOLE if (checkpoint / "optimizer.pt").exists() else None


def _is_whole(checkpoint: Path, spread: str) -> bool:
    """Whether it was written to its end and not yet partly deleted."""
    try:
        # Trainer writes this file last.
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        there = all(any(checkpoint.glob(pattern)) for pattern in _CHECKPOINT_FILES[spread])
        return there and bool(state["global_step"] == int(checkpoint.name.rpartition("-")[2]))
    except (OSError, ValueError, KeyError):
        return False


def _refuse_uneven_pictures(dataset: ConversationDataset, at_a_time: int, processes: int) -> None:
    """Processes that gather each other's parameters wait for ever where one passes through the projector and another,
    without pictures, does not."""
    shows = [bool(sample.images) for sample in dataset.samples]
    shows += [encoded.pixel_values is not None for encoded in dataset.old]
    batches = [dataset.order[at : at + at_a_time] for at in range(0, len(dataset.order), at_a_time)]
    shown = [any(shows[i if i >= 0 else ~i] for i in batch) for batch in batches]
    rounds = [shown[at : at + processes] for at in range(0, len(shown), processes)]
    if any(len(set(of_all)) > 1 for of_all in rounds):
        raise ConstraintError(
            "some samples have pictures and others (replayed ones too) have none, so that a process may pass by the "
            f"vision tower that the others wait for under {spread_by()}: give every sample a picture, or train under "
            "DDP (recipes/accelerate/ddp.yaml)"
        )


def share_of_step(samples: int, most: int, processes: int) -> tuple[int, int]:
    """(samples a process takes at a time, how often in a step) for a step over so many samples."""
    rounds = math.ceil(samples / (most * processes))
    return math.ceil(samples / (rounds * processes)), rounds


def _lengths(dataset: ConversationDataset, rank: int, processes: int) -> list[int]:
    """Tokens of each sample; the processes share the work of encoding them."""
    lengths = torch.zeros(len(dataset.samples), dtype=torch.int64)
    lengths[rank::processes] = torch.tensor(dataset.lengths(slice(rank, None, processes)), dtype=torch.int64)
    return [int(length) for length in sum_over_ranks(lengths)]


@contextmanager
def _fast_attention(model: nn.Module, *, bf16: bool) -> Iterator[None]:
    """Attention as plain products where that is faster: on a CPU in bfloat16.

    The backward of torch's fused attention takes two to seven times as long there (4 × 9 heads of 106 to 323 tokens,
    torch 2.13): a fifth of a whole step. Plain products keep heads · tokens² scores a layer in memory.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config = getattr(base, "config", None)
    before = getattr(config, "_attn_implementation", None)
    if not bf16 or before != "sdpa" or next(base.parameters()).device.type != "cpu":
        yield
        return
    base.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def _log_every(options: TrainingOptions) -> int:
    """Steps between rows of the loss log.

    A row is the mean since the last one, and a resumed Trainer has forgotten the losses before its checkpoint: so that
    the log does not change, a row ends at each checkpoint.
    """
    most = max(1, min(5, options.steps // 10))
    return next(n for n in range(most, 0, -1) if options.checkpoint_every % n == 0)


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end and not yet partly deleted; broken ones are removed.

    Raises:
        ConstraintError: see `check_spread`; then none is removed.
    """
    _refuse_other_checkpoints(folder)
    found = _by_step(folder)
    while found:
        newest = found.pop()
        if _is_whole(newest, spread_by() or _WHOLE):
            return str(newest)
        shutil.rmtree(newest)
    return None


def write_loss(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the loss log as CSV."""
    out = io.StringIO()
    writer = csv.DictWriter(out, LOSS_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, out.getvalue())
