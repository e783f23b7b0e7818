"""Two-level linears give the bits that an H200 gave: the definition and the C++ kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixllm_compiler.formats.files import load_tensors
from mixllm_compiler.formats.layout import pack
from mixllm_compiler.lowering.cpp import isa, layout
from mixllm_compiler.lowering.lowered import (
    LOWERED_LINEAR,
    LOWERED_QUANTIZE,
    expand_linear,
    expand_quantize_activation,
)
from tests.gpu.make_cases import CASES, KIND, VERSION, Case, digest, weight

FILE = Path(__file__).parents[1] / "gpu_cases.safetensors"
CPP, CUDA = "cpp.v1", "cuda.v1"
NAMES = [case.name for case in CASES]


@pytest.fixture(scope="module")
def stored():
    return load_tensors(FILE, KIND, VERSION)


@pytest.fixture(params=CASES, ids=NAMES)
def case(request, stored) -> tuple[Case, dict[str, torch.Tensor]]:
    tensors, _ = stored
    parts = {k: t for k, t in tensors.items() if k.startswith(f"{request.param.name}/")}
    return request.param, {k.rpartition("/")[2]: t for k, t in parts.items()}


def test_the_weights_are_those_of_the_gpu(stored):
    _, about = stored
    assert "H200" in about["device"]
    assert about["digests"] == {case.weight: digest(weight(case.weight)) for case in CASES}


def test_activations_have_its_codes_scales_and_sums(case):
    made, gpu = case
    args = (gpu["x"], "token", 128, made.rotate)
    found = {"definition": expand_quantize_activation(*args, CUDA)}
    if isa.available():
        found[CPP] = LOWERED_QUANTIZE(*args, CPP)
    for codes, scales, sums in found.values():
        if not made.rotate:
            assert torch.equal(codes, gpu["codes"]) and torch.equal(scales, gpu["scales"])
            assert torch.equal(sums.sum(-1, dtype=torch.int32).flatten(), gpu["sums"].flatten())
        else:  # float sums in another order: a code may fall on the other side of a tie
            assert torch.allclose(scales, gpu["scales"], rtol=1e-5)
            off = (codes.int() - gpu["codes"].int()).abs()
            assert int(off.max()) <= 1 and int((off > 0).sum()) <= codes.numel() // 1000


def test_outputs_are_its_outputs_bit_for_bit(case):
    made, gpu = case
    activation = (gpu["codes"], gpu["scales"], gpu["sums"])
    bias = gpu.get("bias")
    plain = pack(weight(made.weight), "plain.v1")
    args = (bias, str(plain.layout), made.dtype, "")
    assert torch.equal(expand_linear(*activation, plain.blob, *args), gpu["y"])
    by_group = gpu["codes"].unflatten(-1, (-1, 128)).sum(-1, dtype=torch.int32)
    for machine in isa.available():
        with isa.forced(machine.name):
            packed = pack(weight(made.weight), layout.NAME)
            args = (packed.blob, bias, str(packed.layout), made.dtype, CPP)
            assert torch.equal(LOWERED_LINEAR(*activation[:2], by_group, *args), gpu["y"])
