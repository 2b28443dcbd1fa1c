"""The Triton covariance kernels: compiled for every target, run in the interpreter, and on a GPU if there is one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kore_fast.ops.triton import covariance as backend
from kore_fast.ops.triton import device_kind, unavailable
from kore_fast.ops.triton.covariance import BAND, LOOK, NUMBER, Config, candidates, products

GPU = torch.device("cuda")
NO_GPU = unavailable(GPU)
needs_gpu = pytest.mark.skipif(NO_GPU is not None, reason=f"the kernels themselves: {NO_GPU}")
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def build(kernel: str, target: str, config: Config | None = None, num_warps: int = 4, **arguments: Any) -> Any:
    """One kernel for one target, of a call on 2 × 8192 rows of which a linear layer of width 4096 sees all but one."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'triton>=3.4'")
    from kore_fast.ops.triton import compile as ahead
    from kore_fast.ops.triton import covariance_kernels as kernels

    d, rows = 4096, 8191
    defaults = {
        "rows": 2 * rows,
        "d": d,
        "inner": rows,
        "tiles": 32,
        "start": 0,
        "x_group": 0,
        "x_outer": d * (rows + 1),
        "x_inner": d,
        "x_column": 1,
        "C_group": d * d,
        "C_row": d,
        "C_column": 1,
        "count_group": 3,
        "count_entry": 1,
        "state_ptr": torch.uint8,
        "mask_ptr": torch.uint8,
        "scale_ptr": torch.float64,
        "kept_ptr": torch.int32,
        "order_ptr": torch.int32,
        "count_ptr": torch.float64,
        "FLAT": False,
        "MASKED": True,
    }
    stages = {} if config is None else {"num_stages": config.stages}
    num_warps = num_warps if config is None else config.warps
    function = getattr(kernels, kernel)
    given = {name: value for name, value in {**defaults, **arguments}.items() if name in function.arg_names}
    try:
        return ahead.build(function, given, target, num_warps=num_warps, **stages)
    except Exception as error:
        if "linker" in str(error) and "lld" in str(error):
            pytest.skip(f"{target}: {error}")  # Triton 3.4 has none of its own
        raise


def build_update(
    target: str,
    dtype: torch.dtype,
    config: Config,
    weighted: bool = False,
    C: torch.dtype = torch.float64,
    **arguments: Any,
) -> Any:
    """The main kernel as it is launched for rows of ``dtype``."""
    tl = pytest.importorskip("triton.language", reason="Triton is not installed: pip install 'triton>=3.4'")
    how = products(dtype, weighted)
    weight = torch.float64 if dtype == torch.float64 else torch.float32
    return build(
        "update_kernel",
        target,
        config,
        C_ptr=C,
        x_ptr=dtype,
        weight_ptr=weight if weighted else None,
        WEIGHTED=weighted,
        PRODUCT=getattr(tl, how.product),
        TERMS=how.terms,
        ACCUMULATOR=getattr(tl, how.accumulator),
        TILE=config.tile,
        DEPTH=config.depth,
        CHUNK=how.chunk,
        SPAN=how.span,
        BAND=BAND,
        **arguments,
    )


def assert_fits(built: Any) -> None:
    from kore_fast.ops.triton.compile import SHARED_MEMORY

    assert built.spills == 0
    assert built.shared <= SHARED_MEMORY[built.target]


def shipped(dtype: torch.dtype, weighted: bool, target: str, aligned: bool = True) -> tuple[Config, ...]:
    return candidates(products(dtype, weighted), "sm_90" if target == "sm_100" else target, aligned)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_row_kernels_compile(target: str, weighted: bool) -> None:
    dtype = torch.float64 if weighted else torch.bfloat16
    given = {"WEIGHTED": weighted} if weighted else {"WEIGHTED": False, "scale_ptr": None}
    assert_fits(build("rows_kernel", target, x_ptr=dtype, ROWS=LOOK[0], COLUMNS=LOOK[1], **given))
    given["weight_ptr"] = dtype if weighted else None
    assert_fits(build("order_kernel", target, num_warps=8, ROWS=NUMBER, **given))


@pytest.mark.parametrize("target", TARGETS)
def test_low_precision_compiles_to_asynchronous_tensor_core_code(target: str) -> None:
    """No spills, shared memory that is there, and what the schedule counts on in the code of the largest tile."""
    built = [build_update(target, torch.bfloat16, config) for config in shipped(torch.bfloat16, False, target)[::2]]
    for one in built:
        assert_fits(one)
    code = built[0].assembly
    if target == "gfx942":
        assert re.search(r"v_mfma_f32_\w*bf16", code)
        return
    assert "cp.async.cg.shared.global" in code
    if target == "sm_80":
        assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in code
    if target == "sm_90":
        # Products of one block of rows run while the next is fetched; only a chunk's end waits for all.
        assert re.search(r"wgmma\.mma_async\S*m64n128k16\.f32\.bf16\.bf16", code)
        assert "wgmma.wait_group.sync.aligned \t1;" in code or "wgmma.wait_group.sync.aligned 1;" in code
    if target == "sm_100":
        assert "tcgen05.mma" in code


@pytest.mark.parametrize("target", TARGETS)
def test_weighted_rows_and_wide_types_compile(target: str) -> None:
    assert_fits(build_update(target, torch.bfloat16, shipped(torch.bfloat16, True, target)[0], weighted=True))
    single = build_update(target, torch.float32, shipped(torch.float32, False, target)[0])
    assert_fits(single)
    assert "tf32" not in single.assembly
    assert "xf32" not in single.assembly
    double = build_update(target, torch.float64, shipped(torch.float64, False, target)[0])
    assert_fits(double)
    assert re.search(r"mma\.sync\S*f64|v_mfma_f64", double.assembly)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_rows_that_are_not_aligned_compile(target: str, dtype: torch.dtype) -> None:
    config = shipped(dtype, False, target, aligned=False)[0]
    assert_fits(build_update(target, dtype, config, d=4095, x_inner=4095, x_outer=4095 * 8192, C_row=4095))


@pytest.mark.slow
@pytest.mark.parametrize("C", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_everything_shipped_compiles(target: str, dtype: torch.dtype, weighted: bool, C: torch.dtype) -> None:
    """Every configuration, with rows in one dimension and two, even and odd widths, columns side by side and apart."""
    layouts: list[dict[str, Any]] = [
        {},
        {"FLAT": True, "x_outer": 0},
        {"d": 4095, "x_inner": 4095, "C_row": 4095, "C_group": 4095**2, "x_outer": 4095 * 8192},
        {"FLAT": True, "x_outer": 0, "x_inner": 1, "x_column": 8192},
        {"x_group": 2**33, "x_outer": 2**32},
    ]
    for layout in layouts:
        for config in shipped(dtype, weighted, target, aligned=layout.get("d") != 4095 and "x_column" not in layout):
            assert_fits(build_update(target, dtype, config, weighted, C, **layout))


def test_rivals_add_in_one_order() -> None:
    """What is tuned must not change a sum: candidates of one kind share what decides the order of additions."""
    for target in TARGETS:
        for dtype in DTYPES:
            for weighted in (False, True):
                how = products(dtype, weighted)
                found = shipped(dtype, weighted, target)
                assert how.span % how.chunk == 0
                assert all(how.chunk % one.depth == 0 for one in found)
                assert how.terms == 1 or len({one.depth for one in found}) == 1
                assert [one.tile for one in found] == sorted((one.tile for one in found), reverse=True)


def test_small_widths_get_small_tiles() -> None:
    options = shipped(torch.bfloat16, False, "sm_90")
    assert [backend.by_rule(options, d, 1, 132).tile for d in (64, 512, 1024, 1536, 2048, 18944)] == [
        32,
        32,
        64,
        64,
        128,
        128,
    ]
    assert backend.by_rule(options, 1024, 8, 132).tile == 128


def test_arithmetic_in_the_interpreter() -> None:
    """`interpreted_covariance.py`, in a process that asks for the interpreter before it imports Triton."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'triton>=3.4'")
    here = Path(__file__)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--noconftest",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, str(here.with_name("interpreted_covariance.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=here.parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout)
    assert "skipped" not in done.stdout


def test_nothing_needs_triton_until_a_kernel_runs() -> None:
    code = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("not installed here: " + name)
sys.modules.pop("triton", None)
sys.meta_path.insert(0, Absent())
import importlib.util, torch
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find_spec(name, package)
import kore_fast.ops
from kore_fast.ops.triton import covariance
assert "pip install 'triton>=3.4'" in covariance.unavailable(torch.device("cpu"))
assert "pip install 'triton>=3.4'" in covariance.unavailable(torch.device("cuda"))
assert "triton" not in sys.modules
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_processor_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'triton>=3.4'")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "needs a GPU" in str(unavailable(torch.device("cpu")))
    assert "meta" in str(unavailable(torch.device("meta")))


def on_gpu(x: torch.Tensor, scale: torch.Tensor | None = None, C: Any = torch.float64) -> tuple[Any, Any]:
    d = x.shape[-1]
    sums, count = torch.zeros(d, d, dtype=C, device=GPU), torch.zeros(3, dtype=torch.float64, device=GPU)
    backend.covariance_update_(sums, count, x, None, scale)
    return sums.tril(), count


@needs_gpu
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("count", "d"), [(1, 3), (777, 200), (2049, 1003), (8192, 1536), (9000, 4096)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu_against_float64(dtype: torch.dtype, count: int, d: int, weighted: bool) -> None:
    """A second look at what the interpreter showed, bfloat16 included. Truncating tensor cores are allowed 1e-6."""
    torch.manual_seed(0)
    x = torch.randn(count + 1, d, device=GPU).to(dtype)[1:]
    x[count // 2, d // 2] = float("nan") if count > 1 else 1.0
    w = torch.rand(count, device=GPU, dtype=torch.float64) + 0.1 if weighted else None
    C, counted = on_gpu(x, w)
    keep = torch.isfinite(x).all(-1).double()
    rows = torch.where(keep[:, None] != 0, x, 0).double()
    exact = (rows * (keep if w is None else keep * w)[:, None]).T @ rows
    assert float((C - exact.tril()).abs().max()) <= (1e-13 if dtype == torch.float64 else 1e-6) * float(exact.max())
    assert counted.tolist() == pytest.approx(
        [float(keep.sum()), float((keep if w is None else keep * w).sum()), count - float(keep.sum())], rel=1e-12
    )


@needs_gpu
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu_every_rival_gives_the_same_bits(
    dtype: torch.dtype, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3000, 1104, device=GPU).to(dtype)
    w = torch.rand(3000, device=GPU, dtype=torch.float64) if weighted else None
    found = []
    for config in candidates(products(dtype, weighted), device_kind(GPU)[0])[:-1]:
        monkeypatch.setattr(backend, "_choose", lambda *_, config=config: config)
        found.append(on_gpu(x, w)[0])
    assert all(torch.equal(one, found[0]) for one in found)


@needs_gpu
def test_on_a_gpu_a_graph_captures_it() -> None:
    """A capture refuses whatever waits for the host."""
    x, mask = torch.randn(500, 256, device=GPU).bfloat16(), torch.rand(500, device=GPU) > 0.3
    C, count = torch.zeros(256, 256, dtype=torch.float64, device=GPU), torch.zeros(3, dtype=torch.float64, device=GPU)
    backend.covariance_update_(C, count, x, mask, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.covariance_update_(C, count, x, mask, None)
    once = C.tril().clone()
    graph.replay()
    assert torch.equal(C.tril(), 2 * once)
    assert int(count[0]) == 2 * int(mask.sum())


@needs_gpu
def test_on_a_gpu_more_than_2_to_the_31_elements() -> None:
    """Offsets in x past int32. (For C that would take a width of 46,341.)"""
    d, count = 18944, 120_000
    if torch.cuda.get_device_properties(GPU).total_memory < 24 << 30:
        pytest.skip("takes 10 GB")
    x = torch.zeros(count, d, device=GPU, dtype=torch.bfloat16)
    x[-1, :] = 1
    C, counted = on_gpu(x, C=torch.float32)
    assert torch.equal(C, torch.ones_like(C).tril())
    assert counted.tolist() == [count, count, 0]
