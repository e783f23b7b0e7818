"""The system's C++ compiler: from a source to a loaded shared library, through the build cache."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from pathlib import Path

from ...errors import LoweringError
from .. import sources
from .isa import Isa

FLAGS = (
    "-std=c++17",
    "-O2",
    "-ftree-vectorize",
    # A product and a sum stay two roundings: results are defined to the last bit.
    "-ffp-contract=off",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-w",
)
_OPENMP = "-fopenmp"
_SHOWN_LINES = 5


@functools.cache
def find() -> tuple[str, str]:
    """(path, version) of the compiler: $CXX, g++ or clang++, whichever comes first.

    Raises:
        LoweringError: there is none.
    """
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path is not None:
            shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
            return path, (shown.stdout.splitlines() or [path])[0]
    raise LoweringError(
        "no C++ compiler: install g++ or clang++, or name one in the environment variable CXX"
    )


def library(source: str, tag: str, isa: Isa, extra: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The library of a source, built at most once a machine.

    Args:
        source: C++.
        tag: a few words for the file's name.
        isa: whose flags to compile with; nothing depends on the CPU that compiles.
        extra: flags that tests add.

    Raises:
        LoweringError: there is no compiler, it refuses the source, or building is forbidden.
    """
    path, version = find()
    flags = (*FLAGS, *isa.flags, *extra)
    depends = f"{version} {' '.join((_OPENMP, *flags))}"

    def builder(text: Path, out: Path) -> None:
        # Where a compiler comes without OpenMP, one thread is better than none.
        for threads in ((_OPENMP,), ()):
            command = [path, *flags, *threads, str(text), "-o", str(out)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return
        said = "\n".join(done.stderr.splitlines()[:_SHOWN_LINES])
        raise LoweringError(f"{path} cannot compile {text}:\n{said}")

    built = sources.build(source, ".cpp", tag, ".so", builder, depends)
    try:
        # After torch: both name OpenMP's library alike, so they share one pool of threads.
        return ctypes.CDLL(str(built))
    except OSError as error:
        raise LoweringError(f"cannot load {built}: {error}. Delete it to build it anew.") from error
