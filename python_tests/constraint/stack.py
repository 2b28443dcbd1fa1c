"""The model of tests that also run as processes of their own: on two ranks, or to be killed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import kore_fast

# A script finds neither the package nor this module by itself.
PYTHONPATH = ":".join(str(path) for path in (Path(kore_fast.__file__).parents[1], Path(__file__).parents[2]))


class Block(nn.Module):
    def __init__(self, d: int, inner: int) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(d, inner), nn.Linear(d, inner), nn.Linear(inner, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.c(self.a(x).relu() * self.b(x))


class Stack(nn.Module):
    """Three blocks, two distinct inputs in each, of widths 12 and 20."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList([Block(12, 20) for _ in range(3)])

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def sharded(model: Stack) -> nn.Module:
    """The model under FSDP2, over two ranks on CPUs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)
