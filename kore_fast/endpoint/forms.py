"""The form that an answer is asked for in: a pydantic model as the JSON schema that servers take."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel


@cache
def json_schema(form: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a form, as strict structured outputs want it: no titles, all keys required."""
    whole = form.model_json_schema()
    parts = whole.pop("$defs", {})

    def bare(value: Any) -> Any:
        if isinstance(value, list):
            return [bare(one) for one in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return bare(parts[value["$ref"].rpartition("/")[2]])
        kept = {key: bare(one) for key, one in value.items() if key not in ("title", "description", "properties")}
        if "properties" in value:
            # By name: a property may itself be called "title".
            kept["properties"] = {key: bare(one) for key, one in value["properties"].items()}
        return kept

    found: dict[str, Any] = bare(whole)
    return found
