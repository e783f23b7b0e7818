from __future__ import annotations

from mixllm_compiler.formats.tables import same_place, table


def test_first_column_left_the_others_right():
    text = table(("name", "rows", "bits"), [("a", 5, "4.1"), ("longer", 12345, "")])
    assert text.splitlines() == ["name     rows  bits", "a           5   4.1", "longer  12345"]


def test_layers_and_experts_look_alike():
    assert same_place("model.layers.11.mlp.experts.3.up.weight") == (
        "model.layers.*.mlp.experts.*.up.weight"
    )
    assert same_place("layers.0.experts.down_proj.12") == "layers.*.experts.down_proj.*"
    assert same_place("0.weight") == "*.weight"
    assert same_place("conv1d.weight") == "conv1d.weight"
