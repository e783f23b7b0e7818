"""Scores of experts equal those from per-sequence gradients of the fused weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import mixllm_compiler
from mixllm_compiler.quantizers.rtn import quantize_rows
from mixllm_compiler.salience.scores import Scores
from mixllm_compiler.transforms.hadamard import block_hadamard
from tests.helpers import HIDDEN, token_ids
from tests.models.support import MIXTURES, build, experts, turn
from tests.salience.brute_force import FORMATS, OPTIONS, assert_scores, next_token, scores
from tests.salience.test_score_graph import profiled

IDS = token_ids(4, 140)
TOKENS = IDS.shape[1] - 1


def changes_of(model: Any) -> dict[str, Tensor]:
    """A [D, N, F] of every expert, from autograd in float64."""
    twin = copy.deepcopy(model).double()
    twin.set_experts_implementation("eager")
    stacks = {n: p.requires_grad_() for n, p in twin.named_parameters() if p.dim() == 3}
    loss = next_token(IDS)
    found: dict[str, list[Tensor]] = {name: [] for name in experts(model)}
    for d in range(len(IDS)):
        gradients = torch.autograd.grad(loss(twin, d), list(stacks.values()))
        for name, gradient in zip(stacks, gradients, strict=True):
            for e, g in enumerate(gradient):
                w = model.get_parameter(name).detach()[e]
                deltas = [quantize_rows(w, f).dequantize() - w.double() for f in FORMATS]
                parts = [(g * delta).sum(1) for delta in deltas]
                found[f"{name}.{e}"].append(torch.stack(parts, -1))
    return {name: torch.stack(parts) for name, parts in found.items()}


def of_experts(loss: Any) -> dict[str, Tensor]:
    return {name: found for name, found in loss.items() if ".experts." in name}


@pytest.fixture(scope="module", params=MIXTURES)
def case(request):
    model = build(request.param)
    return model, changes_of(model)


@pytest.mark.parametrize("kind", ["fisher-sequence", "paper"])
@pytest.mark.parametrize("batch", [1, 4])
def test_experts_are_scored_like_brute_force(case, kind, batch):
    model, changes = case
    found = mixllm_compiler.score(model, IDS, kind=kind, labels="text", batch=batch, **OPTIONS)
    assert_scores(of_experts(found.loss), scores(changes, kind, TOKENS))


@torch.no_grad()
def test_a_compiled_graph_scores_experts_like_brute_force(case):
    model, changes = case
    found = profiled(model, IDS, use_cache=False)
    assert_scores(of_experts(found), scores(changes, "fisher-sequence", TOKENS))


def routed_rows(model: Any, name: str) -> tuple[Tensor, Tensor]:
    """What an expert of the first product reads and the gradient at its output, per routed token.

    From the eager loop over experts: expert e calls linear with `gate_up_proj[e]`.
    """
    twin = copy.deepcopy(model)
    twin.set_experts_implementation("eager")
    parameter, _, e = name.rpartition(".")
    module = twin.get_submodule(parameter.rpartition(".")[0])
    inputs, gradients = [], []
    original = torch.nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = original(x, weight, bias)
        if weight.data_ptr() == module.gate_up_proj[int(e)].data_ptr():
            inputs.append(x.detach())
            y.register_hook(lambda dy: gradients.append(dy))
        return y

    torch.nn.functional.linear = linear
    try:
        for d in range(len(IDS)):
            next_token(IDS)(twin, d).backward()
    finally:
        torch.nn.functional.linear = original
    return torch.cat(inputs), torch.cat(gradients)


@pytest.mark.parametrize("rotate", [0, 128])
@pytest.mark.parametrize("kind", MIXTURES)
def test_kfac_takes_routed_rows_and_counts_all_tokens(kind, rotate):
    model = build(kind)
    name = "model.layers.1.mlp.experts.gate_up_proj.2"
    found = mixllm_compiler.score(
        model, IDS, kind="kfac", labels="text", **{**OPTIONS, "rotate": rotate}
    )
    x, dy = routed_rows(model, name)
    assert 0 < len(x) < 2 * IDS.numel()
    reached = dy.abs().amax(1) > 0  # the last position of a sequence has no loss
    h = x[reached].double().t() @ x[reached].double() / int(reached.sum())
    squares = dy.double().square().sum(0) / (len(IDS) * TOKENS)
    w = experts(model)[name]
    if rotate:
        h = turn(HIDDEN, rotate).t() @ h @ turn(HIDDEN, rotate)
        w = block_hadamard(w, rotate)
    expected = []
    for fmt in FORMATS:
        delta = quantize_rows(w, fmt).dequantize() - w.double()
        expected.append(0.5 * squares * ((delta @ h) * delta).sum(1))
    assert_scores({name: found.loss[name]}, {name: torch.stack(expected, 1)}, 1e-3)


@pytest.mark.parametrize("kind", ["kfac", "fisher-token", "hessian"])
def test_segments_change_no_score(kind, tmp_path):
    """With a checkpoint the graph is cut between all blocks."""
    model = build("mixtral")
    whole = mixllm_compiler.score(model, IDS, kind=kind, **OPTIONS)
    if kind == "hessian":
        again = mixllm_compiler.score(model, IDS, kind=kind, batch=2, **OPTIONS)
    else:
        again = mixllm_compiler.score(model, IDS, kind=kind, resume=tmp_path / "part", **OPTIONS)
    assert_scores(again.loss, whole.loss, 1e-4)


def never_routed(model: Any) -> list[str]:
    """Make the router prefer experts 0 to 3 for every token; names of the others."""
    for layer in model.model.layers:
        with torch.no_grad():
            gate = layer.mlp.gate.weight
            v, w = torch.randn(2, HIDDEN)
            gate.zero_()
            # Of ±a and ±b two are positive: expert 4's logit 0 is never among the two largest.
            gate[:4] = torch.stack((v, -v, w, -w))
    return [name for name in experts(model) if int(name.rpartition(".")[2]) >= 4]


@pytest.mark.parametrize("kind", ["kfac", "fisher-sequence"])
def test_experts_without_tokens_are_listed(kind, tmp_path):
    model = build("mixtral", num_local_experts=6)
    dead = never_routed(model)
    found = mixllm_compiler.score(model, IDS, kind=kind, **OPTIONS)
    assert found.unreached == {name: found.shapes[name][0] for name in dead}
    assert all(not found.loss[name].any() for name in dead)
    assert dead[0] in found.summary()
    found.save(tmp_path / "scores")
    assert Scores.load(tmp_path / "scores").unreached == found.unreached
