"""Mixtures of experts: every expert is a matrix of its own, in one op per product."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mixllm_compiler
from mixllm_compiler.errors import LoweringError, WeightError
from mixllm_compiler.ir import ops
from mixllm_compiler.runtime import records
from tests.helpers import EAGER, refusal, token_ids
from tests.models.support import (
    LAYERS,
    MIXTURES,
    build,
    experts,
    handed_over,
    kl,
    linear_modules,
    mixed_ops,
    oracle_of,
    plan_of,
    storages,
)

IDS = token_ids(2, 24)


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="mixllm", options={"bits": 4.6, **EAGER, **options})


def quantized_linears(model: Any) -> set[str]:
    """Linear modules that are no routers: those have as many rows as there are experts, or one."""
    return {name for name, (_, n, _) in linear_modules(model).items() if n >= 64}


@pytest.mark.parametrize("rotate", [0, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MIXTURES)
@torch.no_grad()
def test_all_experts_are_quantized(kind, dtype, rotate):
    model = build(kind, dtype=dtype)
    exact = model(IDS).logits
    with handed_over() as graphs:
        logits = compiled(model, rotate=rotate)(IDS).logits
    (graph,) = graphs
    every = experts(model)
    assert len(every) == 2 * LAYERS * 4
    found = mixed_ops(graph)
    assert found.keys() == quantized_linears(model) | every.keys()
    for name, w in every.items():
        assert (found[name].n, found[name].k) == tuple(w.shape), name
        assert w.untyped_storage().data_ptr() not in storages(graph), name
    assert len(graph.calls(ops.GROUPED_LINEAR)) == 2 * LAYERS
    assert logits.dtype == dtype
    assert not torch.equal(logits, exact)


@pytest.mark.parametrize("rotate", [0, 128])
@pytest.mark.parametrize("kind", MIXTURES)
@torch.no_grad()
def test_logits_are_those_of_the_oracle(kind, rotate):
    exact, model = build(kind), build(kind)
    plan = plan_of(exact, IDS, rotate=rotate)
    assert len(plan.rows_per_width()) > 1  # a mix
    oracle = oracle_of(exact, plan)
    got = mixllm_compiler.compile(model, plan=plan, **EAGER)(IDS).logits
    quantization = kl(oracle(IDS).logits, exact(IDS).logits)
    assert quantization > 1e-4
    assert kl(got, oracle(IDS).logits) < 0.01 * quantization


@pytest.mark.parametrize("kind", MIXTURES)
@torch.no_grad()
def test_one_dynamic_graph_serves_all_lengths(kind):
    exact, model = build(kind), build(kind)
    plan = plan_of(exact, IDS)
    oracle = oracle_of(exact, plan)
    with handed_over() as graphs:
        model = mixllm_compiler.compile(model, plan=plan, dynamic=True, fullgraph=True, **EAGER)
        for batch, length in ((2, 24), (3, 17), (2, 5)):
            ids = token_ids(batch, length)
            quantization = kl(oracle(ids).logits, exact(ids).logits)
            assert kl(model(ids, use_cache=False).logits, oracle(ids).logits) < 0.01 * quantization
    assert len(graphs) == 1


@torch.no_grad()
def test_generation_runs_the_experts_of_one_plan():
    model, twin = build("mixtral"), build("mixtral")
    plan = plan_of(twin, IDS)
    mixllm_compiler.compile(model, plan=plan, **EAGER)
    with records.collect() as graphs:
        model.generate(IDS[:, :9], max_new_tokens=4, do_sample=False)
    assert len(graphs) > 1  # prefill and decode
    for graph in graphs:
        rows = {line.name: line.rows for line in graph.quantized}
        assert rows == {name: site.rows_per_width() for name, site in plan.sites.items()}


def decodes_with(model: Any) -> set[str]:
    """How experts are multiplied while `generate` decodes on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "device", property(lambda self: torch.device("cuda")))
        with model._optimize_model_for_decode():
            return set(model.get_experts_implementation().values())


def test_decoding_on_a_gpu_keeps_the_products_that_are_quantized():
    model = build("mixtral")
    assert "batched_mm" in decodes_with(model)  # else nothing is to be kept
    mixllm_compiler.compile(model, plan=plan_of(model, IDS), **EAGER)
    assert decodes_with(model) & {"grouped_mm", "batched_mm"} == {"grouped_mm"}


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_budget_counts_experts(kind):
    model = build(kind)
    scores = mixllm_compiler.score(model, IDS, widths=(2, 3, 4, 5, 6, 8))
    every = experts(model)
    for bits in (3.5, 5.0):
        plan = mixllm_compiler.plan(scores, bits=bits)
        assert every.keys() < plan.sites.keys()
        weights = sum(site.n * site.k for site in plan.sites.values())
        assert weights == sum(w.numel() for w in every.values()) + sum(
            n * k for m, (_, n, k) in linear_modules(model).items() if m in quantized_linears(model)
        )
        stored = sum(site.true_bytes for site in plan.sites.values())
        assert 8 * stored / weights == pytest.approx(plan.true_bits)
        assert bits - 0.05 < plan.true_bits <= bits
    widths = [plan.sites[name].widths for name in every]
    assert len({bytes(w.tolist()) for w in widths}) > 1  # experts differ


@torch.no_grad()
def test_explain_lists_every_expert_and_the_reference():
    model = build("mixtral")
    text = str(mixllm_compiler.explain(model, IDS, options={"bits": 4.6}))
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    for name in experts(model):
        assert "4.5" in lines[name] or "4." in lines[name]
        assert "reference" in lines[name]


@torch.no_grad()
def test_a_pass_that_breaks_nothing_is_not_blamed():
    model = build("qwen2_moe")
    ids = token_ids(1, 12)
    (result,) = mixllm_compiler.bisect(model, ids, options={"bits": 4.6, "rotate": 128})
    assert result.culprit is None, str(result)
    rewrite = next(c for c in result.checks if c.name == "rewrite-linears")
    assert rewrite.error > 0  # it was compared


@torch.no_grad()
def test_float_experts_can_be_released():
    model = build("mixtral")
    expected = compiled(build("mixtral"))(IDS).logits
    run = compiled(model, release=True)
    assert torch.equal(run(IDS).logits, expected)
    assert all(p.untyped_storage().size() == 0 for p in model.parameters() if p.dim() == 3)
    assert torch.equal(run(IDS).logits, expected)


@torch.no_grad()
def test_a_changed_expert_is_planned_and_packed_again():
    model = build("mixtral")
    run = compiled(model)
    before = run(IDS).logits
    model.model.layers[0].mlp.experts.down_proj[1].mul_(2)
    with records.collect() as graphs:
        after = run(IDS).logits
    assert len(graphs) == 1
    assert not torch.equal(before, after)


def test_an_expert_that_is_not_finite_is_named():
    model = build("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj[2, 0, 0] = torch.nan
        error = refusal(compiled(model), IDS)
    assert isinstance(error, WeightError)
    assert "layers.1.mlp.experts.gate_up_proj.2 has 1 values" in str(error)


def test_a_lowering_without_experts_is_refused_where_it_is_asked_for(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    with torch.no_grad():
        error = refusal(compiled(build("mixtral"), family="asym", kernels="triton"), IDS)
    assert isinstance(error, LoweringError)
    assert "experts" in str(error)


@pytest.mark.slow
@torch.no_grad()
def test_through_inductor_logits_are_those_of_the_oracle():
    exact, model = build("mixtral"), build("mixtral")
    plan = plan_of(exact, IDS)
    oracle = oracle_of(exact, plan)
    options = {**EAGER, "lower": "inductor"}
    got = mixllm_compiler.compile(model, plan=plan, dynamic=True, **options)(IDS).logits
    quantization = kl(oracle(IDS).logits, exact(IDS).logits)
    assert kl(got, oracle(IDS).logits) < 0.01 * quantization
