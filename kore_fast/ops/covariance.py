"""Covariance accumulation, C += Σ x xᵀ over the rows of x (KORE, arXiv 2510.19316, step 1)."""

from __future__ import annotations

import torch

from kore_fast.ops.reference import covariance as reference

# What the three entries of a count mean.
TOKENS, WEIGHT, NONFINITE = 0, 1, 2


def new_count(*group: int, device: torch.device | str | None = None) -> torch.Tensor:
    """A zeroed count for ``covariance_update_``: (*group, 3) float64, see there."""
    return torch.zeros(*group, 3, dtype=torch.float64, device=device)


def covariance_update_(
    C: torch.Tensor,
    count: torch.Tensor,
    x: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> None:
    """Add the rows of ``x`` to the **lower triangle** of ``C`` and to ``count``, both in place.

    Args:
        C: (*group, d, d), float64 or float32; what stands above the diagonal is undefined until `finalize`.
        count: (*group, 3) float64: tokens added, their summed weight, rows dropped for a NaN or an infinity.
        x: (*group, …, d) in any floating dtype and stride; every dimension between group and d counts as tokens.
        mask: (*group, …) bool or integer, zero where a row is padding and is left out.
        scale: (*group, …) weight w ≥ 0 of each row: the row adds w·x xᵀ. A weight of zero leaves the row out.

    Rows with a non-finite value are dropped and counted. Nothing is copied to the host.
    The result depends on the order of the calls only through rounding of float64 sums.

    Raises:
        ValueError: shapes that do not fit; names them.
    """
    group, d = C.shape[:-2], C.shape[-1]
    if C.shape[-2] != d or x.shape[-1] != d or x.shape[: len(group)] != group or x.dim() < len(group) + 2:
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
    reference.covariance_update_(C, count, x, mask, scale)


def finalize(C: torch.Tensor) -> torch.Tensor:
    """Mirror the accumulated lower triangle of ``C`` (*group, d, d) upwards, in place; returns ``C``."""
    return reference.finalize(C)
