"""What a generated kernel is: three kinds of options, kept apart, and their text.

    layout     changes the packed bytes that the kernel reads
    numerics   changes results
    schedule   changes time only

No spec names M, N or K: they are arguments of the kernel, so a model needs few kernels. The same
spec gives the same source.
"""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import dataclass

import torch

from ..errors import OptionError
from ..formats.layout import Layout
from ..formats.row_format import WIDTHS
from ..ir.ops import MODES

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
"""Names of the float types that enter and leave kernels."""


def dtype_name(dtype: torch.dtype) -> str:
    """`"bfloat16"` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class BlobLayout:
    """Which packed bytes a kernel reads: the part of a `Layout` that is not a shape."""

    packing: str
    family: str
    group: int
    widths: tuple[int, ...]

    @classmethod
    def of(cls, layout: Layout) -> BlobLayout:
        widths = tuple(bits for bits, _ in layout.widths)
        return cls(layout.packing, layout.family, layout.group, widths)

    def __str__(self) -> str:
        widths = " ".join(f"w{b}" for b in self.widths)
        return f"{self.packing} {self.family} g{self.group} {widths}"


@dataclass(frozen=True)
class Numerics:
    """What a linear computes: the activations' mode, its output's type, whether it adds a bias."""

    mode: str
    out: torch.dtype
    bias: bool

    def __post_init__(self) -> None:
        _check(self.mode, self.out)

    def __str__(self) -> str:
        return f"{self.mode} {dtype_name(self.out)}{' bias' if self.bias else ''}"


@dataclass(frozen=True)
class Bucket:
    """How to run one range of M.

    Attributes:
        block_m: tokens of a program. A table's bucket serves M up to this; the last serves any M.
        rows: packed rows of a program, at most a tile.
        split: groups along K that a program works on side by side.
        warps: warps of a program.
        stages: depth of the pipeline that loads groups ahead.
    """

    block_m: int
    rows: int
    split: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"m{self.block_m}:{self.rows}x{self.split},{self.warps},{self.stages}"

    @classmethod
    def parse(cls, text: str) -> Bucket:
        match = re.fullmatch(r"m(\d+):(\d+)x(\d+),(\d+),(\d+)", text)
        if match is None:
            raise OptionError(
                f"{text!r} is no schedule; one looks like 'm16:16x8,8,3', which is "
                "tokens:rows x groups side by side,warps,stages"
            )
        return cls(*(int(part) for part in match.groups()))


@dataclass(frozen=True)
class KernelSpec:
    """A mixed linear: codes of activations and packed weights in, y in model order out.

    Text: `"linear | tiles64.v1 asym g128 w4 w8 | token bfloat16 bias | m16:16x8,8,3 …"`.
    """

    layout: BlobLayout
    numerics: Numerics
    schedule: tuple[Bucket, ...]

    def bucket(self, m: int) -> Bucket:
        """The bucket that serves M tokens."""
        return next((b for b in self.schedule if m <= b.block_m), self.schedule[-1])

    def __str__(self) -> str:
        schedule = " ".join(str(bucket) for bucket in self.schedule)
        return f"linear | {self.layout} | {self.numerics} | {schedule}"

    @classmethod
    def parse(cls, text: str) -> KernelSpec:
        """Inverse of `str`.

        Raises:
            OptionError: the text is no spec of a linear.
        """
        return _parse_linear(text)


@dataclass(frozen=True)
class QuantizerSpec:
    """The activation quantizer. Text: `"quantize | g128 | token bfloat16 | 2048,512"`.

    Attributes:
        group: elements of a group along K.
        mode: `"token"` or `"group"`: what shares a scale.
        dtype: type of the activations that it reads.
        block: elements of a program in mode "group"; in mode "token" a program has a whole row.
        per_warp: elements that one warp works on.
    """

    group: int
    mode: str
    dtype: torch.dtype
    block: int = 2048
    per_warp: int = 512

    def __post_init__(self) -> None:
        _check(self.mode, self.dtype)

    def __str__(self) -> str:
        numerics = f"{self.mode} {dtype_name(self.dtype)}"
        return f"quantize | g{self.group} | {numerics} | {self.block},{self.per_warp}"

    @classmethod
    def parse(cls, text: str) -> QuantizerSpec:
        """Inverse of `str`.

        Raises:
            OptionError: the text is no spec of a quantizer.
        """
        match = re.fullmatch(r"quantize \| g(\d+) \| (\w+) (\w+) \| (\d+),(\d+)", text)
        if match is None:
            raise OptionError(
                f"{text!r} is no quantizer; one looks like "
                "'quantize | g128 | token bfloat16 | 2048,512'"
            )
        return cls(int(match[1]), match[2], _dtype(match[3]), int(match[4]), int(match[5]))


def parse(text: str) -> KernelSpec | QuantizerSpec:
    """The spec of any kernel, from its text.

    Raises:
        OptionError: the text is no spec.
    """
    kind = text.split(" ", 1)[0]
    if kind not in ("linear", "quantize"):
        raise OptionError(f"{text!r} is no kernel; it must begin with 'linear' or 'quantize'")
    return KernelSpec.parse(text) if kind == "linear" else QuantizerSpec.parse(text)


@functools.lru_cache(maxsize=256)
def _parse_linear(text: str) -> KernelSpec:
    match = re.fullmatch(
        r"linear \| (\S+) (\S+) g(\d+)((?: w\d+)+) \| (\w+) (\w+)( bias)? \| (\S+(?: \S+)*)", text
    )
    if match is None:
        raise OptionError(
            f"{text!r} is no linear kernel; one looks like "
            "'linear | tiles64.v1 asym g128 w4 w8 | token bfloat16 bias | m16:16x8,8,3'"
        )
    widths = tuple(int(b) for b in re.findall(r"w(\d+)", match[4]))
    if list(widths) != sorted(set(widths)) or not set(widths) <= set(WIDTHS):
        raise OptionError(f"the widths of {text!r} must ascend and be among {WIDTHS}")
    buckets = tuple(Bucket.parse(part) for part in match[8].split(" "))
    if any(a.block_m >= b.block_m for a, b in itertools.pairwise(buckets)):
        raise OptionError(f"the schedules of {text!r} are not in ascending order of tokens")
    return KernelSpec(
        BlobLayout(match[1], match[2], int(match[3]), widths),
        Numerics(match[5], _dtype(match[6]), match[7] is not None),
        buckets,
    )


def _check(mode: str, dtype: torch.dtype) -> None:
    """Refuse what no kernel can mean."""
    if mode not in MODES:
        raise OptionError(f"unknown activation mode {mode!r}; modes are {' and '.join(MODES)}")
    if dtype not in DTYPES.values():
        raise OptionError(f"{dtype} is no float type of kernels; types are {', '.join(DTYPES)}")


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise OptionError(f"unknown type {name!r}; types are {', '.join(DTYPES)}")
    return DTYPES[name]
