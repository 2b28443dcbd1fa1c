"""Samples written, and answers judged, by a language model behind any OpenAI-compatible server, through a cache."""

from kore_fast.augmentation.language.judge import LanguageModelJudge
from kore_fast.augmentation.language.options import LanguageModelOptions
from kore_fast.augmentation.language.writer import Estimate, LanguageModelWriter
from kore_fast.endpoint.cache import RequestCache
from kore_fast.errors import LanguageModelError

__all__ = [
    "Estimate",
    "LanguageModelError",
    "LanguageModelJudge",
    "LanguageModelOptions",
    "LanguageModelWriter",
    "RequestCache",
]
