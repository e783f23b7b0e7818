"""Two-level rows as they are stored: every combination of integers, sizes, exact round trips."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given

from mixllm_compiler.errors import WeightError
from mixllm_compiler.formats.layout import Layout, pack, unpack
from mixllm_compiler.formats.neutral import QuantizedWeight, RowCodes
from mixllm_compiler.formats.row_format import FAMILIES, WIDTHS, RowFormat, width_bytes
from tests.properties.support import GROUPS, weights

NARROW = tuple(bits for bits in WIDTHS if bits < 8)


def largest_code(bits: int, step: int, offset: int) -> int:
    return min(2**bits - 1, (255 - offset) // step)


def two_level(codes, steps, offsets, bits, group=16, scales=None) -> RowCodes:
    """Rows from Python integers, one list a row."""
    fmt = RowFormat(bits, group, "two-level")
    scales = torch.ones(len(codes)) if scales is None else torch.tensor(scales)
    steps, offsets = (torch.tensor(v, dtype=torch.uint8) for v in (steps, offsets))
    return RowCodes(
        fmt, torch.tensor(codes, dtype=torch.uint8), scales, steps=steps, offsets=offsets
    )


# -- integers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", NARROW)
def test_every_legal_combination_expands_into_signed_bytes(bits):
    """All t, c and q up to min(2^b − 1, ⌊(255 − c)/t⌋), against plain integers."""
    wanted = [
        (t, c, q)
        for t in range(1, 256)
        for c in range(1, 129)
        for q in range(largest_code(bits, t, c) + 1)
    ]
    t, c, q = torch.tensor(wanted).t()
    assert (t * q + c).max() <= 255
    fmt = RowFormat(bits, 16, "two-level")
    steps, offsets = t.to(torch.uint8)[:, None], c.to(torch.uint8)[:, None]
    codes = q.to(torch.uint8)[:, None]
    rows = RowCodes(fmt, codes, torch.ones(len(q)), steps=steps, offsets=offsets)
    rows.check()
    integers = rows.integers().flatten()
    assert torch.equal(integers.long(), t * q + c - 128)
    assert integers.min() == -127
    assert integers.max() == 127


@pytest.mark.parametrize("bits", NARROW)
def test_every_code_beyond_its_limit_is_refused(bits):
    limits = [(t, c, (255 - c) // t) for t in range(1, 256) for c in range(1, 129)]
    beyond = [(t, c, top + 1) for t, c, top in limits if top + 1 < 2**bits]
    assert len(beyond) > 100
    for t, c, q in beyond[:: max(1, len(beyond) // 500)]:
        with pytest.raises(WeightError, match=rf"{bits}-bit code is beyond .*does not fit a byte"):
            two_level([[0, q, 0]], [[t]], [[c]], bits).check()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": [[3], [0]]}, r"step is 0 or an offset is outside \[1, 128\]"),
        ({"offsets": [[0], [100]]}, r"step is 0 or an offset is outside \[1, 128\]"),
        ({"offsets": [[129], [100]]}, r"step is 0 or an offset is outside \[1, 128\]"),
        ({"offsets": [[255], [100]]}, r"step is 0 or an offset is outside \[1, 128\]"),
        ({"scales": [1.0, 0.0]}, "scale is zero, negative or not finite"),
        ({"scales": [-1.0, 1.0]}, "scale is zero, negative or not finite"),
        ({"scales": [1.0, math.nan]}, "scale is zero, negative or not finite"),
        ({"scales": [math.inf, 1.0]}, "scale is zero, negative or not finite"),
    ],
)
def test_integers_and_scales_that_no_quantizer_writes_are_refused(change, message):
    good = {"codes": [[0, 1, 2], [3, 2, 1]], "steps": [[3], [5]], "offsets": [[128], [1]]}
    rows = two_level(**good, bits=4)
    rows.check()
    bad = two_level(**{**good, **change}, bits=4)
    with pytest.raises(WeightError, match=message):
        bad.check()
    weight = QuantizedWeight.assemble(2, 3, torch.full((2,), 4), [bad])
    with pytest.raises(WeightError, match=message):
        pack(weight, "plain.v1")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_code_minus_128_is_refused(family):
    codes = torch.tensor([[-127, 127, -128]], dtype=torch.int8)
    scales = torch.ones(1) if family == "two-level" else torch.ones(1, 1).half()
    with pytest.raises(WeightError, match="8-bit code is −128"):
        RowCodes(RowFormat(8, 16, family), codes, scales).check()
    RowCodes(RowFormat(8, 16, family), codes.clamp(min=-127), scales).check()


@given(weights(("two-level",)))
def test_values_are_integers_times_one_scale_a_row(weight):
    for bits in weight.rows:
        rows = weight.row_codes(bits)
        integers = rows.integers()
        assert integers.abs().max() <= 127
        expected = integers.double() * rows.scales.double()[:, None]
        assert torch.equal(weight.dequantize()[weight.model_rows(bits)], expected)


# -- sizes ---------------------------------------------------------------------------------------


@given(st.integers(1, 9000), st.sampled_from(GROUPS), st.sampled_from(NARROW))
def test_bytes_of_a_row(k, group, bits):
    groups = math.ceil(k / group) if group else 1
    fmt = RowFormat(bits, group, "two-level")
    assert fmt.row_bytes(k) == math.ceil(bits * k / 8) + 2 * groups + 4
    assert RowFormat(8, group, "two-level").row_bytes(k) == k + 4


@given(weights())
def test_bytes_of_a_matrix_are_those_of_its_rows(weight):
    rows = [weight.format(int(b)).row_bytes(weight.k) for b in weight.widths.tolist()]
    assert weight.true_bytes() == sum(rows) + width_bytes(weight.n)


# -- round trips ---------------------------------------------------------------------------------


@given(weights())
def test_packing_is_exact(weight):
    packed = pack(weight, "plain.v1")
    again = unpack(packed)
    for field in ("n", "k", "group", "family", "transform"):
        assert getattr(again, field) == getattr(weight, field)
    assert torch.equal(again.widths, weight.widths)
    assert again.rows.keys() == weight.rows.keys()
    for bits, rows in weight.rows.items():
        for part in ("codes", "scales", "zeros", "steps", "offsets"):
            ours, theirs = getattr(rows, part), getattr(again.rows[bits], part)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert ours.dtype == theirs.dtype
                assert torch.equal(ours, theirs)
    assert torch.equal(pack(again, "plain.v1").blob, packed.blob)


@given(weights())
def test_codes_come_back_as_a_quantizer_gave_them(weight):
    for bits in weight.rows:
        rows = weight.row_codes(bits)
        again = QuantizedWeight.assemble(
            len(rows.codes), weight.k, torch.full((len(rows.codes),), bits), [rows]
        ).row_codes(bits)
        assert again.codes.dtype == (torch.int8 if bits == 8 else torch.uint8)
        assert torch.equal(again.codes, rows.codes)


@given(weights())
def test_the_text_of_a_layout(weight):
    layout = pack(weight, "plain.v1").layout
    assert f" g{weight.group} {weight.family} plain.v1" in str(layout)
    assert Layout.parse(str(layout)) == layout == Layout.of(weight, "plain.v1")


@given(weights(("two-level",)), st.data())
def test_other_integers_are_other_bytes(weight, data):
    """No stored number is lost: changing any one of them changes the blob."""
    bits = data.draw(st.sampled_from(sorted(weight.rows)))
    part = data.draw(st.sampled_from(("codes", "scales", "steps", "offsets")))
    tensor = getattr(weight.rows[bits], part)
    assume(tensor is not None)
    before = pack(weight, "plain.v1").blob
    at = data.draw(st.integers(0, tensor.numel() - 1))
    flat = tensor.view(-1)
    old = flat[at].clone()
    # Within what is legal: a scale doubles, a step or an offset falls, a code turns into zero.
    flat[at] = {"codes": 0 * old, "scales": 2 * old}.get(part, (old - 1).clamp(min=1))
    assume(flat[at] != old)
    assert not torch.equal(pack(weight, "plain.v1").blob, before)
