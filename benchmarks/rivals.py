"""LoRA as fused training kernels publish it, written for the comparison: "Unsloth-style" in the rows.

It stands for hand-written autograd functions with a trained A (Unsloth, axolotl's kernels): layers that read one x are
one function, and so is a gated MLP; x is saved whole and z = x Aᵀ made again; products are added in place in the
input's dtype. No line is theirs, and neither are their Triton kernels: the gate is torch's own SiLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, silu


def _forward(x: torch.Tensor, weights: Sequence[torch.Tensor], s: float) -> torch.Tensor:
    """(T, d_in) → (T, d_out), by W, A and B."""
    W, A, B = weights
    return linear(x, W).addmm_(x @ A.mT, B.mT, alpha=s)


def _backward(
    dy: torch.Tensor, x: torch.Tensor, weights: Sequence[torch.Tensor], s: float, dx: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, to which an earlier layer's is given, dA and dB."""
    W, A, B = weights
    dz = dy @ B
    dA = torch.addmm(A, dz.mT, x, beta=0, alpha=s)
    dB = torch.addmm(B, dy.mT, x @ A.mT, beta=0, alpha=s)
    dx = dy @ W if dx is None else dx.addmm_(dy, W)
    return dx.addmm_(dz, A, alpha=s), dA, dB


class Lora(torch.autograd.Function):
    """Layers that read one x: W, A and B of each, in turn."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, s: float, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.s = s
        ctx.save_for_backward(x, *weights)
        rows = x.reshape(-1, x.shape[-1])
        ys = [_forward(rows, weights[i : i + 3], s) for i in range(0, len(weights), 3)]
        return tuple(y.view(*x.shape[:-1], -1) for y in ys)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        dx: torch.Tensor | None = None
        grads: list[torch.Tensor | None] = []
        for i, dy in enumerate(dys):
            flat = dy.reshape(-1, dy.shape[-1])
            dx, dA, dB = _backward(flat, rows, weights[3 * i : 3 * i + 3], ctx.s, dx)
            grads += [None, dA, dB]
        assert dx is not None
        return dx.view_as(x), None, *grads


class GatedMlp(torch.autograd.Function):
    """down(silu(gate(x)) · up(x)): W, A and B of gate, up and down; what comes out of gate and up is saved, no more."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, s: float, *weights: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        gate, up = (_forward(rows, weights[i : i + 3], s) for i in (0, 3))
        ctx.s = s
        ctx.save_for_backward(x, gate, up, *weights)
        return _forward(silu(gate).mul_(up), weights[6:], s).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, gate, up, *weights = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        opened = silu(gate)
        dh, dA_down, dB_down = _backward(dy.reshape(-1, dy.shape[-1]), opened * up, weights[6:], ctx.s, None)
        d_up = opened.mul_(dh)
        d_gate = torch.ops.aten.silu_backward(dh.mul_(up), gate)
        dx, dA_up, dB_up = _backward(d_up, rows, weights[3:6], ctx.s, None)
        dx, dA_gate, dB_gate = _backward(d_gate, rows, weights[:3], ctx.s, dx)
        return dx.view_as(x), None, None, dA_gate, dB_gate, None, dA_up, dB_up, None, dA_down, dB_down


def _weights(layer: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W, A and B of PEFT's layer."""
    base = layer.get_base_layer()
    if base.bias is not None:
        raise ValueError("rivals: a base layer with a bias; these functions have none")
    return base.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight


class _Shared(nn.Module):
    """q, k and v in one function: called for q it makes all three and hands k and v to the calls that follow."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.scaling = float(layers[0].scaling["default"])
        self.waiting: list[torch.Tensor] = []

    def call(self, x: torch.Tensor, place: int) -> torch.Tensor:
        if place == 0:
            self.waiting = list(Lora.apply(x, self.scaling, *(w for layer in self.layers for w in _weights(layer))))
        return self.waiting.pop(0)


class _Part(nn.Module):
    def __init__(self, shared: _Shared, place: int) -> None:
        super().__init__()
        self.shared, self.place = shared, place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared.call(x, self.place)


class _Mlp(nn.Module):
    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.parts = nn.ModuleList([mlp.gate_proj, mlp.up_proj, mlp.down_proj])
        self.scaling = float(mlp.gate_proj.scaling["default"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = GatedMlp.apply(x, self.scaling, *(w for part in self.parts for w in _weights(part)))
        return y


def swap_in(layer: Any) -> None:
    """Put these functions into a Llama decoder layer whose seven linear layers are PEFT's, of one scaling."""
    attention = layer.self_attn
    shared = _Shared([attention.q_proj, attention.k_proj, attention.v_proj])
    for place, name in enumerate(("q_proj", "k_proj", "v_proj")):
        setattr(attention, name, _Part(shared, place))
    attention.o_proj = _Part(_Shared([attention.o_proj]), 0)
    layer.mlp = _Mlp(layer.mlp)
