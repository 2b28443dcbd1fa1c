"""Items → samples: dialogue, recognition, caption and VQA, and the held-out questions that measure them."""

from kore_fast.augmentation.augment import Augmented, augment
from kore_fast.augmentation.options import AugmentationOptions
from kore_fast.augmentation.templates import TemplateWriter
from kore_fast.augmentation.wordings import Wordings, load_wordings
from kore_fast.augmentation.writer import CannotWriteError, ImageSource, OwnImage, Round, Writer

__all__ = [
    "AugmentationOptions",
    "Augmented",
    "CannotWriteError",
    "ImageSource",
    "OwnImage",
    "Round",
    "TemplateWriter",
    "Wordings",
    "Writer",
    "augment",
    "load_wordings",
]
