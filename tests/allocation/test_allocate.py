from __future__ import annotations

import pytest
import torch

from mixllm_compiler.allocation.allocate import make_plan, uniform_plan
from mixllm_compiler.errors import BudgetError, OptionError
from mixllm_compiler.formats.bits import true_bits
from mixllm_compiler.formats.row_format import RowFormat
from mixllm_compiler.quantizers.rtn import quantize_rtn

Q, HEAD = "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"


@pytest.mark.parametrize("bits", [3.4, 4.4, 5.0, 6.5])
def test_the_budget_is_met_from_below(scores, bits):
    plan = make_plan(scores, bits=bits, tile=1)
    assert bits * 0.995 < plan.true_bits <= bits
    assert plan.certificate is not None
    assert plan.certificate.gap <= 1e-2  # a thousand rows; at real size 1e-4, see the properties
    assert plan.predicted_loss == plan.certificate.objective >= plan.certificate.bound
    assert plan.asked == f"{bits:.2f} bits"


def test_bits_and_bytes_are_one_budget(scores):
    plan = make_plan(scores, bits=4.4)
    same = make_plan(scores, bytes=plan.true_bytes)
    assert same == plan and same.asked == f"{plan.true_bytes:,} bytes"
    assert make_plan(scores, bits=plan.true_bits) == plan


def test_the_true_bits_of_another_plan_are_enough_for_it(scores):
    uniform = uniform_plan(scores.fingerprint, scores.shapes, 4, group=32)
    assert make_plan(scores, bits=uniform.true_bits, widths=(4,)).sites == uniform.sites


def test_more_budget_is_less_loss_and_beats_uniform_widths(scores):
    losses = [make_plan(scores, bits=b).predicted_loss for b in (3.2, 4.0, 5.0, 6.0, 8.0)]
    assert losses == sorted(losses, reverse=True)
    uniform = make_plan(scores, bits=8, widths=(4,))
    mixed = make_plan(scores, bits=uniform.true_bits)
    assert mixed.predicted_loss < 0.7 * uniform.predicted_loss


def test_predicted_loss_is_the_sum_over_rows(scores):
    plan = make_plan(scores, bits=4.4)
    total = sum(
        scores.loss[name][i, scores.widths.index(bits)].item()
        for name, site in plan.sites.items()
        for i, bits in enumerate(site.widths.tolist())
    )
    assert plan.predicted_loss == pytest.approx(total, rel=1e-9)


def test_rows_that_never_matter_get_what_is_left(model, score):
    """Features that no text reached score zero; the budget is spent on them, not thrown away."""
    scores = score(model)
    for loss in scores.loss.values():
        loss.zero_()
    plan = make_plan(scores, bits=4.5)
    assert 4.5 * 0.995 < plan.true_bits <= 4.5
    assert plan.certificate.gap == 0
    assert len(plan.rows_per_width()) <= 2  # spread, not poured into the first rows


def test_a_budget_beyond_the_largest_widths_is_simply_not_used_up(scores):
    plan = make_plan(scores, bits=16)
    best = {name: loss.argmin(1) for name, loss in scores.loss.items()}
    bits = torch.tensor(scores.widths, dtype=torch.uint8)
    assert all(torch.equal(plan.sites[n].widths, bits[best[n]]) for n in best)


def test_a_budget_below_the_smallest_widths(scores):
    least = uniform_plan(scores.fingerprint, scores.shapes, 4, group=32)
    most = uniform_plan(scores.fingerprint, scores.shapes, 8, group=32)
    with pytest.raises(BudgetError) as caught:
        make_plan(scores, bits=3.5, widths=(4, 8))
    text = str(caught.value)
    assert text.startswith("3.500 true bits (")
    assert f"from {least.true_bits:.3f} bits ({least.true_bytes:,} bytes)" in text
    assert f"to {most.true_bits:.3f} bits ({most.true_bytes:,} bytes)" in text
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(BudgetError, match="is no budget"):
            make_plan(scores, bits=bad)
    with pytest.raises(BudgetError, match="cannot be met"):
        make_plan(scores, bytes=0)


def test_a_budget_that_only_rounding_of_bits_could_miss(scores):
    least = make_plan(scores, bits=8, widths=(2,))
    assert make_plan(scores, bytes=least.true_bytes) == least
    with pytest.raises(BudgetError):
        make_plan(scores, bytes=least.true_bytes - 1)


def test_pins_fix_whole_matrices_inside_the_budget(scores):
    plan = make_plan(scores, bits=4.4, pins={"lm_head": 8, "model.layers.*.q_proj": 3})
    assert plan.sites[HEAD].rows_per_width() == {8: 200}
    assert plan.sites[Q].rows_per_width() == {3: 128}
    assert 4.4 * 0.995 < plan.true_bits <= 4.4


def test_the_last_pattern_decides_and_may_use_a_width_that_is_not_free(scores):
    plan = make_plan(scores, bits=5.5, widths=(4, 6), pins={"*": 4, "lm_head": 8, Q: 3})
    assert plan.sites[HEAD].rows_per_width() == {8: 200}
    assert plan.sites[Q].rows_per_width() == {3: 128}
    others = [site for name, site in plan.sites.items() if name not in (HEAD, Q)]
    assert all(set(site.rows_per_width()) == {4} for site in others)


def test_excluded_matrices_stay_float_outside_of_the_budget(scores, model):
    plan = make_plan(scores, bits=4.4, exclude=["lm_head", "*.up_proj.weight"], tile=1)
    assert plan.float_sites[HEAD] == "excluded by 'lm_head'"
    assert len(plan.sites) == 4 and len(plan.float_sites) == 3
    weights = [quantize_rtn(model[n], s.widths, s.group) for n, s in plan.sites.items()]
    assert 4.4 * 0.995 < true_bits(weights) <= 4.4


def test_what_was_not_scored_stays_float(model, score):
    scores = score(model, only=[name for name in model if "layers" in name])
    plan = make_plan(scores, bits=4.4, float_sites={"router": "8 rows", HEAD: "an embedding"})
    assert plan.float_sites == {HEAD: "an embedding", "router": "8 rows"}
    assert make_plan(scores, bits=4.4).float_sites == {HEAD: "not scored"}
    assert make_plan(scores, bits=4.4) == plan


def test_a_pattern_that_matches_nothing_names_the_nearest(scores):
    for given in ({"exclude": ["model.layers.0.self_attn.q_prj.weight"]}, {"pins": {Q[:-2]: 4}}):
        with pytest.raises(OptionError, match=f"no matrix matches .* Did you mean '{Q}'"):
            make_plan(scores, bits=4.4, **given)
    with pytest.raises(OptionError, match=r"Known: lm_head\.weight, model\.layers\.\*\.mlp"):
        make_plan(scores, bits=4.4, exclude=["?"])


def test_ties_are_planned_once_for_all_names(model, score):
    tied = {**model, "model.layers.1.self_attn.q_proj.weight": model[Q]}
    scores = score(tied)
    plan = make_plan(scores, bits=4.4)
    other = plan.sites["model.layers.1.self_attn.q_proj.weight"]
    assert other == plan.sites[Q]
    weights = [quantize_rtn(tied[n], s.widths, s.group) for n, s in plan.distinct().items()]
    assert len(weights) == 6
    assert plan.true_bits == true_bits(weights)
    assert 4.4 * 0.99 < plan.true_bits <= 4.4
    with pytest.raises(OptionError, match="are one tensor, pinned to two widths"):
        make_plan(scores, bits=4.4, pins={"*0.self_attn*": 4, "*1.self_attn*": 8})


def test_a_tied_name_can_stay_float_alone(model, score):
    tied = {**model, "embed.weight": model[HEAD]}
    plan = make_plan(score(tied), bits=4.4, exclude=["embed"])
    assert HEAD in plan.sites and "embed.weight" in plan.float_sites


def test_widths_are_those_that_were_scored(model, score):
    plan = make_plan(score(model, widths=(3, 5)), bits=4.4)
    assert set(plan.rows_per_width()) == {3, 5}
    with pytest.raises(OptionError, match="not scored at 4 bits, only at 3, 5"):
        make_plan(score(model, widths=(3, 5)), bits=4.4, widths=(4,))
    with pytest.raises(OptionError, match="cannot have 7 bits"):
        make_plan(score(model), bits=4.4, widths=(4, 7))
    with pytest.raises(OptionError, match="widths is empty"):
        make_plan(score(model), bits=4.4, widths=())


def test_a_row_may_lack_a_format_but_not_all(scores):
    scores.loss[Q][3, :4] = float("inf")
    plan = make_plan(scores, bits=4.4)
    assert plan.sites[Q].widths[3] in (6, 8)
    with pytest.raises(OptionError, match=f"row 3 of {Q} has an infinite score in every width"):
        make_plan(scores, bits=4.4, widths=(3, 4))


def test_paper_takes_a_tenth_of_all_rows_by_count(scores):
    plan = make_plan(scores, preset="paper")
    total = sum(n for n, _ in scores.shapes.values())
    assert plan.rows_per_width() == {4: total - round(total / 10), 8: round(total / 10)}
    high = {(n, i) for n, s in plan.sites.items() for i in (s.widths == 8).nonzero().flatten()}
    w4 = scores.widths.index(4)
    worst_high = min(scores.loss[n][i, w4].item() for n, i in high)
    low = [scores.loss[n][s.widths == 4, w4].max().item() for n, s in plan.sites.items()]
    assert max(low) <= worst_high
    assert plan.asked == "paper 10 %" and plan.certificate is None
    assert plan.predicted_loss > 0


def test_paper_within_a_budget_fills_it_by_rank(scores):
    plan = make_plan(scores, preset="paper", bits=5.2)
    assert 5.2 * 0.99 < plan.true_bits <= 5.2
    assert plan.asked == "paper at 5.20 bits"
    knapsack = make_plan(scores, bits=plan.true_bits)
    assert knapsack.predicted_loss < plan.predicted_loss


def test_paper_leaves_pinned_rows_out_of_the_ranking(scores):
    plan = make_plan(scores, preset="paper", fraction=0.5, pins={"lm_head": 3})
    assert plan.sites[HEAD].rows_per_width() == {3: 200}
    free = sum(n for n, _ in scores.shapes.values()) - 200
    assert plan.rows_per_width()[8] == free // 2
    by_bytes = make_plan(scores, preset="paper", bits=5.5, pins={"lm_head": 8})
    assert by_bytes.sites[HEAD].rows_per_width() == {8: 200}
    assert 5.5 * 0.99 < by_bytes.true_bits <= 5.5


def test_paper_with_other_widths(scores):
    plan = make_plan(scores, preset="paper", widths=(3, 6), fraction=0.25)
    assert set(plan.rows_per_width()) == {3, 6}
    with pytest.raises(OptionError, match=r"a low and a high width, not \(3, 4, 6\)"):
        make_plan(scores, preset="paper", widths=(3, 4, 6))


def test_contradictions(scores):
    with pytest.raises(OptionError, match=r"unknown preset 'papr'. Did you mean 'paper'\?"):
        make_plan(scores, preset="papr")
    with pytest.raises(OptionError, match="as bits or as bytes, not both"):
        make_plan(scores, bits=4, bytes=10)
    with pytest.raises(OptionError, match="needs a budget, for example"):
        make_plan(scores)
    with pytest.raises(OptionError, match="no share of rows"):
        make_plan(scores, preset="paper", fraction=10)
    with pytest.raises(OptionError, match="no matrix is left to quantize"):
        make_plan(scores, bits=4, exclude=["*"])


@pytest.mark.parametrize(
    "given, mode, rotation",
    [
        ({}, "group", 0),
        ({"rotation": 128}, "token", 128),
        ({"rotation": 64, "activation_mode": "group"}, "group", 64),
    ],
)
def test_activations_go_with_the_rotation(scores, given, mode, rotation):
    for plan in (
        make_plan(scores, bits=4.4, **given),
        uniform_plan(scores.fingerprint, scores.shapes, 4, group=32, **given),
    ):
        assert (plan.activation_mode, plan.rotation) == (mode, rotation)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_uniform_plans(model, scores, bits):
    shapes = {name: shape for name, shape in scores.shapes.items() if name != HEAD}
    plan = uniform_plan(scores.fingerprint, shapes, bits, exclude=["*down_proj"])
    assert set(plan.rows_per_width()) == {bits}
    assert plan.float_sites[HEAD] == "not asked for"
    assert len(plan.sites) == 4
    size = 8 * sum(n * RowFormat(bits).row_bytes(96) + n // 2 for n in (128, 256))
    assert plan.true_bits == size / (96 * (128 + 256))
    assert (plan.predicted_loss, plan.certificate) == (None, None)
