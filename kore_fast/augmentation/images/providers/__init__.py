"""Where pictures are searched for: one file a provider, all behind `Provider`."""

from __future__ import annotations

from collections.abc import Callable

from kore_fast.augmentation.images.options import ImageSearchOptions, ProviderName
from kore_fast.augmentation.images.providers.brave import Brave
from kore_fast.augmentation.images.providers.local import Local
from kore_fast.augmentation.images.providers.openverse import Openverse
from kore_fast.augmentation.images.providers.provider import Found, Provider
from kore_fast.augmentation.images.providers.serpapi import SerpApi
from kore_fast.augmentation.images.providers.wikimedia import Wikimedia

__all__ = ["PROVIDERS", "Brave", "Found", "Local", "Openverse", "Provider", "SerpApi", "Wikimedia", "make_provider"]

PROVIDERS: dict[ProviderName, Callable[[ImageSearchOptions], Provider]] = {
    "local": Local,
    "wikimedia": Wikimedia,
    "openverse": Openverse,
    "brave": Brave,
    "serpapi": SerpApi,
}


def make_provider(options: ImageSearchOptions) -> Provider:
    """The provider that ``options`` name."""
    return PROVIDERS[options.provider](options)
