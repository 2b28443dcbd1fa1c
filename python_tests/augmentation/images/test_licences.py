from __future__ import annotations

import pytest

from kore_fast.augmentation.images.licences import licence_code


@pytest.mark.parametrize(
    ("name", "url", "code"),
    [
        ("CC BY-SA 4.0", None, "by-sa"),
        ("CC-BY-2.0", None, "by"),
        ("CC BY 3.0 us", None, "by"),
        ("CC BY-NC-ND 2.0", None, "by-nc-nd"),
        ("by-sa", None, "by-sa"),
        ("CC0", None, "cc0"),
        ("CC0 1.0", None, "cc0"),
        ("Public domain", None, "pdm"),
        ("PD-old-100", None, "pdm"),
        ("whatever it says", "https://creativecommons.org/licenses/by-nc-sa/3.0/deed.en", "by-nc-sa"),
        (None, "http://creativecommons.org/publicdomain/zero/1.0/", "cc0"),
        (None, "https://creativecommons.org/publicdomain/mark/1.0/", "pdm"),
        ("GFDL", "http://www.gnu.org/copyleft/fdl.html", None),
        ("bystander", None, None),
        ("All rights reserved by the author", None, None),
        (None, None, None),
    ],
)
def test_a_licence_has_one_code_whoever_names_it(name: str | None, url: str | None, code: str | None) -> None:
    assert licence_code(name, url) == code
