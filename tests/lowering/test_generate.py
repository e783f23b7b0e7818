"""Generated sources: the same spec gives the same bytes, and a person can read them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest
from hypothesis import given

from mixllm_compiler.errors import LoweringError
from mixllm_compiler.lowering.spec import BlobLayout, KernelSpec, QuantizerSpec, parse
from mixllm_compiler.lowering.triton.generate import GROUPS, VERSION, generate
from tests.lowering.test_spec import linears, quantizers

LINEAR = "linear | tiles64.v1 asym g128 w4 w8 | group bfloat16 bias | m16:16x8,8,3 m64:64x1,4,4"


@given(linears | quantizers)
def test_every_source_is_python_with_its_spec_and_version_on_top(spec):
    group = spec.group if isinstance(spec, QuantizerSpec) else spec.layout.group
    if group not in GROUPS:
        with pytest.raises(LoweringError, match="groups of 32, 64 and 128"):
            generate(spec)
        return
    source = generate(spec)
    ast.parse(source)
    first, second = source.splitlines()[:2]
    assert VERSION in first
    assert parse(second.removeprefix("#").strip()) == spec
    assert "{{" not in source and "{%" not in source


def test_the_same_spec_gives_the_same_bytes_in_another_process():
    code = (
        "import hashlib, sys\n"
        "from mixllm_compiler.lowering.spec import parse\n"
        "from mixllm_compiler.lowering.triton.generate import generate\n"
        "print(hashlib.sha256(generate(parse(sys.argv[1])).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code, LINEAR],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_a_kernel_holds_code_for_its_widths_only():
    source = generate(parse(LINEAR))
    assert "def add_w4(" in source and "def add_w8(" in source
    assert "w5" not in source


def test_nibbles_unpack_with_a_mask_and_a_shift():
    source = generate(parse(LINEAR))
    assert "q0 = (w0 & 15).to(tl.int8)" in source
    assert "q1 = (w0 >> 4).to(tl.int8)" in source


def test_the_bias_is_in_the_source_only_if_asked_for():
    assert "bias" in generate(parse(LINEAR)).partition("import triton")[2]
    plain = generate(parse(LINEAR.replace(" bias", "")))
    assert "bias" not in plain.partition("import triton")[2]


def test_another_packing_is_refused():
    spec = KernelSpec.parse(LINEAR)
    other = BlobLayout("plain.v1", "asym", 128, (4, 8))
    with pytest.raises(LoweringError, match=r"plain\.v1"):
        generate(KernelSpec(other, spec.numerics, spec.schedule))


def test_generating_needs_no_triton():
    code = (
        "import sys, mixllm_compiler.lowering\n"
        "from mixllm_compiler.lowering.spec import parse\n"
        "from mixllm_compiler.lowering.triton.generate import generate\n"
        "before = 'triton' in sys.modules\n"  # torch may have imported it by itself
        "import mixllm_compiler.lowering.select\n"
        "generate(parse(sys.argv[1]))\n"
        "import torch\n"
        "sys.exit(0 if before or 'triton' not in sys.modules else 'triton was imported')"
    )
    subprocess.run([sys.executable, "-c", code, LINEAR], check=True)
