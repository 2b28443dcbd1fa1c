"""What a study's kept scores were made from: options, and files by what is in them.

Kept scores outlive the run's folder and go along with the repository, to machines where the data is not there or not
yet. So a file is held against them only where it is here; one that is not makes nothing stale.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kore_fast.files import quick_digest
from kore_fast.recipe.materials import earlier_adapter, earlier_covariance
from kore_fast.recipe.retention import benchmark_files
from kore_fast.recipe.schema import MEMORY_ONLY, Method, Recipe
from kore_fast.recipe.stages import JUDGE_PLACE, beside_items, earlier_asked, evoke_asked, item_pictures, pictures_in

# What no score depends on, and what is told by the files that it names.
_ASIDE: dict[str, Any] = {
    **dict.fromkeys(("methods", "study", "name", "title", "note", "where", "base_folder"), True),
    "model": {"config"},
    "training": MEMORY_ONLY,
    "covariance": {"checkpoint_seconds", "max_memory"},
    "evaluation": {"retention": {"judge": JUDGE_PLACE, "data": True}},
}


def options_digest(recipe: Recipe, method: Method) -> str:
    """Hex SHA-256 of a recipe's options but for its other methods.

    What is at its default is left out, so that an option that a later version knows makes nothing stale.
    """
    told = recipe.model_dump(mode="json", exclude=_ASIDE, exclude_defaults=True)
    own = method.model_dump(mode="json", exclude_defaults=True)
    return hashlib.sha256(json.dumps([told, own], sort_keys=True, default=str).encode()).hexdigest()


def file_digests(recipe: Recipe) -> dict[str, str]:
    """Key of the recipe → hex SHA-256 of what it names, with the pictures of items, old knowledge and questions.

    A model that a script of the repository makes is told by the script, as its bytes may differ between machines. What
    is not here, or not whole, is left out. Pictures of ``samples`` and of sources are told by the file that names them.
    """
    found = {key: _digest(files) for key, files in _named(recipe).items()}
    return {key: digest for key, digest in found.items() if digest}


def still_fits(kept: Any, options: str, files: Mapping[str, str]) -> bool:
    """Whether scores with the note ``kept`` are those of these options and files."""
    if not isinstance(kept, dict):  # of an earlier version
        return False
    before = kept.get("files", {})
    return kept.get("options") == options and all(before.get(key) == digest for key, digest in files.items())


def _named(recipe: Recipe) -> dict[str, Sequence[Path]]:
    """Key → files that belong together, the first of them the one that the key names."""
    files: dict[str, Sequence[Path]] = {}
    items = recipe.resolve(recipe.items)
    files["items"] = [items, *beside_items(items), *item_pictures(items)]
    model = Path(recipe.model_path())
    files["model"] = _inside(model) if recipe.model.build is None else [recipe.resolve(recipe.model.build)]
    plan = recipe.augmentation.resolved(recipe.resolve)
    files["augmentation"] = [file for path in plan.files() for file in _inside(path)]
    for key, path in recipe.data().items():
        there = recipe.resolve(path)
        if key.startswith("old_knowledge."):
            files[key] = [there, *pictures_in(there)]
        elif key == "samples.file" or (key.startswith("covariance.") and key.endswith(".file")):
            files[key] = [there]
    if recipe.after is not None:
        files["after.run"] = [*_inside(earlier_adapter(recipe)), *_inside(earlier_covariance(recipe))]
        files["after.images"] = earlier_asked(recipe)
    files["evaluation.evoke"] = evoke_asked(recipe)
    files["evaluation.retention.data"] = benchmark_files(recipe)
    files["study.depends_on"] = [recipe.resolve(path) for path in (recipe.study.depends_on if recipe.study else ())]
    return files


def _inside(path: Path) -> list[Path]:
    """A file, or every file of a folder."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _digest(files: Sequence[Path]) -> str:
    """Of contents and of the names from the first one's folder; empty where one of them is not there."""
    if not files or not all(file.is_file() for file in files):
        return ""
    lines = (f"{os.path.relpath(file, files[0].parent)}:{quick_digest(file)}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
