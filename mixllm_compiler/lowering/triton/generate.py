"""From a spec to the source of its kernel: a template, filled in. Same spec, same bytes."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources

import jinja2

from ...errors import LoweringError
from ..spec import KernelSpec, QuantizerSpec, dtype_name
from . import layout

VERSION = "triton.v1"
"""Name of these kernels in ops. Another meaning of the ops' arguments needs another name."""

GROUPS = (32, 64, 128)
"""Group sizes with kernels. A dot of int8 needs 32 along k; tiles of more than 128 do not fit the
shared memory of every GPU, three of them deep."""


def generate(spec: KernelSpec | QuantizerSpec) -> str:
    """Python source of a module with one Triton kernel, `linear` or `quantize`.

    Raises:
        LoweringError: these templates cannot express the spec.
    """
    if isinstance(spec, QuantizerSpec):
        chunk_of(spec.group)  # refuses the same groups as the linear that reads the codes
        return _template("quantize.py.jinja").render(
            version=VERSION, spec=spec, group=spec.group, mode=spec.mode
        )
    if spec.layout.packing != layout.NAME:
        raise LoweringError(f"the Triton kernels read {layout.NAME}, not {spec.layout.packing}")
    group = spec.layout.group
    return _template("linear.py.jinja").render(
        version=VERSION,
        spec=spec,
        packing=spec.layout.packing,
        group=group,
        tile=layout.TILE,
        order_bytes=4 * layout.TILE,
        chunk_k=chunk_of(group),
        widths=[_Width.of(bits, group) for bits in spec.layout.widths],
        counts=[f"tiles_w{bits}" for bits in spec.layout.widths],
        mode=spec.numerics.mode,
        out=dtype_name(spec.numerics.out),
        bias=spec.numerics.bias,
    )


def chunk_of(group: int) -> int:
    """Elements of k that one dot takes: half a group, since a nibble plane gives half a group.

    Raises:
        LoweringError: there are no kernels for that group size.
    """
    if group not in GROUPS:
        raise LoweringError(f"the Triton kernels know groups of 32, 64 and 128, not {group}")
    return max(GROUPS[0], group // 2)


@functools.cache
def _template(name: str) -> jinja2.Template:
    text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(text)


@dataclass(frozen=True)
class _Load:
    """Bytes of one plane: their index in the block, for every row `r` and index `k`."""

    name: str
    at: str


@dataclass(frozen=True)
class _Chunk:
    """The int8 codes of `chunk_of(group)` neighbouring k, from index `k` of the group on."""

    k: int
    code: str


@dataclass(frozen=True)
class _Width:
    """What the template needs to know about rows of one width."""

    bits: int
    block: int
    meta: int
    loads: tuple[_Load, ...]
    chunks: tuple[_Chunk, ...]

    @classmethod
    def of(cls, bits: int, group: int) -> _Width:
        size = chunk_of(group)
        loads: dict[str, _Load] = {}
        chunks = []
        for k in range(0, group, size):
            parts = []
            offset = low = 0
            for part in layout.PLANES[bits]:
                row = layout.plane_row_bytes(part, group)
                index, shift = _place(k, row, size, part)
                at = f"{f'{offset} + ' if offset else ''}{row} * r + {index}"
                # Neighbouring chunks are different bits of the same bytes: load those once.
                load = loads.setdefault(at, _Load(f"w{len(loads)}", at))
                parts.append(_extract(load.name, shift, part, low))
                offset += layout.TILE * row
                low += part
            chunks.append(_Chunk(k, _to_int8(parts)))
        block = layout.block_bytes(bits, group)
        return cls(bits, block, block - 4 * layout.TILE, (*loads.values(),), (*chunks,))


def _place(k: int, row: int, size: int, part: int) -> tuple[str, str]:
    """Where a plane of `row` bytes a row holds k … k + size − 1: (byte index, shift)."""
    run, first = divmod(k, row)
    if row >= size:
        return (f"{first} + k" if first else "k"), str(run * part)
    # The chunk spans several runs: the same bytes again, each time `part` bits higher.
    runs = f"{run} + k // {row}" if run else f"k // {row}"
    return f"k % {row}", f"({part} * ({runs})).to(tl.uint8)"


def _extract(name: str, shift: str, part: int, low: int) -> str:
    """The `part` bits at `shift` of a byte, moved to bit `low` of the code."""
    if part == 8:
        return name
    value = name if shift == "0" else f"({name} >> {shift})"
    if shift != str(8 - part):  # the topmost bits need no mask
        value = f"({value} & {2**part - 1})"
    return f"({value} << {low})" if low else value


def _to_int8(parts: list[str]) -> str:
    """Codes below 8 bits are unsigned and fit int8; those of 8 bits are int8 already."""
    [first, *rest] = parts
    if not rest:
        bitcast = ", bitcast=True" if first.isidentifier() else ""
        return f"{first}.to(tl.int8{bitcast})"
    return f"({' | '.join(parts)}).to(tl.int8)"
