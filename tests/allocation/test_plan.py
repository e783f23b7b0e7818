from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mixllm_compiler.allocation.allocate import make_plan, uniform_plan
from mixllm_compiler.allocation.plan import Plan, SitePlan
from mixllm_compiler.errors import OptionError, PlanMismatch
from mixllm_compiler.formats.bits import true_bits
from mixllm_compiler.formats.fingerprint import fingerprint
from mixllm_compiler.quantizers.rtn import quantize_rtn

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def plan(scores) -> Plan:
    return make_plan(scores, bits=4.8, exclude=["lm_head"])


def changed(plan, name, **fields):
    """The plan with other fields in one site."""
    site = plan.sites[name]
    given = {f: getattr(site, f) for f in ("n", "k", "widths", "group", "family")}
    sites = {**plan.sites, name: SitePlan(**{**given, **fields})}
    return Plan(plan.fingerprint, sites, plan.float_sites, plan.activation_mode, plan.rotation)


def test_true_bits_are_those_of_the_quantized_weights(plan, model):
    weights = [quantize_rtn(model[n], s.widths, s.group) for n, s in plan.sites.items()]
    assert plan.true_bits == true_bits(weights)
    assert plan.true_bytes == sum(w.true_bytes() for w in weights)


def test_equal_is_what_quantizes_alike(plan, scores):
    again = make_plan(scores, bits=4.8, exclude=["lm_head.weight"])
    assert again is not plan
    assert again == plan and hash(again) == hash(plan) and again.digest == plan.digest
    assert {plan: 1}[again] == 1
    as_bytes = make_plan(scores, bytes=again.true_bytes, exclude=["lm_head"])
    assert as_bytes.asked != plan.asked and as_bytes == plan


def test_every_change_of_what_is_computed_changes_the_digest(plan):
    widths = plan.sites[Q].widths.clone()
    widths[5] = 8 if widths[5] != 8 else 2
    others = [
        changed(plan, Q, widths=widths),
        changed(plan, Q, group=64),
        Plan(plan.fingerprint, plan.sites, plan.float_sites, "token", 0),
        Plan(plan.fingerprint, plan.sites, plan.float_sites, "group", 128),
    ]
    assert len({plan.digest, *(p.digest for p in others)}) == 5
    assert all(p != plan for p in others)
    assert plan != "a plan"


def test_copies_are_the_plan_itself(plan):
    assert copy.copy(plan) is plan
    assert copy.deepcopy(plan) is plan
    assert copy.deepcopy({"plan": [plan]})["plan"][0] is plan


def test_pickle(plan):
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan and again.asked == plan.asked and again.certificate == plan.certificate


def test_it_is_frozen(plan):
    with pytest.raises(AttributeError):
        plan.rotation = 128


def test_save_and_load(plan, tmp_path):
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    again = Plan.load(path)
    assert again == plan
    for field in ("asked", "score_kind", "predicted_loss", "certificate", "float_sites", "version"):
        assert getattr(again, field) == getattr(plan, field), field
    assert list(again.sites) == list(plan.sites)
    assert again.sites == plan.sites
    assert again.summary() == plan.summary()
    rows = sum(site.n for site in plan.sites.values())
    assert path.stat().st_size < rows + 6000  # a byte a row and the document


def test_an_interrupted_save_leaves_no_file(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        plan.save(tmp_path / "plan")
    assert list(tmp_path.iterdir()) == []


def test_loading_something_else(scores, tmp_path):
    scores.save(tmp_path / "scores")
    with pytest.raises(OptionError, match="not a plan file but a mixllm scores file"):
        Plan.load(tmp_path / "scores")


def test_rows_per_width(plan):
    assert sum(plan.rows_per_width().values()) == sum(s.n for s in plan.sites.values())
    site = SitePlan(4, 128, torch.tensor([8, 2, 8, 4], dtype=torch.uint8))
    assert site.rows_per_width() == {2: 1, 4: 1, 8: 2}


def test_it_answers_while_fake_tensors_are_made(plan):
    """A backend asks the plan in the middle of tracing."""
    fresh = pickle.loads(pickle.dumps(plan))
    fresh.__dict__.pop("digest", None)
    with FakeTensorMode():
        assert fresh.digest == plan.digest
        assert fresh.rows_per_width() == plan.rows_per_width()
        assert fresh.true_bits == plan.true_bits


def test_summary(plan):
    text = plan.summary()
    assert text.splitlines()[1].startswith("4.")
    assert "true bits, " in text and "MB in 6 matrices, asked for 4.80 bits" in text
    assert "activations int8 per group, not rotated" in text
    assert "nats per token (fisher-sequence)" in text
    assert "model.layers.*.self_attn.q_proj.weight      2  128×96" in text
    assert "float: 1× lm_head.weight (excluded by 'lm_head')" in text


def test_summary_of_a_plan_that_quantizes_nothing(scores):
    shapes = scores.shapes
    plan = uniform_plan(scores.fingerprint, shapes, 4, exclude=["*"])
    assert "no matrix quantized" in plan.summary()
    with pytest.raises(ValueError, match="quantizes nothing"):
        _ = plan.true_bits


def test_diff(plan, scores):
    assert plan.diff(plan) == ""
    text = plan.diff(make_plan(scores, bits=4.0, pins={Q: 4}))
    assert "asked: 4.80 bits → 4.00 bits" in text
    assert "lm_head.weight: float → " in text
    assert f"{Q}: " in text and "of 128 rows change" in text


def test_site_for(plan, model):
    assert plan.site_for(Q) is plan.sites[Q]
    assert plan.site_for("lm_head.weight") is None
    with pytest.raises(PlanMismatch, match=f"Did you mean '{Q}'"):
        plan.site_for(Q.replace("q_proj", "q_prj"))
    wrapped = fingerprint({"_orig_mod." + name: w for name, w in model.items()})
    names = plan.match(wrapped)
    assert plan.site_for("_orig_mod." + Q, names) is plan.sites[Q]


def test_another_model_is_refused(plan, model):
    other = {**model, Q: model[Q] + 1}
    with pytest.raises(PlanMismatch, match=f"1 of 7 matrices hold other values, the first is {Q}"):
        plan.match(fingerprint(other))


@pytest.mark.parametrize(
    "widths",
    [torch.zeros(3, dtype=torch.uint8), torch.full((4,), 4), torch.full((5,), 4).to(torch.uint8)],
)
def test_widths_that_are_none(widths):
    with pytest.raises(ValueError):
        SitePlan(4, 128, widths)


def test_a_plan_must_cover_its_model(plan):
    sites = {name: site for name, site in plan.sites.items() if name != Q}
    with pytest.raises(ValueError, match=f"says nothing about {Q}"):
        Plan(plan.fingerprint, sites, plan.float_sites)
    with pytest.raises(ValueError, match="both as quantized and as float"):
        Plan(plan.fingerprint, plan.sites, {**plan.float_sites, Q: "no"})
    with pytest.raises(ValueError, match="its rows say"):
        changed(plan, Q, k=128)


@pytest.mark.parametrize("fields", [{"activation_mode": "row"}, {"rotation": 100}])
def test_impossible_settings(plan, fields):
    with pytest.raises(OptionError):
        Plan(plan.fingerprint, plan.sites, plan.float_sites, **fields)


def test_one_tensor_has_one_plan():
    w = torch.randn(8, 64)
    prints = fingerprint({"a": w, "b": w})
    four, eight = (SitePlan(8, 64, torch.full((8,), b, dtype=torch.uint8)) for b in (4, 8))
    with pytest.raises(ValueError, match="a and b are one tensor with two plans"):
        Plan(prints, {"a": four, "b": eight})
    tied = Plan(prints, {"a": four, "b": four})
    assert tied.true_bytes == four.true_bytes
    assert list(tied.distinct()) == ["a"]
    half = Plan(prints, {"b": four}, {"a": "an embedding"})
    assert half.true_bytes == four.true_bytes
