"""A whole model quantized layer by layer: what was asked for, on the inputs that it really has."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mixllm_compiler
from mixllm_compiler import PackedLinear, demo
from mixllm_compiler.allocation.plan import Plan, SitePlan
from mixllm_compiler.calibration.tokens import pack_documents, split_documents
from mixllm_compiler.errors import OptionError, PlanMismatch, WeightError
from mixllm_compiler.formats.fingerprint import fingerprint
from mixllm_compiler.ir.reference import hadamard
from mixllm_compiler.options import Options
from mixllm_compiler.passes import quantize_model as module
from mixllm_compiler.passes.quantize_model import QuantizingRun, Recipe, dequantized
from tests.helpers import EAGER, causal_lm, token_ids
from tests.models.support import kl, linear_modules

IDS = token_ids(8, 32)
OTHERS = token_ids(4, 32, seed=9)


def build(kind, seed=0):
    return causal_lm(kind, 1, seed)


def plan_for(kind, *bits, family="two-level", rotate=32, exclude=()):
    """Widths by lot, 6 and 8 bits unless others are named."""
    found = {
        name: (m.weight if n == m.weight.shape[0] and type(m) is nn.Linear else m.weight.t())
        for name, (m, n, _) in linear_modules(build(kind)).items()
    }
    draw, mix = torch.Generator().manual_seed(3), torch.tensor(bits or (6, 8), dtype=torch.uint8)
    sites = {
        name: SitePlan(
            *w.shape, mix[torch.randint(len(mix), (len(w),), generator=draw)], 64, family
        )
        for name, w in found.items()
        if not name.endswith(exclude)
    }
    kept = {name: "not asked for" for name in found if name not in sites}
    mode = "token" if rotate else "group"
    weights = {name: w.detach() for name, w in found.items()}
    return Plan(fingerprint(weights), sites, kept, activation_mode=mode, rotation=rotate)


def quantized(kind, plan, ids=IDS, **settings):
    return mixllm_compiler.quantize(build(kind), plan, ids, batch=4, **settings)


def packed_modules(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}


def same_bytes(one, other):
    ours, theirs = packed_modules(one), packed_modules(other)
    assert ours.keys() == theirs.keys() != set()
    return all(torch.equal(ours[n].packed, theirs[n].packed) for n in ours)


@torch.no_grad()
@pytest.mark.parametrize(
    "kind, method, refit, rotate, family",
    [
        ("llama", "gptq", True, 32, "two-level"),
        ("gpt2", "gptq", False, 0, "asym"),
        ("qwen2", "rtn", True, 0, "two-level"),
        ("opt", "rtn", False, 32, "asym"),
    ],
)
def test_the_plan_is_what_comes_out(kind, method, refit, rotate, family):
    """Widths, family, rotation and mode as planned; at 6 and 8 bits close to the float model."""
    plan = plan_for(kind, family=family, rotate=rotate)
    assert set(plan.rows_per_width()) == {6, 8}
    model = quantized(kind, plan, method=method, refit=refit)
    found = packed_modules(model)
    assert found.keys() == plan.sites.keys() == linear_modules(build(kind)).keys()
    for name, packed in found.items():
        weight, site = packed.quantized_weight(), plan.sites[name]
        assert torch.equal(weight.widths, site.widths)
        assert (weight.group, weight.family) == (site.group, family)
        assert weight.transform == (f"hadamard:{rotate}" if rotate else "")
        assert packed.mode == plan.activation_mode == ("token" if rotate else "group")
    exact = build(kind)
    float_logits = exact(OTHERS).logits
    off = (model(OTHERS).logits - float_logits).norm() / float_logits.norm()
    assert 1e-4 < off < 0.15
    biases = {n for n, (m, _, _) in linear_modules(exact).items() if m.bias is not None}
    assert biases == {n for n, m in found.items() if m.bias is not None}


@torch.no_grad()
@pytest.mark.parametrize(
    "kind, rotate, refit", [("llama", 32, True), ("gpt2", 0, True), ("opt", 32, False)]
)
def test_every_layer_is_calibrated_on_the_inputs_that_it_will_get(kind, rotate, refit, monkeypatch):
    seen = {}
    solve = QuantizingRun._solve

    def watched(run, matrices, moments):
        seen.update({m.name: moments.second() for m in matrices})
        solve(run, matrices, moments)

    monkeypatch.setattr(QuantizingRun, "_solve", watched)
    plan = plan_for(kind, 3, 4, rotate=rotate)
    model = quantized(kind, plan, refit=refit)
    inputs = {}

    def keep(name):
        def hook(packed, args):
            x = args[0].float()
            x = hadamard(x, packed.rotation) if packed.rotation else x
            inputs[name] = dequantized(x, packed.mode, packed.group).flatten(0, -2)

        return hook

    for name, packed in packed_modules(model).items():
        packed.register_forward_pre_hook(keep(name))
    model(IDS)
    assert len(seen) == len(inputs) == len(plan.sites)
    for h, (name, x) in zip(seen.values(), inputs.items(), strict=True):
        expected = x.double().t() @ x.double() / len(x)
        # Sums in another order may push an activation over to the next of its 255 codes.
        assert (h - expected).norm() <= 1e-3 * expected.norm(), name


class Parallel(nn.Module):
    """Two branches whose inputs are both there before either linear runs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(100, 64)
        self.one, self.two = nn.LayerNorm(64), nn.RMSNorm(64)
        self.left, self.right, self.last = (nn.Linear(64, 64) for _ in range(3))
        self.lm_head = nn.Linear(64, 100, bias=False)
        self.eval()

    def forward(self, ids):
        x = self.table(ids)
        u, v = self.one(x), self.two(x)
        return self.lm_head(self.last(torch.tanh(self.left(u) * self.right(v))))


@torch.no_grad()
@pytest.mark.parametrize("rotate", [0, 32])
def test_linears_behind_the_next_cut_are_quantized_too(rotate, monkeypatch):
    seen, solve = [], QuantizingRun._solve

    def spy(self, matrices, moments):
        seen.append(moments.second())
        solve(self, matrices, moments)

    monkeypatch.setattr(QuantizingRun, "_solve", spy)
    model, ids = Parallel(), token_ids(4, 32)
    weights = {n: getattr(model, n).weight.detach() for n in ("left", "right", "last")}
    sites = {n: SitePlan(64, 64, torch.full((64,), 2, dtype=torch.uint8), 64) for n in weights}
    plan = Plan(fingerprint(weights), sites, {}, activation_mode="token", rotation=rotate)
    mixllm_compiler.quantize(model, plan, ids, batch=2)
    inputs = []
    model.last.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(ids)
    x = hadamard(inputs[0], rotate) if rotate else inputs[0]
    x = dequantized(x, "token", 64).flatten(0, -2)
    expected = x.t() @ x / len(x)
    assert (seen[-1] - expected).norm() <= 1e-3 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("kind, family", [("llama", "two-level"), ("opt", "asym")])
def test_text_makes_three_bits_better(kind, family):
    plan = plan_for(kind, 3, 4, family=family)
    ids = token_ids(32, 64, seed=4)
    reference = build(kind)(OTHERS).logits
    rounded = mixllm_compiler.quantize(build(kind), plan)
    ours = quantized(kind, plan, ids, refit=False)
    assert kl(reference, ours(OTHERS).logits) < 0.9 * kl(reference, rounded(OTHERS).logits)


@torch.no_grad()
def test_compile_with_search_computes_what_quantize_does():
    plan = plan_for("llama", 3, 8, family="two-level")
    expected = quantized("llama", plan, method="search")(OTHERS).logits
    model = mixllm_compiler.compile(
        build("llama"), plan=plan, data=IDS, quantizer="search", **EAGER
    )
    found = model(OTHERS).logits
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_the_compiled_model_equals_the_eager_one():
    model = quantized("qwen2", plan_for("qwen2"))
    eager = model(OTHERS).logits
    found = torch.compile(model, backend="mixllm", options=EAGER)(OTHERS).logits
    assert torch.allclose(found, eager, rtol=1e-5, atol=1e-5 * float(eager.abs().max()))


@torch.no_grad()
def test_compile_with_gptq_computes_what_quantize_and_compile_do():
    plan = plan_for("llama")
    expected = mixllm_compiler.quantize(build("llama"), plan, IDS)(OTHERS).logits
    model = mixllm_compiler.compile(build("llama"), plan=plan, data=IDS, quantizer="gptq", **EAGER)
    found = model(OTHERS).logits
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    torch._dynamo.reset()
    nearest = mixllm_compiler.compile(build("llama"), plan=plan, **EAGER)(OTHERS).logits
    assert (nearest - expected).norm() > 1e-3 * expected.norm()


@torch.no_grad()
def test_the_same_text_gives_the_same_bytes():
    plan = plan_for("llama", 3, 4)
    first, second = (quantized("llama", plan) for _ in range(2))
    assert same_bytes(first, second)
    assert not same_bytes(first, quantized("llama", plan, token_ids(8, 32, seed=5)))


@torch.no_grad()
def test_the_float_weights_that_it_was_given_stay_until_they_are_replaced():
    model = build("gpt2")
    plan = plan_for("gpt2")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = IDS.clone()
    found = module.quantize_model(model, plan, ids, Recipe())
    assert found.keys() == plan.sites.keys()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert torch.equal(ids, IDS)


@torch.no_grad()
def test_settings_of_a_recipe_reach_the_codes():
    plan = plan_for("llama", 3, 4)
    options = Options(plan=plan, group=64, rotate=32, quiet=True)
    captured = module.capture_model(build("llama"), IDS.split(4), options)

    def made(**change):
        run = QuantizingRun(captured, plan.sites, "token", Recipe(**change))
        return torch.cat([w.dequantize().flatten() for w in run.run().values()])

    usual = made()
    assert torch.equal(usual, made())
    for change in (
        {"method": "rtn"},
        {"clip": False},
        {"propagate": False},
        {"refit": False},
        {"sweeps": 0},
        {"damping": 0.1},
    ):
        assert not torch.equal(usual, made(**change)), change


@torch.no_grad()
def test_progress_counts_the_values_that_linears_read():
    told = []
    quantized("llama", plan_for("llama"), progress=lambda *at: told.append(at))
    # q, k and v; o; gate and up; down.
    assert told == [(i, 4) for i in range(1, 5)]


@torch.no_grad()
def test_linears_that_are_not_planned_stay_float():
    model = quantized("llama", plan_for("llama", exclude=("gate_proj", "down_proj")))
    kept = {name.rpartition(".")[2] for name in linear_modules(model)}
    assert kept == {"gate_proj", "down_proj"}
    assert len(packed_modules(model)) == 5


# -- the shipped model ---------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_gptq_with_refit_beats_nearest_codes_on_a_trained_model():
    """On text that neither saw; calibrated on as much as 8 × 128 tokens of the same file."""
    model, tokenizer = demo.load()
    model.eval()
    documents = split_documents(demo.HELDOUT.read_text(encoding="utf-8"))
    ids = pack_documents(documents, tokenizer, 16, 128, None)
    calibration, held_out = ids[:8], ids[8:]
    scores = mixllm_compiler.score(
        model, calibration, kind="weight-error", family="two-level", rotate=64, widths=(3, 4)
    )
    plan = mixllm_compiler.plan(scores, bits=3.8)
    reference = model(held_out).logits

    def measured(**settings):
        candidate = mixllm_compiler.quantize(copy.deepcopy(model), plan, **settings)
        return kl(reference, candidate(held_out).logits)

    nearest = measured()
    plain = measured(data=calibration, refit=False)
    full = measured(data=calibration)
    assert plain < 0.8 * nearest
    assert full < 0.8 * nearest
    # So little text hardly helps a refit, but its guard must keep it from doing harm.
    assert full < 1.05 * plain


# -- bad input -----------------------------------------------------------------------------------


def test_one_batch_is_too_few_for_a_refit():
    plan = plan_for("llama")
    with pytest.raises(OptionError, match=r"two batches.*not 1.*or refit=False"):
        quantized("llama", plan, IDS[:1])
    quantized("llama", plan, IDS[:2])


def test_another_models_plan():
    plan = plan_for("llama")
    with pytest.raises(PlanMismatch, match="made for"):
        mixllm_compiler.quantize(build("llama", seed=1), plan, IDS)
    with pytest.raises(PlanMismatch, match=r"\(7 of 7 in all\), which is no linear module"):
        quantized("opt", plan)
    with pytest.raises(PlanMismatch, match="made for"):
        module.quantize_model(build("llama", seed=1), plan, IDS, Recipe())


def test_a_method_needs_its_text():
    with pytest.raises(OptionError, match=r"method 'gptq' needs calibration text: give data="):
        mixllm_compiler.quantize(build("llama"), plan_for("llama"), method="gptq")


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(OptionError, match=r"unknown method 'gtpq'\. Did you mean 'gptq'\?"):
        quantized("llama", plan_for("llama"), method="gtpq")
    with pytest.raises(OptionError, match=r"unknown quantizer 'gtpq'\. Did you mean 'gptq'\?"):
        mixllm_compiler.compile(build("llama"), quantizer="gtpq", **EAGER)


def test_a_search_of_rows_that_it_does_not_make():
    words = r"'search' makes two-level rows, not 'asym': give family='two-level'"
    with pytest.raises(OptionError, match=words):
        quantized("llama", plan_for("llama", family="asym"), method="search")
    with pytest.raises(OptionError, match=words):  # before anything is scored
        mixllm_compiler.compile(
            build("llama"), data="no text", quantizer="search", family="asym", **EAGER
        )


@pytest.mark.parametrize("share", [0, 1, -0.5])
def test_a_share_that_is_none(share):
    with pytest.raises(OptionError, match="is no share of the text"):
        Recipe(held_out=share)


@pytest.mark.parametrize("method, refit", [("gptq", True), ("gptq", False), ("rtn", False)])
def test_activations_that_are_no_numbers_name_the_layer(method, refit):
    """A norm that overflows: weights are fine, what the linears read is not."""
    plan = plan_for("llama")
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[3] = float("inf")
    with pytest.raises(WeightError, match=r"inputs of \S*layers\.0\.mlp\.gate_proj\S* are NaN"):
        mixllm_compiler.quantize(model, plan, IDS, method=method, refit=refit)
