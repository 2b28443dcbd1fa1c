"""The 12 retention benchmarks and EVOKE: which task measures each, which of its figures counts, and how it becomes
points from 0 to 100."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from kore_fast.evaluation.lmms.readable import Readable, extraction, holds

Metrics = Mapping[str, float | None]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark, as lmms-eval runs it."""

    name: str
    """As options, folders of local data and results call it."""
    title: str
    task: str
    """The YAML of its task, below lmms-eval's tasks; for our own, below this room's ``tasks``."""
    split: str
    metrics: tuple[str, ...]
    """The figures of the task that the points are made from."""
    points: Callable[[Metrics], float]
    images: tuple[str, ...] = ("image",)
    """The columns of its data that hold a picture; with a trailing ``*`` a list of pictures."""
    configurations: tuple[str, ...] = ()
    """Where its data set on the hub has several, each in a folder of its name: first the one that is measured."""
    parts: bool = False
    """Folders with its split are parts of one whole."""
    own: bool = False
    """The task is ours: lmms-eval has none."""
    data: str = ""
    """For our own tasks: which files are wanted as local data."""
    file: str = ""
    """Among other files of its data set, the one with the questions."""
    judged: bool = False
    readable: Readable | None = None
    """For judged ones: whether an answer of the judge can be used."""
    vlmevalkit: tuple[str, str] = ("", "")
    """VLMEvalKit's data set and the class that reads it."""


def _share(name: str) -> Callable[[Metrics], float]:
    return lambda metrics: 100 * _number(metrics[name])


def _percent(name: str) -> Callable[[Metrics], float]:
    # lmms-eval's MathVista says None where nothing was right.
    return lambda metrics: _number(metrics[name])


def _number(value: float | None) -> float:
    return 0.0 if value is None else float(value)


def mme_points(perception: float, cognition: float) -> float:
    """MME's two sums, of at most 2000 and 800, as points from 0 to 100."""
    return (perception + cognition) / 2800 * 100


MULTIPLE_CHOICE, YES_OR_NO = "ImageMCQDataset", "ImageYORNDataset"

RETENTION: tuple[Benchmark, ...] = (
    Benchmark(
        name="mme",
        title="MME",
        task="mme/mme.yaml",
        split="test",
        metrics=("mme_perception_score", "mme_cognition_score"),
        points=lambda m: mme_points(_number(m["mme_perception_score"]), _number(m["mme_cognition_score"])),
        vlmevalkit=("MME", YES_OR_NO),
    ),
    Benchmark(
        # lmms-eval's mmbench_en_dev asks an endpoint where it finds no letter, and draws one where there is none.
        name="mmbench",
        title="MMBench (dev en)",
        task="mmbench/mmbench_en_dev_static.yaml",
        split="dev",
        metrics=("gpt_eval_score",),
        points=_percent("gpt_eval_score"),
        configurations=("en", "cn", "cc"),
        vlmevalkit=("MMBench_DEV_EN", MULTIPLE_CHOICE),
    ),
    Benchmark(
        name="seedbench2_plus",
        title="SEEDBench2_Plus",
        task="seedbench_2_plus/seedbench_2_plus.yaml",
        split="test",
        metrics=("seedbench_2_plus_all",),
        points=_share("seedbench_2_plus_all"),
        vlmevalkit=("SEEDBench2_Plus", MULTIPLE_CHOICE),
    ),
    Benchmark(
        name="ocrvqa",
        title="OCRVQA",
        task="ocrvqa/ocrvqa.yaml",
        split="test",
        metrics=("exact_match",),
        points=_share("exact_match"),
        own=True,
        data="VLMEvalKit's OCRVQA_TESTCORE.tsv, or rows of image, questions and answers",
        file="OCRVQA_TESTCORE.tsv",
        vlmevalkit=("OCRVQA_TESTCORE", "ImageVQADataset"),
    ),
    Benchmark(
        name="scienceqa",
        title="ScienceQA",
        task="scienceqa/scienceqa_img.yaml",
        split="test",
        metrics=("exact_match",),
        points=_share("exact_match"),
        configurations=("ScienceQA-IMG", "ScienceQA-FULL"),
        vlmevalkit=("ScienceQA_TEST", MULTIPLE_CHOICE),
    ),
    Benchmark(
        name="mmmu",
        title="MMMU",
        task="mmmu/mmmu_val.yaml",
        split="validation",
        metrics=("mmmu_acc",),
        points=_share("mmmu_acc"),
        images=tuple(f"image_{number}" for number in range(1, 8)),
        # The authors' own data set has a folder a subject; the copy that lmms-eval fetches has one for all.
        parts=True,
        vlmevalkit=("MMMU_DEV_VAL", "MMMUDataset"),
    ),
    Benchmark(
        name="mia_bench",
        title="MIA-Bench",
        task="mia_bench/mia_bench.yaml",
        split="test",
        metrics=("gpt_eval_score",),
        points=_share("gpt_eval_score"),
        judged=True,
        readable=holds(r"(?i)total\s+score\s*:\s*\d+\s*/\s*\d+"),
        vlmevalkit=("MIA-Bench", "MIABench"),
    ),
    Benchmark(
        name="mmdu",
        title="MMDU",
        task="mmdu/mmdu.yaml",
        split="test",
        metrics=("overall_score",),
        points=_percent("overall_score"),
        images=("images*",),
        own=True,
        data="VLMEvalKit's MMDU.tsv, or MMDU's benchmark.json as JSON lines with its pictures",
        file="benchmark.json",
        judged=True,
        readable=holds(r"(?i)[\"']?overall score[\"']?\s*:\s*\d+"),
        vlmevalkit=("MMDU", "MMDUDataset"),
    ),
    Benchmark(
        # Its wording of the question is VLMEvalKit's too.
        name="mathvista",
        title="MathVista",
        task="mathvista/mathvista_testmini_cot.yaml",
        split="testmini",
        metrics=("llm_as_judge_eval",),
        points=_percent("llm_as_judge_eval"),
        images=("decoded_image",),
        judged=True,
        readable=extraction,
        vlmevalkit=("MathVista_MINI", "MathVista"),
    ),
    Benchmark(
        name="mathvision",
        title="MathVision",
        task="mathvision/mathvision_test.yaml",
        split="test",
        metrics=("mathvision_standard_eval",),
        points=_percent("mathvision_standard_eval"),
        images=("decoded_image",),
        vlmevalkit=("MathVision", "MathVision"),
    ),
    Benchmark(
        # F1, as VLMEvalKit's overall figure; the accuracy is kept beside it.
        name="pope",
        title="POPE",
        task="pope/pope.yaml",
        split="test",
        metrics=("pope_f1_score",),
        points=_share("pope_f1_score"),
        vlmevalkit=("POPE", YES_OR_NO),
    ),
    Benchmark(
        name="hallusionbench",
        title="HallusionBench",
        task="hallusion_bench/hallusion_bench_image.yaml",
        split="image",
        metrics=("aAcc", "fAcc", "qAcc"),
        points=lambda m: sum(_number(m[name]) for name in ("aAcc", "fAcc", "qAcc")) / 3,
        judged=True,
        readable=holds(r"(?i)correct|unclear"),
        vlmevalkit=("HallusionBench", YES_OR_NO),
    ),
)
"""The KORE paper's 12, whose plain mean is K.R."""

EVOKE = Benchmark(
    name="evoke",
    title="EVOKE",
    task="evoke/evoke.yaml",
    split="test",
    metrics=("cem", "f1"),
    points=lambda m: 50 * (_number(m["cem"]) + _number(m["f1"])),
    own=True,
    data="evoke_evaluation_data.jsonl with its pictures",
    file="evoke_evaluation_data.jsonl",
)
"""Adaptation, for the same table: K.A = (CEM + F1) / 2. It has no part in K.R."""

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in (*RETENTION, EVOKE)}

BenchmarkName = Literal[
    "mme",
    "mmbench",
    "seedbench2_plus",
    "ocrvqa",
    "scienceqa",
    "mmmu",
    "mia_bench",
    "mmdu",
    "mathvista",
    "mathvision",
    "pope",
    "hallusionbench",
    "evoke",
]
