"""Licences by short codes, whatever name or address a provider gives them."""

from __future__ import annotations

import re

_BY = r"by(?:-(?:nc|sa|nd))*"


def licence_code(name: str | None, url: str | None = None) -> str | None:
    """``"CC BY-SA 4.0"`` or its deed's address as ``"by-sa"``; None for an unknown licence.

    ``pdm`` stands for the public domain, marked as such or otherwise; ``cc0`` for a work given to it.
    """
    for text in (url or "", name or ""):
        text = text.strip().lower()
        if deed := re.search(rf"creativecommons\.org/licenses/({_BY})(?:/|$)", text):
            return deed[1]
        if re.search(r"creativecommons\.org/publicdomain/zero(?:/|$)|^(?:cc[ -]?0|cc-zero)\b", text):
            return "cc0"
        if re.search(r"creativecommons\.org/publicdomain/mark(?:/|$)|^(?:public domain|pdm|pd)\b", text):
            return "pdm"
        if short := re.match(rf"(?:cc[ -])?({_BY})(?:[ -][\d.]+.*)?$", text):
            return short[1]
    return None
