"""Image search behind one interface, bounded downloads, and the picture cache that the assembly reads."""

from kore_fast.augmentation.images.options import ImageSearchOptions
from kore_fast.augmentation.images.providers import Found, Provider
from kore_fast.augmentation.images.search import PictureSearch, Report
from kore_fast.augmentation.images.store import Picture, PictureStore

__all__ = ["Found", "ImageSearchOptions", "Picture", "PictureSearch", "PictureStore", "Provider", "Report"]
