"""The kernels that can be generated: a regime and its sizes, as text and as source.

| text | sizes |
|---|---|
| `decode:1,2,8,4` | octets of tokens, blocks of 16 rows, warps, groups ahead |
| `staged:2,2,8,2,4` | the same, and slots for the tokens of a warp |
| `mma:64,4` | tokens of a CTA, stages |
| `middle:64,6,2,0,2,1,2` | tokens, stages, ranks, pipeline, CTAs an SM, tiles, sets of warpgroups |
| `prefill:256,3,4` | tokens, stages, token tiles of a band |
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from ...errors import OptionError
from .layout import TILE

_FIELDS = {"decode": 4, "staged": 5, "mma": 2, "middle": 7, "prefill": 3}
_READ_TILES = ("staged", "middle", "prefill")
_SLOT = 8192  # shared memory for a block of any width
_GROUP = 128


@dataclass(frozen=True)
class Launch:
    """How a variant is launched.

    Attributes:
        grid, block: CTAs, threads of one.
        shared: bytes of dynamic shared memory.
        cluster: CTAs of a cluster along the grid.
    """

    grid: int
    block: int
    shared: int
    cluster: int = 1


@dataclass(frozen=True)
class Variant:
    """One way to run a mixed linear. `sizes`: what the table in this module's text names."""

    regime: str
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.regime}:{','.join(map(str, self.sizes))}"

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Inverse of `str`.

        Raises:
            OptionError: the text is no variant.
        """
        return _parse(text)

    @property
    def architecture(self) -> tuple[int, int]:
        """The oldest compute capability that it runs on."""
        return (9, 0) if self.reads_tiles else (8, 0)

    @property
    def tokens(self) -> int:
        """Tokens that a CTA computes together."""
        few = self.regime in ("decode", "staged")
        return 8 * self.sizes[0] if few else self.sizes[0]

    @property
    def reads_tiles(self) -> bool:
        """Whether activations come through a tensor map, in boxes of `tokens` × 128."""
        return self.regime in _READ_TILES

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one stage of a ring."""
        tiles = self.sizes[5] if self.regime == "middle" else 2
        return self.tokens * _GROUP + tiles * _SLOT

    def launch(self, m: int, tiles: int, multiprocessors: int) -> Launch:
        """Grid and memory for M tokens and so many tiles of rows."""
        token_tiles = -(-m // self.tokens)
        if self.regime in ("decode", "staged"):
            octets, blocks, warps, _, *slots = self.sizes
            shared = warps * slots[0] * (octets * 1024 + 8) + 1024 if slots else 0
            return Launch(tiles * (TILE // 16 // blocks), 32 * warps, shared)
        if self.regime == "mma":
            return Launch(tiles * token_tiles, 128, 0)
        if self.regime == "middle":
            _, stages, ranks, _, _, rows, sets = self.sizes
            shared = stages * (self.stage_bytes + 16) + 8 * self.tokens + 1024
            grid = -(-tiles // rows) * token_tiles * ranks
            return Launch(grid, 128 * rows * sets + 32, shared, ranks)
        stages = self.sizes[1]
        items = -(-tiles // 2) * token_tiles
        outputs = self.tokens * (2 * 2 * TILE + 4 * 8)
        shared = stages * (self.stage_bytes + 16) + outputs + 32 + 1024
        return Launch(min(items, multiprocessors), 384, shared)

    def kernel(self, out: int) -> str:
        """Source of the kernel `linear`; `out`: 0 bf16, 1 fp16, 2 fp32."""
        sizes = self.sizes
        arguments = "Weights w, Activations x, Output out"
        if self.regime == "decode":
            call, bounds = f"decode<{_join(sizes)}, {out}>", f"{32 * sizes[2]}, {16 // sizes[2]}"
        elif self.regime == "staged":
            call, bounds = f"staged<{_join(sizes)}, {out}>", f"{32 * sizes[2]}, {16 // sizes[2]}"
        elif self.regime == "mma":
            call, bounds = f"stream_tokens<{_join(sizes)}, {out}>", "128"
        elif self.regime == "middle":
            tokens, stages, ranks, pipeline, resident, rows, sets = sizes
            numbers = _join((tokens, stages, ranks, pipeline, rows, sets, out))
            call, bounds = f"middle<{numbers}>", f"{128 * rows * sets + 32}, {resident}"
        else:
            call, bounds = f"prefill<{_join(sizes)}, {out}>", "384, 1"
        values = "w, x, out"
        if self.reads_tiles:
            arguments = f"const __grid_constant__ TensorMap map, {arguments}"
            values = f"map, {values}"
        arguments = arguments.replace("Weights w", "const __grid_constant__ Weights w")
        return (
            f'extern "C" __global__ void __launch_bounds__({bounds})\n'
            f"linear({arguments}) {{ {call}({values}); }}\n"
        )


def _join(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> Variant:
    match = re.fullmatch(r"(\w+):(\d+(?:,\d+)*)", text)
    if match is None or _FIELDS.get(match[1]) != len(match[2].split(",")):
        raise OptionError(
            f"{text!r} is no variant of the CUDA kernels; one looks like 'decode:1,2,8,4'"
        )
    return Variant(match[1], tuple(int(part) for part in match[2].split(",")))
