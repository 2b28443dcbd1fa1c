"""Samples written by a language model behind any OpenAI-compatible server, through a cache of requests."""

from kore_fast.augmentation.language.cache import RequestCache
from kore_fast.augmentation.language.client import LanguageModelError
from kore_fast.augmentation.language.options import LanguageModelOptions
from kore_fast.augmentation.language.writer import Estimate, LanguageModelWriter

__all__ = ["Estimate", "LanguageModelError", "LanguageModelOptions", "LanguageModelWriter", "RequestCache"]
