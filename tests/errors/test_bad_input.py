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
    BudgetError,
    GradModeError,
    GraphBreakError,
    MixLLMError,
    OptionError,
    PlanMismatch,
    UnsupportedModel,
    WeightError,
)
from mixllm_compiler.runtime.weights import CACHE
from tests.helpers import (
    EAGER,
    HIDDEN,
    activations,
    assert_quantized,
    captured,
    compiled,
    mlp,
    oracle,
    passed,
    refusal,
    tiny_llama,
    token_ids,
)

X = activations(3)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def refused(model, x=X, **options):
    """The error of a call through the backend, after which the float model is as it was."""
    before = bytes_of(model)
    error = refusal(compiled(model, **options), x)
    assert isinstance(error, MixLLMError), error
    assert bytes_of(model) == before
    return error


def bytes_of(model):
    state = model.state_dict().items()
    return {
        name: value.flatten().view(torch.uint8).numpy().tobytes()
        for name, value in state
        if value.device.type != "meta"
    }


def assert_still_works(model, x=X):
    """In float by itself, and quantized as soon as the mistake is mended."""
    assert model(x).isfinite().all()
    torch._dynamo.reset()
    assert_quantized(compiled(model)(x), model(x), oracle(model)(x))


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
    assert_still_works(model)


def test_a_matrix_with_nan_can_be_excluded():
    model = mlp()
    model[2].weight[5, 7] = math.nan
    y, exact = compiled(model, exclude="2")(X), model(X)
    assert torch.equal(y.isnan(), exact.isnan())
    assert not torch.equal(y.nan_to_num(), exact.nan_to_num())


def test_weights_too_large_for_their_scale():
    model = mlp()
    model[0].weight[0, 0] = 1e30
    error = refused(model)
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

    error = refused(Integers().eval())
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
        error = refused(model)
        assert isinstance(error, UnsupportedModel)
        assert re.search(r"float8_e4m3fn.*already quantized", str(error))
        assert "compile the original checkpoint" in str(error)


def test_float64_weights():
    error = refused(mlp().double(), X.double())
    assert isinstance(error, UnsupportedModel)
    assert "0.weight is float64; linears are quantized from float32" in str(error)
    assert_still_works(mlp().double().float())


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
    assert torch.equal(compiled(model)(ids).logits, exact)  # it compiles as it is


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
    assert_still_works(model)


# -- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, message",
    [
        ({"bit": 4.4}, "unknown option 'bit'. Did you mean 'bits'?"),
        ({"pre_set": "paper"}, "unknown option 'pre_set'. Did you mean 'preset'?"),
        ({"xyz": 1}, "unknown option 'xyz'. Known: bits, disable, dump, exclude, group"),
        ({"preset": "papr"}, "unknown preset 'papr'. Did you mean 'paper'?"),
        ({"lower": "inducto"}, "unknown lower 'inducto'. Did you mean 'inductor'?"),
        ({"pipeline": "anotate-linears"}, "unknown pass 'anotate-linears'. Did you mean 'annotate"),
        ({"disable": ("packweights",)}, "cannot disable 'packweights'. Did you mean 'pack-weight"),
        ({"kernels": "tritn"}, "unknown lowering 'tritn'. Did you mean 'triton'?"),
        ({"widths": (4, 7)}, "a row cannot have 7 bits; widths are (2, 3, 4, 5, 6, 8)"),
        ({"widths": ()}, "widths is empty; choose from (2, 3, 4, 5, 6, 8)"),
        ({"pins": {"0": 9}}, "a row cannot have 9 bits"),
        ({"group": 100}, "group size 100 is not a multiple of 16"),
        ({"bits": 0.5}, "bits = 0.5 is no budget in bits per weight (1 to 16)"),
        ({"rotate": 100}, "rotate = 100: a Hadamard block is a power of two, or 0"),
        ({"exclude": "3"}, "the pattern '3' matches none of 2 linears. Known: 0, 2"),
        ({"plan": 4.4}, "plan must be a Plan or a path, not float"),
    ],
)
def test_options_name_the_nearest(given, message):
    model = mlp()
    error = refused(model, **given)
    assert isinstance(error, OptionError)
    assert message in str(error)
    assert_still_works(model)


def test_a_budget_that_cannot_be_met_says_what_can():
    error = refused(mlp(), widths=(4, 8), bits=4)
    assert isinstance(error, BudgetError)
    assert re.search(r"take from 4\.\d+ bits .* to 8\.\d+ bits", str(error))


def test_a_plan_file_that_is_not_there(tmp_path):
    error = refusal(compiled(mlp(), plan=tmp_path / "plan.safetensors"), X)
    assert isinstance(error, FileNotFoundError)
    assert "plan.safetensors" in str(error)


def test_a_plan_file_that_holds_something_else(tmp_path):
    path = tmp_path / "plan.safetensors"
    path.write_bytes(b"not a plan")
    error = refused(mlp(), plan=path)
    assert isinstance(error, OptionError)
    assert "plan.safetensors" in str(error)


# -- plans ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned():
    model = tiny_llama(1)
    scores = mixllm_compiler.score(model, token_ids(2, 16), kind="weight-error")
    return mixllm_compiler.plan(scores, bits=5)


def test_a_plan_for_a_wider_model(planned):
    model = tiny_llama(1, intermediate_size=384)
    error = refused(model, token_ids(), plan=planned)
    assert isinstance(error, PlanMismatch)
    lines = str(error).splitlines()
    assert lines[0] == "this plan was made for another model."
    assert lines[1] == f"  plan:  7 matrices (float32), fingerprint {planned.fingerprint.digest}"
    assert re.fullmatch(r"  model: 7 matrices \(float32\), fingerprint [0-9a-f]{12}", lines[2])
    assert lines[3] == (
        "  first difference: model.layers.0.mlp.gate_proj is [384, 128], the plan says [256, 128]"
    )
    assert lines[4].startswith("Make one with mixllm_compiler.plan(mixllm_compiler.score(")
    assert model(token_ids()).logits.isfinite().all()


def test_a_plan_for_other_weights(planned):
    error = refused(tiny_llama(1, seed=5), token_ids(), plan=planned)
    assert isinstance(error, PlanMismatch)
    assert "made for other weights of the same architecture" in str(error)
    assert "7 of 7 matrices hold other values" in str(error)


def test_a_plan_for_a_deeper_model(planned):
    error = refused(tiny_llama(2), token_ids(), plan=planned)
    assert isinstance(error, PlanMismatch)
    assert "model.layers.1.self_attn.q_proj is not in the plan" in str(error)


def test_a_foreign_plan_is_refused_before_any_weight_changes(planned):
    model, ids = tiny_llama(1, seed=5), token_ids()
    exact, modules = model(ids).logits, dict(model.named_modules())
    assert isinstance(refusal(mixllm_compiler.quantize, model, planned), PlanMismatch)
    assert dict(model.named_modules()) == modules
    assert torch.equal(model(ids).logits, exact)


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
    error = refused(model)
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
    assert_still_works(model)


# -- nothing lost --------------------------------------------------------------------------------


def test_a_failure_leaves_no_packed_weight_of_the_wrong_rows():
    """What was packed before the mistake was found is right, and is used again."""
    model = mlp()
    model[2].weight[0, 0] = math.nan
    refused(model)
    model[2].weight[0, 0] = 0
    before = CACHE.packs
    assert_still_works(model)
    assert CACHE.packs - before <= 2


def test_errors_are_ours_when_caught_at_the_call():
    """Dynamo wraps what a backend raises; its text still starts with our name and message."""
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as error:
        compiled(mlp(), bit=4)(X)
    assert "OptionError: unknown option 'bit'. Did you mean 'bits'?" in str(error.value)
    assert isinstance(error.value.inner_exception, OptionError)
    assert isinstance(error.value.inner_exception, ValueError)
