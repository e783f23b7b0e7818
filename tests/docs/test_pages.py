"""What the documentation repeats from the code is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mixllm_compiler.formats.row_format import DEFAULT_GROUP, WIDTHS, RowFormat, width_bytes
from mixllm_compiler.ir import ops
from mixllm_compiler.options import DEFAULT_BITS
from mixllm_compiler.passes.annotate_salience import MIN_TOKENS
from mixllm_compiler.report.pass_docs import markdown

DOCS = Path(__file__).resolve().parents[2] / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text("utf-8")


def test_passes_page_is_up_to_date():
    command = "python -m mixllm_compiler.report.pass_docs docs/passes.md"
    assert page("passes.md") == markdown(), f"run `{command}`"


def test_every_semantic_op_is_explained():
    for op in ops.SEMANTIC:
        name = op.name().replace("::", ".").partition(".default")[0]
        assert f"`{name}(" in page("ir.md")


@pytest.mark.parametrize("bits", [4, 8])
def test_the_true_bits_of_the_example_are_right(bits):
    k, n = 4096, 4096
    exact = 8 * (n * RowFormat(bits).row_bytes(k) + width_bytes(n)) / (n * k)
    (written,) = re.findall(rf"rows of {bits} bits.*?[≈] ([\d.]+\d)", page("quantization.md"), re.S)
    assert float(written) == pytest.approx(exact, abs=6e-4)


def test_settings_named_in_the_pages_are_the_defaults():
    text = page("quantization.md")
    assert f"groups of {DEFAULT_GROUP} along K" in text
    assert f"`bits={DEFAULT_BITS}` is the default budget" in text
    assert f"below {MIN_TOKENS} tokens" in text
    *some, last = WIDTHS
    assert f"Rows of {', '.join(map(str, some))} and {last} bits" in text
