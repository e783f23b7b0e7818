"""Bad input gets a clear error, what works in float goes on working, and nothing is lost."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mixllm_compiler
from mixllm_compiler.errors import (
    GradModeError,
    GraphBreakError,
    MixLLMError,
    UnsupportedModel,
    WeightError,
)
from mixllm_compiler.runtime.weights import CACHE
from tests.helpers import (
    EAGER,
    HIDDEN,
    activations,
    assert_quantized,
    assert_still_works,
    captured,
    compiled,
    mlp,
    oracle,
    passed,
    refusal,
    refused,
    tiny_llama,
    token_ids,
)

X = activations(3)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


# -- shapes --------------------------------------------------------------------------------------


def test_k_smaller_than_a_group():
    model = nn.Sequential(nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 96)).eval()
    error = refused(model, X[:, :96])
    assert isinstance(error, UnsupportedModel)
    message = str(error)
    assert "none of 2 linears can be quantized" in message
    assert "0: K = 96 is smaller than a group of 128" in message
    assert "options={'group': 32}" in message
    y = compiled(model, group=32, bits=5)(X[:, :96])  # the cure that it names
    assert not torch.equal(y, model(X[:, :96]))


def test_no_linears():
    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 3)

        def forward(self, x):
            return self.conv(x)

    model, x = Convolution().eval(), torch.randn(2, 4, 9)
    error = refused(model, x)
    assert isinstance(error, UnsupportedModel)
    assert "no linear with a constant weight was found in Convolution" in str(error)
    assert torch.equal(compiled(model, partial=True)(x), model(x))


def test_no_linears_in_a_function():
    error = refusal(compiled(torch.sin), X)
    assert isinstance(error, UnsupportedModel)
    assert "no linear with a constant weight was found in this graph" in str(error)


def test_linears_that_all_stay_float_are_announced(caplog):
    model = mlp()
    assert torch.equal(compiled(model, exclude="*")(X), model(X))
    assert "nothing quantized, 2 linears kept float (0: excluded by '*'; 2: " in caplog.text


# -- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tokens", [3, 600])
def test_weights_that_are_not_finite_are_named(value, tokens):
    model, x = mlp(), activations(1, tokens)
    kept = model[2].weight[5, 7].clone()
    model[2].weight[5, 7] = value
    error = refused(model, x, widths=(4, 8), bits=5)
    assert isinstance(error, WeightError)
    assert "2.weight has 1 values that are NaN or infinite" in str(error)
    assert "exclude" in str(error)
    model[2].weight[5, 7] = kept
    assert_still_works(model, X)


def test_a_matrix_with_nan_can_be_excluded():
    model = mlp()
    model[2].weight[5, 7] = math.nan
    y, exact = compiled(model, exclude="2")(X), model(X)
    assert torch.equal(y.isnan(), exact.isnan())
    assert not torch.equal(y.nan_to_num(), exact.nan_to_num())


def test_weights_too_large_for_their_scale():
    model = mlp()
    model[0].weight[0, 0] = 1e30
    error = refused(model, X)
    assert isinstance(error, WeightError)
    assert "fp16 holds at most 65504" in str(error)
    assert "exclude it" in str(error)


def test_logits_that_are_not_finite_give_no_scores():
    model = tiny_llama(1)
    model.lm_head.weight[3] = math.inf  # stays float, and is no weight of a plan
    for call in (
        lambda: mixllm_compiler.score(model, token_ids(2, 16)),
        lambda: compiled(model, widths=(4, 8), bits=5)(token_ids(2, 600)),
    ):
        error = refusal(call)
        assert isinstance(error, UnsupportedModel)
        assert "the float model's own logits are NaN or infinite" in str(error)
        assert "bfloat16" in str(error)


def test_weights_that_are_not_finite_cannot_be_scored():
    model = tiny_llama(1)
    model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    for kind in ("fisher-sequence", "weight-error"):
        error = refusal(mixllm_compiler.score, model, token_ids(2, 16), kind=kind)
        assert isinstance(error, WeightError)
        assert "model.layers.0.mlp.up_proj.weight has 1 values that are NaN" in str(error)
    error = refusal(mixllm_compiler.score, model)  # on text that it should write itself
    assert isinstance(error, WeightError)
    assert "model.layers.0.mlp.up_proj.weight holds values that are NaN" in str(error)


def test_weights_in_integers():
    class Integers(nn.Module):
        """The codes of somebody else's quantizer."""

        def __init__(self):
            super().__init__()
            codes = torch.randint(-8, 8, (HIDDEN, HIDDEN), dtype=torch.int8)
            self.codes = nn.Parameter(codes, requires_grad=False)

        def forward(self, x):
            return F.linear(x, self.codes.to(x.dtype) * 0.01)

    error = refused(Integers().eval(), X)
    assert isinstance(error, UnsupportedModel)
    assert "codes is int8: this model is already quantized" in str(error)


def test_float8_weights():
    class Float8(nn.Module):
        def __init__(self):
            super().__init__()
            weight = torch.randn(HIDDEN, HIDDEN).to(torch.float8_e4m3fn)
            self.weight = nn.Parameter(weight, requires_grad=False)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return torch.matmul(x, self.weight.t().to(x.dtype)) * self.scale

    class Mixed(nn.Module):
        """What a model in float8 looks like where the product itself is in float8."""

        def __init__(self):
            super().__init__()
            self.plain = nn.Linear(HIDDEN, HIDDEN)
            self.w = nn.Parameter(torch.randn(HIDDEN, HIDDEN).to(torch.float8_e4m3fn), False)

        def forward(self, x):
            return self.plain(F.linear(x, self.w.to(x.dtype)))

    for model in (Float8().eval(), Mixed().eval()):
        error = refused(model, X)
        assert isinstance(error, UnsupportedModel)
        assert re.search(r"float8_e4m3fn.*already quantized", str(error))
        assert "compile the original checkpoint" in str(error)


def test_float64_weights():
    error = refused(mlp().double(), X.double())
    assert isinstance(error, UnsupportedModel)
    assert "0.weight is float64; linears are quantized from float32" in str(error)
    assert_still_works(mlp().double().float(), X)


def test_a_model_that_is_quantized_already():
    model = tiny_llama(1)
    plan = mixllm_compiler.plan(
        mixllm_compiler.score(model, token_ids(2, 16), kind="weight-error"), bits=5
    )
    mixllm_compiler.quantize(model, plan)
    ids = token_ids()
    exact = model(ids).logits
    for call in (
        lambda: mixllm_compiler.compile(model, bits=4.5, data=token_ids(2, 16), **EAGER),
        lambda: mixllm_compiler.score(model, token_ids(2, 16)),
        lambda: mixllm_compiler.quantize(model, plan),
    ):
        error = refusal(call)
        assert isinstance(error, MixLLMError)
        assert re.search("quantized (already|module)", str(error))
    assert torch.equal(model(ids).logits, exact)
    # It compiles as it is.
    assert torch.equal(compiled(model, kernels="reference")(ids).logits, exact)


# -- where the model is --------------------------------------------------------------------------


def test_meta_tensors():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)).eval()
    error = refused(model, X.to("meta"))
    assert isinstance(error, UnsupportedModel)
    message = str(error)
    assert "4 weights have no values (they are on the meta device), first 0.weight" in message
    assert "load the checkpoint" in message


def test_meta_tensors_are_refused_by_every_door():
    with torch.device("meta"):
        model = tiny_llama_on_meta()
    for call in (
        lambda: mixllm_compiler.score(model, token_ids(2, 16)),
        lambda: mixllm_compiler.score(model, token_ids(2, 16), kind="weight-error"),
        lambda: mixllm_compiler.score(model),
        lambda: mixllm_compiler.compile(model, bits=5, data=token_ids(2, 16)),
    ):
        error = refusal(call)
        assert isinstance(error, UnsupportedModel), error
        assert "meta device" in str(error)


def tiny_llama_on_meta():
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_a_model_on_two_devices():
    """Dynamo itself refuses to trace real mixtures; this is what the pass says of bindings."""
    graph = captured(mlp(), X)
    bindings = [b for b in graph.bindings.values() if b.name == "2.weight"]
    bindings[0].tensor = bindings[0].tensor.to("meta")
    with pytest.raises(UnsupportedModel) as error:
        passed(graph, "annotate-linears")
    message = str(error.value)
    assert "live on 2 devices (0.weight on cpu, 2.weight on meta)" in message
    assert "move the model to one device" in message


# -- the model's mode ----------------------------------------------------------------------------


def test_training_mode_at_every_door():
    model = tiny_llama(1).train()
    ids = token_ids()
    for call in (
        lambda: compiled(model)(ids),
        lambda: mixllm_compiler.compile(model, bits=5),
        lambda: mixllm_compiler.score(model, ids),
    ):
        error = refusal(call)
        assert isinstance(error, UnsupportedModel)
        assert "LlamaForCausalLM is in training mode" in str(error)
        assert "model.eval()" in str(error)
    model.eval()
    assert_quantized(compiled(model)(ids).logits, model(ids).logits, oracle(model)(ids).logits)


def test_an_input_that_wants_a_gradient():
    model = mlp()
    with torch.enable_grad():
        error = refusal(compiled(model), X.clone().requires_grad_())
    assert isinstance(error, GradModeError)
    assert re.search("the input .* requires a gradient", str(error))
    assert_still_works(model, X)


# -- one graph for a model -----------------------------------------------------------------------


def test_a_graph_break_that_splits_an_unplanned_model():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x):
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    model = Breaks().eval()
    error = refused(model, X)
    assert isinstance(error, GraphBreakError)
    for part in (
        "1 linears were planned",
        "first b",
        "broken by: ",
        "test_bad_input.py",
        "partial",
    ):
        assert part in str(error)
    assert_quantized(compiled(model, partial=True)(X), model(X), oracle(model)(X))


def test_a_released_weight():
    model, kept = mlp(), mlp()
    compiled(model, release=True)(X)
    error = refusal(compiled(model, widths=(8,), bits=9), X)
    assert isinstance(error, WeightError)
    assert "0.weight was released after an earlier compilation" in str(error)
    assert "reload the model" in str(error)
    model.load_state_dict(copy.deepcopy(kept.state_dict()), assign=True)
    assert_still_works(model, X)


# -- nothing lost --------------------------------------------------------------------------------


def test_a_failure_leaves_no_packed_weight_of_the_wrong_rows():
    """What was packed before the mistake was found is right, and is used again."""
    model = mlp()
    model[2].weight[0, 0] = math.nan
    refused(model, X)
    model[2].weight[0, 0] = 0
    before = CACHE.packs
    assert_still_works(model, X)
    assert CACHE.packs - before <= 2
