"""From a null space to the LoRA factors of a weight (KORE step 3), and how much a factor leaks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kore_fast.ops.dense import product


@dataclass(frozen=True)
class Factors:
    """B0·A = W0·Û·Ûᵀ, the part of a layer's weight that acts on the null space."""

    A: torch.Tensor
    """(r, d_in) float64: √Σ V*ᵀ."""
    B0: torch.Tensor | None
    """(d_out, r) float64: U* √Σ; None where it was not asked for."""


def nullspace_factors(weight: torch.Tensor, basis: torch.Tensor) -> Factors:
    """Thin-SVD factors of W0·P, P = ÛÛᵀ, without forming P: W0·Û = U*ΣQᵀ, V* = Û·Q (KORE step 3).

    Args:
        weight: W0 (d_out, d_in), any floating dtype; computed in float64.
        basis: Û (d_in, r), orthonormal columns.
    """
    return thin_factors([product(weight.detach().to(torch.float64), basis)], basis)[0]


def thin_factors(products: Sequence[torch.Tensor], basis: torch.Tensor, *, b0: bool = True) -> list[Factors]:
    """Factors of several layers that share one basis, from W0·Û of each.

    By QR of the product and the SVD of its r × r triangle, those of one size in a batch: singular values as accurate as
    the SVD's of the product (an error of ε·σ₁ in both), at a fraction of its time. By the Gram matrix (W0·Û)ᵀW0·Û the
    error would be ε·σ₁²/σ: no digit of a σ below 1e-8·σ₁ would be right.

    Args:
        products: W0·Û (d_out, r) float64; r may differ, then the first r columns of ``basis`` are meant.
        basis: Û (d_in, r), orthonormal columns.
        b0: whether B0 is wanted; A does not need the Q of the QR.
    """
    parts = [torch.linalg.qr(product, mode="reduced" if b0 else "r") for product in products]
    by_size: dict[torch.Size, list[int]] = {}
    for number, (_, triangle) in enumerate(parts):
        by_size.setdefault(triangle.shape, []).append(number)
    found: dict[int, Factors] = {}
    for numbers in by_size.values():
        batch = torch.linalg.svd(torch.stack([parts[number].R for number in numbers]), full_matrices=False)
        for number, U, S, Qh in zip(numbers, *batch, strict=True):
            root = S.sqrt()
            found[number] = Factors(
                A=root[:, None] * (Qh @ basis[:, : Qh.shape[1]].mT),
                B0=parts[number].Q @ (U * root) if b0 else None,
            )
    return [found[number] for number in range(len(products))]


def leak(A: torch.Tensor, C: torch.Tensor) -> float:
    """Leak of A (r, d) against C (d, d): tr(A C Aᵀ)·d / (‖A‖_F²·tr C), in float64."""
    A64, C64 = A.detach().to(torch.float64), C.to(torch.float64)
    scale = A64.square().sum() * C64.diagonal().sum()
    return float((product(A64, C64) * A64).sum() * C64.shape[0] / scale) if float(scale) > 0 else 0.0
