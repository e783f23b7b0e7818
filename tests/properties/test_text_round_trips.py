"""Spec text of formats and layouts parses back into the same object."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from mixllm_compiler.errors import OptionError
from mixllm_compiler.formats.layout import Layout
from mixllm_compiler.formats.row_format import FAMILIES, WIDTHS, RowFormat

GROUPS = st.integers(1, 64).map(lambda i: 16 * i)
WORDS = st.from_regex(r"[a-z][a-z0-9:\-]{0,12}", fullmatch=True)


@given(st.sampled_from(WIDTHS), GROUPS, st.sampled_from(FAMILIES))
def test_row_format(bits, group, family):
    fmt = RowFormat(bits, group, family)
    assert RowFormat.parse(str(fmt)) == fmt


@given(
    k=st.integers(1, 100_000),
    rows=st.dictionaries(st.sampled_from(WIDTHS), st.integers(1, 100_000), min_size=1),
    group=GROUPS,
    family=WORDS,
    packing=st.tuples(WORDS, st.integers(1, 20)).map(lambda t: f"{t[0]}.v{t[1]}"),
    transform=st.one_of(st.just(""), WORDS),
)
def test_layout(k, rows, group, family, packing, transform):
    layout = Layout(k, tuple(sorted(rows.items())), group, family, packing, transform)
    assert Layout.parse(str(layout)) == layout
    assert layout.n == sum(rows.values())


@given(st.text(max_size=40))
def test_other_text_is_refused(text):
    for parse in (Layout.parse, RowFormat.parse):
        with pytest.raises(OptionError):
            parse(text)
