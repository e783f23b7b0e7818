"""Scaled and shifted input channels leave the float function as it is, in every architecture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from mixllm_compiler.errors import OptionError, UnsupportedModel
from mixllm_compiler.formats.row_format import RowFormat
from mixllm_compiler.options import Options
from mixllm_compiler.passes.captured_model import capture_model
from mixllm_compiler.passes.producers import producer_of
from mixllm_compiler.passes.scale_model import scale_model
from mixllm_compiler.passes.scaling_methods import METHODS
from mixllm_compiler.quantizers.rtn import rounding_error
from mixllm_compiler.transforms.channels import InputChannels
from tests.helpers import (
    HIDDEN,
    activations,
    assert_quantized,
    causal_lm,
    compiled,
    oracle,
    token_ids,
)

IDS = token_ids(2, 8)


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits.double()


def left(model):
    """Linears with a multiplication in front of them."""
    return sorted(
        name.rpartition(".")[0].rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, InputChannels)
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_the_float_function_stays_equal(kind, method):
    """Run in float64; what is left is the rounding of the new weights to float32."""
    model = causal_lm(kind, layers=1)
    twin = scale_model(model, [IDS], method)
    changed = [
        not torch.equal(p, dict(twin.named_parameters()).get(n, p.new_zeros(0)))
        for n, p in model.named_parameters()
    ]
    assert any(changed)
    before, after = logits(model.double()), logits(twin.double())
    assert not torch.equal(before, after)
    assert (after - before).abs().max() < 1e-5 * before.abs().max()


@pytest.mark.parametrize(
    "kind, scaled, shifted",
    [
        (
            "llama",
            [],
            ["down_proj", "gate_proj", "k_proj", "q_proj", "up_proj", "v_proj"],
        ),
        ("gpt2", ["c_proj"], ["c_proj"]),
        ("opt", [], ["fc2"]),
    ],
)
def test_producers_take_what_they_can(kind, scaled, shifted):
    """No shift passes a product, GELU or ReLU, RMSNorm has no bias; no scale passes GELU."""
    model = causal_lm(kind, layers=1)
    assert left(scale_model(model, [IDS], "smoothquant")) == scaled
    assert left(scale_model(model, [IDS], "outliertune")) == shifted


def test_heads_that_share_a_value_share_its_scale():
    graph = capture_model(causal_lm("llama", layers=1), [IDS], Options(rotate=0, quiet=True)).graph
    node, site = next((n, s) for n, s in graph.sites() if s.matrix.endswith("o_proj"))
    producer = producer_of(graph, node.args[0], [node], site.k)
    assert producer.heads == 32
    tied = producer.tied(torch.arange(128.0))
    assert torch.equal(tied[:32], tied[32:64])
    assert not torch.equal(tied[32:64], tied[64:96])


@pytest.mark.parametrize("method", METHODS)
def test_static_methods_give_every_channel_of_a_norm_one_range(method):
    model = causal_lm("opt", layers=1)
    twin = scale_model(model, [IDS], method)
    seen = []
    twin.model.decoder.layers[0].fc1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(twin)
    x = seen[0].flatten(0, -2)
    spread = x.abs().amax(0).max() / x.abs().amax(0).min()
    assert (spread < 1.01) == (method in ("outliertune", "mergequant"))
    if method == "outliertune":
        assert torch.allclose(x.amax(0), -x.amin(0), rtol=1e-3)


def test_the_search_lowers_the_error_of_rounded_weights():
    model = causal_lm("llama", layers=1)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = 10  # a channel that matters
    errors = [outputs_off(scale_model(model, [IDS], "awq", alpha=a)) for a in (0.0, None)]
    assert errors[1] < 0.9 * errors[0]


def outputs_off(model):
    """Squared error that 4-bit weights make in the outputs of q, k and v."""
    attention = model.model.layers[0].self_attn
    weight = torch.cat([p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)])
    seen = []
    attention.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model)
    error = rounding_error(weight.detach(), RowFormat(4, 128, "asym"), None, False)
    return (seen[0] @ error.t()).square().sum()


def test_a_scaled_model_is_rotated_and_quantized_like_any_other():
    twin = scale_model(causal_lm("opt", layers=1), [IDS], "smoothquant")
    with torch.no_grad():
        expected = oracle(twin, mode="token", block=128)(IDS).logits
        got = compiled(twin, rotate=128)(IDS).logits
        assert_quantized(got, twin(IDS).logits, expected)


def test_a_wrong_producer_does_not_go_unnoticed(monkeypatch):
    def shuffled(*args):
        found = producer_of(*args)
        return found and replace(found, rows=found.rows.flip(0))

    monkeypatch.setattr("mixllm_compiler.passes.scale_model.producer_of", shuffled)
    with pytest.raises(UnsupportedModel, match="changed the outputs"):
        scale_model(causal_lm("opt", layers=1), [IDS], "smoothquant")


def test_a_norm_whose_weight_is_computed_is_left_alone():
    class Norm(nn.LayerNorm):
        def forward(self, x):
            return nn.functional.layer_norm(x, (HIDDEN,), 1 + self.weight, self.bias)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = Norm(HIDDEN), nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x):
            return torch.tanh(self.linear(self.norm(x)))  # else it is a head

    x = activations(2, 5)
    twin = scale_model(Model().eval(), [x], "outliertune")
    assert isinstance(twin.linear, nn.Sequential)


def test_an_unknown_method_is_refused():
    with pytest.raises(OptionError, match="awq"):
        scale_model(causal_lm("opt", layers=1), [IDS], "awk")
