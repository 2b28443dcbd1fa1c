"""Which layers KORE constrains: by default every linear of the language decoder, nothing of vision tower or head."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal

from torch import nn

from kore_fast.errors import ConstraintError

# "model.layers.3.mlp.up_proj" → "model.layers", "mlp.up_proj"
_INDEXED = re.compile(r"(.+)\.\d+\.(.+)")


def decoder_linears(model: nn.Module) -> list[str]:
    """Names of all `nn.Linear` in the language decoder's layers, in the model's order.

    The decoder is what the model's ``get_decoder()`` returns (transformers) or, without one, its ``base_model`` or the
    model itself; its layers are the longest `nn.ModuleList` directly in it.

    Raises:
        ConstraintError: no list of layers with linears was found.
    """
    found: object = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    # transformers 4.56 answers None for models of text alone.
    decoder: nn.Module = found if isinstance(found, nn.Module) else getattr(model, "base_model", model)
    lists = [module for module in decoder.children() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ConstraintError(
            f"{type(model).__name__}: found no list of decoder layers; name the layers with target_modules"
        )
    layers = max(lists, key=len)
    inside = {id(module) for module in layers.modules() if isinstance(module, nn.Linear)}
    names = [name for name, module in model.named_modules() if id(module) in inside]
    if not names:
        raise ConstraintError(f"{type(model).__name__}: its decoder layers hold no nn.Linear; nothing to constrain")
    return names


def select_linears(model: nn.Module, target_modules: str | Sequence[str] | None = None) -> list[str]:
    """Names of the linears to constrain, in the model's order.

    Args:
        target_modules: ``None`` for `decoder_linears`; a regular expression that must match the whole name; or a list
            of names or name endings, as in PEFT.

    Raises:
        ConstraintError: nothing matched, or a match is not an `nn.Linear`; names it.
    """
    if target_modules is None:
        return decoder_linears(model)
    modules = dict(model.named_modules())
    if isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ConstraintError(f"target_modules {target_modules!r} is not a regular expression: {error}") from None
        names = [name for name in modules if pattern.fullmatch(name)]
    else:
        names = [n for n in modules if any(n == target or n.endswith(f".{target}") for target in target_modules)]
    if not names:
        raise ConstraintError(f"target_modules {target_modules!r} matches no layer of {type(model).__name__}")
    for name in names:
        if not isinstance(modules[name], nn.Linear):
            raise ConstraintError(
                f"{name}: target_modules matches a {type(modules[name]).__name__}; only nn.Linear can be constrained"
            )
    return names


Depth = Literal["all", "first third", "middle third", "last third"]
Part = Literal["all", "attention", "mlp"]


def narrow(names: Sequence[str], depth: Depth = "all", part: Part = "all") -> list[str]:
    """Of linears in numbered blocks (``model.layers.3.mlp.up_proj``), those of a third of the blocks or a part of each.

    The thirds are by number, with the remainder in the later ones: 32 blocks are 10, 11 and 11.

    Raises:
        ConstraintError: a name has no number of a block, or nothing is left.
    """
    found = {name: _INDEXED.fullmatch(name) for name in names}
    strange = next((name for name, match in found.items() if match is None), None)
    if strange is not None:
        raise ConstraintError(f"{strange}: not in a numbered block, so it cannot be chosen by its depth or part")
    block = {name: int(name[match.end(1) + 1 :].partition(".")[0]) for name, match in found.items() if match}
    count = max(block.values(), default=-1) + 1
    edges = [count * third // 3 for third in range(4)]
    thirds: dict[str, tuple[int, int]] = {
        name: (edges[i], edges[i + 1]) for i, name in enumerate(("first third", "middle third", "last third"))
    }
    low, high = thirds.get(depth, (0, count))
    kept = [
        name for name in names if low <= block[name] < high and (part == "all" or (".mlp." in name) == (part == "mlp"))
    ]
    if not kept:
        raise ConstraintError(f"no layer is left: {len(names)} layers in {count} blocks have no {depth} of {part}")
    return kept


def target_pattern(names: Sequence[str], all_names: Iterable[str]) -> str | list[str]:
    """A short regular expression that matches exactly ``names`` among ``all_names``; the sorted list where none does.

    It goes into ``adapter_config.json``, where hundreds of full names would be hard to read.
    """
    parts = [_INDEXED.fullmatch(name) for name in names]
    prefixes = {part[1] for part in parts if part}
    if len(prefixes) == 1 and all(parts):
        tails = "|".join(sorted({re.escape(part[2]) for part in parts if part}))
        pattern = rf"{re.escape(prefixes.pop())}\.\d+\.({tails})"
        if {name for name in all_names if re.fullmatch(pattern, name)} == set(names):
            return pattern
    return sorted(names)
