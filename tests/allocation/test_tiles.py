"""Tiles, their options, and the other budgets on a small model."""

from __future__ import annotations

import math

import pytest
import torch

from mixllm_compiler.allocation.allocate import make_plan
from mixllm_compiler.allocation.plan import Plan
from mixllm_compiler.errors import BudgetError, OptionError
from mixllm_compiler.formats.row_format import RowFormat

Q, UP, DOWN = (
    f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
)
TOGETHER = {name.replace(".0.", f".{i}."): f"layer {i}" for i in range(2) for name in (Q, UP)}


@pytest.fixture
def scores(model, score):
    return score(model, siblings=TOGETHER)


def rows_of(plan, *names):
    return torch.bincount(torch.cat([plan.sites[name].widths for name in names]))


def test_a_tile_has_one_width(scores):
    plan = make_plan(scores, bits=4.4, tile=32)
    assert (rows_of(plan, Q, UP) % 32 == 0).all()
    assert (rows_of(plan, DOWN) % 32 == 0).all()
    odd = rows_of(plan, "lm_head.weight") % 32  # 200 rows
    assert sorted(odd[odd > 0].tolist()) == [200 % 32]


def test_rows_that_share_a_tile_need_not_be_neighbours(scores):
    widths = make_plan(scores, bits=4.4, tile=32).sites[UP].widths
    assert int((widths.diff() != 0).sum()) > 256 // 32


def test_windows_bound_what_shares_a_tile(scores):
    plan = make_plan(scores, bits=4.4, tile=32, window=64, siblings=False)
    for window in plan.sites[UP].widths.split(64):
        assert (torch.bincount(window) % 32 == 0).all()


def test_tensor_parallel_shares_are_tiled_alone(scores):
    plan = make_plan(scores, bits=4.4, tile=32, tp=2, exclude=["lm_head"])
    for part in range(2):
        shares = [plan.sites[name].widths.chunk(2)[part] for name in (Q, UP)]
        assert (torch.bincount(torch.cat(shares)) % 32 == 0).all()
    with pytest.raises(OptionError, match=r"lm_head\.weight has 200 rows, which tp=3"):
        make_plan(scores, bits=4.4, tp=3, exclude=["model*"])


def test_what_is_coarser_loses_more(scores):
    ways = [{"tile": 1}, {"tile": 16}, {"granularity": "linears"}, {"granularity": "siblings"}]
    losses = [make_plan(scores, bits=4.6, **way).predicted_loss for way in ways]
    assert losses == sorted(losses)
    assert make_plan(scores, bits=4.6, granularity="rows") == make_plan(scores, bits=4.6, tile=1)
    whole = make_plan(scores, bits=4.6, granularity="siblings")
    assert sorted(rows_of(whole, Q, UP).tolist())[-2:] == [0, 128 + 256]


def test_pinned_matrices_take_no_part_in_tiles(scores):
    plan = make_plan(scores, bits=4.8, tile=32, pins={Q: 8})
    assert plan.sites[Q].rows_per_width() == {8: 128}
    assert (rows_of(plan, UP) % 32 == 0).all()
    few = make_plan(scores, bits=4.8, tile=32, pins={Q: 8}, formats_per_layer=1)
    assert len(few.sites[UP].rows_per_width()) == 1


def test_the_paper_rule_stays_row_by_row(scores):
    plan = make_plan(scores, preset="paper")
    rows = sum(n for n, _ in scores.shapes.values())
    assert plan.rows_per_width()[8] == round(rows / 10)
    assert (rows_of(plan, Q) % 64 > 0).any()


def test_few_widths_a_layer_lose_more_than_many(scores):
    plans = [make_plan(scores, bits=4.6, tile=16, formats_per_layer=n) for n in (1, 2, 3, None)]
    for n, plan in enumerate(plans[:3], 1):
        for i in range(2):
            names = [name for name in TOGETHER if f".{i}." in name]
            assert int((rows_of(plan, *names) > 0).sum()) <= n
    losses = [plan.predicted_loss for plan in plans]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("tile", [1, 32])
def test_the_smallest_plan_within_a_kl(scores, tile):
    asked = make_plan(scores, bits=4.6, tile=tile)
    kl = 0.7 * asked.predicted_loss + 0.002
    plan = make_plan(scores, kl=kl, constant=0.7, floor=0.002, tile=tile)
    assert plan.predicted_kl <= kl
    assert plan.true_bytes == pytest.approx(asked.true_bytes, rel=0.01)
    assert (plan.certificate.objective, plan.certificate.of) == (plan.true_bytes, "bytes")
    assert plan.certificate.bound <= asked.true_bytes
    assert plan.asked == f"KL {kl:g}"
    assert "gap to the smallest plan of this loss at most" in plan.summary()
    assert f"predicted KL {plan.predicted_kl:.4g}" in plan.summary()


def test_a_kl_that_no_plan_reaches_tells_the_range(scores):
    low = make_plan(scores, bits=16).predicted_loss
    high = make_plan(scores, bits=16, widths=(2,)).predicted_loss
    with pytest.raises(
        BudgetError, match=f"from {low + 1:.4g} nats per token .* to {high + 1:.4g}"
    ):
        make_plan(scores, kl=1, floor=1)
    assert make_plan(scores, kl=2 * high).rows_per_width().keys() == {2}


def test_constant_and_floor_travel_with_the_plan(scores, tmp_path):
    plan = make_plan(scores, bits=4.4, constant=0.67, floor=0.001)
    plan.save(tmp_path / "plan")
    again = Plan.load(tmp_path / "plan")
    assert again.predicted_kl == plan.predicted_kl == 0.67 * plan.predicted_loss + 0.001
    assert again.certificate == plan.certificate


def test_time_has_a_price(scores):
    """Five bits take long here: with a price on seconds they are avoided, at more loss."""

    def slow(name: str, row: RowFormat) -> float:
        return 1e-6 * (row.bits == 5)

    free = make_plan(scores, bits=4.8, tile=16)
    priced = make_plan(scores, bits=4.8, tile=16, time=slow, price=1e3)
    assert free.rows_per_width()[5] > 0
    assert 5 not in priced.rows_per_width()
    assert priced.predicted_loss > free.predicted_loss
    total = sum(
        float(loss.gather(1, _columns(scores, priced.sites[name]))[:, 0].double().sum())
        for name, loss in scores.loss.items()
    )
    assert priced.predicted_loss == pytest.approx(total)
    assert make_plan(scores, bits=4.8, tile=16, time=slow, price=0.0) == free


def _columns(scores, site):
    return torch.tensor([scores.widths.index(b) for b in site.widths.tolist()])[:, None]


def test_rows_without_a_common_width_cannot_share_a_tile(model, score):
    scores = score(model, widths=(4, 8))
    scores.loss[Q][0, 0] = scores.loss[Q][1, 1] = math.inf
    with pytest.raises(OptionError, match=f"128 rows of {Q} share a tile.* tile=1"):
        make_plan(scores, bits=6, tile=128)
    assert make_plan(scores, bits=6, tile=1).sites[Q].widths[:2].tolist() == [8, 4]


def test_contradictions(scores):
    for given, message in [
        ({"bits": 4, "kl": 1}, "as bits or as kl, not both"),
        ({"bits": 4, "window": 100}, "cannot be cut into tiles of 64; take window=128"),
        ({"bits": 4, "tile": -1}, "tile = -1 is no number of rows from 0 on"),
        ({"bits": 4, "tp": 0}, "tp = 0 is no number of rows from 1 on"),
        ({"bits": 4, "granularity": "linear"}, "Did you mean 'linears'"),
        ({"bits": 4, "formats_per_layer": 0}, "leaves rows no width"),
        ({"bits": 4, "constant": 0.0}, "predict no KL"),
        ({"kl": 1, "preset": "paper"}, "budget of preset 'best'"),
    ]:
        with pytest.raises(OptionError, match=message):
            make_plan(scores, **given)
