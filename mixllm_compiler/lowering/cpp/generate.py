"""From a scheme and an instruction set to the source of a shared library. Same spec, same bytes.

One source serves all linears of a model: a library holds the kernels of every width for one family
of formats and one granularity of activations. Sizes, groups, types and the bias are arguments.
"""

from __future__ import annotations

import functools
from importlib import resources

from .isa import Isa
from .kernels import Kernel, Scheme, steps_of_turn
from .lanes import LANES, WORD

VERSION = "cpp.v1"
"""Name of these kernels in ops. Another meaning of the ops' arguments needs another name."""


def linear_source(scheme: Scheme, isa: Isa) -> str:
    """C++ source with `mixllm_linear` of a scheme."""
    parts = [
        f"// {VERSION}: linear of {scheme.family} rows, one scale a {scheme.mode}, {isa.name}",
        _text("head.h"),
        _constants(scheme, isa),
    ]
    if isa.rows:
        parts += [_text("avx512.h" if isa.rows == 16 else "avx2.h"), *_vector_kernels(scheme, isa)]
    else:
        parts += [*_units(), _text("plain.h")]
    return "\n".join([*parts, _dispatch(isa), _text("output.h"), _text("linear.h")])


def quantizer_source(isa: Isa) -> str:
    """C++ source with `mixllm_quantize`, the activation quantizer of all linears."""
    about = f"// {VERSION}: activation quantizer, {isa.name}"
    return "\n".join([about, _text("head.h"), _text("quantize.h")])


def packer_source() -> str:
    """C++ source with `mixllm_pack`: stored codes of one width to panels."""
    about = f"// {VERSION}: packing of stored codes into panels"
    return "\n".join([about, _text("head.h"), *_units(), _text("pack.h")])


def native_source() -> str:
    """C++ source with the ops that `native.py` registers."""
    about = f"// {VERSION}: ops for torch's dispatcher"
    return "\n".join(
        [about, "#include <stdexcept>\n#include <string>", _text("head.h"), _text("native.h")]
    )


@functools.cache
def _text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _constants(scheme: Scheme, isa: Isa) -> str:
    def literal(value: bool) -> str:
        return "true" if value else "false"

    family = "TWO_LEVEL" if scheme.family == "two-level" else "ASYM"
    return (
        "enum Family { ASYM, TWO_LEVEL };\n"
        f"constexpr Family FAMILY = {family};\n"
        f"constexpr bool PER_GROUP = {literal(scheme.mode == 'group')};\n"
        f"constexpr bool INTEGER = {literal(scheme.integer)};\n"
        f"constexpr bool LOOKS_UP = {literal(isa.looks_up)};\n"
        f"constexpr int TOKENS = {isa.tokens};\n"
    )


def _vector_kernels(scheme: Scheme, isa: Isa) -> list[str]:
    """Kernels of every width and number of tokens."""
    tokens = range(1, isa.tokens + 1)
    return [Kernel(isa, scheme, bits, t).source() for bits in LANES for t in tokens]


def _units() -> list[str]:
    """Without vectors: how to pack and unpack a unit of each width."""
    parts = ["template <int BITS> struct Unit;"]
    for bits, lanes in LANES.items():
        lines = [
            f"template <> struct Unit<{bits}> {{",
            f"  static constexpr long STEPS = {lanes.steps}, BYTES = {lanes.unit_bytes};",
            "  static void unpack(const uint8_t* w, uint8_t* codes) {",
            f"    for (int i = 0; i < {WORD}; i++) {{",
        ]
        for step, fields in enumerate(lanes.fields):
            terms = " | ".join(
                f"(w[i + {f.word * WORD}] >> {f.at} & {f.mask >> f.to}) << {f.to}" for f in fields
            )
            lines += [f"      codes[i + {step * WORD}] = (uint8_t)({terms});"]
        lines += [
            "    }",
            "  }",
            "  static void pack(const uint8_t* codes, uint8_t* w) {",
            f"    for (int i = 0; i < {WORD}; i++) {{",
        ]
        for word in range(lanes.words):
            terms = " | ".join(
                f"(codes[i + {step * WORD}] >> {f.to} & {f.mask >> f.to}) << {f.at}"
                for step, fields in enumerate(lanes.fields)
                for f in fields
                if f.word == word
            )
            lines += [f"      w[i + {word * WORD}] = (uint8_t)({terms});"]
        parts += [*lines, "    }", "  }", "};"]
    return parts


def _dispatch(isa: Isa) -> str:
    """`run`: the kernel of a width and a number of tokens."""
    rows = []
    for bits in range(9):
        names = ["nullptr"] * (isa.tokens + 1)
        if bits in LANES:
            plain = [f"plain<{bits}, {t}>" for t in range(1, isa.tokens + 1)]
            vector = [f"w{bits}_t{t}" for t in range(1, isa.tokens + 1)]
            names[1:] = vector if isa.rows else plain
        rows += [f"  {{{', '.join(names)}}},"]
    table = "\n".join(rows)
    turns = ", ".join(str(steps_of_turn(isa, b) if b in LANES else 1) for b in range(9))
    return (
        f"constexpr long STEPS_OF_TURN[9] = {{{turns}}};\n"
        f"static const Kernel KERNELS[9][TOKENS + 1] = {{\n{table}\n}};\n"
        "INLINE void run(int bits, int tokens, const uint8_t* w, const Tile& tile, long groups,"
        " long steps, float* out) {\n"
        "  KERNELS[bits][tokens](w, tile, groups, steps, out);\n}\n"
    )
