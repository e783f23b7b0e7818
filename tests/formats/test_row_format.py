from __future__ import annotations

import pytest

from mixllm_compiler.errors import OptionError
from mixllm_compiler.formats.row_format import RowFormat, groups_of, padded, width_bytes


def test_its_text():
    assert str(RowFormat(4)) == "w4 g128 asym"
    assert RowFormat.parse("w3 g64 asym") == RowFormat(3, 64)


@pytest.mark.parametrize(
    "bits, k, expected",
    [
        (4, 4096, 2048 + 64 + 16),
        (3, 768, 288 + 12 + 3),  # 6 zero points of 3 bits: 18 bits, 3 bytes
        (8, 768, 768 + 12),
        (2, 100, 25 + 2 + 1),
        (5, 1, 1 + 2 + 1),
    ],
)
def test_row_bytes(bits, k, expected):
    assert RowFormat(bits).row_bytes(k) == expected


def test_ranges_of_codes():
    assert (RowFormat(8).qmin, RowFormat(8).qmax) == (-127, 127)
    assert (RowFormat(3).qmin, RowFormat(3).qmax) == (0, 7)


@pytest.mark.parametrize("args", [(7,), (4, 100), (4, 8), (4, 2048), (4, 128, "float")])
def test_impossible_formats(args):
    with pytest.raises(OptionError):
        RowFormat(*args)


def test_short_last_groups():
    assert groups_of(129, 128) == 2
    assert padded(129, 128) == 256
    assert (width_bytes(3), width_bytes(4)) == (2, 2)
