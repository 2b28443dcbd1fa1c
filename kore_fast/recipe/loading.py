"""Recipes read from YAML: one that extends another, changes from the command line, and what is wrong in words."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from kore_fast.augmentation.options import AugmentationOptions
from kore_fast.augmentation.plan import AugmentationPlan
from kore_fast.errors import RecipeError
from kore_fast.recipe.schema import Recipe
from kore_fast.recipe.study import expand

_BASE_FOLDER = "base_folder"


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_recipe(path: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read a recipe: a YAML file, or a folder with ``recipe.yaml``.

    ``extends: other.yaml`` starts from another recipe and changes what is given; a method or a source that is set to
    null is dropped.

    Args:
        overrides: dotted key → YAML value, as from ``--set training.steps=20``.

    Raises:
        RecipeError: names the file, the key, and for a misspelt one the nearest known.
    """
    path = Path(path)
    file = path / "recipe.yaml" if path.is_dir() else path
    values = _read(file, ())
    for key, text in (overrides or {}).items():
        _override(values, key, text, file)
    covariance = values.get("covariance")
    for section, key in ((values, "methods"), (covariance, "sources")):
        if isinstance(section, dict) and isinstance(section.get(key), dict):
            section[key] = {name: value for name, value in section[key].items() if value is not None}
    if isinstance(values.get("study"), dict) and values["study"].pop("jobs", None) is not None:
        raise RecipeError(f"{file}: study.jobs follows from the methods; leave it out")
    try:
        values = expand(values)
    except RecipeError as error:
        raise RecipeError(f"{file}: {error}") from None
    values[_BASE_FOLDER] = file.parent.resolve()
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_explain(file, error)) from None


def load_plan(items: Path, overrides: Mapping[str, str] | None = None) -> AugmentationPlan:
    """How to augment an items file without a recipe: for EVOKE's JSON the shape of KORE-74K, else the defaults.

    Args:
        overrides: key of the plan → YAML value, as from ``--set language_model.model=gpt-4o``; ``augmentation.`` may
            stand before it, as in a recipe.

    Raises:
        RecipeError: names the key, and for a misspelt one the nearest known.
    """
    from kore_fast.data.items import is_evoke_file

    values: dict[str, Any] = AugmentationOptions.kore_74k().model_dump(mode="json") if is_evoke_file(items) else {}
    for key, text in (overrides or {}).items():
        _override(values, key.removeprefix("augmentation."), text, "the augmentation")
    try:
        return AugmentationPlan.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_explain("--set", error, AugmentationPlan)) from None


def _read(file: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeys)
    except FileNotFoundError:
        raise RecipeError(f"{file}: no such recipe; give a YAML file or a folder with recipe.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: not valid YAML ({error})") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{file}: want keys and values, found {type(values).__name__}")
    if _BASE_FOLDER in values:
        raise RecipeError(f"{file}: {_BASE_FOLDER} is set by the file's place, not in it")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    parent_file = (file.parent / str(parent)).resolve()
    if parent_file in seen:
        raise RecipeError(f"{file}: extends {parent}, which extends it in turn")
    if parent_file.parent != file.parent.resolve():
        raise RecipeError(f"{file}: extends {parent} in another folder; relative paths would lose their meaning")
    return _merge(_read(parent_file, (*seen, file.resolve())), values)


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _override(values: dict[str, Any], key: str, text: str, file: Path | str) -> None:
    *parents, last = key.split(".")
    section = values
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise RecipeError(f"--set {key}: {parent} is not a section of {file}")
    try:
        section[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {key}={text}: not a YAML value ({error})") from None


def _explain(file: Path | str, error: ValidationError, section: type[BaseModel] | None = None) -> str:
    lines = []
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _known_keys(problem["loc"][:-1], section or Recipe)
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
            lines.append(f"{place}: unknown key; {hint}")
        elif problem["type"] == "missing":
            lines.append(f"{place}: missing")
        elif problem["type"] in ("model_type", "dict_type"):
            lines.append(
                f"{place}: want keys and values, as in {{key: value}}, found {type(problem['input']).__name__}"
            )
        else:
            # What stands in these may be a secret, pasted where its variable's name belongs.
            secret = isinstance(problem["input"], dict) or _MAY_HOLD_SECRETS & set(problem["loc"])
            found = "" if secret else f" (found {problem['input']!r:.60})"
            lines.append(f"{place or 'as a whole'}: {problem['msg'].removeprefix('Value error, ')}{found}")
    return f"{file}: " + "; ".join(lines)


_MAY_HOLD_SECRETS = {"api_key_env", "key_env", "base_url", "endpoint", "extra_body"}


def _known_keys(location: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    """The keys of the section of ``root`` at ``location``."""
    section: Any = root
    for part in location:
        fields = getattr(section, "model_fields", {})
        if part in fields:
            section = next((t for t in _models_in(fields[part].annotation)), None)
        # else: a key of a dictionary of sections, whose type was found one step before.
    return [name for name in getattr(section, "model_fields", {}) if name != _BASE_FOLDER]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in _models_in(argument)]
