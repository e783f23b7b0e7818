"""What a machine has for the compiler, and what it lacks."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MixLLMError

if TYPE_CHECKING:
    from ..lowering.target import Target


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        state: "ok"; "missing" if the compiler does not work without it; else "none": it works, but
            something is not available.
        detail: the version or place, or what to do.
    """

    name: str
    state: str
    detail: str = ""


def checkup() -> list[Check]:
    """All checks, in the order in which a failure would matter."""
    return [
        *_versions(),
        _private_names(),
        _entry_point(),
        *_devices(),
        _triton(),
        _cuda_compiler(),
        *_tables(),
        _cpp_compiler(),
        _cpu_kernels(),
        _matplotlib(),
        _demo_model(),
        *_cache(),
        *_user_passes(),
    ]


def _versions() -> Iterator[Check]:
    import torch

    yield Check("mixllm-compiler", "ok", _version("mixllm-compiler"))
    yield Check("python", "ok", platform.python_version())
    yield Check("torch", "ok", torch.__version__)
    found = _version("transformers")
    yield Check("transformers", "ok" if found else "missing", found or "pip install transformers")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _private_names() -> Check:
    """Whether this torch has every private name that capture uses."""
    from .. import compat

    try:
        compat.self_test()
    except MixLLMError as error:
        return Check("torch's private interfaces", "missing", str(error))
    return Check("torch's private interfaces", "ok", "all that capture uses are there")


def _entry_point() -> Check:
    """Whether torch finds the backend by name, without an import of this package."""
    import torch

    name = 'torch.compile(backend="mixllm")'
    if "mixllm" in torch.compiler.list_backends():
        return Check(name, "ok", "registered")
    return Check(name, "missing", "torch does not know the backend; reinstall mixllm-compiler")


def _devices() -> Iterator[Check]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    isa = torch.backends.cpu.get_cpu_capability()
    yield Check("CPU", "ok", f"{cores} cores, torch uses {torch.get_num_threads()}, {isa}")
    if not torch.cuda.is_available():
        yield Check("CUDA", "none", "no CUDA device; models run on the CPU")
    for index in range(torch.cuda.device_count()):
        from ..lowering.target import Target

        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        yield Check(f"cuda:{index}", "ok", f"{Target.of(index)}, {memory:.0f} GiB")


def _triton() -> Check:
    try:
        import triton
    except ImportError:
        return Check("triton", "none", "not installed: no generated GPU kernels")
    return Check("triton", "ok", triton.__version__)


def _cuda_compiler() -> Check:
    from ..lowering.cuda import compiling

    found = compiling.available()
    if found is None:
        return Check("CUDA compiler", "none", compiling.missing())
    return Check("CUDA compiler", "ok", found)


def _tables() -> Iterator[Check]:
    """Where each GPU's fastest kernels are known from."""
    import torch

    from ..lowering.target import Target

    for index in range(torch.cuda.device_count()):
        target = Target.of(index)
        if target.at_least(8):
            yield kernel_table(target)


def kernel_table(target: Target) -> Check:
    """Which table of timings chooses the CUDA kernels of a GPU."""
    from .. import runtime  # noqa: F401  it says where this machine's tables are
    from ..lowering.cuda import timed

    name, shipped, path = f"fastest kernels, {target.name}", timed.shipped(target), None
    ships = f"{len(shipped)} problems timed before, shipped" if shipped else ""
    try:
        path = timed.path_of(target)
        mine = None if path is None else timed.read(path, target)
    except MixLLMError as error:
        return Check(name, "none", str(error))
    if mine is not None and mine.best:
        more = f", then {ships}" if ships else ""
        return Check(name, "ok", f"{len(mine.best)} problems timed here, {path}{more}")
    if ships:
        return Check(name, "ok", f"{ships}; `mixllm tune` times them on this machine")
    return Check(name, "none", "not timed, a cost model chooses; `mixllm tune` makes a table")


def _cpp_compiler() -> Check:
    """Inductor compiles C++ for the CPU."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path:
            shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
            return Check("C++ compiler", "ok", (shown.stdout.splitlines() or [path])[0])
    return Check(
        "C++ compiler",
        "none",
        "no g++ or clang++: on the CPU only options={'lower': 'eager'} works, and without kernels",
    )


def _cpu_kernels() -> Check:
    """Which instruction set the generated C++ kernels use."""
    from ..lowering.cpp import compiler, isa

    try:
        chosen, others = isa.current().name, [one.name for one in isa.available()]
        compiler.find()
    except MixLLMError as error:
        return Check(
            "CPU kernels", "none", f"{error} Until then linears run in plain torch, slowly."
        )
    return Check(
        "CPU kernels", "ok", f"{chosen} ({isa.OVERRIDE} chooses among {', '.join(others)})"
    )


def _matplotlib() -> Check:
    found = _version("matplotlib")
    missing = "not installed: no SVG plots (pip install 'mixllm-compiler[report]')"
    return Check("matplotlib", "ok" if found else "none", found or missing)


def _demo_model() -> Check:
    folder = Path(__file__).parents[1] / "demo" / "model"

    weights = folder / "model.safetensors"
    if weights.is_file():
        return Check("shipped model", "ok", f"{weights.stat().st_size / 1e6:.1f} MB")
    return Check("shipped model", "none", "not installed: `mixllm demo` does not work")


def _cache() -> Iterator[Check]:
    from ..runtime import build

    folder, entries = build.cache_dir(), build.status()
    size = sum(entry.size for entry in entries) / 1e6
    yield Check("build cache", "ok", f"{folder}: {len(entries)} files, {size:.1f} MB")
    if build.building_forbidden():
        yield Check("building kernels", "none", "MIXLLM_NO_BUILD forbids it")


def _user_passes() -> Iterator[Check]:
    from ..passes.registry import registered

    for registration in registered():
        place = f"after {registration.after}" if registration.after else "by name only"
        yield Check(f"pass {registration.name}", "ok", place)
