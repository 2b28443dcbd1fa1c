from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kore_fast.augmentation.images import ImageSearchOptions
from kore_fast.augmentation.images.content import EXTENSIONS, bits_apart, decode_picture, hash_file, perceptual_hash
from kore_fast.data.images import IMAGE_FORMATS
from kore_fast.errors import DataError

NEAR = ImageSearchOptions(folder=".").near


def test_every_format_that_is_read_has_an_extension(make: Any) -> None:
    assert set(IMAGE_FORMATS) <= EXTENSIONS.keys()
    for kind in IMAGE_FORMATS:
        assert decode_picture(make.encode(make.draw(1), kind)).format == kind


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>Not found</body></html>", "web page"),
        (b"\n  <HTML><head></head></HTML>", "web page"),
        (b'<?xml version="1.0"?><svg xmlns="x"><image href="http://169.254.169.254/"/></svg>', "SVG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a picture"),
        (b"plain words", "not a picture"),
    ],
)
def test_what_is_not_a_raster_picture_is_told_apart(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        decode_picture(data)


def test_twenty_gigapixels_are_refused_from_the_header(make: Any) -> None:
    with pytest.raises(DataError, match="pixels"):
        decode_picture(make.png_header(200_000, 100_000))
    with pytest.raises(DataError, match="9000 x 9000 pixels, more than the 50,000,000"):
        decode_picture(make.png_header(9000, 9000), max_pixels=50_000_000)


def test_truncated_and_tiny_pictures_are_refused(make: Any) -> None:
    whole = make.encode(make.draw(1, (300, 300)), "JPEG")
    decode_picture(whole)
    with pytest.raises(DataError, match="cut short"):
        decode_picture(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="the shorter side needs 64"):
        decode_picture(make.encode(make.draw(1, (500, 63))), min_side=64)


def test_the_hash_survives_size_and_compression_and_tells_pictures_apart(make: Any, tmp_path: Path) -> None:
    hashes = [perceptual_hash(make.draw(seed)) for seed in range(1, 25)]
    for seed, known in enumerate(hashes, start=1):
        smaller = make.encode(make.draw(seed).resize((70, 59)), "JPEG", quality=60)
        assert bits_apart(known, perceptual_hash(decode_picture(smaller))) <= NEAR
    apart = [bits_apart(one, other) for place, one in enumerate(hashes) for other in hashes[:place]]
    assert min(apart) > 3 * NEAR
    make.draw(3).save(tmp_path / "a.png")
    assert hash_file(tmp_path / "a.png") == hashes[2]


def test_a_transparent_ground_counts_as_white(make: Any) -> None:
    on_white = Image.new("RGB", (96, 80), "white")
    on_white.paste(make.draw(5, (48, 40)), (20, 20))
    clear = Image.new("RGBA", (96, 80), (0, 0, 0, 0))
    clear.paste(make.draw(5, (48, 40)), (20, 20))
    assert perceptual_hash(clear) == perceptual_hash(on_white)


def test_a_picture_and_its_turned_copy_with_a_note_of_it_are_one(make: Any) -> None:
    turned = make.draw(6).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    noted = decode_picture(make.encode(turned, "PNG", exif=exif))
    assert bits_apart(perceptual_hash(noted), perceptual_hash(make.draw(6))) == 0
