"""Which linears there are, what they are called, and why some stay float."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mixllm_compiler.errors import OptionError, UnsupportedModel
from mixllm_compiler.ir.annotations import site_of
from mixllm_compiler.passes.annotate_linears import refuse_two_devices
from mixllm_compiler.passes.canonicalize_linears import LINEAR
from tests.helpers import (
    HIDDEN,
    VOCABULARY,
    LlamaBlock,
    activations,
    captured,
    causal_lm,
    outputs,
    passed,
    token_ids,
)

X = activations(2, 5)


def annotated(model, *args, **options):
    graph = captured(model.eval(), *(args or (X,)))
    passed(graph, "annotate-linears", **options)
    return graph


def reasons(graph):
    return {m.name: m.kept_float for m in graph.matrices.values()}


# -- names ---------------------------------------------------------------------------------------


def test_matrices_are_named_by_the_module_that_calls_them():
    graph = annotated(LlamaBlock())
    assert list(graph.matrices) == [
        *(f"self_attn.{p}_proj" for p in "qkvo"),
        *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
    ]
    assert graph.matrices["mlp.up_proj"].binding.name == "mlp.up_proj.weight"


def test_names_are_the_same_whichever_way_a_model_is_compiled():
    model = LlamaBlock()
    whole = annotated(model)
    forward = captured(model.forward, X)
    closure = captured(lambda x: model(x), X)
    for graph in (forward, closure):
        passed(graph, "annotate-linears")
        assert list(graph.matrices) == list(whole.matrices)
        assert [m.binding.name for m in graph.matrices.values()] == [
            m.binding.name for m in whole.matrices.values()
        ]


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(192, HIDDEN))
        self.inner = nn.ParameterDict({"down": nn.Parameter(torch.randn(HIDDEN, 192))})

    def forward(self, x):
        return F.linear(F.linear(x, self.up), self.inner["down"])


def test_a_weight_without_a_linear_module_has_its_own_name():
    assert list(annotated(Functional()).matrices) == ["up", "inner.down"]


def test_a_matrix_used_twice_is_one_matrix_at_two_sites():
    lin = nn.Linear(HIDDEN, HIDDEN)
    graph = annotated(nn.Sequential(lin, nn.ReLU(), lin))
    assert len(graph.matrices) == 1
    assert [site.matrix for _, site in graph.sites()] == ["0", "0"]


def test_a_transposed_weight_is_counted_in_output_features():
    graph = annotated(causal_lm("gpt2", layers=1), token_ids())
    assert {name: (m.n, m.k) for name, m in graph.matrices.items()} == {
        "transformer.h.0.attn.c_attn": (3 * HIDDEN, HIDDEN),
        "transformer.h.0.attn.c_proj": (HIDDEN, HIDDEN),
        "transformer.h.0.mlp.c_fc": (4 * HIDDEN, HIDDEN),
        "transformer.h.0.mlp.c_proj": (HIDDEN, 4 * HIDDEN),
        "lm_head": (VOCABULARY, HIDDEN),
    }
    assert all(m.transposed == ("head" not in m.name) for m in graph.matrices.values())


def test_nothing_is_computed_differently():
    model = LlamaBlock()
    graph = captured(model, X)
    before = outputs(graph)
    passed(graph, "annotate-linears")
    assert torch.equal(outputs(graph), before)


# -- what stays float ----------------------------------------------------------------------------


class LM(nn.Module):
    def __init__(self, vocabulary=VOCABULARY, tied=False, experts=False):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, HIDDEN)
        self.lin = nn.Linear(HIDDEN, HIDDEN)
        self.unembed = nn.Linear(HIDDEN, vocabulary, bias=False)
        if tied:
            self.unembed.weight = self.embed.weight
        self.router = nn.Linear(HIDDEN, 8)
        self.w1 = nn.Parameter(torch.randn(8, 256, HIDDEN)) if experts else None

    def forward(self, ids):
        x = self.lin(self.embed(ids))
        x = x * self.router(x).softmax(-1).sum(-1, keepdim=True)
        if self.w1 is not None:
            x = x + torch.einsum("bth,eoh->bto", x, self.w1)[..., :HIDDEN]
        return self.unembed(x)


HEAD = "the output head (quantize it with lm_head=True)"
ROUTER = "min(N, K) = 8 is smaller than a tile of 64"


@pytest.mark.parametrize("tied", [False, True])
def test_the_output_head_and_the_router_stay_float_whatever_they_are_called(tied):
    graph = annotated(LM(tied=tied), token_ids())
    assert reasons(graph) == {"lin": "", "router": ROUTER, "unembed": HEAD}


def test_the_output_head_on_request():
    graph = annotated(LM(), token_ids(), lm_head=True)
    assert reasons(graph) == {"lin": "", "router": ROUTER, "unembed": ""}


def test_a_hidden_size_that_collides_with_the_vocabulary_hides_no_linear():
    """Both matrices have as many rows as the embedding; only one of them leaves the graph."""
    graph = annotated(LM(vocabulary=HIDDEN), token_ids())
    assert reasons(graph) == {"lin": "", "router": ROUTER, "unembed": HEAD}


def test_fused_experts_are_listed_and_float_with_the_reason():
    graph = annotated(LM(experts=True), token_ids())
    kept = reasons(graph)
    assert kept["w1"] == "fused expert weights (8, 256, 128), not multiplied with sorted rows"
    assert kept["lin"] == ""


def test_the_experts_of_a_mixtral_are_matrices_of_their_own():
    sizes = {"num_local_experts": 4}
    kept = reasons(annotated(causal_lm("mixtral", layers=1, **sizes), token_ids()))
    assert kept["model.layers.0.mlp.gate"] == "min(N, K) = 4 is smaller than a tile of 64"
    experts = "model.layers.0.mlp.experts"
    assert [name for name, why in kept.items() if not why] == [
        *(f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"),
        *(f"{experts}.{part}.{e}" for part in ("gate_up_proj", "down_proj") for e in range(4)),
    ]


def test_an_excluded_expert_keeps_those_of_its_product_float():
    model = causal_lm("mixtral", layers=1, num_local_experts=4)
    kept = reasons(annotated(model, token_ids(), exclude=("*.down_proj.2",)))
    down = "model.layers.0.mlp.experts.down_proj"
    assert kept[f"{down}.2"] == "excluded by '*.down_proj.2'"
    assert kept[f"{down}.0"] == f"{down}.2, of the same product, stays float"
    assert kept["model.layers.0.mlp.experts.gate_up_proj.2"] == ""


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: torch.bmm(x.expand(8, -1, -1), w.transpose(1, 2)),
        lambda x, w: torch.bmm(x.expand(2, -1, -1), w[torch.tensor([0, 3])].transpose(-2, -1)),
        lambda x, w: torch.einsum("th,eoh->eto", x, w),
        lambda x, w: torch.stack([F.linear(x, w[e]) for e in range(8)]),
        lambda x, w: x @ w.mT,
    ],
    ids=["bmm", "gathered", "einsum", "one by one", "matmul"],
)
def test_experts_are_recognized_by_the_products_they_are_in(product):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 256, HIDDEN))

        def forward(self, x):
            return product(x, self.w)

    kept = reasons(annotated(Experts(), X[0]))
    assert kept == {"w": "fused expert weights (8, 256, 128), not multiplied with sorted rows"}


def test_other_weights_of_three_dimensions_are_no_experts():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.randn(1, 5, HIDDEN))
            self.conv = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1)
            self.lin = nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x):
            return self.lin(self.conv((x + self.position).mT).mT)

    assert reasons(annotated(Model())) == {"lin": ""}


def test_short_rows_stay_float():
    graph = annotated(nn.Sequential(nn.Linear(HIDDEN, 64), nn.Linear(64, HIDDEN)))
    assert reasons(graph) == {"0": "", "1": "K = 64 is smaller than a group of 128"}


def test_a_smaller_group_takes_them():
    graph = annotated(nn.Sequential(nn.Linear(HIDDEN, 64), nn.Linear(64, HIDDEN)), group=64)
    assert reasons(graph) == {"0": "", "1": ""}


def test_excluded_patterns():
    graph = annotated(LlamaBlock(), exclude=("*.down_proj", "self_attn.[qk]_proj"))
    kept = {name: why for name, why in reasons(graph).items() if why}
    assert kept == {
        "self_attn.q_proj": "excluded by 'self_attn.[qk]_proj'",
        "self_attn.k_proj": "excluded by 'self_attn.[qk]_proj'",
        "mlp.down_proj": "excluded by '*.down_proj'",
    }


def test_a_kept_linear_keeps_its_annotation_with_the_reason():
    graph = annotated(LlamaBlock(), exclude=("mlp.*",))
    sites = [site_of(n) for n in graph.calls(LINEAR)]
    assert [bool(s.kept_float) for s in sites] == [False] * 4 + [True] * 3


@pytest.mark.parametrize("option", [{"exclude": ("mlp.down",)}, {"pins": {"mlp.down": 8}}])
def test_a_pattern_that_matches_nothing_is_a_mistake(option):
    with pytest.raises(OptionError) as error:
        annotated(LlamaBlock(), **option)
    assert "'mlp.down' matches none of 7 linears" in str(error.value)
    assert "Did you mean 'mlp.down_proj'?" in str(error.value)


# -- what is refused -----------------------------------------------------------------------------


def test_a_model_of_small_linears_only():
    with pytest.raises(UnsupportedModel) as error:
        annotated(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)), X[..., :32])
    assert "none of 2 linears can be quantized; 0: K = 32 is smaller" in str(error.value)
    assert "'group': 32" in str(error.value)


def test_a_model_whose_linears_were_all_excluded_is_no_mistake():
    assert not annotated(nn.Sequential(nn.Linear(HIDDEN, HIDDEN)), exclude="*").active()


def test_a_dtype_that_is_not_quantized_from():
    with pytest.raises(UnsupportedModel, match=r"0\.weight is float64"):
        annotated(nn.Sequential(nn.Linear(HIDDEN, HIDDEN).double()), X.double())


def test_linears_on_two_devices():
    graph = annotated(LlamaBlock())
    bindings = [m.binding for m in graph.matrices.values()]
    refuse_two_devices(bindings)
    bindings[3].tensor = bindings[3].tensor.to("meta")
    with pytest.raises(UnsupportedModel) as error:
        refuse_two_devices(bindings)
    message = str(error.value)
    assert "self_attn.q_proj.weight on cpu, self_attn.o_proj.weight on meta" in message
    assert "move the model to one device" in message
