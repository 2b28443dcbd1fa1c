"""Covariance accumulation, C += Σ x xᵀ over the rows of x (KORE, arXiv 2510.19316, step 1)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from kore_fast.ops.backends import Backend, choose

# What the three entries of a count mean.
TOKENS, WEIGHT, NONFINITE = 0, 1, 2
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Backends in the order in which they are tried.
_CPU = ("native", "reference")

_library = torch.library.Library("kore_fast", "FRAGMENT")
_library.define(
    "covariance_update_(Tensor(a!) C, Tensor(b!) count, Tensor x, Tensor? mask=None, Tensor? scale=None, *, "
    'str backend="auto") -> ()'
)


def new_count(*group: int, device: torch.device | str | None = None) -> torch.Tensor:
    """A zeroed count for ``covariance_update_``: (*group, 3) float64, see there."""
    return torch.zeros(*group, 3, dtype=torch.float64, device=device)


def covariance_update_(
    C: torch.Tensor,
    count: torch.Tensor,
    x: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> None:
    """Add the rows of ``x`` to the **lower triangle** of ``C`` and to ``count``, both in place.

    Also ``torch.ops.kore_fast.covariance_update_``, for graphs.

    Args:
        C: (*group, d, d), float64 or float32, row-major; above the diagonal it is undefined until `finalize`.
        count: (*group, 3) float64: tokens added, their summed weight, rows dropped for a NaN or an infinity.
        x: (*group, …, d) in float64, float32, bfloat16 or float16 and any stride; every dimension between group and d
            counts as tokens.
        mask: (*group, …) bool or integer, zero where a row is padding and is left out.
        scale: (*group, …) weight w ≥ 0 of each row: the row adds w·x xᵀ. A weight of zero leaves the row out.
        backend: ``"reference"`` (plain PyTorch, all sums in C's dtype), ``"native"`` (compiled), ``"triton"``, or
            ``"auto"``: the fastest that is there (see `kore_fast.ops.backends.choose`).

    Rows with a value or a weight that is not finite, or of negative weight, are dropped and counted. Nothing is copied
    to the host. The fast backends sum products of at most 256 tokens in float32 before they promote: natively those
    sums are added in C's dtype (on a GPU first with compensation in float32), by Triton in float32 up to 8192 tokens.
    Where x is float64, all sums are. The order of the sums does not depend on the machine's threads.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, no rows, a C that overlaps itself; names them. C and
            count are then as they were.
        BackendError: a backend that can't run here; says what to install.
    """
    if (
        backend == "auto"
        and not torch.compiler.is_compiling()
        and x.is_cpu
        and not x.requires_grad
        and _update_if_ready()(C, count, x, mask, scale)
    ):
        return
    torch.ops.kore_fast.covariance_update_(C, count, x, mask, scale, backend=backend)


@cache
def _update_if_ready() -> Callable[..., bool]:
    """The CPU's shortest way; one that takes nothing where "auto" would not choose the native backend there."""
    chosen = choose("covariance", "auto", torch.device("cpu"), _CPU)
    return getattr(chosen, "update_if_ready", lambda: lambda *_: False)()


def finalize(C: torch.Tensor) -> torch.Tensor:
    """Mirror the accumulated lower triangle of ``C`` (*group, d, d) upwards, in place; returns ``C``."""
    return C.copy_(torch.tril(C) + torch.tril(C, -1).mT)


@torch.library.impl(_library, "covariance_update_", "CompositeExplicitAutograd")
def _update(
    C: torch.Tensor,
    count: torch.Tensor,
    x: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> None:
    _check(C, count, x, mask, scale)
    if x.numel() == 0:
        raise ValueError(f"covariance_update_: x {tuple(x.shape)} has no rows to add")
    rows = x.shape[:-1]
    mask = None if mask is None else (mask if mask.dtype == torch.bool else mask != 0).contiguous()
    scale = None if scale is None else scale.detach().to(torch.float64).contiguous()
    run = choose("covariance", backend, x.device, _preferences(x)).covariance_update_
    groups = C.shape[:-2]
    if len(groups) <= 1:
        run(C, count, x.detach(), mask, scale)
        return
    # Backends take one group dimension at most.
    given = [
        None if rows_of is None else rows_of.reshape(groups.numel(), *rows[len(groups) :]) for rows_of in (mask, scale)
    ]
    for number in range(groups.numel()):
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(number), groups))
        run(C[at], count[at], x[at].detach(), *(None if rows_of is None else rows_of[number] for rows_of in given))


@torch.library.register_fake("kore_fast::covariance_update_")
def _(
    C: torch.Tensor,
    count: torch.Tensor,
    x: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> None:
    _check(C, count, x, mask, scale)


def _preferences(x: torch.Tensor) -> tuple[str, ...]:
    """Backends in the order in which they are tried, fastest first."""
    if x.device.type == "cpu":
        return _CPU
    if x.dtype in (torch.bfloat16, torch.float16):
        return ("native", "triton", "reference")
    # Float64 products on a GPU's tensor cores are as fast as float32 ones off them, and exact.
    return ("reference",)


def _check(
    C: torch.Tensor, count: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None, scale: torch.Tensor | None
) -> None:
    group, d = C.shape[:-2], C.shape[-1] if C.dim() else 0
    fits = C.dim() >= 2 and C.shape[-2] == d and x.dim() >= C.dim() and x.shape[-1] == d
    if not fits or x.shape[: len(group)] != group:
        raise ValueError(
            f"covariance_update_: x {tuple(x.shape)} does not fit C {tuple(C.shape)}: want (*group, tokens, d)"
        )
    if count.shape != (*group, 3):
        raise ValueError(f"covariance_update_: count has shape {tuple(count.shape)}, want {(*group, 3)}")
    for name, rows in (("mask", mask), ("scale", scale)):
        if rows is not None and rows.shape != x.shape[:-1]:
            raise ValueError(
                f"covariance_update_: {name} has shape {tuple(rows.shape)}, want one value a row: {tuple(x.shape[:-1])}"
            )
        if rows is not None and rows.device != x.device:
            raise ValueError(f"covariance_update_: {name} is on {rows.device}, x on {x.device}")
    if C.dtype not in (torch.float64, torch.float32):
        raise ValueError(f"covariance_update_: C is {C.dtype}; sums need float64 (or float32)")
    if count.dtype != torch.float64:
        raise ValueError(f"covariance_update_: count is {count.dtype}, want float64")
    if not count.is_contiguous():
        raise ValueError(f"covariance_update_: count has strides {count.stride()}, want contiguous")
    if x.dtype not in _FLOATS:
        raise ValueError(f"covariance_update_: x is {x.dtype}; want float64, float32, bfloat16 or float16")
    if mask is not None and mask.dtype.is_floating_point:
        raise ValueError(f"covariance_update_: mask is {mask.dtype}, want bool or integers; weights go into scale")
    if not C.device == count.device == x.device:
        raise ValueError(f"covariance_update_: C is on {C.device}, count on {count.device}, x on {x.device}")
    if d > 1 and C.stride(-1) != 1:
        raise ValueError(f"covariance_update_: C has strides {C.stride()}, want row-major (the last one 1)")
    if _overlaps(C):
        raise ValueError(f"covariance_update_: C has strides {C.stride()}: its elements overlap")


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether two indices may share an element: a dimension that steps by less than what lies inside it."""
    span = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < span:
            return True
        span = max(span, stride * size) if size > 1 else span
    return False
