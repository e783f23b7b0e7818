"""Plans of random models keep their promises whatever the shapes, widths and budgets."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given

from mixllm_compiler.allocation.allocate import make_plan
from mixllm_compiler.formats.bits import true_bits
from mixllm_compiler.formats.fingerprint import fingerprint
from mixllm_compiler.formats.row_format import WIDTHS, RowFormat, width_bytes
from mixllm_compiler.quantizers.rtn import quantize_rtn
from mixllm_compiler.salience.scores import Scores


@st.composite
def scored_models(draw):
    """(weights, scores, budget in bits that some plan meets)."""
    group = draw(st.sampled_from((16, 32, 128)))
    widths = sorted(draw(st.sets(st.sampled_from(WIDTHS), min_size=1)))
    size = st.tuples(st.integers(1, 60), st.integers(1, 150))
    shapes = draw(st.lists(size, min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weights = {f"m.{i}": torch.randn(*s, generator=generator) for i, s in enumerate(shapes)}
    if draw(st.booleans()):
        weights["tied"] = weights["m.0"]
    formats = tuple(RowFormat(b, group) for b in widths)
    loss = {}
    for name, w in weights.items():
        scale = torch.exp(2 * torch.randn(len(w), 1, generator=generator))
        loss[name] = scale * torch.tensor([4.0**-b for b in widths])
    sizes = {name: tuple(w.shape) for name, w in weights.items()}
    prints = fingerprint(weights)
    scores = Scores("test", formats, loss, sizes, prints, group=group)
    # In rows of a few weights eight bits can take fewer bytes than two: they have no zero point.
    row = [[f.row_bytes(k) for f in formats] for _, k in shapes]
    tables = sum(width_bytes(n) for n, _ in shapes)
    least, most = (
        tables + sum(n * pick(sizes) for (n, _), sizes in zip(shapes, row, strict=True))
        for pick in (min, max)
    )
    budget = draw(st.integers(least, most + 100))
    return weights, scores, 8 * budget / sum(n * k for n, k in shapes)


@given(scored_models())
def test_the_bits_are_true_and_within_the_budget(case):
    weights, scores, bits = case
    plan = make_plan(scores, bits=bits, tile=1)
    stored = [quantize_rtn(weights[n], s.widths, s.group) for n, s in plan.distinct().items()]
    assert plan.true_bits == true_bits(stored) <= bits
    # Every row's loss falls with its width: what is left holds no further step of any row.
    left = int(bits * sum(w.n * w.k for w in stored) / 8) - plan.true_bytes
    for site in plan.distinct().values():
        sizes = [f.row_bytes(site.k) for f in scores.formats]
        for width, following in zip(scores.formats, scores.formats[1:], strict=False):
            if width.bits in site.rows_per_width():
                assert sizes[scores.formats.index(following)] - width.row_bytes(site.k) > left


@given(scored_models(), st.floats(0, 1))
def test_no_rule_of_the_paper_beats_the_bound(case, fraction):
    _, scores, _ = case
    low, high = scores.widths[0], scores.widths[-1]
    if low == high:
        return
    paper = make_plan(scores, preset="paper", widths=(low, high), fraction=fraction)
    best = make_plan(scores, bytes=paper.true_bytes, tile=1)
    assert best.certificate.bound <= paper.predicted_loss * (1 + 1e-9)
