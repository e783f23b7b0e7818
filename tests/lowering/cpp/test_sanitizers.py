"""The generated sources under AddressSanitizer and UndefinedBehaviorSanitizer.

A small program per source: buffers of exactly the right size, results compared with the library's.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from mixllm_compiler.formats.layout import pack
from mixllm_compiler.ir import reference
from mixllm_compiler.lowering.cpp import compiler, isa, launch
from mixllm_compiler.lowering.cpp.generate import linear_source, quantizer_source
from mixllm_compiler.lowering.cpp.kernels import Scheme
from mixllm_compiler.lowering.lowered import LOWERED_LINEAR, expand_quantize_activation
from tests.lowering.cases import ALL_WIDTHS, mix, random_weight

PROGRAM = Path(__file__).with_name("sanitized.h").read_text()
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1")


@pytest.fixture(params=list(isa.ISAS))
def instructions(request):
    if isa.ISAS[request.param] not in isa.available():
        pytest.skip(f"this CPU has no {request.param}")
    with launch.using(request.param):
        yield isa.ISAS[request.param]


def build(source: str, chosen: isa.Isa, folder: Path, *defines: str) -> Path:
    text, program = folder / "program.cpp", folder / "program"
    text.write_text(source + PROGRAM)
    flags = [
        flag
        for flag in compiler.FLAGS
        if flag not in ("-fPIC", "-shared", "-O2", "-ftree-vectorize")
    ]
    command = [compiler.find()[0], "-O0", *flags, *chosen.flags, *SANITIZE, *defines, "-fopenmp"]
    done = subprocess.run([*command, str(text), "-o", str(program)], capture_output=True, text=True)
    if "cannot find" in done.stderr and "san" in done.stderr:
        pytest.skip("this compiler has no sanitizers")
    assert done.returncode == 0, done.stderr[:2000]
    return program


def run(program: Path, *arguments: int) -> None:
    environment = {"ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=program.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[:3000]


def write(folder: Path, **tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        (folder / name).write_bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, mode, dtype",
    [
        ("two-level", "token", torch.bfloat16),
        ("asym", "group", torch.float32),
    ],
)
def test_linear(instructions, tmp_path, family, mode, dtype):
    source = linear_source(Scheme(family, mode), instructions)
    program = build(source, instructions, tmp_path, "-DLINEAR")
    for m, n, k, group in [
        (1, 70, 160, 32),
        (8, 130, 300, 64),
        (19, 333, 97, 96),
        (98, 65, 128, 128),
    ]:
        weight = random_weight(n, k, mix(n, ALL_WIDTHS), group, family)
        packed = pack(weight, "panels64.v1")
        codes, scales, sums = reference.quantize_activation(torch.randn(m, k), mode, group)
        bias = torch.randn(n)
        arguments = (codes, scales, sums, packed.blob, bias, str(packed.layout), dtype, "cpp.v1")
        y = LOWERED_LINEAR(*arguments)
        shape = launch._linear(
            packed.layout, mode if scales.shape[-1] > 1 else "token", dtype, bias.dtype
        ).shape
        (tmp_path / "shape").write_bytes(ctypes.string_at(shape, ctypes.sizeof(shape.contents)))
        if scales.shape[-1] == 1 and mode == "group":
            continue  # one group: the scheme is another
        write(tmp_path, codes=codes, scales=scales, sums=sums, blob=packed.blob, bias=bias, y=y)
        run(program, m)


@pytest.mark.slow
def test_quantizer(instructions, tmp_path):
    program = build(quantizer_source(instructions), instructions, tmp_path)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for m, k, group, mode, block in [
            (3, 300, 64, "group", 4),
            (2, 37, 48, "token", 0),
            (9, 384, 128, "token", 128),
        ]:
            x = torch.randn(m, k).to(dtype)
            argument = launch._quantizer(k, mode, group, dtype, block)[1]
            content = ctypes.string_at(argument, ctypes.sizeof(argument.contents))
            (tmp_path / "quantizer").write_bytes(content)
            codes, scales, sums = expand_quantize_activation(x, mode, group, block, "cpp.v1")
            write(tmp_path, x=x, codes=codes, scales=scales, sums=sums)
            run(program, m, k)
