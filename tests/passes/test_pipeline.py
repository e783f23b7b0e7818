"""The order of passes: checked, changed by text or list, extended by users."""

from __future__ import annotations

import pytest
import torch

from mixllm_compiler import Pass, Pipeline, register_pass
from mixllm_compiler.errors import OptionError
from mixllm_compiler.options import Options
from mixllm_compiler.passes.base import Changes, PassError
from mixllm_compiler.passes.context import Context
from mixllm_compiler.passes.pipeline import (
    OWN_PASSES,
    choose_pipeline,
    default_pipeline,
    parse,
)
from mixllm_compiler.passes.rotate_inputs import RotateInputs
from mixllm_compiler.runtime import records
from tests.helpers import (
    W4,
    LlamaBlock,
    activations,
    assert_quantized,
    captured,
    compiled,
    mlp,
    oracle,
    outputs,
    refusal,
)

X = activations(2, 5)
NAMES = [p.name for p in OWN_PASSES]


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def run(pipeline, graph, **options):
    ctx = Context(Options.parse({**W4, **options}))
    pipeline.run(graph, ctx)
    return ctx


# -- order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [p for p in OWN_PASSES if p.requires])
def test_a_pass_without_its_facts_is_refused(make):
    graph = captured(mlp(), X)
    with pytest.raises(PassError) as error:
        make()(graph, Context(Options()))
    assert f"{make.name} needs {', '.join(sorted(make.requires))}" in str(error.value)
    assert "established so far: nothing" in str(error.value)


def test_the_default_order_meets_every_requirement():
    facts = set()
    for make in OWN_PASSES:
        assert set(make.requires) <= facts, make.name
        facts |= set(make.ensures)


@pytest.mark.parametrize("at", range(len(OWN_PASSES) - 1))
def test_two_passes_in_the_wrong_order_are_refused_or_harmless(at):
    """Neighbours that need each other cannot be swapped; the others give the same result."""
    passes = default_pipeline().passes
    passes[at], passes[at + 1] = passes[at + 1], passes[at]
    graph = captured(LlamaBlock(), X)
    if set(passes[at].requires) & set(passes[at + 1].ensures):
        with pytest.raises(PassError):
            run(Pipeline(passes), graph)
    else:
        run(Pipeline(passes), graph)
        usual = captured(LlamaBlock(), X)
        run(default_pipeline(), usual)
        assert torch.equal(outputs(graph), outputs(usual))


def test_stages_come_in_order():
    order = ["annotate", "transform", "plan", "rewrite", "lower"]
    stages = [order.index(p.stage) for p in OWN_PASSES]
    assert stages == sorted(stages)


def test_every_pass_says_what_it_is():
    for make in OWN_PASSES:
        assert make.name.replace("-", "_") == make.__module__.rpartition(".")[2]
        assert make.ensures


# -- choosing ------------------------------------------------------------------------------------


def test_disabled_passes_do_not_run():
    model = LlamaBlock()
    with records.collect() as graphs:
        y = compiled(model, disable=("share-quantizers",))(X)
    assert_quantized(y, model(X), oracle(model)(X))
    ran = [name for name, *_ in graphs[0].passes]
    assert ran == [name for name in NAMES if name != "share-quantizers"]
    assert graphs[0].code.count("quantize_activation(") == 7


def test_the_semantic_ops_run_without_the_lower_stage():
    model = LlamaBlock()
    y = compiled(model, disable=("select-kernels", "fuse-quantizers", "pack-weights"))(X)
    assert_quantized(y, model(X), oracle(model)(X))


@pytest.mark.parametrize("name", ["allocate-bits", "canonicalize-linears", "quantize-weights"])
def test_disabling_what_others_need_is_refused_by_the_first_of_them(name):
    error = refusal(compiled(mlp(), disable=name), X)
    assert isinstance(error, PassError)


def test_disabling_an_unknown_pass_names_the_nearest():
    error = refusal(compiled(mlp(), disable="share-quantiser"), X)
    assert isinstance(error, OptionError)
    assert "cannot disable 'share-quantiser'. Did you mean 'share-quantizers'?" in str(error)


def test_an_unknown_pass_in_a_pipeline_names_the_nearest():
    error = refusal(compiled(mlp(), pipeline="canonicalise-linears"), X)
    assert isinstance(error, OptionError)
    assert "unknown pass 'canonicalise-linears'. Did you mean 'canonicalize-linears'?" in str(error)


def test_an_argument_that_a_pass_does_not_take():
    with pytest.raises(OptionError, match=r"pass 'rotate-inputs': .*'blocks'"):
        parse("rotate-inputs{blocks=64}")


@pytest.mark.parametrize(
    "text",
    [
        "rotate-inputs{block}",
        "rotate-inputs{block=}",
        "rotate-inputs{block=64",
        "a b",
        "!",
        "rotate-inputs;",
    ],
)
def test_text_that_is_no_pipeline(text):
    with pytest.raises(OptionError):
        parse(text)


@pytest.mark.parametrize("given", [3, ["rotate-inputs"], OWN_PASSES[0]])
def test_a_pipeline_is_text_or_a_pipeline(given):
    with pytest.raises(OptionError, match="spec text or a Pipeline"):
        choose_pipeline(given, ())


def test_the_default_pipeline_as_text():
    text = default_pipeline().spec()
    assert text == ",".join(NAMES)
    assert parse(text).spec() == text


def test_arguments_in_text_reach_the_pass():
    pipeline = parse("rotate-inputs{block=64}, annotate-salience{kind=weight-error}")
    assert pipeline.passes[0].block == 64
    assert pipeline.passes[1].kind == "weight-error"
    assert pipeline.spec() == "rotate-inputs{block=64},annotate-salience{kind=weight-error}"


def test_defaults_are_left_out_of_the_text():
    assert RotateInputs(block=0).spec() == "rotate-inputs"


def test_a_pipeline_given_as_text_runs():
    model = LlamaBlock()
    text = ",".join(NAMES).replace("rotate-inputs", "rotate-inputs{block=128}")
    with records.collect() as graphs:
        y = compiled(model, pipeline=text)(X)
    expected = oracle(model, mode="group", block=128)(X)
    assert_quantized(y, model(X), expected)
    assert "hadamard" in graphs[0].code


def test_a_pipeline_given_as_an_object_runs():
    model = LlamaBlock()
    pipeline = Pipeline([p for p in default_pipeline().passes if p.name != "share-quantizers"])
    y = compiled(model, pipeline=pipeline)(X)
    assert_quantized(y, model(X), oracle(model)(X))


def test_pipelines_nest():
    inner = Pipeline(default_pipeline().passes[:3])
    outer = Pipeline([inner, *default_pipeline().passes[3:]])
    assert outer.names() == NAMES
    assert outer.spec() == default_pipeline().spec()
    graph = captured(mlp(), X)
    run(outer, graph)
    assert all(m.packed is not None for m in graph.matrices.values())


def test_until_includes_its_name():
    assert default_pipeline().until("rotate-inputs").names() == NAMES[:3]
    with pytest.raises(OptionError, match="no pass 'rotate-input' in this pipeline"):
        default_pipeline().until("rotate-input")


# -- users' passes -------------------------------------------------------------------------------


@pytest.fixture
def registry():
    """Everything registered during a test is forgotten after it."""
    from mixllm_compiler.passes import registry as module

    kept = dict(module._REGISTERED)
    yield module
    module._REGISTERED.clear()
    module._REGISTERED.update(kept)
    module._load_entry_points.cache_clear()


def test_a_registered_class_runs_in_its_place(registry):
    @register_pass(after="allocate-bits")
    class RaiseDownProjections(Pass):
        name = "raise-down-projections"
        stage = "plan"
        requires = {"planned"}

        def run(self, graph, ctx):
            changes = Changes()
            for matrix in graph.active():
                if matrix.name.endswith("down_proj"):
                    matrix.widths = torch.full((matrix.n,), 8, dtype=torch.uint8)
                    changes.add(matrix.name, "raised")
            return changes

    names = default_pipeline().names()
    assert names[names.index("allocate-bits") + 1] == "raise-down-projections"
    model = LlamaBlock()
    with records.collect() as graphs:
        y = compiled(model)(X)
    widths = {f"self_attn.{p}_proj": 4 for p in "qkvo"}
    widths |= {"mlp.gate_proj": 4, "mlp.up_proj": 4, "mlp.down_proj": 8}
    assert_quantized(y, model(X), oracle(model, widths)(X))
    assert {line.name: line.rows for line in graphs[0].quantized}["mlp.down_proj"] == {8: 128}


def test_ten_lines_over_a_plain_graph_module(registry):
    @register_pass(after="share-quantizers")
    def silu_to_relu(gm):
        for node in gm.graph.nodes:
            if node.target is torch.nn.functional.silu:
                node.target = torch.nn.functional.relu
        gm.graph.eliminate_dead_code()
        gm.recompile()
        return gm

    class Relu(LlamaBlock):
        def forward(self, x):
            x = x + self.self_attn(self.input_layernorm(x))
            h, mlp = self.post_attention_layernorm(x), self.mlp
            return x + mlp.down_proj(mlp.gate_proj(h).relu() * mlp.up_proj(h))

    model = LlamaBlock()
    with records.collect() as graphs:
        y = compiled(model)(X)
    assert_quantized(y, Relu()(X), oracle(Relu())(X))
    assert ("silu-to-relu", "user", 1) in [p[:3] for p in graphs[0].passes]


def test_a_pass_known_by_name_only_runs_where_the_text_says(registry):
    seen = []

    @register_pass(name="look-at-it")
    def look(gm):
        seen.append(len(gm.graph.nodes))

    assert "look-at-it" not in default_pipeline().names()
    compiled(mlp(), pipeline=default_pipeline().spec() + ",look-at-it")(X)
    assert len(seen) == 1


def test_a_registered_pass_can_be_disabled(registry):
    @register_pass(after="pack-weights")
    def never(gm):
        raise AssertionError

    model = mlp()
    assert_quantized(compiled(model, disable="never")(X), model(X), oracle(model)(X))


def test_a_function_that_returns_another_module_is_refused(registry):
    @register_pass(after="pack-weights")
    def copy_it(gm):
        return torch.fx.GraphModule(gm, gm.graph)

    error = refusal(compiled(mlp()), X)
    assert isinstance(error, PassError)
    assert "copy-it returned another GraphModule; change the one it is given" in str(error)


def test_names_of_our_passes_are_taken(registry):
    with pytest.raises(OptionError, match="is a pass of mixllm-compiler"):
        register_pass(name="rotate-inputs")(lambda gm: gm)


def test_a_pass_without_a_name_is_refused(registry):
    with pytest.raises(OptionError, match="has no name"):
        register_pass()(type("Nameless", (Pass,), {}))


def test_a_place_behind_no_pass_is_refused(registry):
    register_pass(after="rotate-input", name="lost")(lambda gm: gm)
    error = refusal(compiled(mlp()), X)
    assert isinstance(error, OptionError)
    assert "'lost' wants to run after 'rotate-input', which is no pass" in str(error)
    assert "Did you mean 'rotate-inputs'?" in str(error)


def test_passes_may_follow_registered_passes(registry):
    register_pass(after="rotate-inputs", name="first")(lambda gm: None)
    register_pass(after="first", name="second")(lambda gm: None)
    assert default_pipeline().names()[2:5] == ["rotate-inputs", "first", "second"]


def entry_points_of(monkeypatch, registry, *loaded):
    class Point:
        def __init__(self, value):
            self.load = lambda: value

    monkeypatch.setattr(registry, "entry_points", lambda group: [Point(v) for v in loaded])
    registry._load_entry_points.cache_clear()


def test_a_class_from_an_entry_point_takes_its_place(registry, monkeypatch):
    ran = []

    class Count(Pass):
        name = "count-linears"
        after = "annotate-linears"
        requires = {"annotated"}

        def run(self, graph, ctx):
            ran.append(len(graph.matrices))

    entry_points_of(monkeypatch, registry, Count)
    assert "count-linears" in default_pipeline().names()
    assert "count-linears" in registry.known_passes()
    compiled(mlp())(X)
    assert ran == [2]


def test_an_entry_point_whose_module_registers_itself(registry, monkeypatch):
    def plugin():
        return None

    register_pass(after="pack-weights", name="plugin")(plugin)
    entry_points_of(monkeypatch, registry, plugin)
    assert default_pipeline().names()[-1] == "plugin"


def test_entry_points_are_asked_for_by_our_group(registry, monkeypatch):
    groups = []
    monkeypatch.setattr(registry, "entry_points", lambda group: groups.append(group) or [])
    registry._load_entry_points.cache_clear()
    default_pipeline()
    default_pipeline()
    assert groups == ["mixllm.passes"]
