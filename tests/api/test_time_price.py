"""Plans that pay for time: the price of a second, by the cost model that also chooses kernels."""

from __future__ import annotations

import pytest

import mixllm_compiler
from mixllm_compiler.errors import OptionError
from mixllm_compiler.formats.layout import Layout
from mixllm_compiler.formats.row_format import RowFormat
from mixllm_compiler.lowering.cost import predict_seconds, row_time
from mixllm_compiler.lowering.target import Target
from tests.helpers import causal_lm, token_ids

H200 = Target.parse("cuda sm_90 NVIDIA H200")


@pytest.fixture(scope="module")
def scores():
    model = causal_lm("llama", hidden_size=512, intermediate_size=1024)
    ids = token_ids(2, 300)
    return mixllm_compiler.score(model, ids, family="two-level", widths=(2, 4, 8), rotate=128)


def predicted(plan, m=1):
    """Seconds of all linears of a plan, by the model itself."""
    layouts = (
        Layout(s.k, tuple(s.rows_per_width().items()), s.group, s.family)
        for s in plan.sites.values()
    )
    return sum(predict_seconds(m, layout, H200) for layout in layouts)


@pytest.mark.parametrize("m", [1, 4096])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_of_one_width_share_their_matrix_time(m, bits):
    time = row_time({"a": (4096, 4096)}, m, H200)
    layout = Layout(4096, ((bits, 4096),), 128, "two-level")
    assert 4096 * time("a", RowFormat(bits, 128, "two-level")) == pytest.approx(
        predict_seconds(m, layout, H200)
    )


def test_a_price_trades_loss_for_time_within_the_same_budget(scores):
    free = mixllm_compiler.plan(scores, bits=5.0)
    assert mixllm_compiler.plan(scores, bits=5.0, price=0.0, target=H200) == free
    plans = [
        mixllm_compiler.plan(scores, bits=5.0, price=price, target="cuda sm_90 NVIDIA H200")
        for price in (1e4, 1e5, 1e9)
    ]
    assert all(plan.true_bits <= 5.0 for plan in plans)
    times = [predicted(plan) for plan in (free, *plans)]
    losses = [plan.predicted_loss for plan in (free, *plans)]
    assert times == pytest.approx(sorted(times, reverse=True)) and times[-1] < times[0]
    assert losses == pytest.approx(sorted(losses)) and losses[-1] > losses[0]
    assert plans[-1].rows_per_width().keys() == {2}, "bytes decide when decoding"


def test_devices_without_known_times_are_refused(scores):
    with pytest.raises(OptionError, match="none are known for 'cpu'; name a target"):
        mixllm_compiler.plan(scores, bits=5.0, price=1.0, target="cpu")
    assert row_time({}, 1, Target.parse("cuda sm_90")) is None
