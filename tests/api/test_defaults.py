"""What a user gets who asks for nothing, and who asks for the paper: the same at every door."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import mixllm_compiler
from mixllm_compiler.allocation.plan import Plan
from mixllm_compiler.formats.row_format import WIDTHS
from mixllm_compiler.options import Options
from mixllm_compiler.passes.pipeline import default_pipeline
from mixllm_compiler.runtime import records
from mixllm_compiler.salience.scores import Scores
from tests.helpers import EAGER, activations, token_ids
from tests.models.support import build, handed_over, mixed_ops

IDS = token_ids(2, 40)
RECIPES = {
    "best": ("two-level", WIDTHS, 256, "token"),
    "paper": ("asym", (4, 8), 0, "group"),
}
PRESETS = pytest.mark.parametrize("preset", RECIPES)


def asked(preset: str) -> dict[str, Any]:
    return {} if preset == "best" else {"preset": preset}


def recipe_of(plan: Plan) -> tuple[set[str], int, str]:
    return {s.family for s in plan.sites.values()}, plan.rotation, plan.activation_mode


def used(model: Any, *args: Any, **options: Any) -> tuple[Plan, dict[str, Any]]:
    """The plan that `torch.compile` makes for this call, and the layouts that run."""
    plans = []
    with handed_over() as graphs, torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        from mixllm_compiler.passes import allocate_bits

        original = allocate_bits.make_plan
        patch.setattr(
            allocate_bits, "make_plan", lambda *a, **k: plans.append(original(*a, **k)) or plans[-1]
        )
        torch.compile(model, backend="mixllm", options={**EAGER, **options})(*args)
    return plans[0], mixed_ops(graphs[0])


@PRESETS
def test_options(preset):
    family, widths, rotate, _ = RECIPES[preset]
    found = Options.parse(asked(preset))
    assert (found.family, found.widths, found.rotate) == (family, widths, rotate)
    assert (found.tile, found.window, found.siblings) == (64, 1024, True)
    nothing = dict.fromkeys(("family", "widths", "rotate"))
    assert Options.parse({**asked(preset), **nothing}) == found == dataclasses.replace(found)


def test_what_is_given_beside_a_preset_counts():
    found = Options(preset="paper", rotate=128, widths=(4,))
    assert (found.family, found.widths, found.rotate) == ("asym", (4,), 128)
    assert Options(rotate=0, family="asym").widths == WIDTHS


@PRESETS
def test_scores_and_plans(preset, tmp_path):
    family, widths, rotate, mode = RECIPES[preset]
    model = build("llama")
    scores = mixllm_compiler.score(model, IDS, kind="weight-error", **asked(preset))
    assert (scores.family, scores.widths, scores.rotation) == (family, widths, rotate)
    scores.save(tmp_path / "scores")
    for found in (scores, Scores.load(tmp_path / "scores")):
        plan = mixllm_compiler.plan(found, bits=4.6, **asked(preset))
        assert recipe_of(plan) == ({family}, rotate, mode)


@PRESETS
def test_the_backend(preset):
    family, _, rotate, mode = RECIPES[preset]
    plan, layouts = used(build("llama"), IDS, bits=4.7, **asked(preset))
    assert recipe_of(plan) == ({family}, rotate, mode)
    assert {layout.family for layout in layouts.values()} == {family}
    blocks = {k: f"hadamard:{k}" if rotate else "" for k in (128, 256)}
    assert all(layout.transform == blocks[layout.k] for layout in layouts.values())


@PRESETS
@torch.no_grad()
def test_compile_and_quantize(preset):
    family, _, rotate, mode = RECIPES[preset]
    model = build("llama")
    given = {"data": IDS, "kind": "weight-error", **asked(preset)}
    mixllm_compiler.compile(model, bits=4.6, **given, **EAGER)
    plan = model._mixllm_options["plan"]
    assert recipe_of(plan) == ({family}, rotate, mode)
    quantized = mixllm_compiler.quantize(build("llama"), plan)
    module = quantized.model.layers[0].mlp.down_proj
    assert (module.mode, module.rotation) == (mode, rotate)
    torch.testing.assert_close(quantized(IDS).logits, model(IDS).logits)


def test_scores_that_say_nothing_are_of_inputs_as_they_are():
    """Files from before rotation had a setting."""
    model = build("llama")
    plain = {"family": "asym", "rotate": 0, "widths": (4, 8)}
    scores = mixllm_compiler.score(model, IDS, kind="weight-error", **plain)
    old = dataclasses.replace(scores, settings={})
    assert recipe_of(mixllm_compiler.plan(old, bits=4.6)) == ({"asym"}, 0, "group")


def test_a_rule_of_the_paper_keeps_the_formats_of_the_scores():
    scores = mixllm_compiler.score(build("llama"), IDS, kind="weight-error")
    plan = mixllm_compiler.plan(scores, preset="paper")
    assert recipe_of(plan) == ({"two-level"}, 256, "token")
    assert plan.rows_per_width().keys() == {4, 8}


@pytest.mark.parametrize("way", ["disabled", "no pass", "no block"])
def test_without_rotation_a_group_has_a_scale(way):
    """One scale a token needs rotated inputs, whatever kept them from it."""
    k = 200 if way == "no block" else 256  # 200 has no power of two from 32 on
    model = nn.Sequential(nn.Linear(k, k), nn.ReLU(), nn.Linear(k, k)).eval()
    options: dict[str, Any] = {"disabled": {"disable": ("rotate-inputs",)}, "no block": {}}.get(
        way, {"pipeline": default_pipeline().without(["rotate-inputs"]).spec()}
    )
    plan, layouts = used(model, activations(3, k=k), bits=4.6, **options)
    assert (plan.rotation, plan.activation_mode) == (0, "group")
    assert {layout.transform for layout in layouts.values()} == {""}


def test_another_pipeline_does_not_take_the_plan_of_rotated_inputs():
    model = nn.Sequential(nn.Linear(256, 256)).eval()
    x = activations(3, k=256)
    rotated, _ = used(model, x, bits=4.6)
    torch._dynamo.reset()
    plain, _ = used(model, x, bits=4.6, disable=("rotate-inputs",))
    assert (rotated.rotation, plain.rotation) == (256, 0)


@torch.no_grad()
def test_matrices_smaller_than_a_tile_of_their_window_are_planned():
    model = nn.Sequential(nn.Linear(128, 72), nn.ReLU(), nn.Linear(72, 128)).eval()
    with records.collect() as graphs:
        compiled = torch.compile(model, backend="mixllm", options={"bits": 5, **EAGER})
        y = compiled(activations(3))
    (line,) = graphs[0].quantized  # the second one's K is less than a group
    assert sum(line.rows.values()) == 72
    assert y.isfinite().all() and not torch.equal(y, model(activations(3)))
