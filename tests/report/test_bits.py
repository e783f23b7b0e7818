"""The map of bits, its plot, and the tables that people look at."""

from __future__ import annotations

import re

import pytest
from rich.console import Console

from mixllm_compiler.report.bits_map import BitsMap, MatrixBits
from mixllm_compiler.report.bits_plot import PlotError, colour_of, save_bits_plot
from mixllm_compiler.report.terminal import bits_table


def matrices(layers: int = 3) -> list[MatrixBits]:
    found = []
    for layer in range(layers):
        for name, bits in (("attn.q", 4.25), ("mlp.down", 5.0 + layer)):
            found.append(MatrixBits(f"model.layers.{layer}.{name}", 64, 128, bits, {4: 60, 8: 4}))
    return [*found, MatrixBits("lm_head", 96, 128, 8.125, {8: 96})]


def shown(renderable, width: int = 100) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def test_places_lose_the_prefix_that_all_layers_share():
    assert BitsMap.of(matrices()).places == ["attn.q", "mlp.down", "lm_head"]


def test_a_matrix_outside_of_the_layers_has_a_column_of_its_own():
    bits = BitsMap.of(matrices())
    assert bits.layers == [-1, 0, 1, 2]
    assert bits.row("lm_head") == [8.125, None, None, None]


def test_experts_of_a_layer_share_a_cell():
    experts = [
        MatrixBits(f"layers.0.experts.{e}.up", n, 128, bits, {4: n})
        for e, n, bits in ((0, 100, 4.0), (1, 300, 8.0))
    ]
    assert BitsMap.of(experts).row("experts.*.up") == [7.0]


def test_the_average_is_over_weights():
    bits = BitsMap.of(matrices(1))
    expected = (64 * 4.25 + 64 * 5.0 + 96 * 8.125) / (64 + 64 + 96)
    assert bits.average() == pytest.approx(expected)


def test_few_layers_are_numbers_many_are_bars():
    assert "6.00" in shown(bits_table(BitsMap.of(matrices(3))))
    many = shown(bits_table(BitsMap.of(matrices(40))))
    assert "█" in many and "layers – to 39" in many


def test_colours_go_from_blue_to_orange():
    assert (colour_of(2), colour_of(5), colour_of(8)) == ("#4c78a8", "#72b7b2", "#f58518")
    assert colour_of(16) == colour_of(8)


def test_the_plot_is_a_small_svg_with_text(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "bits.svg"
    save_bits_plot(BitsMap.of(matrices()), path, "a title")
    text = path.read_text()
    assert text.lstrip().startswith("<?xml") and len(text) < 100_000
    assert all(word in text for word in ("mlp.down", "a title", "layer"))


def test_the_same_plan_gives_the_same_svg(tmp_path):
    pytest.importorskip("matplotlib")
    pages = []
    for name in ("a.svg", "b.svg"):
        save_bits_plot(BitsMap.of(matrices()), tmp_path / name)
        pages.append((tmp_path / name).read_text())
    assert pages[0] == pages[1]


def test_the_plot_is_readable_on_any_ground(tmp_path):
    """No white or black: a transparent ground takes the reader's colour."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "bits.svg"
    save_bits_plot(BitsMap.of(matrices()), path)
    assert not re.search(r"fill: ?(#fff|#000|white|black)", path.read_text())


def test_without_matplotlib_the_plot_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotError, match=r"mixllm-compiler\[report\]"):
        save_bits_plot(BitsMap.of(matrices()), tmp_path / "bits.svg")
