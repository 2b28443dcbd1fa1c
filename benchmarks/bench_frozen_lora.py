"""The frozen-A LoRA layer against the frozen linear layer alone and against LoRA as others run it: `make bench`.

Of one layer and of a whole decoder block: forward, backward, their sum, what is saved for backward and the peak of
memory. `of_floor` of a row is its time in multiples of the time without an adapter × (1 + 2 r/d), where d is square;
in a block, of the share that the adapters' products have in those of its linear layers. A row's error is the largest
of y, dx and dB against float64, as a multiple of what plain PyTorch's products in the same dtype err by; ours is
asserted to be at most 2. `--rows=DIR` writes the rows, `python benchmarks/plot.py DIR` draws them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn
from torch.nn.functional import linear

from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.rivals import Lora, swap_in
from kore_fast.ops import frozen_lora

GPU = torch.cuda.is_available()
DTYPES = [pytest.param(torch.float32, marks=pytest.mark.slow) if GPU else torch.float32, torch.bfloat16]
OURS, ALONE, BASE, COMPILED = "ours", "frozen linear alone", "base alone", "PEFT, A frozen, torch.compile"
# Tokens, width, rank.
CASES = (
    [(8192, 4096, r) for r in (16, 64, 128, 235, 256, 512)] + [(t, 4096, 256) for t in (512, 2048, 16384)]
    if GPU
    else [(2048, 2048, 128), (2048, 576, 32), (2048, 576, 27), (512, 2048, 128)]
)
SLOW = [] if GPU else [(4096, 4096, 256), (4096, 4096, 235)]
WIDTH = 4096 if GPU else 1024
RANKS, RAGGED, TOKENS = [16, 32, 64, 128, 256, 512], [27, 235, 274], [512, 1024, 2048, 4096, 8192, 16384]
# Lines over ranks and over tokens go through this point; a GPU also measures the others, where compiling would take
# longer than all the rest.
CROSS = (8192, 256) if GPU else (2048, 128)
SWEEP = [(T, WIDTH, r) for T in TOKENS for r in RANKS if GPU or CROSS[0] == T or CROSS[1] == r]
SWEEP += [(CROSS[0], WIDTH, r) for r in RAGGED]


@dataclass
class Pass:
    """Forward and backward of one variant, each to be timed alone."""

    call: Callable[[torch.Tensor], torch.Tensor]
    x: torch.Tensor
    dy: torch.Tensor
    trained: Mapping[str, torch.Tensor]
    y: torch.Tensor | None = None

    def forward(self) -> None:
        self.y = self.call(self.x)

    def backward(self) -> dict[str, torch.Tensor]:
        y, self.y = self.y, None
        assert y is not None
        found = torch.autograd.grad(y, [self.x, *self.trained.values()], self.dy)
        return dict(zip(["x", *self.trained], found, strict=True))

    def both(self) -> None:
        self.forward()
        self.backward()

    def weights(self) -> list[torch.Tensor]:
        """What is there however often it runs."""
        if isinstance(self.call, nn.Module):
            return [*self.call.parameters(), *self.call.buffers()]
        cells = [cell.cell_contents for cell in getattr(self.call, "__closure__", None) or ()]
        return [*self.trained.values(), *(cell for cell in cells if isinstance(cell, torch.Tensor))]

    def everything(self) -> dict[str, torch.Tensor]:
        """y and the gradients by name."""
        self.forward()
        assert self.y is not None
        return {"y": self.y.detach(), **self.backward()}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def error(found: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Relative errors of y, dx and, all together, dB."""

    def ratio(names: list[str]) -> float:
        wrong = sum(float((found[name].double() - exact[name]).square().sum()) for name in names)
        return float((wrong / sum(float(exact[name].square().sum()) for name in names)) ** 0.5)

    return {"y": ratio(["y"]), "x": ratio(["x"]), "B": ratio([name for name in exact if name.startswith("B")])}


def errors(passes: Mapping[str, Pass], exact: Pass, plain: Pass) -> dict[str, dict[str, Any]]:
    """What each variant with an adapter errs by, as a multiple of ``plain``; a row's extra."""
    truth = exact.everything()
    allowed = error(plain.everything(), truth)
    found = {}
    for name, one in passes.items():
        if one.trained:
            worst = max(value / allowed[key] for key, value in error(one.everything(), truth).items())
            found[name] = {"error": round(worst, 3)}
    for name, row in found.items():
        assert not name.startswith(OURS) or row["error"] <= 2, (name, row)
    return found


def compiled(call: Callable[[torch.Tensor], torch.Tensor], like: Pass) -> Pass | str:
    """The pass with ``torch.compile``, compiled; or why it can't be."""
    made = Pass(torch.compile(call, dynamic=False), like.x, like.dy, like.trained)
    try:
        made.both()
    # Whatever the machine lacks (a compiler of C++, its headers): the row says so, and the rest is measured.
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
    return made


def measure_memory(
    record: Callable[[dict[str, Any]], None], passes: Mapping[str, Pass], case: dict[str, Any], device: torch.device
) -> None:
    """Rows of what is saved for backward and of the peak of forward and backward, in bytes."""
    found: dict[str, dict[str, dict[str, Any]]] = {"saved for backward": {}, "peak memory": {}}
    for name, one in passes.items():
        saved = saved_bytes(one.forward, one.weights())
        one.backward()
        peak = peak_bytes(one.both, device)
        found["saved for backward"][name] = {"bytes": saved}
        found["peak memory"][name] = {"bytes": peak.allocated}
        if peak.resident is not None:
            found["peak memory"][name]["resident_bytes"] = peak.resident
    for what, rows in found.items():
        for name, row in rows.items():
            ratio = round(row["bytes"] / rows[OURS]["bytes"], 3)
            record({"variant": name, **case, "what": what, **row, "ratio": ratio})


def layer_passes(
    T: int, d: int, r: int, dtype: torch.dtype, device: torch.device, *, compiling: bool
) -> tuple[dict[str, Pass], Pass, str | None]:
    """Variants of a square layer with the same weights; the layer in float64; why `torch.compile` is not among them."""
    from peft import LoraConfig, get_peft_model

    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    x, dy = randn(T, d).to(dtype).requires_grad_(), randn(T, d).to(dtype)
    W, A, B = (randn(d, d) / d**0.5).to(dtype), (randn(r, d) / d**0.5).to(dtype), randn(d, r).to(dtype)

    def peft(*, train_a: bool, adapter: torch.dtype = dtype) -> Pass:
        base = nn.Linear(d, d, bias=False, device="meta", dtype=dtype)
        base.weight = nn.Parameter(W, requires_grad=False)
        config = LoraConfig(r=r, lora_alpha=r, target_modules=["0"])
        model = get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False)
        layer = model.base_model.model[0]
        layer.lora_A["default"].weight = nn.Parameter(A.to(adapter, copy=True), requires_grad=train_a)
        layer.lora_B["default"].weight = nn.Parameter(B.to(adapter, copy=True))
        trained = {"A": layer.lora_A["default"].weight} if train_a else {}
        return Pass(layer, x, dy, {**trained, "B": layer.lora_B["default"].weight})

    def ours(B: torch.Tensor, **options: Any) -> Pass:
        return Pass(lambda x: frozen_lora(x, W, A, B, **options), x, dy, {"B": B})

    def trained(tensor: torch.Tensor, dtype: torch.dtype = dtype) -> torch.Tensor:
        return tensor.to(dtype, copy=True).requires_grad_()

    fused_A, fused_B = trained(A), trained(B)
    found = {
        OURS: ours(trained(B)),
        ALONE: Pass(lambda x: linear(x, W), x, dy, {}),
        "plain products": ours(trained(B), backend="reference"),
        "PEFT LoRA": peft(train_a=True),
        "PEFT, A frozen": peft(train_a=False),
        "Unsloth-style": Pass(
            lambda x: Lora.apply(x, 1.0, W, fused_A, fused_B)[0], x, dy, {"A": fused_A, "B": fused_B}
        ),
    }
    if device.type == "cuda":
        found |= {f"ours, {name}": ours(trained(B), backend=name) for name in ("native", "triton")}
    if dtype != torch.float32:
        found["ours, float32 B"] = ours(trained(B, torch.float32))
        found["PEFT's default, float32 adapter"] = peft(train_a=True, adapter=torch.float32)
    wide = [tensor.double() for tensor in (x.detach(), dy, W, A, B)]
    exact_B = wide[4].requires_grad_()
    exact = Pass(
        lambda x: linear(x, wide[2]) + linear(linear(x, wide[3]), exact_B),
        wide[0].requires_grad_(),
        wide[1],
        {"B": exact_B},
    )
    why = None
    if compiling:
        torch._dynamo.reset()
        like = peft(train_a=False)
        made = compiled(like.call, like)
        if isinstance(made, Pass):
            found[COMPILED] = made
        else:
            why = made
    return found, exact, why


def add_to(benchmark: BenchmarkFixture, rows: Mapping[str, dict[str, Any]]) -> None:
    benchmark.extra_info.update({name: row["ratio"] for name, row in rows.items()})
    benchmark.extra_info["ours as a multiple of the floor"] = rows[OURS]["of_floor"]


def run_layer(
    benchmark: BenchmarkFixture,
    compare_passes: Any,
    case: dict[str, Any],
    passes: Mapping[str, Pass],
    exact: Pass,
) -> None:
    extra = errors(passes, exact, passes["PEFT, A frozen"])
    calls = {name: (one.forward, one.backward) for name, one in passes.items()}
    share = 2 * case["rank"] / case["d"]
    work = case["tokens"] * case["d"] ** 2
    rounds = 15 if GPU else 3 if work > 1 << 33 else 5 if work > 1 << 32 else 9
    rows = compare_passes(calls, case, ours=OURS, base=ALONE, adapter_share=share, rounds=rounds, extra=extra)
    add_to(benchmark, rows)
    benchmark.pedantic(passes[OURS].both, rounds=1)


@pytest.mark.parametrize(("T", "d", "r"), CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def bench_layer(
    benchmark: BenchmarkFixture, compare_passes: Any, record: Any, device: torch.device, T: int, d: int, r: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    passes, exact, why = layer_passes(T, d, r, dtype, device, compiling=not GPU or (CROSS[0] == T and r >= 235))
    case = {"part": "layer", "tokens": T, "d": d, "rank": r, "dtype": name_of(dtype)}
    run_layer(benchmark, compare_passes, case, passes, exact)
    if why is not None:
        record({"variant": COMPILED, **case, "not_run": why})
    measure_memory(record, passes, case, device)


@pytest.mark.slow
@pytest.mark.parametrize(("T", "d", "r"), SWEEP)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def bench_sweep(
    benchmark: BenchmarkFixture, compare_passes: Any, record: Any, device: torch.device, T: int, d: int, r: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Ranks × tokens at one width."""
    passes, exact, why = layer_passes(T, d, r, dtype, device, compiling=CROSS[0] == T or CROSS[1] == r)
    case = {"part": "sweep", "tokens": T, "d": d, "rank": r, "dtype": name_of(dtype)}
    run_layer(benchmark, compare_passes, case, passes, exact)
    if why is not None:
        record({"variant": COMPILED, **case, "not_run": why})


@dataclass(frozen=True)
class Shape:
    """Of a decoder block and of what goes through it."""

    d: int
    mlp: int
    heads: int
    kv_heads: int
    rank: int
    rows: int
    length: int


TINY, MEDIUM = Shape(576, 1536, 9, 3, 53, 4, 256), Shape(2048, 5504, 16, 16, 128, 1, 512)
BLOCKS = (
    [Shape(4096, 11008, 32, 32, r, 4, 2048) for r in (256, 235)]
    if GPU
    else [TINY, pytest.param(MEDIUM, marks=pytest.mark.slow)]
)


_ONE_INPUT = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]


class Block(nn.Module):
    """A Llama decoder layer as a function of hidden states (rows, length, d) alone."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        config = LlamaConfig(
            hidden_size=shape.d,
            intermediate_size=shape.mlp,
            num_hidden_layers=1,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            vocab_size=32,
            attn_implementation="sdpa",
        )
        self.layer = LlamaDecoderLayer(config, 0)
        turned = LlamaRotaryEmbedding(config)(torch.empty(0), torch.arange(shape.length)[None])
        self.cos: torch.Tensor
        self.sin: torch.Tensor
        self.register_buffer("cos", turned[0])
        self.register_buffer("sin", turned[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        y = self.layer(x, attention_mask=None, position_embeddings=(self.cos[:, :n], self.sin[:, :n]))
        return y[0] if isinstance(y, tuple) else y


def block_passes(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Pass], dict[str, Pass], Pass, float, str | None]:
    """Variants of a block with the same weights, those of fewer tokens for the comparison with float64, the block in
    float64, the adapters' share of the products, why `torch.compile` is not among them."""
    from peft import LoraConfig, get_peft_model

    from kore_fast.modules.adapter import freeze_lora_a, lora_layers
    from kore_fast.modules.lora import use_kore_layers
    from kore_fast.modules.shared_input import share_inputs

    torch.manual_seed(0)
    base = Block(shape).to(device, dtype).eval().requires_grad_(False)
    linears = {name: part for name, part in base.named_modules() if isinstance(part, nn.Linear)}
    r = shape.rank
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    adapters = {
        name: (
            (randn(r, part.in_features) / part.in_features**0.5).to(dtype),
            (0.02 * randn(part.out_features, r)).to(dtype),
        )
        for name, part in linears.items()
    }
    x = randn(shape.rows, shape.length, shape.d).to(dtype).requires_grad_()
    dy = randn(shape.rows, shape.length, shape.d).to(dtype)

    def shared() -> Block:
        """The block once more, its weights the same memory."""
        return copy.deepcopy(base, {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})

    def adapted(
        block: Block, *, ours: bool = False, train_a: bool = False, adapter: torch.dtype = dtype
    ) -> tuple[Block, dict[str, torch.Tensor]]:
        config = LoraConfig(r=r, lora_alpha=r, target_modules=[name.rpartition(".")[2] for name in linears])
        model = get_peft_model(block, use_kore_layers(config) if ours else config, autocast_adapter_dtype=False)
        trained = {}
        for name, (A, B) in adapters.items():
            layer: Any = block.get_submodule(name)
            layer.lora_A["default"].weight = nn.Parameter(A.to(adapter, copy=True))
            layer.lora_B["default"].weight = nn.Parameter(B.to(adapter, copy=True))
            if train_a:
                trained[f"A of {name}"] = layer.lora_A["default"].weight
            trained[f"B of {name}"] = layer.lora_B["default"].weight
        if not train_a:
            freeze_lora_a(model)
        if ours:  # as get_kore_model does, which knows from the covariances what shares an input
            share_inputs(lora_layers(model), [[name for name in linears if name.endswith(ends)] for ends in _ONE_INPUT])
        return block, trained

    made: dict[str, tuple[Block, dict[str, torch.Tensor]]] = {
        OURS: adapted(shared(), ours=True),
        BASE: (base, {}),
        "PEFT LoRA": adapted(shared(), train_a=True),
        "PEFT, A frozen": adapted(shared()),
        "Unsloth-style": adapted(shared(), train_a=True),
    }
    swap_in(made["Unsloth-style"][0].layer)
    if dtype != torch.float32:
        made["ours, float32 B"] = adapted(shared(), ours=True, adapter=torch.float32)
        made["PEFT's default, float32 adapter"] = adapted(shared(), train_a=True, adapter=torch.float32)
    passes = {name: Pass(block, x, dy, trained) for name, (block, trained) in made.items()}
    # One row of a few hundred tokens: attention in float64 keeps its scores whole.
    few_x, few_dy = x.detach()[:1, :256].clone().requires_grad_(), dy[:1, :256].contiguous()
    few = {name: Pass(block, few_x, few_dy, trained) for name, (block, trained) in made.items()}
    exact_block, exact_trained = adapted(copy.deepcopy(base).double(), adapter=torch.float64)
    exact = Pass(exact_block, few_x.detach().double().requires_grad_(), few_dy.double(), exact_trained)

    torch._dynamo.reset()
    why = None
    for name, ours in ((COMPILED, False), ("ours, torch.compile", True)):
        alone, trained = adapted(shared(), ours=ours)
        found = compiled(alone, Pass(alone, x, dy, trained))
        if isinstance(found, Pass):
            passes[name] = found
        else:
            why = found
    weights = sum(part.in_features * part.out_features for part in linears.values())
    share = sum(r * (part.in_features + part.out_features) for part in linears.values()) / weights
    return passes, few, exact, share, why


@pytest.mark.parametrize("shape", BLOCKS, ids=lambda shape: f"{shape.d}-{shape.mlp}-{shape.rank}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def bench_block(
    benchmark: BenchmarkFixture,
    compare_passes: Any,
    record: Any,
    device: torch.device,
    shape: Shape,
    dtype: torch.dtype,
) -> None:
    """A Llama decoder layer with adapters on all seven linear layers."""
    passes, few, exact, share, why = block_passes(shape, dtype, device)
    extra = errors(few, exact, few["PEFT, A frozen"])
    for one in passes.values():
        one.both()
    case = {"part": "block", "tokens": shape.rows * shape.length, "d": shape.d, "mlp": shape.mlp}
    case |= {"rank": shape.rank, "dtype": name_of(dtype)}
    calls = {name: (one.forward, one.backward) for name, one in passes.items()}
    rows = compare_passes(
        calls, case, ours=OURS, base=BASE, adapter_share=share, rounds=5 if shape.d > 576 else 9, extra=extra
    )
    if why is not None:
        record({"variant": COMPILED, **case, "not_run": why})
    add_to(benchmark, rows)

    measure_memory(record, passes, case, device)
    benchmark.pedantic(passes[OURS].both, rounds=1)


MODEL = Path(__file__).resolve().parents[1] / "build" / "tiny_vlm"


@pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="no build/tiny_vlm: run make quickstart first")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_training_step(benchmark: BenchmarkFixture, compare: Any, device: torch.device, dtype: torch.dtype) -> None:
    """A step of the tiny VLM (forward, backward, AdamW) on text: our layers against PEFT's, of the same rank."""
    from peft import LoraConfig, get_peft_model

    from kore_fast.constraint.selection import select_linears, target_pattern
    from kore_fast.modules.adapter import freeze_lora_a, lora_layers
    from kore_fast.modules.loading import load_model
    from kore_fast.modules.lora import use_kore_layers
    from kore_fast.modules.shared_input import share_inputs

    rank, rows, length = 53, 4, 256
    ids = torch.randint(1000, 40000, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def step(ours: bool) -> Callable[[], None]:
        model = load_model(MODEL, dtype).to(device)
        names = [name for name, _ in model.named_modules()]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=target_pattern(select_linears(model, None), names))
        peft_model = get_peft_model(model, use_kore_layers(config) if ours else config)
        if ours:
            freeze_lora_a(peft_model)
            layers = lora_layers(peft_model)
            parents = sorted({name.rpartition(".")[0] for name in layers})
            share_inputs(layers, [[f"{parent}.{end}" for end in ends] for parent in parents for ends in _ONE_INPUT])
        optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], weight_decay=0.0)

        def run() -> None:
            peft_model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    case = {"part": "tiny VLM", "tokens": rows * length, "rank": rank, "dtype": name_of(dtype), "what": "training step"}
    calls = {"ours": step(True), "PEFT LoRA": step(False)}
    rows_of = compare(calls, case, ours="ours", rounds=7)
    benchmark.extra_info.update({name: row["ratio"] for name, row in rows_of.items()})
    benchmark.pedantic(calls["ours"], rounds=1)
