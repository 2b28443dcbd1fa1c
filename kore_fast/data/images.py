"""Pictures named by data: each stays inside its folder, is decoded once in full, and has a bounded size."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from kore_fast.errors import DataError
from kore_fast.files import inside

# Raster formats whose decoders are part of Pillow itself; others (EPS, for one) hand the file to another program.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 50_000_000


def check_image(root: str | Path, relative: str, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Decode the picture ``relative`` below ``root`` and return its (width, height) in pixels.

    Raises:
        DataError: the path leaves ``root``, there is no such file, it is not a picture or is cut short, or it has more
            than ``max_pixels`` pixels (refused from its header, before anything is decoded).
    """
    try:
        path = inside(root, relative)
        found = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a null byte, a name too long, a circle of links
        raise DataError(f"image {relative!r} is not a usable path ({error}); correct it") from None
    if not found:
        raise DataError(f"no image {relative!r} below {root}; put the file there or correct the path")
    return decode_image(path, f"image {relative!r}", max_pixels=max_pixels).size


def decode_image(file: str | Path | BinaryIO, name: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture in full (of an animation the first frame); ``name`` is what an error calls it.

    Raises:
        DataError: not a picture of one of `IMAGE_FORMATS`, cut short, or of more than ``max_pixels`` pixels (refused
            from its header, before anything is decoded).
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns at its own, larger bound; ours is checked below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise DataError(
                        f"{name} has {width} x {height} pixels, more than the {max_pixels:,} allowed; make it smaller"
                    )
                image.load()
                return image
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise DataError(f"{name} has more than {max_pixels:,} pixels; make it smaller") from None
    except Exception as error:  # decoders raise whatever a broken file leads them into, not only OSError
        raise DataError(
            f"{name} cannot be decoded ({error}): it is cut short or not a picture; "
            f"replace it ({', '.join(IMAGE_FORMATS)} are read)"
        ) from None
