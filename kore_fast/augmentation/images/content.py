"""What a download really is: decoded in full, named by its own format, and hashed for what it shows."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageOps

from kore_fast.data.images import MAX_PIXELS, decode_image
from kore_fast.errors import DataError

EXTENSIONS = {
    "PNG": ".png",
    "JPEG": ".jpg",
    "MPO": ".jpg",  # a JPEG with a second view behind it
    "WEBP": ".webp",
    "GIF": ".gif",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "PPM": ".ppm",
}
HASH_SIDE = 16


def decode_picture(data: bytes, *, max_pixels: int = MAX_PIXELS, min_side: int = 1) -> Image.Image:
    """Decode a file of unknown content; ``format`` of the result is what it is, whatever its name says.

    Raises:
        DataError: the reason why it is no usable picture.
    """
    head = data[:1024].lstrip().lower()
    if b"<svg" in head:
        raise DataError("it is an SVG drawing, which may refer to other files; only raster pictures are read")
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        raise DataError("it is a web page (HTML), not a picture")
    if not data:
        raise DataError("it is empty")
    image = decode_image(io.BytesIO(data), "it", max_pixels=max_pixels)
    if min(image.size) < min_side:
        raise DataError(f"it has {image.width} x {image.height} pixels; the shorter side needs {min_side}")
    return image


def perceptual_hash(image: Image.Image) -> int:
    """A difference hash of 256 bits: whether each of 16 x 16 places is darker than the one to its right.

    It is the same, but for a few bits, after resizing and compression; a transparent ground counts as white.
    """
    upright = ImageOps.exif_transpose(image) or image
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        solid = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", solid.size, "white"), solid)
    small = upright.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX)
    grey = small.tobytes()
    bits = 0
    for row in range(HASH_SIDE):
        for column in range(HASH_SIDE):
            place = row * (HASH_SIDE + 1) + column
            bits = bits << 1 | (grey[place] < grey[place + 1])
    return bits


def hash_file(path: str | Path) -> int:
    """`perceptual_hash` of a picture file.

    Raises:
        DataError: it is missing or cannot be decoded.
    """
    try:
        return perceptual_hash(decode_image(path, f"image {str(path)!r}"))
    except OSError as error:
        raise DataError(f"image {str(path)!r} cannot be read ({error.strerror})") from None


def bits_apart(one: int, other: int) -> int:
    """In how many bits two hashes differ."""
    return (one ^ other).bit_count()
