from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from kore_fast.augmentation.images import ImageSearchOptions


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({}, "needs 'folder'"),
        ({"provider": "wikimedia"}, "needs 'contact'"),
        ({"provider": "wikimedia", "contact": "a@b.example\r\nX: y"}, "one line"),
        ({"provider": "openverse", "folder": "pictures"}, "'folder' is for provider 'local'"),
        ({"provider": "brave", "licences": ["by"]}, "does not tell licences"),
        ({"provider": "openverse", "licences": []}, "licences"),
        ({"provider": "openverse", "licences": ["mit"]}, "licences"),
        ({"provider": "openverse", "endpoint": "https://user:pass@host/"}, "without user name"),
        ({"provider": "openverse", "endpoint": "https://host/?api_key=x"}, "without user name"),
        ({"provider": "openverse", "endpoint": "ftp://host/"}, "http or https"),
        ({"provider": "bing"}, "provider"),
        ({"provider": "openverse", "api_key": "x"}, "api_key"),
    ],
)
def test_options_that_do_not_fit_together_say_so(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        ImageSearchOptions.model_validate(values)


def test_the_default_is_offline() -> None:
    assert ImageSearchOptions(folder="pictures").provider == "local"
    assert not ImageSearchOptions(folder="pictures").allow_private_addresses
