"""quantize-weights, rewrite-linears, select-kernels, pack-weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from mixllm_compiler.errors import LoweringError, OptionError, WeightError
from mixllm_compiler.formats import layout as layouts
from mixllm_compiler.formats.layout import Layout, pack, unpack
from mixllm_compiler.ir import ops
from mixllm_compiler.ir.annotations import quantized_of
from mixllm_compiler.lowering.cuda import compiling
from mixllm_compiler.lowering.lowered import LOWERED_LINEAR, LOWERED_QUANTIZE
from mixllm_compiler.lowering.target import Target
from mixllm_compiler.modules import PackedLinear
from mixllm_compiler.options import Options
from mixllm_compiler.passes.canonicalize_linears import LINEAR
from mixllm_compiler.passes.context import Context
from mixllm_compiler.passes.pack_weights import PackWeights
from mixllm_compiler.passes.quantize_weights import QuantizeWeights
from mixllm_compiler.passes.select_kernels import SelectKernels
from mixllm_compiler.quantizers.rtn import quantize_rtn
from mixllm_compiler.runtime.weights import CACHE
from tests.helpers import (
    HIDDEN,
    LlamaBlock,
    activations,
    assert_quantized,
    captured,
    compiled,
    oracle,
    outputs,
    passed,
)

X = activations(2, 5)
MIXED = {"widths": (3, 4, 8), "bits": 5}


def rewritten(until="rewrite-linears", model=None, **options):
    graph = captured(model or LlamaBlock(), X)
    return graph, passed(graph, until, **options)


# -- quantize-weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("rotate", [0, 128])
def test_what_is_packed_is_the_quantizers_result(rotate):
    graph, _ = rewritten("quantize-weights", **MIXED, rotate=rotate)
    for matrix in graph.matrices.values():
        weight = quantize_rtn(matrix.value(), matrix.widths, 128, matrix.transform)
        again = unpack(matrix.packed)
        assert torch.equal(again.dequantize(), weight.dequantize())
        assert torch.equal(again.widths, matrix.widths)
        assert again.transform == ("hadamard:128" if rotate else "")


def test_a_second_graph_of_the_weights_quantizes_nothing():
    model = LlamaBlock()
    first = captured(model, X)
    passed(first, "pack-weights")
    before = CACHE.packs
    second = captured(model, activations(1, 3))
    passed(second, "allocate-bits")
    changes = QuantizeWeights()(second, Context(Options(family="asym")))
    assert {why for _, why in changes.lines} == {"packed before"}
    for name, matrix in second.matrices.items():
        assert matrix.packed.blob is first.matrices[name].packed.blob
    assert CACHE.packs == before


def test_a_weight_that_is_not_finite_is_named():
    model = LlamaBlock()
    model.mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(WeightError, match=r"mlp\.up_proj\.weight has 1 values that are NaN"):
        rewritten("quantize-weights", model)


# -- rewrite-linears -----------------------------------------------------------------------------


def test_every_linear_becomes_three_ops():
    graph, _ = rewritten()
    assert not graph.calls(LINEAR)
    for target in (ops.QUANTIZE_ACTIVATION, ops.MIXED_GEMM, ops.DEQUANTIZE):
        assert len(graph.calls(target)) == 7
    model = LlamaBlock()
    with torch.no_grad():
        assert_quantized(outputs(graph), model(X), oracle(model)(X))


def test_excluded_linears_stay():
    graph, _ = rewritten(exclude=("mlp.*",))
    assert len(graph.calls(LINEAR)) == 3
    assert len(graph.calls(ops.DEQUANTIZE)) == 4
    model = LlamaBlock()
    kept = tuple(f"{p}_proj" for p in ("gate", "up", "down"))
    with torch.no_grad():
        assert_quantized(outputs(graph), model(X), oracle(model, keep=kept)(X))


def test_where_a_node_came_from_goes_with_it():
    graph, _ = rewritten()
    for node in graph.calls(ops.QUANTIZE_ACTIVATION, ops.MIXED_GEMM, ops.DEQUANTIZE):
        site = quantized_of(node)
        path, _kind = list(node.meta["nn_module_stack"].values())[-1]
        assert path.endswith(site.matrix)
        assert "in forward" in node.stack_trace
    for node in graph.calls(ops.DEQUANTIZE):
        assert node.meta["example_value"].shape[-1] == graph.matrices[quantized_of(node).matrix].n


def test_a_matrix_used_twice_has_one_constant():
    lin = nn.Linear(HIDDEN, HIDDEN)
    graph, _ = rewritten(model=nn.Sequential(lin, nn.ReLU(), lin).eval())
    assert [name for name in graph.module._buffers if name.startswith("mixllm_")] == ["mixllm_0"]
    assert len(graph.calls(ops.DEQUANTIZE)) == 2


def test_blobs_are_persistent_buffers():
    """A non-persistent one gives Inductor's cache another key in every process."""
    graph, _ = rewritten()
    names = {m.attr for m in graph.matrices.values()}
    assert names <= dict(graph.module.named_buffers()).keys()
    assert not names & graph.module._non_persistent_buffers_set


def test_the_bias_and_the_output_dtype_of_the_linear_stay():
    model = nn.Sequential(nn.Linear(HIDDEN, 96)).to(torch.bfloat16).eval()
    graph = captured(model, X.bfloat16())
    passed(graph, "rewrite-linears")
    (dequantize,) = graph.calls(ops.DEQUANTIZE)
    _, _, _, _, layout, bias, dtype = dequantize.args
    assert graph.weight_binding(bias).name == "0.bias"
    assert dtype == torch.bfloat16
    assert Layout.parse(layout).n == 96


# -- select-kernels ------------------------------------------------------------------------------


def test_the_reference_keeps_the_semantic_ops():
    graph, _ = rewritten("select-kernels", kernels="reference")
    assert len(graph.calls(ops.DEQUANTIZE)) == 7
    assert {(m.kernel, m.packing) for m in graph.matrices.values()} == {("reference", "plain.v1")}


def test_on_a_cpu_a_transform_goes_into_the_quantizer_that_reads_it():
    graph, _ = rewritten("select-kernels", rotate=128)
    assert not graph.calls(ops.HADAMARD, ops.QUANTIZE_ACTIVATION, ops.DEQUANTIZE)
    assert {node.args[3:] for node in graph.calls(LOWERED_QUANTIZE)} == {(128, "cpp.v1")}
    assert len(graph.calls(LOWERED_LINEAR)) == 7
    graph, _ = rewritten("select-kernels", rotate=128, kernels="reference")
    assert graph.calls(ops.HADAMARD) and graph.calls(ops.QUANTIZE_ACTIVATION)


def test_a_lowering_that_the_target_lacks_is_refused_with_its_reason():
    with pytest.raises(LoweringError, match="no lowering can run a linear with layout"):
        rewritten("select-kernels", kernels="triton")


def test_an_unknown_lowering_names_the_nearest():
    with pytest.raises(OptionError, match="Did you mean 'reference'"):
        rewritten("select-kernels", kernels="referense")


def test_cuda_quantizers_take_the_transform_in(monkeypatch):
    monkeypatch.setattr(compiling, "available", lambda: "nvrtc 13.0")
    graph, ctx = rewritten("share-quantizers", **MIXED, family="two-level", rotate=128)
    rotations = len(graph.calls(ops.HADAMARD))
    assert rotations > 0
    SelectKernels()(graph, dataclasses.replace(ctx, target=Target.parse("cuda sm_90")))
    quantizers = graph.calls(LOWERED_QUANTIZE)
    assert len(quantizers) == rotations and not graph.calls(ops.HADAMARD)
    assert {node.args[3:] for node in quantizers} == {(128, "cuda.v1")}
    assert {m.packing for m in graph.matrices.values()} == {"cuda64.v1"}


def test_ops_of_a_users_pass_are_left_alone():
    """Ops without our annotation belong to whoever wrote them."""
    graph, _ = rewritten("share-quantizers")
    first = graph.calls(ops.DEQUANTIZE)[0]
    del first.meta["mixllm"]
    before = outputs(graph)
    changes = SelectKernels()(graph, Context(Options.parse({"kernels": "reference"})))
    assert len(changes) == 6
    assert torch.equal(outputs(graph), before)


# -- pack-weights --------------------------------------------------------------------------------


def test_packing_again_points_the_ops_to_the_new_blob():
    """As for a kernel with a layout of its own: codes move, the result does not."""
    graph, ctx = rewritten("select-kernels", **MIXED, kernels="reference")
    before = outputs(graph)

    def reverse(weight):
        return layouts.packing("plain.v1").pack(weight).flip(0)

    def restore(blob, layout):
        return layouts.packing("plain.v1").unpack(blob.flip(0).contiguous(), layout)

    layouts.register_packing(layouts.Packing("reversed.v1", reverse, restore))
    try:
        for matrix in graph.matrices.values():
            matrix.packing = "reversed.v1"
        PackWeights()(graph, ctx)
        graph.settle()
        for node in graph.calls(ops.MIXED_GEMM, ops.DEQUANTIZE):
            matrix = graph.matrices[quantized_of(node).matrix]
            assert node.args[4] == str(matrix.packed.layout)
            assert "reversed.v1" in node.args[4]
            assert graph.module._buffers[node.args[3].target] is matrix.packed.blob
        assert torch.equal(outputs(graph), before)
    finally:
        del layouts._PACKINGS["reversed.v1"]


def test_a_weight_is_packed_once_per_rows_and_transform():
    model = LlamaBlock()
    before = CACHE.packs
    for options in (MIXED, MIXED, {**MIXED, "rotate": 128}, {**MIXED, "rotate": 128}):
        passed(captured(model, X), "pack-weights", **options)
    assert CACHE.packs - before == 14


# -- modules that are quantized already ----------------------------------------------------------


def packed_mlp():
    torch.manual_seed(0)
    up, down = torch.randn(192, HIDDEN) / 9, torch.randn(HIDDEN, 192) / 9
    widths = torch.tensor([4, 8] * 96, dtype=torch.uint8)
    return nn.Sequential(
        PackedLinear(quantize_rtn(up, widths), torch.randn(192)),
        nn.ReLU(),
        PackedLinear(quantize_rtn(down, widths[:HIDDEN]), mode="token"),
    ).eval()


def test_packed_linears_are_captured_into_the_same_ops():
    model = packed_mlp()
    graph = captured(model, X)
    passed(graph, "pack-weights", kernels="reference")
    assert list(graph.matrices) == ["0", "2"]
    assert {m.kept_float for m in graph.matrices.values()} == {"quantized module"}
    assert len(graph.calls(ops.MIXED_GEMM)) == 2
    with torch.no_grad():
        eagerly = model(X)  # on the kernels of this CPU
        assert torch.equal(compiled(model, kernels="cpp")(X), eagerly)
        by_definition = compiled(model, kernels="reference")(X)
        assert torch.equal(outputs(graph), by_definition)
        torch.testing.assert_close(by_definition, eagerly)


def test_a_quantized_module_holds_what_the_quantizer_made():
    module = packed_mlp()[0]
    weight = module.quantized_weight()
    assert weight.counts() == {4: 96, 8: 96}
    assert torch.equal(pack(weight, "plain.v1").blob, module.packed)
