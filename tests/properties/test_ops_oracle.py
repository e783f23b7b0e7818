"""Semantic ops against float64 formulas that never look into a packed blob.

Ŵ comes from the quantizer, x̂ from the formula in numpy; only the packed order of rows (ascending
width, then model order) is taken from the definition.
"""

from __future__ import annotations

from typing import NamedTuple

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given
from torch import Tensor

import mixllm_compiler.ir.ops  # registers torch.ops.mixllm
from mixllm_compiler.formats.layout import PackedWeight, pack
from mixllm_compiler.formats.neutral import QuantizedWeight, RowCodes
from mixllm_compiler.formats.row_format import WIDTHS, RowFormat
from mixllm_compiler.quantizers.rtn import quantize_rows, quantize_rtn
from mixllm_compiler.transforms.hadamard import hadamard_matrix

ops = torch.ops.mixllm
assert mixllm_compiler.ir.ops.SEMANTIC

MODES = st.sampled_from(("token", "group"))
DTYPES = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))
LEADS = st.sampled_from(((), (1,), (5,), (2, 3), (0,), (1, 17)))
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class Case(NamedTuple):
    x: Tensor
    w: Tensor
    widths: Tensor
    group: int
    mode: str
    bias: Tensor | None


@st.composite
def activations(draw, k=None):
    k = k or draw(st.integers(1, 330))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(*draw(LEADS), k, generator=generator) * 2.0 ** draw(st.integers(-12, 6))
    kind = draw(st.sampled_from(("plain", "outlier", "zero token", "zero")))
    if kind == "outlier":
        x[..., k // 2] *= 100
    if kind == "zero token" and x.numel() and x.ndim > 1:
        x[0] = 0
    if kind == "zero":
        x.zero_()
    return x.to(draw(DTYPES))


@st.composite
def cases(draw):
    n, k = draw(st.integers(1, 48)), draw(st.integers(1, 330))
    group = draw(st.sampled_from((16, 64, 128)))
    mix = draw(st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = draw(activations(k))
    widths = torch.tensor(mix, dtype=torch.uint8)
    widths = widths[torch.randint(len(mix), (n,), generator=generator)]
    w = torch.randn(n, k, generator=generator).to(draw(DTYPES))
    bias = torch.randn(n, generator=generator).to(x.dtype) if draw(st.booleans()) else None
    return Case(x, w, widths, group, draw(MODES), bias)


def quantized_input(x: Tensor, mode: str, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes [..., K'] and scales [..., 1 or G], in IEEE fp32 as the definition says."""
    x = x.float().numpy()
    missing = -x.shape[-1] % group
    x = np.concatenate([x, np.zeros((*x.shape[:-1], missing), np.float32)], -1)
    parts = x.reshape(*x.shape[:-1], x.shape[-1] // group, group)
    top = np.abs(parts).max(-1)
    if mode == "token":
        top = top.max(-1, keepdims=True)
    scales = top / np.float32(127)
    scales = np.where(scales == 0, np.float32(1), scales)
    codes = np.rint(parts / scales[..., None])
    return codes.reshape(x.shape), scales


def stored_weight(case: Case) -> np.ndarray:
    """Ŵ [N, K] float64, width by width from the quantizer."""
    out = torch.empty(case.w.shape, dtype=torch.float64)
    for bits in set(case.widths.tolist()):
        rows = case.widths == bits
        out[rows] = quantize_rows(case.w[rows], RowFormat(bits, case.group)).dequantize()
    return out.numpy()


def run_linear(case: Case, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    codes, scales, sums = ops.quantize_activation(case.x, case.mode, case.group)
    layout = str(packed.layout)
    acc = ops.mixed_gemm(codes, scales, sums, packed.blob, layout)
    return ops.dequantize(acc, scales, sums, packed.blob, layout, case.bias, dtype)


@given(activations(), MODES, st.sampled_from((16, 64, 128)))
def test_quantize_activation(x, mode, group):
    codes, scales, sums = ops.quantize_activation(x, mode, group)
    expected, expected_scales = quantized_input(x, mode, group)
    assert codes.dtype == torch.int8
    assert np.array_equal(codes.numpy(), expected)
    assert scales.dtype == torch.float32
    assert np.array_equal(scales.numpy(), expected_scales)
    assert sums.dtype == torch.int32
    grouped = expected.reshape(*sums.shape, group)
    assert np.array_equal(sums.numpy(), grouped.sum(-1))
    # Half a step, and the codes use their whole range.
    per_value = np.repeat(expected_scales, expected.shape[-1] // expected_scales.shape[-1], -1)
    k = x.shape[-1]
    error = np.abs(expected * per_value.astype(np.float64))[..., :k] - np.abs(x.double().numpy())
    assert (np.abs(error) <= per_value[..., :k] * 0.5001).all()


@given(cases(), DTYPES)
def test_a_quantized_linear(case, dtype):
    y = run_linear(case, pack(quantize_rtn(case.w, case.widths, case.group), "plain.v1"), dtype)
    assert y.dtype == dtype
    assert y.shape == (*case.x.shape[:-1], len(case.w))

    k = case.x.shape[-1]
    codes, scales = quantized_input(case.x, case.mode, case.group)
    steps = np.repeat(scales.astype(np.float64), codes.shape[-1] // scales.shape[-1], -1)
    x, w = (codes * steps)[..., :k], stored_weight(case)
    expected, magnitude = x @ w.T, np.abs(x) @ np.abs(w).T
    if case.bias is not None:
        bias = case.bias.double().numpy()
        expected, magnitude = expected + bias, magnitude + np.abs(bias)
    rounding = EPS[dtype] * np.abs(expected) + torch.finfo(dtype).tiny
    error = np.abs(y.double().numpy() - expected)
    assert (error <= 1e-6 * magnitude + 1.0001 * rounding).all()


@given(cases())
def test_integers_are_exact_with_unit_scales(case):
    """Given the same codes, acc is Σ q_x·(q_w − z), number for number."""
    n, k = case.w.shape
    generator = torch.Generator().manual_seed(n * k)
    parts, integers = [], np.zeros((n, k), np.int64)
    for bits in sorted(set(case.widths.tolist())):
        fmt = RowFormat(bits, case.group)
        rows = (case.widths == bits).nonzero().flatten()
        groups = -(-k // case.group)
        codes = torch.randint(fmt.qmin, fmt.qmax + 1, (len(rows), k), generator=generator)
        zeros = torch.randint(0, fmt.qmax + 1, (len(rows), groups), generator=generator)
        integers[rows.numpy()] = codes.numpy()
        if fmt.symmetric:
            stored = RowCodes(fmt, codes.to(torch.int8), torch.ones(len(rows), groups).half(), None)
        else:
            integers[rows.numpy()] -= zeros.numpy().repeat(case.group, 1)[:, :k]
            ones = torch.ones(len(rows), groups).half()
            stored = RowCodes(fmt, codes.to(torch.uint8), ones, zeros.to(torch.uint8))
        parts.append(stored)
    weight = QuantizedWeight.assemble(n, k, case.widths, parts)
    packed = pack(weight, "plain.v1")

    groups = packed.layout.groups
    lead = case.x.shape[:-1]
    codes = torch.randint(-127, 128, (*lead, packed.layout.padded_k), generator=generator)
    codes[..., k:] = 0
    scales = torch.ones(*lead, groups if case.mode == "group" else 1)
    sums = codes.unflatten(-1, (groups, case.group)).sum(-1).to(torch.int32)
    layout = str(packed.layout)
    acc = ops.mixed_gemm(codes.to(torch.int8), scales, sums, packed.blob, layout)
    exact = codes.numpy()[..., :k] @ integers.T
    in_order = np.argsort(case.widths.numpy(), kind="stable")
    assert acc.dtype == torch.float32
    assert np.array_equal(acc.numpy(), exact[..., in_order])

    y = ops.dequantize(acc, scales, sums, packed.blob, layout, None, torch.float32)
    assert np.array_equal(y.numpy(), exact)


@given(activations(), st.sampled_from((1, 2, 16, 128)), st.integers(1, 3))
def test_hadamard(x, block, count):
    x = x.repeat(*[1] * (x.ndim - 1), block * count)[..., : block * count]
    matrix = hadamard_matrix(block).numpy()
    parts = x.double().numpy().reshape(*x.shape[:-1], count, block)
    expected = (parts @ matrix).reshape(x.shape)
    magnitude = (np.abs(parts) @ np.abs(matrix)).reshape(x.shape)
    y = ops.hadamard(x, block)
    assert y.dtype == x.dtype
    rounding = EPS[x.dtype] * np.abs(expected) + torch.finfo(x.dtype).tiny
    assert (np.abs(y.double().numpy() - expected) <= 1e-6 * magnitude + 1.0001 * rounding).all()


@given(cases(), DTYPES)
def test_token_and_group_mode_agree_where_a_row_is_one_group(case, dtype):
    """With one group both modes have one scale, and either way it is applied once."""
    k = case.x.shape[-1]
    case = case._replace(group=16 * -(-k // 16))
    packed = pack(quantize_rtn(case.w, case.widths, case.group), "plain.v1")
    by_token = run_linear(case._replace(mode="token"), packed, dtype)
    by_group = run_linear(case._replace(mode="group"), packed, dtype)
    assert torch.equal(by_token, by_group)
