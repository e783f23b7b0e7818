from __future__ import annotations

import pytest
import torch

from mixllm_compiler.formats.bits import resident_bits, true_bits
from mixllm_compiler.formats.layout import pack
from mixllm_compiler.formats.row_format import RowFormat
from mixllm_compiler.quantizers.rtn import quantize_rtn


def quantized(n, k, widths, group=128):
    widths = torch.as_tensor(widths, dtype=torch.uint8).expand(n)
    return quantize_rtn(torch.randn(n, k), widths, group)


def test_w4_768_by_768_to_the_byte():
    weight = quantized(768, 768, 4)
    # 384 bytes of codes, six fp16 scales, six zero points of four bits; half a byte for the width.
    assert weight.true_bytes() == 768 * (384 + 12 + 3) + 384 == 306_816
    assert true_bits([weight]) == 8 * 306_816 / 768**2 == 4.161458333333333


def test_w8_768_by_768_to_the_byte():
    weight = quantized(768, 768, 8)
    assert weight.true_bytes() == 768 * (768 + 12) + 384
    assert true_bits([weight]) == pytest.approx(8 * (780 + 0.5) / 768, rel=1e-15)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("n, k, group", [(5, 200, 64), (7, 33, 16), (1, 1, 128), (3, 896, 128)])
def test_stored_bytes_are_what_the_format_says(bits, n, k, group):
    weight = quantized(n, k, bits, group)
    assert weight.true_bytes() == n * RowFormat(bits, group).row_bytes(k) + -(-n // 2)


def test_matrices_weigh_by_their_size():
    small, large = quantized(16, 128, 8), quantized(64, 512, 4)
    together = true_bits([small, large])
    size = 16 * 128 + 64 * 512
    expected = (true_bits([small]) * 16 * 128 + true_bits([large]) * 64 * 512) / size
    assert together == pytest.approx(expected, rel=1e-12)


def test_resident_bits_count_the_whole_blob():
    packed = pack(quantized(10, 128, 4), "plain.v1")
    assert resident_bits([packed]) == 8 * packed.blob.numel() / 1280
    assert resident_bits([packed]) > true_bits([quantized(10, 128, 4)])


@pytest.mark.parametrize("figure", [true_bits, resident_bits])
def test_bits_of_nothing(figure):
    with pytest.raises(ValueError, match="of no weights"):
        figure([])
