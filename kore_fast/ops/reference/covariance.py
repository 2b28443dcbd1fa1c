"""Reference of `kore_fast.ops.covariance`: blocked products in the accumulator's own precision."""

from __future__ import annotations

import torch

# Blocks of rows bound the copy in the accumulator's dtype; panels of columns leave most of the upper triangle undone.
ROWS = 8192
PANEL = 256


def covariance_update_(
    C: torch.Tensor,
    count: torch.Tensor,
    x: torch.Tensor,
    mask: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> None:
    group, d = C.shape[:-2], C.shape[-1]
    if group:
        for index in range(group[0]):
            covariance_update_(
                C[index],
                count[index],
                x[index],
                None if mask is None else mask[index],
                None if scale is None else scale[index],
            )
        return
    rows = x.detach().reshape(-1, d)
    wanted = torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device)
    if mask is not None:
        wanted &= mask.reshape(-1)
    sound = torch.isfinite(rows).all(dim=-1)
    weights = None
    if scale is not None:
        weights = scale.reshape(-1)
        wanted &= weights != 0
        sound &= torch.isfinite(weights) & (weights > 0)
    keep = wanted & sound
    total = keep.sum() if weights is None else torch.where(keep, weights, torch.zeros_like(weights)).sum()
    count += torch.stack([keep.sum(), total, (wanted & ~sound).sum()]).to(count)
    weights = None if weights is None else weights.to(C.dtype)

    for start in range(0, rows.shape[0], ROWS):
        stop = start + ROWS
        block, kept = rows[start:stop], keep[start:stop]
        w = None if weights is None else weights[start:stop]
        if block.device.type == "cpu":
            # Selecting rows saves the product's time; on an accelerator it would wait for the host to learn the size.
            block, w = block[kept].to(C.dtype), None if w is None else w[kept]
        else:
            block = torch.where(kept[:, None], block, torch.zeros_like(block)).to(C.dtype)
        left = block if w is None else block * w[:, None]
        for a in range(0, d, PANEL):
            b = min(a + PANEL, d)
            C[a:b, :b].addmm_(left[:, a:b].T, block[:, :b])
