"""Retention: the KORE paper's 12 benchmarks, by lmms-eval on the model in memory or by VLMEvalKit on an endpoint.

Absolute scores differ between harnesses, their versions and judges: compare only figures of one harness.
"""

from kore_fast.evaluation.lmms.benchmarks import BENCHMARKS, EVOKE, RETENTION, Benchmark
from kore_fast.evaluation.lmms.judge import Judge
from kore_fast.evaluation.lmms.retention import Retention, Score, check_retention, choose, evaluate_retention
from kore_fast.evaluation.lmms.vlmevalkit import VlmEvalKitRun, read_vlmevalkit, write_vlmevalkit_config

__all__ = [
    "BENCHMARKS",
    "EVOKE",
    "RETENTION",
    "Benchmark",
    "Judge",
    "Retention",
    "Score",
    "VlmEvalKitRun",
    "check_retention",
    "choose",
    "evaluate_retention",
    "read_vlmevalkit",
    "write_vlmevalkit_config",
]
