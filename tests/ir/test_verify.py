"""`verify` finds what a wrong pass leaves behind, and says which pass, node and matrix."""

from __future__ import annotations

import pytest
import torch

from mixllm_compiler.errors import VerifyError
from mixllm_compiler.formats.layout import PackedWeight
from mixllm_compiler.ir import ops
from mixllm_compiler.ir.annotations import LinearSite, annotate
from mixllm_compiler.ir.verify import verify
from mixllm_compiler.passes.canonicalize_linears import LINEAR
from tests.helpers import activations, captured, causal_lm, mlp, passed, token_ids

STAGES = ["canonicalize-linears", "annotate-linears", "allocate-bits", "rewrite-linears"]


@pytest.fixture
def graph():
    return captured(mlp(), activations(3))


def complaint(graph):
    with pytest.raises(VerifyError) as error:
        verify(graph, "wrong-pass")
    message = str(error.value)
    assert message.startswith("after wrong-pass")
    return message


@pytest.mark.parametrize("stage", [*STAGES, "share-quantizers", "pack-weights"])
def test_what_our_passes_leave_is_right(graph, stage):
    passed(graph, stage)
    verify(graph, stage)


# -- any stage -----------------------------------------------------------------------------------


def test_a_malformed_graph(graph):
    linears = graph.calls(LINEAR)
    linears[0].args = (linears[1], *linears[0].args[1:])  # reads what comes later
    assert "the graph is malformed" in complaint(graph)


def test_a_bound_weight_that_was_erased(graph):
    node = next(iter(graph.bindings))
    user = next(iter(node.users))
    user.replace_input_with(node, list(graph.bindings)[1])
    graph.graph.erase_node(node)
    message = complaint(graph)
    assert "(0.weight): the node of a bound weight was erased" in message


def test_an_input_that_nothing_feeds(graph):
    graph.inputs.pop()
    assert "placeholders and example inputs no longer match" in complaint(graph)


# -- annotated -----------------------------------------------------------------------------------


def test_an_annotation_of_no_matrix(graph):
    passed(graph, "annotate-linears")
    node = graph.calls(LINEAR)[1]
    annotate(node, LinearSite("nowhere", "2", 128, 192))
    message = complaint(graph)
    assert "(nowhere): the annotation names a matrix that is not there" in message
    assert node.name in message


def test_an_annotation_of_another_shape(graph):
    passed(graph, "annotate-linears")
    annotate(graph.calls(LINEAR)[1], LinearSite("2", "2", 64, 64))
    assert "(2): annotation and matrix disagree about the shape" in complaint(graph)


def test_a_linear_that_reads_another_weight(graph):
    passed(graph, "annotate-linears")
    first, second = graph.calls(LINEAR)
    second.args = (second.args[0], first.args[1], second.args[2])
    assert "(2): the linear reads another weight than annotated" in complaint(graph)


# -- planned -------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [None, torch.full((3,), 4, dtype=torch.uint8)])
def test_a_matrix_without_a_width_for_every_row(graph, widths):
    passed(graph, "allocate-bits")
    graph.matrices["2"].widths = widths
    assert "(2): planned, but its rows have no widths" in complaint(graph)


# -- rewritten -----------------------------------------------------------------------------------


def test_a_linear_that_was_left_float(graph):
    passed(graph, "allocate-bits")
    graph.facts |= {"quantized", "rewritten"}
    message = complaint(graph)
    assert "(0): a linear of the plan is still float" in message
    assert "torch._C._nn.linear" in message


def test_a_layout_of_another_shape(graph):
    passed(graph, "rewrite-linears")
    gemm = graph.calls(ops.MIXED_GEMM)[0]
    gemm.args = (*gemm.args[:4], "k128 w4:64 g128 asym plain.v1")
    assert "(0): layout k128 w4:64 g128 asym plain.v1 is not of a [192×128] matrix" in complaint(
        graph
    )


def test_a_packed_argument_that_is_no_node(graph):
    passed(graph, "rewrite-linears")
    gemm = graph.calls(ops.MIXED_GEMM)[0]
    gemm.args = (*gemm.args[:3], None, gemm.args[4])
    assert "(0): the packed argument is no node" in complaint(graph)


# -- packed --------------------------------------------------------------------------------------


def test_an_op_that_reads_another_layout_than_was_packed(graph):
    passed(graph, "pack-weights", kernels="reference")
    dequantize = graph.calls(ops.DEQUANTIZE)[1]
    dequantize.args = (*dequantize.args[:4], "k192 w8:128 g128 asym plain.v1", *dequantize.args[5:])
    message = complaint(graph)
    assert "(2): reads 'k192 w8:128 g128 asym plain.v1'" in message
    assert "packed as k192 w4:128" in message


def test_a_constant_that_is_not_the_packed_blob(graph):
    passed(graph, "pack-weights")
    matrix = graph.matrices["0"]
    matrix.packed = PackedWeight(matrix.packed.blob.clone(), matrix.packed.layout)
    assert "(0): the graph's constant is not the matrix' packed blob" in complaint(graph)


# -- experts -------------------------------------------------------------------------------------


@pytest.fixture
def mixture():
    return captured(causal_lm("mixtral", 1, num_local_experts=4), token_ids())


@pytest.mark.parametrize("stage", [*STAGES, "pack-weights"])
def test_what_our_passes_leave_of_experts_is_right(mixture, stage):
    passed(mixture, stage)
    verify(mixture, stage)


def test_experts_that_are_not_there(mixture):
    passed(mixture, "annotate-linears")
    del mixture.matrices["model.layers.0.mlp.experts.down_proj.3"]
    assert "down_proj.3): the annotation names a matrix that is not there" in complaint(mixture)


def test_experts_that_nobody_rewrote(mixture):
    passed(mixture, "allocate-bits")
    for node, _ in list(mixture.sites()):
        del node.meta["mixllm"]
    mixture.facts |= {"quantized", "rewritten"}
    assert "gate_up_proj.0): experts of the plan are still float" in complaint(mixture)


@pytest.mark.parametrize(
    "blobs, layouts, said",
    [(3, 4, "4 layouts, but not as many blobs"), (3, 3, "3 layouts for 4 experts")],
)
def test_a_product_that_lost_an_expert(mixture, blobs, layouts, said):
    passed(mixture, "rewrite-linears")
    node = mixture.calls(ops.GROUPED_LINEAR)[1]
    x, offsets, packed, text, *rest = node.args
    text = "; ".join(text.split("; ")[:layouts])
    node.args = (x, offsets, packed[:blobs], text, *rest)
    assert said in complaint(mixture)


def test_an_expert_of_another_shape(mixture):
    passed(mixture, "rewrite-linears")
    node = mixture.calls(ops.GROUPED_LINEAR)[1]
    other = node.args[3].replace("k256 w4:128", "k256 w4:64", 1)
    node.args = (*node.args[:3], other, *node.args[4:])
    assert "down_proj.0): layout k256 w4:64" in complaint(mixture)


def test_an_expert_that_reads_the_blob_of_another(mixture):
    passed(mixture, "pack-weights")
    node = mixture.calls(ops.GROUPED_LINEAR)[0]
    first, second, *rest = node.args[2]
    node.args = (*node.args[:2], [second, first, *rest], *node.args[3:])
    assert "is not the expert's packed blob" in complaint(mixture)
