"""A wrong option, or a plan of another model: named, with what would be right."""

from __future__ import annotations

import re

import pytest
import torch

import mixllm_compiler
from mixllm_compiler.errors import BudgetError, OptionError, PlanMismatch
from tests.helpers import (
    activations,
    assert_still_works,
    compiled,
    mlp,
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


# -- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, message",
    [
        ({"bit": 4.4}, "unknown option 'bit'. Did you mean 'bits'?"),
        ({"pre_set": "paper"}, "unknown option 'pre_set'. Did you mean 'preset'?"),
        ({"xyz": 1}, "unknown option 'xyz'. Known: bits, disable, dump, exclude, f"),
        ({"preset": "papr"}, "unknown preset 'papr'. Did you mean 'paper'?"),
        ({"lower": "inducto"}, "unknown lower 'inducto'. Did you mean 'inductor'?"),
        ({"pipeline": "anotate-linears"}, "unknown pass 'anotate-linears'. Did you mean 'annotate"),
        ({"disable": ("packweights",)}, "cannot disable 'packweights'. Did you mean 'pack-weight"),
        ({"kernels": "tritn"}, "unknown lowering 'tritn'. Did you mean 'triton'?"),
        ({"widths": (4, 7)}, "a row cannot have 7 bits; widths are (2, 3, 4, 5, 6, 8)"),
        ({"widths": ()}, "widths is empty; choose from (2, 3, 4, 5, 6, 8)"),
        ({"pins": {"0": 9}}, "a row cannot have 9 bits"),
        ({"window": 100}, "a window of 100 rows cannot be cut into tiles of 64; take window=128"),
        ({"tp": 0}, "tp = 0 is no number of rows from 1 on"),
        ({"formats_per_layer": 0}, "formats_per_layer = 0 leaves rows no width"),
        ({"group": 100}, "group size 100 is not a multiple of 16"),
        ({"bits": 0.5}, "bits = 0.5 is no budget in bits per weight (1 to 16)"),
        ({"rotate": 100}, "rotate = 100: a Hadamard block is a power of two, or 0"),
        ({"exclude": "3"}, "the pattern '3' matches none of 2 linears. Known: 0, 2"),
        ({"plan": 4.4}, "plan must be a Plan or a path, not float"),
    ],
)
def test_options_name_the_nearest(given, message):
    model = mlp()
    error = refused(model, X, **given)
    assert isinstance(error, OptionError)
    assert message in str(error)
    assert_still_works(model, X)


def test_a_budget_that_cannot_be_met_says_what_can():
    error = refused(mlp(), X, widths=(4, 8), bits=4)
    assert isinstance(error, BudgetError)
    assert re.search(r"take from 4\.\d+ bits .* to 8\.\d+ bits", str(error))


def test_a_plan_file_that_is_not_there(tmp_path):
    error = refusal(compiled(mlp(), plan=tmp_path / "plan.safetensors"), X)
    assert isinstance(error, FileNotFoundError)
    assert "plan.safetensors" in str(error)


def test_a_plan_file_that_holds_something_else(tmp_path):
    path = tmp_path / "plan.safetensors"
    path.write_bytes(b"not a plan")
    error = refused(mlp(), X, plan=path)
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


def test_errors_are_ours_when_caught_at_the_call():
    """Dynamo wraps what a backend raises; its text still starts with our name and message."""
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as error:
        compiled(mlp(), bit=4)(X)
    assert "OptionError: unknown option 'bit'. Did you mean 'bits'?" in str(error.value)
    assert isinstance(error.value.inner_exception, OptionError)
    assert isinstance(error.value.inner_exception, ValueError)
