"""The instruction sets that kernels are generated for, and which of them this machine has."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import LoweringError, OptionError, nearest

OVERRIDE = "MIXLLM_ISA"
"""Environment variable that names the instruction set to use."""


@dataclass(frozen=True)
class Isa:
    """An instruction set.

    Attributes:
        name: as users write it.
        flags: of the compiler.
        needs: flags of /proc/cpuinfo.
        rows: 32-bit lanes of a vector, 0 for plain C++.
        registers: vector registers.
        tokens: most tokens of one kernel.
        vnni: whether four products of bytes are added in one instruction.
        looks_up: whether a lane can be looked up among 16.
    """

    name: str
    flags: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()
    rows: int = 0
    registers: int = 0
    tokens: int = 4
    vnni: bool = False
    looks_up: bool = False


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX2_NEEDS = frozenset({"avx2", "fma", "f16c"})
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
_AVX512_NEEDS = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"})

ISAS = {
    isa.name: isa
    for isa in (
        Isa(
            "avx512-vnni",
            (*_AVX2, *_AVX512),
            _AVX2_NEEDS | _AVX512_NEEDS,
            rows=16,
            registers=32,
            tokens=6,
            vnni=True,
            looks_up=True,
        ),
        Isa(
            "avx-vnni",
            (*_AVX2, "-mavxvnni"),
            _AVX2_NEEDS | {"avx_vnni"},
            rows=8,
            registers=16,
            tokens=6,
            vnni=True,
        ),
        Isa("avx2", _AVX2, _AVX2_NEEDS, rows=8, registers=16, tokens=5),
        Isa("plain"),
    )
}
"""All of them, best first."""


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What this machine's CPU can do, in the words of /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        # Not Linux: torch knows AVX2, and nothing about VNNI.
        if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
            return frozenset()
        return _AVX2_NEEDS if platform.machine().lower() in ("x86_64", "amd64") else frozenset()
    line = next((one for one in text.splitlines() if one.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def available() -> list[Isa]:
    """The instruction sets of this machine, best first."""
    return [isa for isa in ISAS.values() if isa.needs <= cpu_flags()]


def current() -> Isa:
    """The instruction set that kernels use: the best, unless `MIXLLM_ISA` names another.

    Raises:
        OptionError: it names none.
        LoweringError: it names one that this machine does not have.
    """
    return _forced[-1] if _forced else _chosen()


_forced: list[Isa] = []


@functools.cache
def _chosen() -> Isa:
    wanted = os.environ.get(OVERRIDE)
    return _named(wanted) if wanted else available()[0]


def _named(name: str) -> Isa:
    if name not in ISAS:
        raise OptionError(f"{OVERRIDE}={name} is no instruction set.{nearest(name, ISAS)}")
    isa = ISAS[name]
    if isa not in available():
        missing = ", ".join(sorted(isa.needs - cpu_flags()))
        raise LoweringError(f"{OVERRIDE}={name}: this CPU lacks {missing}. Unset {OVERRIDE}.")
    return isa


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Inside, `current` is this instruction set. Raises what `current` raises."""
    _forced.append(_named(name))
    try:
        yield
    finally:
        _forced.pop()
