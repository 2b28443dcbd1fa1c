"""A linear layer with a LoRA whose A is frozen: y = x Wᵀ + bias + s·(x Aᵀ) Bᵀ (KORE, arXiv 2510.19316, step 4).

W and A never change, so that backward has no use for x: it needs z = x Aᵀ, of r values a token, and nothing else.

    dz = s·dy B        dx = dy W + dz A        dB = s·dyᵀ z        dbias = Σ dy
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import linear

from kore_fast.ops.backends import Backend, choose, fastest

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Backends of the backward pass; the first where none is measured: below so many products of a token's and a weight's.
_BACKWARD = {("cpu", dtype): ("native", "reference") for dtype in (torch.float32, torch.float64)}
_BACKWARD |= {("cpu", dtype): ("reference", "native") for dtype in (torch.bfloat16, torch.float16)}
_WORTH_MEASURING = 1 << 26

_library = torch.library.Library("kore_fast", "FRAGMENT")
_OPTIONS = "float dropout, int seed, str backend"
_library.define(
    f"frozen_lora(Tensor x, Tensor W, Tensor A, Tensor B, Tensor? bias, float scaling, {_OPTIONS}) -> (Tensor, Tensor)"
)
# An empty bias stands for none: lists with None get no gradients.
_library.define(
    "frozen_lora_many(Tensor x, Tensor[] W, Tensor[] A, Tensor[] B, Tensor[] bias, float[] scaling, "
    f"{_OPTIONS}) -> Tensor[]"
)
_library.define(
    "frozen_lora_backward(Tensor[] dy, Tensor[] z, Tensor[] W, Tensor[] A, Tensor[] B, float[] scaling, bool dx, "
    f"bool dB, {_OPTIONS}) -> Tensor[]"
)


def frozen_lora(
    x: torch.Tensor,
    W: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
    seed: int | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """y = x Wᵀ + bias + scaling·(dropout(x) Aᵀ) Bᵀ, with gradients for x, B and bias.

    For backward it saves z = x Aᵀ, (…, r), beside the weights. Also `torch.ops.kore_fast.frozen_lora`, for graphs.

    Args:
        x: (…, d_in) float32, bfloat16, float16 or float64, any strides.
        W: (d_out, d_in) in x's dtype, frozen.
        A: (r, d_in) in x's dtype, frozen.
        B: (d_out, r), in x's dtype or a wider one (float32 beside a bfloat16 base); its gradient has B's dtype.
        bias: (d_out,) in x's dtype.
        scaling: s.
        dropout: probability at which an element of x is left out of the adapter's part; the others are divided by
            1 − dropout. The mask is made from ``seed``, in backward again, and never kept.
        seed: of the dropout; default a new one from torch's generator of the CPU.
        backend: ``"reference"`` (plain PyTorch), ``"native"`` (compiled), ``"triton"``, or ``"auto"``: forward the one
            that leaves y the base's bit for bit where B is 0, backward the fastest on this machine, see
            `kore_fast.ops.measured`.

    Under autocast all but B are cast to its dtype, as in `torch.nn.functional.linear`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; W or A that wants a gradient; a dropout outside [0, 1).
        BackendError: a backend that can't run here; says what to install.
    """
    x, (W,), (A,), (bias,) = _autocast(x, [W], [A], [bias])
    _check(x, [W], [A], [B], [bias], [scaling], dropout)
    seed = _seed(dropout, seed)
    # Operations with a gradient of their own are not for torch.func; its transforms take plain products apart.
    if torch._C._are_functorch_transforms_active():
        kept = _kept(x, dropout, seed)
        z = linear(x if kept is None else x * kept, A)
        return linear(x, W, bias) + scaling * linear(z, B.to(z.dtype))
    y: torch.Tensor = torch.ops.kore_fast.frozen_lora(x, W, A, B, bias, scaling, dropout, seed, backend)[0]
    return y


def frozen_lora_many(
    x: torch.Tensor,
    W: Sequence[torch.Tensor],
    A: Sequence[torch.Tensor],
    B: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None] | None = None,
    *,
    scaling: Sequence[float] | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    backend: Backend = "auto",
) -> list[torch.Tensor]:
    """`frozen_lora` of several layers that read one x (q, k, v; gate, up): one call, and one dx, their sum.

    Returns:
        y of each layer, (…, d_out).
    """
    bias = [None] * len(W) if bias is None else list(bias)
    scaling = [1.0] * len(W) if scaling is None else list(map(float, scaling))
    x, W, A, bias = _autocast(x, W, A, bias)
    _check(x, W, A, B, bias, scaling, dropout)
    seed = _seed(dropout, seed)
    given = [x.new_empty(0) if b is None else b for b in bias]
    found = torch.ops.kore_fast.frozen_lora_many(x, W, A, list(B), given, scaling, dropout, seed, backend)
    return list(found[: len(W)])


def _autocast(
    x: torch.Tensor, W: Sequence[torch.Tensor], A: Sequence[torch.Tensor], bias: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor], list[torch.Tensor | None]]:
    if not torch.is_autocast_enabled(x.device.type):
        return x, list(W), list(A), list(bias)
    dtype = torch.get_autocast_dtype(x.device.type)
    biases = [b if b is None else b.to(dtype) for b in bias]
    return x.to(dtype), [w.to(dtype) for w in W], [a.to(dtype) for a in A], biases


def _seed(dropout: float, seed: int | None) -> int:
    if dropout and seed is None:
        return int(torch.randint(2**62, ()).item())
    return seed or 0


def _check(
    x: torch.Tensor,
    W: Sequence[torch.Tensor],
    A: Sequence[torch.Tensor],
    B: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    scaling: Sequence[float],
    dropout: float,
) -> None:
    if not W or not len(W) == len(A) == len(B) == len(bias) == len(scaling):
        raise ValueError(
            f"frozen_lora: {len(W)} W, {len(A)} A, {len(B)} B, {len(bias)} bias and {len(scaling)} scaling; want one "
            "of each a layer"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"frozen_lora: dropout {dropout}, want 0 ≤ dropout < 1")
    if x.dim() < 1 or x.dtype not in _FLOATS:
        raise ValueError(f"frozen_lora: x {tuple(x.shape)} is {x.dtype}; want (…, d_in) in a floating dtype")
    d_in = x.shape[-1]
    for W_i, A_i, B_i, bias_i in zip(W, A, B, bias, strict=True):
        if W_i.dim() != 2 or W_i.shape[1] != d_in:
            raise ValueError(f"frozen_lora: W {tuple(W_i.shape)} does not fit x {tuple(x.shape)}: want (d_out, {d_in})")
        if A_i.dim() != 2 or A_i.shape[1] != d_in:
            raise ValueError(f"frozen_lora: A {tuple(A_i.shape)} does not fit x {tuple(x.shape)}: want (r, {d_in})")
        if B_i.shape != (W_i.shape[0], A_i.shape[0]):
            raise ValueError(
                f"frozen_lora: B has shape {tuple(B_i.shape)}, want (d_out, r) = {(W_i.shape[0], A_i.shape[0])}"
            )
        if bias_i is not None and bias_i.shape != (W_i.shape[0],):
            raise ValueError(f"frozen_lora: bias has shape {tuple(bias_i.shape)}, want ({W_i.shape[0]},)")
        for name, tensor in (("W", W_i), ("A", A_i), ("B", B_i), ("bias", bias_i)):
            if tensor is None:
                continue
            if tensor.device != x.device:
                raise ValueError(f"frozen_lora: {name} is on {tensor.device}, x on {x.device}")
            if name != "B" and tensor.dtype != x.dtype:
                raise ValueError(f"frozen_lora: {name} is {tensor.dtype}, x {x.dtype}; cast one of them")
            if name in ("W", "A") and tensor.requires_grad:
                raise ValueError(
                    f"frozen_lora: {name} requires a gradient, and gets none here: freeze it ({name}.requires_grad_("
                    "False)), or use an ordinary LoRA layer"
                )
        if B_i.dtype not in _FLOATS or torch.promote_types(B_i.dtype, x.dtype) != B_i.dtype:
            raise ValueError(f"frozen_lora: B is {B_i.dtype}, narrower than x ({x.dtype}); its sums would be rounded")


@torch.library.impl(_library, "frozen_lora_many", "CompositeExplicitAutograd")
def _forward_many(
    x: torch.Tensor,
    W: list[torch.Tensor],
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    bias: list[torch.Tensor],
    scaling: list[float],
    dropout: float,
    seed: int,
    backend: Backend,
) -> list[torch.Tensor]:
    """y of each layer, then z of each."""
    biases = [b if len(b) else None for b in bias]
    _check(x, [w.detach() for w in W], [a.detach() for a in A], B, biases, scaling, dropout)
    rows = x.reshape(-1, x.shape[-1])
    ys, zs = _forward_backend(backend, x).forward(rows, W, A, B, biases, scaling, _kept(rows, dropout, seed))
    # As a linear layer's output: of a view autograd would refuse to change it in place.
    return [torch.ops.aten._unsafe_view(part, [*x.shape[:-1], part.shape[-1]]) for part in (*ys, *zs)]


@torch.library.impl(_library, "frozen_lora", "CompositeExplicitAutograd")
def _forward(
    x: torch.Tensor,
    W: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    dropout: float,
    seed: int,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor]:
    y, z = _forward_many(
        x, [W], [A], [B], [x.new_empty(0) if bias is None else bias], [scaling], dropout, seed, backend
    )
    return y, z


@torch.library.impl(_library, "frozen_lora_backward", "CompositeExplicitAutograd")
def _backward(
    dy: list[torch.Tensor],
    z: list[torch.Tensor],
    W: list[torch.Tensor],
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: list[float],
    dx: bool,
    dB: bool,
    dropout: float,
    seed: int,
    backend: Backend,
) -> list[torch.Tensor]:
    """dx, where it is wanted, then dB of each layer, where they are."""
    lead, d_in = dy[0].shape[:-1], W[0].shape[1]
    flat = [part.reshape(-1, part.shape[-1]) for part in dy]
    kept = _kept(flat[0].new_empty(len(flat[0]), d_in), dropout, seed) if dx else None
    given = (flat, [part.reshape(-1, part.shape[-1]) for part in z], W, A, B, scaling, kept)
    # A GPU may get dz and dB of one read of dy. A CPU is bound by its products, and each has its own fastest way.
    apart = dx and dB and flat[0].device.type == "cpu"
    found: torch.Tensor | None = None
    dBs: list[torch.Tensor] = []
    for wanted in ((True, False), (False, True)) if apart else ((dx, dB),):
        part, more = _backward_backend(backend, *given, *wanted).backward(*given, *wanted)
        found, dBs = part if found is None else found, more or dBs
    return [*([] if found is None else [found.view(*lead, d_in)]), *dBs]


@torch.library.register_fake("kore_fast::frozen_lora")
def _(
    x: torch.Tensor,
    W: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    dropout: float,
    seed: int,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, [W.detach()], [A.detach()], [B], [bias], [scaling], dropout)
    return x.new_empty(*x.shape[:-1], W.shape[0]), x.new_empty(*x.shape[:-1], A.shape[0])


@torch.library.register_fake("kore_fast::frozen_lora_many")
def _(
    x: torch.Tensor,
    W: list[torch.Tensor],
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    bias: list[torch.Tensor],
    scaling: list[float],
    dropout: float,
    seed: int,
    backend: Backend,
) -> list[torch.Tensor]:
    return [x.new_empty(*x.shape[:-1], part.shape[0]) for part in (*W, *A)]


@torch.library.register_fake("kore_fast::frozen_lora_backward")
def _(
    dy: list[torch.Tensor],
    z: list[torch.Tensor],
    W: list[torch.Tensor],
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: list[float],
    dx: bool,
    dB: bool,
    dropout: float,
    seed: int,
    backend: Backend,
) -> list[torch.Tensor]:
    found = [dy[0].new_empty(*dy[0].shape[:-1], W[0].shape[1])] if dx else []
    return [*found, *(torch.empty_like(part, memory_format=torch.contiguous_format) for part in (B if dB else []))]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, W, A, B, _, ctx.scaling, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], W, A, B)


def _differentiate(ctx: Any, dy: torch.Tensor | None, _: torch.Tensor | None) -> tuple[Any, ...]:
    z, W, A, B = ctx.saved_tensors
    wants_x, _, _, wants_B, wants_bias = ctx.needs_input_grad[:5]
    dx, (dB,), (dbias,) = _gradients(
        [dy], [z], [W], [A], [B], [ctx.scaling], wants_x, [wants_B], [wants_bias], ctx.options
    )
    return dx, None, None, dB, dbias, None, None, None, None


def _setup_many(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    _, W, A, B, _, ctx.scaling, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[len(W) :], *W, *A, *B)


def _differentiate_many(ctx: Any, grads: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
    n = len(ctx.scaling)
    saved = ctx.saved_tensors  # once: an activation checkpoint gives them out one time only
    z, W, A, B = (list(saved[start : start + n]) for start in range(0, 4 * n, n))
    wants_x, _, _, wants_B, wants_bias = ctx.needs_input_grad[:5]
    dx, dB, dbias = _gradients(grads[:n], z, W, A, B, ctx.scaling, wants_x, wants_B, wants_bias, ctx.options)
    nothing: list[None] = [None] * n
    return dx, nothing, nothing, dB, dbias, None, None, None, None


def _gradients(
    dy: Sequence[torch.Tensor | None],
    z: Sequence[torch.Tensor],
    W: Sequence[torch.Tensor],
    A: Sequence[torch.Tensor],
    B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    wants_x: bool,
    wants_B: Sequence[bool],
    wants_bias: Sequence[bool],
    options: Sequence[Any],
) -> tuple[torch.Tensor | None, list[torch.Tensor | None], list[torch.Tensor | None]]:
    """Of x, of each B and of each bias; None where not wanted, or where an output was not used."""
    dx: torch.Tensor | None = None
    dB: list[torch.Tensor | None] = [None] * len(dy)
    dbias: list[torch.Tensor | None] = [None] * len(dy)
    used = [i for i, part in enumerate(dy) if part is not None]
    if used:
        lists = [[part[i] for i in used] for part in (dy, z, W, A, B, scaling)]
        parts = torch.ops.kore_fast.frozen_lora_backward(*lists, wants_x, any(wants_B), *options)
        dx, found = (parts[0], parts[1:]) if wants_x else (None, parts)
        for place, i in enumerate(used):
            part = dy[i]
            assert part is not None
            dB[i] = found[place] if wants_B[i] else None
            dbias[i] = part.sum(dim=tuple(range(part.dim() - 1))) if wants_bias[i] else None
    return dx, dB, dbias


torch.library.register_autograd("kore_fast::frozen_lora", _differentiate, setup_context=_setup)
torch.library.register_autograd("kore_fast::frozen_lora_many", _differentiate_many, setup_context=_setup_many)


def _kept(like: torch.Tensor, dropout: float, seed: int) -> torch.Tensor | None:
    """What each element of x is multiplied with: 0, or 1 / (1 − dropout); the same for the same seed."""
    if dropout == 0:
        return None
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.empty_like(like).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


def _forward_backend(backend: str, x: torch.Tensor) -> Any:
    # "auto" leaves the base's product to the vendor: where B is 0, y is then the base's bit for bit.
    return choose("frozen_lora", backend, x.device, ("reference",))


def _backward_backend(
    backend: str,
    dy: list[torch.Tensor],
    z: list[torch.Tensor],
    W: list[torch.Tensor],
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: list[float],
    kept: torch.Tensor | None,
    dx: bool,
    dB: bool,
) -> Any:
    """The one asked for; of "auto" the fastest here, measured where the work is worth it."""
    device, dtype, tokens = dy[0].device, dy[0].dtype, len(dy[0])
    preferred = _BACKWARD.get((device.type, dtype), ("reference", "native", "triton"))
    if backend != "auto" or tokens * sum(w.numel() for w in W) < _WORTH_MEASURING:
        return choose("frozen_lora", backend, device, preferred)
    layers = Counter(f"{w.shape[1]} → {w.shape[0]} r {len(a)}" for w, a in zip(W, A, strict=True))
    sizes = ", ".join(size if count == 1 else f"{count} times {size}" for size, count in layers.items())
    asked = " and ".join(name for name, wanted in (("dx", dx), ("dB", dB), ("dropout", kept is not None)) if wanted)
    # Of token counts that are alike, one stands for all.
    about = 1 << round(math.log2(tokens))
    kind = f"backward of {sizes} with {about} tokens, {dtype}, B {B[0].dtype}, {asked}"
    return fastest(
        "frozen_lora", kind, device, preferred, lambda it: it.backward(dy, z, W, A, B, scaling, kept, dx, dB)
    )
