"""CUDA source to machine code: NVRTC through cuda-core, or nvcc where that is not installed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from ...errors import LoweringError
from .. import sources

_STANDARD = "c++17"
_SERIALIZED = re.compile(r"C75(?:0[89]|1\d)\b.*")
"""What ptxas says when it gives up asynchronous matrix instructions or a register split."""


def cubin(source: str, tag: str, architecture: str) -> Path:
    """The file of the machine code of `source`, from the build cache or compiled now.

    Args:
        source: CUDA C++ that includes nothing.
        tag: a few words for the file's name.
        architecture: `"sm_90a"`.

    Raises:
        LoweringError: there is no compiler, or it refused the source.
    """
    compiler = available()
    if compiler is None:
        raise LoweringError(missing())
    builder = _with_nvrtc if compiler.startswith("nvrtc") else _with_nvcc

    def build(text: Path, product: Path) -> None:
        product.write_bytes(builder(text, architecture))

    return sources.build(source, ".cu", tag, ".cubin", build, f"{compiler} {architecture}")


@functools.cache
def available() -> str | None:
    """Name and version of the compiler that is used, None if there is none."""
    return _nvrtc_version() or _nvcc_version()


def missing() -> str:
    """What to do where there is no compiler."""
    return (
        "no CUDA compiler: install the extra 'cuda' (cuda-core calls the NVRTC that torch's CUDA "
        "builds bring), or put nvcc into PATH"
    )


def _nvrtc_version() -> str | None:
    if importlib.util.find_spec("cuda") is None:
        return None
    try:
        if importlib.util.find_spec("cuda.core") is None:
            return None
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        error, major, minor = nvrtc.nvrtcVersion()
    except Exception:  # noqa: BLE001  a package without its library raises what it likes
        return None
    return None if int(error) else f"nvrtc {major}.{minor}"


def _nvcc_version() -> str | None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    found = re.search(r"V(\d+\.\d+\.\d+)", done.stdout)
    return f"nvcc {found[1]}" if found else None


def _with_nvrtc(source: Path, architecture: str) -> bytes:
    core: Any
    try:
        core = importlib.import_module("cuda.core")
        program = core.Program
    except (ImportError, AttributeError):  # before its version 0.5
        core = importlib.import_module("cuda.core.experimental")
        program = core.Program
    options = core.ProgramOptions(
        arch=architecture, std=_STANDARD, device_as_default_execution_space=True
    )
    try:
        made = program(source.read_text(encoding="utf-8"), "c++", options).compile("cubin")
    except Exception as error:
        raise LoweringError(f"NVRTC refused {source}: {error}") from error
    return bytes(made.code)


def _with_nvcc(source: Path, architecture: str) -> bytes:
    return compile_with_nvcc(source, architecture)[0]


def compile_with_nvcc(source: Path, architecture: str) -> tuple[bytes, str]:
    """Machine code of a file, and what ptxas reports: registers, spills.

    Raises:
        LoweringError: nvcc refused it, or ptxas serialized matrix instructions.
    """
    number = architecture.removeprefix("sm_")
    product = source.with_suffix(".nvcc.tmp")
    command = ["nvcc", f"-std={_STANDARD}", "-O3", "-cubin", "-Xptxas", "-v", str(source)]
    command += [f"-gencode=arch=compute_{number},code=sm_{number}", "-o", str(product)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise LoweringError(f"nvcc refused {source}: {done.stderr.strip()[-2000:]}")
        serialized = _SERIALIZED.search(done.stderr)
        if serialized:
            raise LoweringError(f"ptxas, {source}: {serialized[0]}")
        return product.read_bytes(), done.stderr
    finally:
        product.unlink(missing_ok=True)
