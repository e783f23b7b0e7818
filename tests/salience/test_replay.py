"""Segment replay gives what one backward through the whole model gives, in every kind."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixllm_compiler.calibration.segments import cut
from mixllm_compiler.formats.row_format import RowFormat
from mixllm_compiler.options import Options
from mixllm_compiler.passes.captured_model import CapturedModel, capture_model
from mixllm_compiler.quantizers.rtn import quantize_rows
from mixllm_compiler.salience import replay, supervision
from mixllm_compiler.salience.blocks import block_ends
from mixllm_compiler.salience.kinds import ScoreSpec
from mixllm_compiler.salience.replay import Found
from mixllm_compiler.salience.score_graph import score_graph
from mixllm_compiler.salience.supervision import draw
from mixllm_compiler.transforms.hadamard import block_hadamard
from tests.helpers import VOCABULARY, captured, token_ids
from tests.models.support import LINEARS_PER_LAYER, build, linear_modules

FORMATS = (RowFormat(3), RowFormat(4), RowFormat(8))
IDS = token_ids(4, 24)


model_of = functools.cache(build)


@functools.cache
def captured_model(architecture: str, rotate: int) -> CapturedModel:
    return capture_model(model_of(architecture), IDS.split(2), Options(rotate=rotate))


def scored(architecture: str, kind: str, budget: int | None, rotate: int = 0, **more: Any) -> Found:
    spec = ScoreSpec(kind, FORMATS, labels=more.pop("labels", ""), budget=budget)
    found = captured_model(architecture, rotate)
    return score_graph(found.graph, [found.inputs(i) for i in (0, 1)], spec, **more)


def assert_close(a: Any, b: Any, relative: float) -> None:
    assert a.keys() == b.keys()
    for name in b:
        torch.testing.assert_close(
            a[name], b[name], rtol=relative, atol=relative * float(b[name].abs().max()), msg=name
        )


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "qwen2"])
@pytest.mark.parametrize("kind", ["kfac", "fisher-token", "fisher-sequence", "paper"])
def test_replay_equals_end_to_end(architecture, kind):
    whole, replayed = (scored(architecture, kind, budget) for budget in (None, 1))
    assert len(whole.losses) == 2 * LINEARS_PER_LAYER[architecture]
    assert_close(replayed.losses, whole.losses, 1e-5)
    assert_close(replayed.curvature, whole.curvature, 1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_graphs_are_cut_between_decoder_blocks(architecture):
    graph = captured_model(architecture, 0).graph
    found = block_ends(graph.graph)
    assert len(found) == 1
    first, last = cut(graph.graph, found)
    shapes = [tuple(n.meta["example_value"].shape) for n in first.outputs]
    assert shapes.count((2, 24, 128)) == 1  # the residual stream, besides masks and positions
    half = LINEARS_PER_LAYER[architecture]
    products = (torch._C._nn.linear,)
    assert sum(n.target in products for n in first.nodes) == half
    assert sum(n.target in products for n in last.nodes) == half + 1  # and the head


class NoBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 128)
        self.inner, self.head = nn.Linear(128, 128), nn.Linear(128, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.table(ids))))


def test_a_graph_without_a_list_of_modules_is_one_segment():
    graph = captured(NoBlocks().eval(), IDS)
    assert block_ends(graph.graph) == []


def test_a_block_runs_forward_twice_and_the_last_one_once():
    steps: list[tuple[int, int]] = []
    scored("llama", "kfac", 1, progress=lambda *step: steps.append(step))
    assert steps == [(i, 6) for i in range(1, 7)]  # 2 batches: forward of one block, 2 backward


# -- the kinds, by their formulas in float64 -------------------------------------------------------


def traced(model: Any, labels: Tensor, weights: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Name → (x [S, T, K], δ [S, T, N]) in float64, of the loss Σ w ℓ."""
    twin = copy.deepcopy(model).double()
    found: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, y: Tensor) -> None:
            y.retain_grad()
            found[name] = [args[0].detach(), y]

        return hook

    for name, (module, _, _) in linear_modules(twin).items():
        module.register_forward_hook(keep(name))
    for parameter in twin.parameters():
        parameter.requires_grad_()
    logits = twin(IDS, use_cache=False).logits
    each = -logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    (each * weights).sum().backward()
    return {name: (x, y.grad) for name, (x, y) in found.items()}


def deltas(module: Any) -> list[Tensor]:
    w = module.weight.detach()
    return [quantize_rows(w, f).dequantize(torch.float64) - w.double() for f in FORMATS]


def next_tokens(weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    labels = torch.cat((IDS[:, 1:], IDS[:, :1]), 1)
    w = torch.ones(IDS.shape, dtype=torch.float64) if weights is None else weights.double()
    return labels, torch.cat((w[:, 1:], torch.zeros(len(IDS), 1)), 1)


def kfac(x: Tensor, d: Tensor, delta: Tensor, tokens: float, reach: Tensor) -> Tensor:
    h = x[reach].t() @ x[reach] / int(reach.sum())
    return 0.5 * d.square().sum((0, 1)) / tokens * ((delta @ h) * delta).sum(1)


def fisher_token(x: Tensor, d: Tensor, delta: Tensor, tokens: float, reach: Tensor) -> Tensor:
    return 0.5 * ((x @ delta.t()) * d).square().sum((0, 1)) / tokens


def hessian(x: Tensor, d: Tensor, delta: Tensor, tokens: float, reach: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    return ((delta @ (rows.t() @ rows / len(rows))) * delta).sum(1)


@pytest.mark.parametrize(
    "kind, formula", [("kfac", kfac), ("fisher-token", fisher_token), ("hessian", hessian)]
)
def test_a_kind_is_its_formula(kind, formula):
    model = model_of("llama")
    labels, weights = next_tokens()
    found = scored("llama", kind, 1, labels="text")
    for name, (x, d) in traced(model, labels, weights).items():
        module = linear_modules(model)[name][0]
        reach = weights > 0
        wanted = [formula(x, d, e, float(weights.sum()), reach) for e in deltas(module)]
        torch.testing.assert_close(
            found.losses[name].double(), torch.stack(wanted, 1), rtol=1e-3, atol=0, msg=name
        )


def test_token_weights_weigh_the_loss_and_zero_leaves_it_out():
    model = model_of("llama")
    given = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(0))
    given[:, :6], given[1:, 20:] = 0, 0  # prompts, and ends that nothing reaches
    labels, weights = next_tokens(given)
    found = scored("llama", "kfac", 1, labels="text", token_weights=given)
    reach = weights.flip(1).cumsum(1).flip(1) > 0
    for name, (x, d) in traced(model, labels, weights.sqrt()).items():
        module = linear_modules(model)[name][0]
        wanted = [kfac(x, d, e, float(weights.sum()), reach) for e in deltas(module)]
        torch.testing.assert_close(
            found.losses[name].double(), torch.stack(wanted, 1), rtol=1e-3, atol=0, msg=name
        )
        torch.testing.assert_close(
            found.curvature[name].double(),
            d.square().sum((0, 1)) / weights.sum(),
            rtol=1e-3,
            atol=0,
        )


def test_rotated_kfac_is_kfac_of_rotated_weights_and_inputs():
    model = model_of("llama")
    labels, weights = next_tokens()
    found = scored("llama", "kfac", 1, rotate=128, labels="text")
    for name, (x, d) in traced(model, labels, weights).items():
        w = block_hadamard(linear_modules(model)[name][0].weight.detach(), 128)
        turned = block_hadamard(x, 128)
        for i, f in enumerate(FORMATS):
            delta = quantize_rows(w, f).dequantize(torch.float64) - w.double()
            wanted = kfac(turned, d, delta, float(weights.sum()), weights > 0)
            torch.testing.assert_close(found.losses[name][:, i].double(), wanted, rtol=1e-3, atol=0)


def test_drawn_labels_have_the_models_distribution():
    p = torch.tensor([[0.0, 0.2, 0.5, 0.3, 0.0]])
    labels = draw(p.expand(20_000, -1), torch.Generator().manual_seed(0))
    share = torch.bincount(labels, minlength=5) / len(labels)
    torch.testing.assert_close(share, p[0], atol=0.02, rtol=0)
    assert share[0] == share[4] == 0


def test_the_head_is_scored_by_its_exact_softmax_fisher():
    """E over labels of δ_n² is p_n (1 − p_n), without drawing any."""
    model = build("untied")
    found = capture_model(model, IDS.split(2), Options(lm_head=True, rotate=0))
    spec = ScoreSpec("kfac", FORMATS, budget=1)
    scores = score_graph(found.graph, [found.inputs(i) for i in (0, 1)], spec)
    twin = copy.deepcopy(model).double()
    with torch.no_grad():
        x = twin.model(IDS).last_hidden_state[:, :-1].flatten(0, 1)
        p = twin.lm_head(x).softmax(-1)
    curvature = (p - p * p).mean(0)
    torch.testing.assert_close(scores.curvature["lm_head"].double(), curvature, rtol=1e-3, atol=0)
    h = x.t() @ x / len(x)
    wanted = [0.5 * curvature * ((e @ h) * e).sum(1) for e in deltas(model.lm_head)]
    torch.testing.assert_close(
        scores.losses["lm_head"].double(), torch.stack(wanted, 1), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("kind", ["kfac", "fisher-sequence"])
def test_logits_made_in_pieces_give_the_scores_of_whole_ones(kind, monkeypatch):
    model = build("untied")
    found = capture_model(model, IDS.split(2), Options(lm_head=True, rotate=0))
    inputs = [found.inputs(i) for i in (0, 1)]
    spec = ScoreSpec(kind, FORMATS, labels="text")
    monkeypatch.setattr(supervision, "_CHUNK", 5 * VOCABULARY)
    pieces = score_graph(found.graph, inputs, spec)
    monkeypatch.setattr(replay, "_head", lambda *_: None)
    whole = score_graph(found.graph, inputs, spec)
    assert_close(pieces.losses, whole.losses, 1e-4)
    assert "lm_head" in whole.losses
