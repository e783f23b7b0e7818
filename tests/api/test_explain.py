"""`explain` says what became of every linear; `invalidate` tells of unseen changes."""

from __future__ import annotations

import pytest
import torch

import mixllm_compiler
from mixllm_compiler.lowering.cpp import isa
from mixllm_compiler.runtime import records
from tests.helpers import EAGER, token_ids
from tests.models.support import build, linear_modules, oracle_of, plan_of

IDS = token_ids(2, 40)


def test_every_linear_has_its_rows_bits_and_kernel():
    model = build("llama")
    (graph,) = mixllm_compiler.explain(model, IDS, options={"bits": 4.6, "spans": 1}).graphs
    lines = {line.name: line for line in graph.linears}
    assert lines.keys() == {*linear_modules(model), "lm_head"}
    for name, (_, n, k) in linear_modules(model).items():
        line = lines[name]
        assert (line.n, line.k) == (n, k) and sum(line.rows.values()) == n
        assert line.kernel == f"cpp.v1 {isa.current().name}" and line.kept_float == ""
        assert line.true_bits == pytest.approx(bits_of(line.rows, n, k))
        assert line.resident_bits >= line.true_bits - 4 / k  # blobs keep no width table
    assert "output head" in lines["lm_head"].kept_float


def bits_of(rows: dict[int, int], n: int, k: int) -> float:
    """Codes, a fp32 scale, two bytes a group below 8 bits, four bits for the row's width."""
    groups = k // 128
    stored = {b: b * k + 32 + (0 if b == 8 else 16 * groups) for b in rows}
    return (sum(count * stored[b] for b, count in rows.items()) + 4 * n) / (n * k)


def test_the_table_names_every_linear_and_why_one_stays_float():
    text = str(mixllm_compiler.explain(build("llama"), IDS, options={"bits": 4.6, "tile": 1}))
    assert "14 linears, 4.60 true bits (asked 4.60 bits)" in text
    assert "model.layers.1.mlp.down_proj" in text
    assert "the output head (quantize it with lm_head=True)" in text
    assert "allocate-bits" in text


def test_a_compiled_model_is_explained_as_it_was_compiled():
    model = build("llama")
    plan = plan_of(model, IDS)
    mixllm_compiler.compile(model, plan=plan, **EAGER)
    (graph,) = mixllm_compiler.explain(model, IDS).graphs
    assert graph.plan_digest == plan.digest
    assert {line.name: line.rows for line in graph.quantized} == {
        name: site.rows_per_width() for name, site in plan.sites.items()
    }


def test_explaining_needs_no_no_grad_and_changes_nothing():
    model = build("llama")
    before = model(IDS).logits
    mixllm_compiler.explain(model, input_ids=IDS, options={"bits": 4.6})
    assert torch.equal(model(IDS).logits, before)


@torch.no_grad()
def test_after_invalidate_a_change_through_data_is_quantized():
    model = build("llama")
    compiled = torch.compile(model, backend="mixllm", options={"bits": 4.6, **EAGER})
    before = compiled(IDS).logits
    module, _, _ = linear_modules(model)["model.layers.0.mlp.up_proj"]
    module.weight.data.mul_(2)
    assert torch.equal(compiled(IDS).logits, before)  # invisible, as documented
    assert mixllm_compiler.invalidate(model) == 14
    with records.collect() as graphs:
        after = compiled(IDS).logits
    assert len(graphs) == 1 and not torch.equal(after, before)


@torch.no_grad()
def test_a_plan_does_not_survive_the_change_of_its_weights():
    """Equal plans pack again: the packed copy is that of the new values."""
    model = build("llama")
    mixllm_compiler.compile(model, plan=plan_of(model, IDS), **EAGER)
    model(IDS)
    for module, _, _ in linear_modules(model).values():
        module.weight.mul_(-1)
    plan = plan_of(model, IDS)
    expected = oracle_of_float(model, plan)(IDS).logits
    found = mixllm_compiler.compile(model, plan=plan, **EAGER)(IDS).logits
    assert (found - expected).abs().max() < 1e-3


def oracle_of_float(model, plan):
    """The oracle of a compiled model: its forward is put back first."""
    twin = build("llama")
    twin.load_state_dict(model.state_dict())
    return oracle_of(twin, plan)
