"""Semantic ops on two-level rows against integers of numpy: bit for bit in mode "token".

The oracle knows the stored integers and the formula of an int8 activation, and nothing else: it
never sees a packed blob. Only the packed order of rows (ascending width, then model order) is
taken from the definition.
"""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import mixllm_compiler.ir.ops  # registers torch.ops.mixllm
from mixllm_compiler.errors import OptionError
from mixllm_compiler.formats.layout import PackedWeight, pack
from mixllm_compiler.formats.neutral import QuantizedWeight, RowCodes
from mixllm_compiler.formats.row_format import RowFormat, group_size, groups_of
from mixllm_compiler.ir.reference import MAX_INTEGER_K
from tests.properties.support import weights

ops = torch.ops.mixllm
assert mixllm_compiler.ir.ops.SEMANTIC

TWO_LEVEL = weights(("two-level",))
DTYPES = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))
LEADS = st.sampled_from(((), (1,), (5,), (2, 3), (0,)))
SEEDS = st.integers(0, 2**32)


def integers_of(weight: QuantizedWeight) -> tuple[np.ndarray, np.ndarray]:
    """t·q + c − 128 as int64 [N, K], and S as fp32 [N], in model order; group by group."""
    found = np.zeros((weight.n, weight.k), np.int64)
    scales = np.zeros(weight.n, np.float32)
    size = group_size(weight.k, weight.group)
    for bits in weight.rows:
        rows, at = weight.row_codes(bits), weight.model_rows(bits).numpy()
        q = rows.codes.numpy().astype(np.int64)
        if rows.steps is not None:
            for g in range(groups_of(weight.k, weight.group)):
                t, c = (
                    v[:, g : g + 1].numpy().astype(np.int64) for v in (rows.steps, rows.offsets)
                )
                columns = slice(g * size, (g + 1) * size)
                q[:, columns] = t * q[:, columns] + c - 128
        found[at], scales[at] = q, rows.scales.numpy()
    return found, scales


def int8(x: Tensor, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes int64 [..., K'] padded to whole groups, fp32 scales [..., G] of groups of `size`."""
    x = x.float().numpy()
    x = np.concatenate([x, np.zeros((*x.shape[:-1], -x.shape[-1] % size), np.float32)], -1)
    parts = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    scales = np.abs(parts).max(-1) / np.float32(127)
    scales = np.where(scales == 0, np.float32(1), scales)
    return np.rint(parts / scales[..., None]).astype(np.int64).reshape(x.shape), scales


def activations(lead: tuple[int, ...], k: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*lead, k, generator=generator).to(dtype)


def run(x: Tensor, packed: PackedWeight, mode: str, bias: Tensor | None, dtype: torch.dtype):
    """acc and y of the ops."""
    layout = packed.layout
    codes, scales, sums = ops.quantize_activation(x, mode, layout.group)
    acc = ops.mixed_gemm(codes, scales, sums, packed.blob, str(layout))
    return acc, ops.dequantize(acc, scales, sums, packed.blob, str(layout), bias, dtype)


@given(TWO_LEVEL, LEADS, SEEDS, DTYPES, DTYPES, st.booleans())
def test_one_scale_a_token_is_exact_to_the_last_bit(weight, lead, seed, of_x, of_y, biased):
    x = activations(lead, weight.k, seed, of_x)
    bias = torch.randn(weight.n).to(of_y) if biased else None
    acc, y = run(x, pack(weight, "plain.v1"), "token", bias, of_y)

    integers, row_scales = integers_of(weight)
    codes, scales = int8(x, weight.k)
    exact = codes @ integers.T
    in_order = np.argsort(weight.widths.numpy(), kind="stable")
    assert acc.dtype == torch.int32
    assert np.array_equal(acc.numpy(), exact[..., in_order])

    # float(F) · (S · s_x), then the bias, each rounded to fp32; then once to the output's dtype.
    expected = exact.astype(np.float32) * (row_scales * scales)
    assert expected.dtype == np.float32
    if bias is not None:
        expected = expected + bias.float().numpy()
    assert y.dtype == of_y
    assert torch.equal(y, torch.from_numpy(expected).to(of_y))


@given(TWO_LEVEL, LEADS, SEEDS, DTYPES, st.booleans())
def test_one_scale_a_group_is_within_a_millionth(weight, lead, seed, of_x, biased):
    x = activations(lead, weight.k, seed, of_x)
    bias = torch.randn(weight.n) if biased else None
    _, y = run(x, pack(weight, "plain.v1"), "group", bias, torch.float32)

    integers, row_scales = integers_of(weight)
    size = group_size(weight.k, weight.group)
    codes, scales = int8(x, size)
    x_hat = (codes * scales.astype(np.float64).repeat(size, -1))[..., : weight.k]
    w_hat = integers * row_scales.astype(np.float64)[:, None]
    expected, magnitude = x_hat @ w_hat.T, np.abs(x_hat) @ np.abs(w_hat).T
    if bias is not None:
        expected, magnitude = expected + bias.numpy(), magnitude + np.abs(bias.numpy())
    assert (np.abs(y.double().numpy() - expected) <= 1e-6 * magnitude + 1e-30).all()


@given(weights(("two-level",), (0,)), SEEDS)
def test_whole_rows_have_one_meaning_in_both_modes(weight, seed):
    packed = pack(weight, "plain.v1")
    assert packed.layout.groups == 1
    x = activations((3,), weight.k, seed, torch.float32)
    token, group = (run(x, packed, mode, None, torch.float32)[1] for mode in ("token", "group"))
    assert torch.equal(token, group)


def extreme(k: int, n: int = 6, group: int = 128) -> QuantizedWeight:
    """Rows of nothing but ±127: by t = 254 at two bits, and by 8-bit codes."""
    generator = torch.Generator().manual_seed(k)
    groups = groups_of(k, group)
    signs = torch.randint(0, 2, (n, k), generator=generator)
    signs[0], signs[1] = 1, 0
    full = torch.ones(n, groups, dtype=torch.uint8)
    narrow = RowCodes(
        RowFormat(2, group, "two-level"),
        signs.to(torch.uint8),
        torch.ones(n),
        steps=254 * full,
        offsets=full,
    )
    wide = RowCodes(
        RowFormat(8, group, "two-level"), (254 * signs - 127).to(torch.int8), torch.ones(n)
    )
    widths = torch.tensor([2, 8] * n, dtype=torch.uint8)
    return QuantizedWeight.assemble(2 * n, k, widths, [narrow, wide])


@pytest.mark.parametrize("k", [1023, 1024, 1025, 4096, 7001])
@pytest.mark.parametrize("group", [0, 128])
def test_sums_of_the_largest_codes_are_exact(k, group):
    """fp32 alone would lose units from 2²⁴ on: K = 1,041 of these."""
    weight = extreme(k, group=group)
    integers, _ = integers_of(weight)
    assert set(np.unique(integers)) == {-127, 127}
    layout = pack(weight, "plain.v1").layout
    codes = torch.zeros(4, layout.padded_k, dtype=torch.int8)
    codes[0, :k], codes[1, :k] = 127, -127
    codes[2:, :k] = torch.randint(0, 2, (2, k)) * 254 - 127
    codes[3, 0] = 126  # sums that are no multiple of 127
    sums = codes.unflatten(-1, (layout.groups, -1)).sum(-1).to(torch.int32)
    blob = pack(weight, "plain.v1").blob
    acc = ops.mixed_gemm(codes, torch.ones(4, 1), sums, blob, str(layout))
    in_order = np.argsort(weight.widths.numpy(), kind="stable")
    exact = (codes.numpy().astype(np.int64)[:, :k] @ integers.T)[:, in_order]
    assert np.abs(exact).max() == 127 * 127 * k
    assert np.array_equal(acc.numpy(), exact)


def test_rows_too_long_for_int32_are_refused_in_mode_token_only():
    def of_length(k):
        return pack(extreme(k, n=2, group=1024), "plain.v1")

    def call(packed, mode):
        layout = packed.layout
        codes = torch.full((1, layout.padded_k), 127, dtype=torch.int8)
        codes[:, layout.k :] = 0
        groups = layout.groups if mode == "group" else 1
        sums = torch.zeros(1, layout.groups, dtype=torch.int32)
        return ops.mixed_gemm(codes, torch.ones(1, groups), sums, packed.blob, str(layout))

    longest, longer = of_length(MAX_INTEGER_K), of_length(MAX_INTEGER_K + 1)
    most = 127 * 127 * MAX_INTEGER_K
    assert call(longest, "token").tolist() == [[most, -most, most, -most]]
    with pytest.raises(OptionError, match=f"K = {MAX_INTEGER_K + 1}: integer sums are safe up to"):
        call(longer, "token")
    assert call(longer, "group").shape == (1, 4)


@settings(max_examples=20)
@given(TWO_LEVEL, SEEDS)
def test_a_token_does_not_depend_on_its_neighbours(weight, seed):
    x = activations((5,), weight.k, seed, torch.float32)
    packed = pack(weight, "plain.v1")
    together = run(x, packed, "token", None, torch.float32)[1]
    for i in range(5):
        alone = run(x[i : i + 1], packed, "token", None, torch.float32)[1]
        assert torch.equal(alone[0], together[i])
