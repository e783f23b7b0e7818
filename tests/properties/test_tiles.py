"""Plans in tiles against brute force: which rows may share a width, and what is best then."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from mixllm_compiler.allocation.allocate import make_plan
from mixllm_compiler.allocation.problem import Problem
from mixllm_compiler.allocation.tiles import cut, regions, resort
from mixllm_compiler.allocation.tiling import Tiling
from mixllm_compiler.formats.fingerprint import fingerprint
from mixllm_compiler.formats.row_format import RowFormat
from mixllm_compiler.salience.scores import Scores


@st.composite
def models(draw, rows=12, matrices=3, widths=3, noise=0.5):
    """Scores of small matrices, some of them siblings, and a tiling of them."""
    tp = draw(st.sampled_from((1, 1, 2)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shapes, siblings = {}, {}
    for i in range(draw(st.integers(1, matrices))):
        n = tp * draw(st.integers(1, rows // matrices // tp))
        together = i > 0 and draw(st.booleans())
        k = shapes[f"m{i - 1}"][1] if together else draw(st.sampled_from((16, 32, 48)))
        shapes[f"m{i}"] = (n, k)
        if together:
            group = siblings.setdefault(f"m{i - 1}", f"m{i - 1}")
            siblings[f"m{i}"] = group
    bits = sorted(draw(st.sets(st.sampled_from((2, 3, 4, 5, 6, 8)), min_size=1, max_size=widths)))
    loss = {}
    for name, (n, _) in shapes.items():
        scale = torch.exp(2 * torch.randn(n, 1, generator=generator))
        wobble = torch.exp(noise * torch.randn(n, len(bits), generator=generator))
        loss[name] = scale * wobble * torch.tensor([4.0**-b for b in bits])
    scores = Scores(
        kind="test",
        formats=tuple(RowFormat(b, 16) for b in bits),
        loss=loss,
        shapes=shapes,
        fingerprint=fingerprint(
            {n: torch.randn(*s, generator=generator) for n, s in shapes.items()}
        ),
        group=16,
        siblings=siblings,
    )
    tile = draw(st.integers(1, 4))
    window = tile * draw(st.integers(0, 3))
    return scores, {"tile": tile, "window": window, "siblings": draw(st.booleans()), "tp": tp}


def windows(scores, tile, window, siblings, tp):
    """Lists of (matrix, row) that may be reordered among each other, written down anew."""
    groups: dict[str, list[str]] = {}
    for name in scores.shapes:
        alone = not siblings or name not in scores.siblings
        groups.setdefault(name if alone else "of " + scores.siblings[name], []).append(name)
    found = []
    for names in groups.values():
        for part in range(tp):
            region = []
            for name in names:
                n = scores.shapes[name][0] // tp
                region += [(name, part * n + i) for i in range(n)]
            size = window or len(region)
            found += [region[at : at + size] for at in range(0, len(region), size)]
    return found


def budget_of(scores, share):
    """Bytes between those of the narrowest and the widest plan."""
    plans = [make_plan(scores, bits=16, widths=(w,), tile=1).true_bytes for w in scores.widths]
    return min(plans) + int(share * (max(plans) - min(plans)))


@given(models(rows=60), st.floats(0, 1))
def test_every_window_has_whole_tiles_of_each_width_but_one(case, share):
    scores, tiling = case
    plan = make_plan(scores, bytes=budget_of(scores, share), **tiling)
    assert plan.true_bytes <= budget_of(scores, share)
    for rows in windows(scores, **tiling):
        counts = torch.bincount(torch.tensor([plan.sites[m].widths[i].item() for m, i in rows]))
        odd = [count % tiling["tile"] for count in counts.tolist() if count % tiling["tile"]]
        assert odd in ([], [len(rows) % tiling["tile"]])


def best_by_trying_all(loss, cost, budget):
    best = math.inf
    for choice in itertools.product(range(loss.shape[1]), repeat=len(loss)):
        if sum(cost[i, f].item() for i, f in enumerate(choice)) <= budget:
            best = min(best, sum(loss[i, f].item() for i, f in enumerate(choice)))
    return best


@given(models(), st.floats(0, 1))
def test_no_worse_than_the_best_widths_of_sorted_tiles_but_for_one_step(case, share):
    scores, tiling = case
    budget = budget_of(scores, share)
    plan = make_plan(scores, bytes=budget, **tiling)
    problem = Problem.build(scores, list(scores.loss), scores.widths, {})
    items = cut(problem, regions(problem, Tiling(**tiling)))
    if len(items.loss) > 7:
        return
    best = best_by_trying_all(items.loss, items.cost, budget - problem.fixed_bytes)
    one_step = float((items.loss.amax(1) - items.loss.amin(1)).max())
    assert plan.predicted_loss <= best + one_step + 1e-9
    assert plan.certificate.bound <= plan.predicted_loss


@settings(max_examples=25)
@given(models(rows=7, matrices=2), st.floats(0, 1))
def test_no_tiles_at_all_beat_the_bound_of_free_rows(case, share):
    """Brute force over rows, kept where every window has whole tiles."""
    scores, tiling = case
    budget = budget_of(scores, share)
    found = windows(scores, **tiling)
    rows = [row for window in found for row in window]
    ends = list(itertools.accumulate(map(len, found)))
    sizes = [[f.row_bytes(scores.shapes[m][1]) for f in scores.formats] for m, _ in rows]
    losses = [scores.loss[m][i].tolist() for m, i in rows]
    room = budget - sum(-(-n // 2) for n, _ in scores.shapes.values())
    best = math.inf
    for choice in itertools.product(range(len(scores.formats)), repeat=len(rows)):
        if sum(sizes[i][f] for i, f in enumerate(choice)) > room:
            continue
        parts = [choice[a:b] for a, b in itertools.pairwise([0, *ends])]
        odd = [[part.count(f) % tiling["tile"] for f in set(part)] for part in parts]
        if all(sum(1 for o in window if o) <= 1 for window in odd):
            best = min(best, sum(losses[i][f] for i, f in enumerate(choice)))
    plan = make_plan(scores, bytes=budget, **tiling)
    free = make_plan(scores, bytes=budget, tile=1)
    assert free.certificate.bound <= best + 1e-9
    assert best <= plan.predicted_loss + 1e-9


@given(models(rows=60), st.floats(0, 1), st.integers(1, 3))
def test_a_limit_on_widths_holds_for_siblings_together(case, share, limit):
    scores, tiling = case
    plan = make_plan(scores, bytes=budget_of(scores, share), formats_per_layer=limit, **tiling)
    assert plan.true_bytes <= budget_of(scores, share)
    groups: dict[str, set[int]] = {}
    for name, site in plan.sites.items():
        key = scores.siblings.get(name, name) if tiling["siblings"] else name
        groups.setdefault(key, set()).update(site.widths.tolist())
    assert all(len(found) <= limit for found in groups.values())


# Losses fall with the width, so that the best any tiles reach is the same.
@given(models(rows=60, noise=0.1), st.floats(0, 1))
def test_a_target_of_kl_is_met_within_one_step_of_the_bound(case, share):
    scores, tiling = case
    asked = make_plan(scores, bytes=budget_of(scores, share), **tiling)
    kl = 1.5 * asked.predicted_loss + 0.01
    plan = make_plan(scores, kl=kl, constant=1.5, floor=0.01, **tiling)
    assert plan.predicted_kl <= kl * (1 + 1e-9)
    assert plan.certificate.of == "bytes"
    assert plan.certificate.objective == plan.true_bytes
    # Tiles were cut around other solutions, so the plan that was asked for bytes may be smaller.
    problem = Problem.build(scores, list(scores.loss), scores.widths, {})
    cost = cut(problem, regions(problem, Tiling(**tiling))).cost
    assert plan.true_bytes - plan.certificate.bound <= int((cost.amax(1) - cost.amin(1)).max()) + 1
    free = make_plan(scores, kl=kl, constant=1.5, floor=0.01, tile=1)
    assert free.certificate.bound <= plan.true_bytes


@given(models(rows=60), st.floats(0, 1))
def test_equal_scores_give_equal_plans(case, share):
    scores, tiling = case
    once, again = (make_plan(scores, bytes=budget_of(scores, share), **tiling) for _ in range(2))
    assert once == again and once.predicted_loss == again.predicted_loss


@given(models(rows=60), st.integers(0, 2**32))
def test_rows_change_places_without_loss_and_tiles_stay(case, seed):
    scores, tiling = case
    problem = Problem.build(scores, list(scores.loss), scores.widths, {})
    generator = torch.Generator().manual_seed(seed)
    for region in regions(problem, Tiling(**tiling)):
        n, tile = len(region.rows), region.tile
        choice = torch.randint(len(scores.formats), (-(-n // tile),), generator=generator)
        better = resort(problem, region, choice)
        assert sorted(better.rows.tolist()) == sorted(region.rows.tolist())
        for at in range(0, n, region.window):
            old, new = (set(r.rows[at : at + region.window].tolist()) for r in (region, better))
            assert old == new
        if tile == n:
            continue
        # Some arrangement of the same widths over the new tiles loses no more than before.
        before = problem.loss[region.rows].gather(1, choice.repeat_interleave(tile)[:n, None]).sum()
        sums = [problem.loss[better.rows[at : at + tile]].sum(0) for at in range(0, n, tile)]
        per = -(-region.window // tile)
        after = 0.0
        for start in range(0, len(sums), per):
            widths = choice[start : start + per].tolist()
            if len(widths) > 5:
                return
            short = n % tile and start + per >= len(sums)  # the short tile's width stays its own
            tail = widths[-1:] if short else []
            after += min(
                sum(s[f].item() for s, f in zip(sums[start:], [*move, *tail], strict=False))
                for move in itertools.permutations(widths[: len(widths) - len(tail)])
            )
        assert after <= before.item() * (1 + 1e-6) + 1e-9


@settings(max_examples=5)
@given(st.integers(0, 2**32), st.sampled_from((3.6, 4.4, 5.0)))
def test_gaps_are_small_at_real_size(seed, bits):
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"m{i}": ((1024, 3072)[i % 2], (1024, 768, 3072)[i % 3]) for i in range(48)}
    widths = (2, 3, 4, 5, 6, 8)
    loss = {}
    for name, (n, _) in shapes.items():
        scale = torch.exp(
            torch.randn(1, generator=generator) + torch.randn(n, 1, generator=generator)
        )
        noise = torch.exp(0.1 * torch.randn(n, 6, generator=generator))
        loss[name] = scale * noise * torch.tensor([4.0**-b for b in widths])
    prints = fingerprint({name: torch.zeros(1).expand(s) for name, s in shapes.items()})
    formats = tuple(RowFormat(b) for b in widths)
    scores = Scores("test", formats, loss, shapes, prints)
    free, tiles = (make_plan(scores, bits=bits, tile=tile) for tile in (1, 64))
    assert free.certificate.gap <= 1e-4
    assert tiles.certificate.gap <= 5e-4  # of 1,536 tiles
    assert free.predicted_loss <= tiles.predicted_loss <= 1.02 * free.predicted_loss
    assert tiles.true_bits == pytest.approx(bits, rel=1e-3)
