"""Drives CMakeLists.txt with ninja; everything else is declared in pyproject.toml.

Environment:
    KORE_FAST_NATIVE  0: install pure Python. 1: a missing compiler is an error. Default: build where it can be built.
    KORE_FAST_CUDA    0: no CUDA library. 1: a missing nvcc is an error. Default: build it where nvcc is, but not for a
                      CPU build of torch, which could not load it.
    KORE_FAST_CUDA_ARCHITECTURES  as CMake's CUDA_ARCHITECTURES; default "80;90a-real".
    MAX_JOBS          compile jobs side by side; default: what cores and memory allow.

Nothing here imports torch, probes a GPU or asks the network: the torch to build against is found by its files.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# The stable ABI that csrc/ is written against.
OLDEST_TORCH = (2, 11)
MEMORY_PER_JOB = 2 << 30


def switch(name: str) -> bool | None:
    """An environment variable that is 0, 1 or not set."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}={value}: want 0 or 1, or leave it out")
    return {"": None, "0": False, "1": True}[value]


def torch_folder() -> Path | None:
    """The torch package to build against: the importable one or, where pip isolates the build, the one beside pip."""
    spec = find_spec("torch")
    found = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    found += [Path(sysconfig.get_path(key)) / "torch" for key in ("platlib", "purelib")]
    return next((folder for folder in found if (folder / "include" / "torch" / "csrc" / "stable").is_dir()), None)


def torch_version(folder: Path) -> str:
    """What torch/version.py says."""
    match = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text(encoding="utf-8"))
    return match.group(1) if match else "unknown"


def nvcc() -> Path | None:
    """The CUDA compiler, on the path or in the usual places."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    on_path = shutil.which("nvcc")
    return next((path for path in [*candidates, *([Path(on_path)] if on_path else [])] if path.exists()), None)


def compiler() -> str | None:
    """A C++ compiler."""
    names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def jobs() -> int:
    """Compile jobs that cores and memory bear: one of CUDA takes up to 2 GiB."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = 4 << 30
    if Path("/proc/meminfo").exists():
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
        memory = int(match.group(1)) << 10 if match else memory
    return max(1, min(cores, memory // MEMORY_PER_JOB))


def reason_not_to_build() -> str | None:
    """Why this install is pure Python; None if it is compiled."""
    native = switch("KORE_FAST_NATIVE")
    if native is False:
        return "KORE_FAST_NATIVE=0"
    folder = torch_folder()
    reason = None
    if folder is None:
        reason = "no torch of version 2.11 or later to build against; install torch first"
    elif tuple(int(n) for n in re.findall(r"\d+", torch_version(folder))[:2]) < OLDEST_TORCH:
        reason = f"torch {torch_version(folder)} is older than 2.11, whose stable ABI the native kernels use"
    elif compiler() is None:
        reason = "no C++ compiler (c++, g++ or clang++)"
    if reason and native:
        raise SystemExit(f"KORE_FAST_NATIVE=1, but {reason}")
    if reason and switch("KORE_FAST_CUDA"):
        raise SystemExit(f"KORE_FAST_CUDA=1, but {reason}")
    return reason


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt, and leaves the libraries in the package."""

    def run(self) -> None:
        """Build all, then say what was built."""
        folder = torch_folder()
        assert folder is not None
        wanted = switch("KORE_FAST_CUDA")
        if wanted is None:
            wanted = not torch_version(folder).endswith("+cpu")
        cuda = nvcc() if wanted else None
        if switch("KORE_FAST_CUDA") and cuda is None:
            raise SystemExit("KORE_FAST_CUDA=1, but there is no nvcc on the path, in CUDA_HOME or in /usr/local/cuda")
        package = ROOT / "kore_fast" if self.editable_mode or self.inplace else Path(self.build_lib) / "kore_fast"
        package.mkdir(parents=True, exist_ok=True)
        remove_libraries(package)
        # In the source tree, so that the next install compiles only what changed.
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}-torch{torch_version(folder)}"
        build.mkdir(parents=True, exist_ok=True)
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": package.resolve(),
            "Python_EXECUTABLE": sys.executable,
            "KORE_FAST_TORCH_DIR": folder,
            "KORE_FAST_TORCH_VERSION": torch_version(folder),
            "KORE_FAST_PYBIND11_INCLUDE": pybind11_include(folder),
            "KORE_FAST_CUDA": "ON" if cuda else "OFF",
        }
        if cuda:
            settings["CMAKE_CUDA_COMPILER"] = cuda
        if architectures := os.environ.get("KORE_FAST_CUDA_ARCHITECTURES"):
            settings["KORE_FAST_CUDA_ARCHITECTURES"] = architectures
        # A cache of another environment (pip's isolated ones come and go) names compilers that are gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja"]
        configure += [f"-D{key}={value}" for key, value in settings.items()]
        for command in (configure, ["cmake", "--build", build, "--parallel", str(jobs())]):
            try:
                subprocess.run([str(part) for part in command], check=True)
            except FileNotFoundError:
                raise SystemExit("cmake is missing; pip install cmake ninja, or KORE_FAST_NATIVE=0") from None
            except subprocess.CalledProcessError:
                hint = "KORE_FAST_CUDA=0 leaves CUDA out, " if cuda else ""
                raise SystemExit(
                    f"the native build failed, see above; {hint}KORE_FAST_NATIVE=0 installs pure Python"
                ) from None
        built = sorted(path.name for path in package.glob("_native*.so"))
        print(
            f"kore-fast: built {', '.join(built)} against torch {torch_version(folder)}"
            f"{f' with {cuda}' if cuda else ', without CUDA'}",
            flush=True,
        )

    def get_source_files(self) -> list[str]:
        """What a source distribution must hold."""
        return ["CMakeLists.txt", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.*")))]

    def get_outputs(self) -> list[str]:
        """The libraries that belong to the package."""
        return [str(path) for path in (Path(self.build_lib) / "kore_fast").glob("_native*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        """In an editable install the libraries are already where they belong."""
        return {}


class PureBuild(build_py):
    """Without native kernels: an editable install must not go on with those of an earlier one."""

    def run(self) -> None:
        """Take them away, then build."""
        if self.editable_mode:
            remove_libraries(ROOT / "kore_fast")
        super().run()


def remove_libraries(package: Path) -> None:
    """What an earlier build left: this one may be without CUDA, or without kernels at all."""
    for library in package.glob("_native*.so"):
        library.unlink()


def pybind11_include(torch: Path) -> Path:
    """Headers of pybind11: its own package, else the copy that torch ships."""
    spec = find_spec("pybind11")
    places = [Path(place) / "include" for place in (spec.submodule_search_locations or [])] if spec else []
    return next((place for place in places if (place / "pybind11").is_dir()), torch / "include")


reason = reason_not_to_build()
if reason:
    print(f"kore-fast: pure Python, no native kernels ({reason})", flush=True)
# Where torch is neither importable nor beside pip, pip fetches one into the isolated build.
fetch_torch = switch("KORE_FAST_NATIVE") is not False and torch_folder() is None
pure = bool(reason) and not fetch_torch
setup(
    ext_modules=[] if pure else [Extension("kore_fast._native", [])],
    cmdclass={"build_py": PureBuild} if pure else {"build_ext": CMakeBuild},
    setup_requires=["torch>=2.11"] if fetch_torch else [],
)
