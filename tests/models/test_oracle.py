"""Compiled models against eager ones whose linears compute in float64 (`support.OracleLinear`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import mixllm_compiler
from mixllm_compiler.allocation.plan import Plan
from tests.helpers import EAGER, token_ids
from tests.models.support import ARCHITECTURES, build, kl, oracle_of, plan_of

IDS = token_ids(2, 96)
PROMPTS = token_ids(64, 9, seed=2)
ROWS = 4
NEW_TOKENS = 64
TIE = 1e-3  # closer logits may change places by rounding


class Case(NamedTuple):
    exact: Any
    oracle: Any
    compiled: Any
    plan: Plan


def make(
    kind: str, dtype: torch.dtype = torch.float32, preset: str = "best", **options: Any
) -> Case:
    exact, model = build(kind, dtype=dtype), build(kind, dtype=dtype)
    plan = plan_of(exact, IDS, preset=preset)
    assert len(plan.rows_per_width()) > 1  # a mix
    compiled = mixllm_compiler.compile(model, plan=plan, **{**EAGER, **options})
    return Case(exact, oracle_of(exact, plan), compiled, plan)


@pytest.fixture(scope="module", params=[*ARCHITECTURES, "llama paper", "gpt2 paper"])
def case(request):
    kind, _, preset = request.param.partition(" ")
    return make(kind, preset=preset or "best")


@torch.no_grad()
def kl_ratio(case: Case) -> float:
    """KL(compiled ‖ oracle) / KL(oracle ‖ float)."""
    exact, oracle, compiled = (m(IDS).logits for m in (case.exact, case.oracle, case.compiled))
    quantization = kl(oracle, exact)
    assert quantization > 1e-4, "quantization changes nothing here: a useless test"
    return kl(compiled, oracle) / quantization


def generate(model: Any, prompts: Tensor, cache: str) -> tuple[Tensor, Tensor]:
    """Greedy tokens [B, T] after the prompts, and the gaps between the two largest logits."""
    implementation = {} if cache == "dynamic" else {"cache_implementation": cache}
    out = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
        **implementation,
    )
    top = torch.stack(out.logits, 1).float().topk(2).values
    return out.sequences[:, prompts.shape[1] :], top[..., 0] - top[..., 1]


def clear_prompts(oracle: Any) -> Tensor:
    """Prompts after which the oracle chooses every token by a good margin.

    An activation that lies half-way between two codes may round either way, and in random models
    one code moves logits by up to 0.03; what a token is must not hang on it.
    """
    _, gaps = generate(oracle, PROMPTS, "dynamic")
    return PROMPTS[gaps.amin(1).topk(ROWS).indices]


def compared_tokens(tokens: Tensor, expected: Tensor, gaps: Tensor) -> int:
    """Tokens that must be and are equal: all of a row up to its first near tie."""
    count = 0
    for row in range(len(expected)):
        near = (gaps[row] < TIE).nonzero().flatten().tolist()
        until = near[0] if near else NEW_TOKENS
        assert torch.equal(tokens[row, :until], expected[row, :until]), (row, until)
        count += until
    return count


def test_logits_are_those_of_the_oracle(case):
    assert kl_ratio(case) < 0.01


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generated_tokens_are_those_of_the_oracle(case, cache):
    prompts = clear_prompts(case.oracle)
    expected, gaps = generate(case.oracle, prompts, cache)
    tokens, _ = generate(case.compiled, prompts, cache)
    assert compared_tokens(tokens, expected, gaps) == ROWS * NEW_TOKENS


def test_the_oracle_does_not_write_what_the_float_model_writes(case):
    """Otherwise equal tokens would prove nothing."""
    (expected, _), (exact, _) = (generate(m, PROMPTS, "dynamic") for m in (case.oracle, case.exact))
    assert not torch.equal(expected, exact)


@pytest.mark.parametrize("kind, dtype", [("llama", torch.bfloat16), ("gpt2", torch.float16)])
def test_logits_of_half_precision_models_are_those_of_the_oracle(kind, dtype):
    assert kl_ratio(make(kind, dtype)) < 0.01


def test_logits_under_a_paper_plan_with_pins_and_exclusions_are_those_of_the_oracle():
    exact, model = build("llama"), build("llama")
    scores = mixllm_compiler.score(exact, IDS, kind="weight-error", preset="paper")
    plan = mixllm_compiler.plan(
        scores, preset="paper", pins={"*.down_proj": 8}, exclude=("*.1.self_attn.*",)
    )
    compiled = mixllm_compiler.compile(model, plan=plan, **EAGER)
    assert kl_ratio(Case(exact, oracle_of(exact, plan), compiled, plan)) < 0.01


@pytest.mark.parametrize(
    "recipe", [{"family": "asym"}, {"rotate": 0}, {"rotate": 32, "group": 64}], ids=str
)
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_logits_of_mixed_recipes_are_those_of_the_oracle(kind, recipe):
    exact, model = build(kind), build(kind)
    plan = plan_of(exact, IDS, bits=4.8, **recipe)
    assert plan.activation_mode == ("group" if recipe.get("rotate") == 0 else "token")
    compiled = mixllm_compiler.compile(model, plan=plan, **EAGER)
    assert kl_ratio(Case(exact, oracle_of(exact, plan), compiled, plan)) < 0.01


@pytest.mark.slow
def test_through_inductor_tokens_and_logits_are_those_of_the_oracle():
    case = make("llama", lower="inductor")
    prompts = clear_prompts(case.oracle)
    expected, gaps = generate(case.oracle, prompts, "static")
    tokens, _ = generate(case.compiled, prompts, "static")
    assert compared_tokens(tokens, expected, gaps) == ROWS * NEW_TOKENS
    assert kl_ratio(case) < 0.01
