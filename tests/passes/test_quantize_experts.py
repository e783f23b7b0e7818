"""Experts quantized on calibration text: on their own tokens, or to nearest where those are few."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mixllm_compiler
from mixllm_compiler.allocation.plan import Plan
from mixllm_compiler.errors import UnsupportedModel
from mixllm_compiler.formats.neutral import QuantizedWeight
from mixllm_compiler.options import Options
from mixllm_compiler.passes.captured_model import capture_model
from mixllm_compiler.passes.quantize_experts import pairs
from mixllm_compiler.passes.quantize_model import (
    QuantizingRun,
    Recipe,
    dequantized,
    quantize_model,
)
from mixllm_compiler.quantizers.encode import encode
from mixllm_compiler.runtime import records
from tests.helpers import EAGER, HIDDEN, PLAIN, token_ids
from tests.models.support import build, experts, handed_over, kl, mixed_ops, plan_of

IDS = token_ids(8, 64)
QUICK = Recipe(sweeps=0)


def plan_for(model: Any, **options: Any) -> Plan:
    return plan_of(model, IDS, bits=4.2, **{"widths": (3, 4, 8), **PLAIN, **options})


def same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    return torch.equal(a.dequantize(), b.dequantize())


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, rotate, dtype",
    [("mixtral", 128, torch.float32), ("qwen2_moe", 0, torch.bfloat16)],
)
@torch.no_grad()
def test_a_compiled_model_runs_the_calibrated_experts(kind, rotate, dtype):
    exact = build(kind, dtype=dtype)
    plan = plan_for(exact, rotate=rotate, family="two-level")
    wanted = exact(IDS).logits
    off = {}
    for quantizer in ("rtn", "gptq"):
        model = build(kind, dtype=dtype)
        with handed_over() as graphs:
            compiled = mixllm_compiler.compile(
                model, plan=plan, quantizer=quantizer, data=IDS, **EAGER
            )
            off[quantizer] = kl(compiled(IDS).logits, wanted)
        found = mixed_ops(graphs[-1])
        for name in experts(model):
            assert dict(found[name].widths) == plan.sites[name].rows_per_width()
    assert off["gptq"] < 0.8 * off["rtn"]  # on the text that it was calibrated on


def run_of(model: Any, plan: Plan, recipe: Recipe, batch: int = 4) -> QuantizingRun:
    captured = capture_model(
        model, IDS.split(batch), Options(plan=plan, rotate=plan.rotation, quiet=True)
    )
    return QuantizingRun(captured, plan.sites, plan.activation_mode, recipe)


def inputs_of(model: Any, layer: int, expert: int) -> Tensor:
    """Tokens [S_e, K] that the router of a float model sends to an expert."""
    mlp, found = model.model.layers[layer].mlp, []

    def look(_: Any, args: tuple[Tensor, ...]) -> None:
        hidden, chosen, _ = args
        found.append(hidden[(chosen == expert).any(1)])

    handle = mlp.experts.register_forward_pre_hook(look)
    model(IDS, use_cache=False)
    handle.remove()
    return torch.cat(found)


@torch.no_grad()
def test_an_expert_is_calibrated_on_its_own_tokens(monkeypatch):
    """Without propagation these are the float model's, quantized."""
    seen = {}
    solve = QuantizingRun._solve

    def watched(run: QuantizingRun, matrices: Any, moments: Any) -> None:
        seen.update({m.name: (moments.tokens, moments.second()) for m in matrices})
        solve(run, matrices, moments)

    monkeypatch.setattr(QuantizingRun, "_solve", watched)
    model = build("mixtral")
    plan = plan_for(model)
    run_of(model, plan, Recipe(propagate=False, sweeps=0)).run()
    for layer, expert in ((0, 1), (1, 3)):
        x = dequantized(inputs_of(model, layer, expert), plan.activation_mode, 128)
        tokens, h = seen[f"model.layers.{layer}.mlp.experts.gate_up_proj.{expert}"]
        assert tokens == len(x)
        assert torch.allclose(h, x.t() @ x / len(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_with_a_refit_only_tokens_count_that_both_models_route_alike(monkeypatch):
    seen = {}
    solve = QuantizingRun._solve

    def watched(run: QuantizingRun, matrices: Any, moments: Any) -> None:
        seen.update({m.name: moments.tokens for m in matrices})
        solve(run, matrices, moments)

    monkeypatch.setattr(QuantizingRun, "_solve", watched)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    counts = []
    for refit in (False, True):
        model = build("mixtral")
        run_of(model, plan_for(model), Recipe(refit=refit, sweeps=0)).run()
        counts.append([seen[f"{name}.{e}"] for e in range(4)])
    ours, both = counts
    assert sum(ours) == 2 * IDS.numel()  # two experts a token
    assert min(both) > 0
    assert sum(both) < sum(ours)  # quantization sent some tokens elsewhere


@torch.no_grad()
def test_experts_with_few_tokens_are_rounded_to_nearest_and_listed(caplog):
    model = build("mixtral", num_local_experts=6)
    for layer in model.model.layers:
        gate, (v, w) = layer.mlp.gate.weight, torch.randn(2, HIDDEN)
        gate.zero_()
        gate[:4] = torch.stack((v, -v, w, -w))  # experts 4 and 5 are never among the best two
    plan = plan_for(model)
    with caplog.at_level(logging.WARNING, "mixllm_compiler"):
        found = quantize_model(model, plan, IDS, QUICK, batch=4)
    assert found.keys() == plan.sites.keys()
    (line,) = [r.getMessage() for r in caplog.records if "fewer tokens" in r.getMessage()]
    for name, w in experts(model).items():
        site = plan.sites[name]
        nearest = encode(w.float(), site.widths, site.group, site.family).stored()
        if name.endswith((".4", ".5")):
            assert name in line
            assert same(found[name], nearest), name
        elif name not in line:
            assert not same(found[name], nearest), name
    assert "layers.0.mlp.experts.gate_up_proj.0" not in line  # a few are listed, not all


@torch.no_grad()
def test_the_result_is_deterministic():
    model = build("qwen2_moe")
    plan = plan_for(model)
    first, again = (quantize_model(model, plan, IDS, QUICK, batch=4) for _ in range(2))
    assert all(same(first[name], again[name]) for name in experts(model))


@torch.no_grad()
def test_a_product_with_an_excluded_expert_stays_float_as_a_whole():
    model = build("mixtral")
    scores = mixllm_compiler.score(model, IDS, kind="weight-error", widths=(3, 4, 8))
    down = "model.layers.1.mlp.experts.down_proj"
    plan = mixllm_compiler.plan(scores, bits=4.2, exclude=(f"{down}.2",))
    with records.collect() as graphs:
        mixllm_compiler.compile(model, plan=plan, quantizer="gptq", data=IDS, **EAGER)(IDS)
    kept = {line.name: line.kept_float for line in graphs[-1].linears if "experts" in line.name}
    assert {name for name, why in kept.items() if why} == {f"{down}.{e}" for e in range(4)}
    assert kept[f"{down}.0"] == f"{down}.2, of the same product, stays float"


def test_experts_are_no_modules_to_be_replaced():
    model = build("mixtral")
    plan = plan_for(model)
    with pytest.raises(UnsupportedModel, match="compile the model with the plan instead") as error:
        mixllm_compiler.quantize(model, plan, IDS)
    assert "16 matrices of the plan are experts" in str(error.value)
    assert all(type(m).__name__ != "PackedLinear" for m in model.modules())


@given(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)), st.randoms())
def test_pairs_finds_every_number_of_both(first, second, order):
    a, b = list(first), list(second)
    order.shuffle(a)
    order.shuffle(b)
    one, two = torch.tensor(a, dtype=torch.int64), torch.tensor(b, dtype=torch.int64)
    at, there = pairs(one, two)
    assert torch.equal(one[at], two[there])
    assert set(one[at].tolist()) == first & second
