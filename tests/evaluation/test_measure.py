from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from mixllm_compiler.errors import OptionError
from mixllm_compiler.evaluation.measure import (
    Quality,
    compare,
    compare_logits,
    kl_ratio,
    logits,
    mean,
)
from mixllm_compiler.evaluation.text import Windows


class Bigram(nn.Module):
    """Logits of the next token by a table."""

    def __init__(self, vocabulary: int = 11, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(vocabulary, vocabulary, generator=draw))

    def forward(self, input_ids):
        return self.table[input_ids]


def some_windows(count=3, length=9, vocabulary=11):
    ids = torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(1))
    return Windows(ids, (4 * (length - 1),) * count)


def quality(kl, loss=None):
    loss = loss or [1.0] * len(kl)
    return Quality(100, 400, (1.0,) * len(kl), tuple(loss), tuple(kl), (1.0,) * len(kl))


def test_a_model_and_itself():
    model = Bigram()
    found = compare(model, {"same": model}, some_windows())["same"]
    assert found.kl == (0.0, 0.0, 0.0)
    assert found.agreement == (1.0, 1.0, 1.0)
    assert found.loss == found.float_loss


def test_shifted_logits_are_the_same_model():
    model, shifted = Bigram(), Bigram()
    with torch.no_grad():
        shifted.table += torch.randn(11, 1)
    found = compare(model, {"shifted": shifted}, some_windows())["shifted"]
    assert found.mean_kl.value == pytest.approx(0, abs=1e-6)
    assert found.top1.value == 1


def test_kl_of_two_known_distributions():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    found = compare_logits(p.log().repeat(3, 1), q.log().repeat(3, 1), torch.tensor([0, 0, 1]))
    # 1/2 log 2 − 1/4 log 2; the labels are 0 and 1
    assert found.kl == pytest.approx(0.25 * math.log(2))
    assert found.float_loss == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert found.loss == pytest.approx((math.log(4) + math.log(2)) / 2)
    assert found.agreement == 0


def test_kl_is_of_float_to_quantized_and_not_the_reverse():
    p, q = torch.tensor([[0.9, 0.1]] * 2), torch.tensor([[0.5, 0.5]] * 2)
    forward = compare_logits(p.log(), q.log(), torch.tensor([0, 0])).kl
    assert forward == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))


def test_logits_of_minus_infinity_add_nothing():
    padded = torch.tensor([[1.0, 2.0, -math.inf]] * 2)
    other = torch.tensor([[1.0, 2.5, -math.inf]] * 2)
    ids = torch.tensor([0, 1])
    expected = compare_logits(padded[:, :2], other[:, :2], ids)
    assert compare_logits(padded, other, ids) == pytest.approx(expected)


def test_small_differences_are_not_lost_in_float32():
    reference = torch.randn(5, 1000)
    step = 1e-4 * torch.randn(5, 1000)
    found = compare_logits(reference, reference + step, torch.zeros(5, dtype=torch.long)).kl
    p = reference[:4].double().softmax(-1)
    d = (reference + step)[:4].double() - reference[:4].double()
    second_order = 0.5 * ((p * d.square()).sum(-1) - (p * d).sum(-1).square()).mean()
    assert found == pytest.approx(float(second_order), rel=1e-3)


def test_chunks_do_not_change_the_result(monkeypatch):
    a, b, ids = torch.randn(33, 50), torch.randn(33, 50), torch.randint(50, (33,))
    whole = compare_logits(a, b, ids)
    monkeypatch.setattr("mixllm_compiler.evaluation.measure._CHUNK", 7 * 50)
    assert compare_logits(a, b, ids) == pytest.approx(whole, rel=1e-12)


def test_perplexity_and_bits_per_byte_of_a_uniform_model():
    model = Bigram(vocabulary=8)
    with torch.no_grad():
        model.table.zero_()
    windows = some_windows(vocabulary=8)
    found = compare(model, {"same": model}, windows)["same"]
    assert found.perplexity == pytest.approx(8)
    assert found.float_perplexity == pytest.approx(8)
    # 3 bits a token, 4 bytes a token
    assert found.bits_per_byte == pytest.approx(3 / 4)
    assert found.tokens == windows.tokens == 24
    assert found.bytes == 96


def test_every_model_runs_once_per_window():
    calls = []

    def counting(name):
        def forward(input_ids):
            calls.append(name)
            return torch.zeros(*input_ids.shape, 11)

        return forward

    told = []
    compare(
        counting("float"),
        {"a": counting("a"), "b": counting("b")},
        some_windows(count=2),
        progress=lambda done, runs: told.append((done, runs)),
    )
    assert calls == ["float", "a", "b"] * 2
    assert told == [(i + 1, 6) for i in range(6)]


def test_no_cache_is_asked_of_models_that_know_one():
    class Output:
        logits = torch.zeros(1, 2, 3)

    def forward(input_ids, use_cache=True):
        assert not use_cache
        return Output()

    assert logits(forward, torch.tensor([0, 1])).shape == (2, 3)


def test_standard_error_of_a_mean():
    value, se = mean([1.0, 2.0, 3.0, 4.0])
    assert value == 2.5
    assert se == pytest.approx(math.sqrt(5 / 3 / 4))


def test_one_window_has_no_standard_error():
    assert math.isnan(mean([1.0]).se)


def test_ratio_is_of_means():
    assert kl_ratio(quality([1.0, 3.0]), quality([2.0, 6.0])).value == pytest.approx(0.5)


def test_windows_that_are_hard_for_both_add_nothing_to_the_error_of_a_ratio():
    hard = [0.1, 1.0, 10.0]
    found = kl_ratio(quality([0.5 * v for v in hard]), quality(hard))
    assert found.se == pytest.approx(0, abs=1e-12)


def test_error_of_a_ratio_is_that_of_resampled_windows():
    draw = torch.Generator().manual_seed(0)
    base = torch.rand(40, generator=draw) + 0.5
    other = 0.8 * base + 0.1 * torch.randn(40, generator=draw)
    found = kl_ratio(quality(other.tolist()), quality(base.tolist()))
    picks = torch.randint(40, (4000, 40), generator=draw)
    resampled = other[picks].mean(1) / base[picks].mean(1)
    assert found.se == pytest.approx(float(resampled.std()), rel=0.1)


def test_ratio_to_a_lossless_model_is_no_number():
    assert math.isnan(kl_ratio(quality([1.0]), quality([0.0])).value)


def test_ratio_needs_the_same_windows():
    with pytest.raises(OptionError, match="2 and 3 windows"):
        kl_ratio(quality([1.0, 1.0]), quality([1.0, 1.0, 1.0]))


def test_a_quality_file_round_trips(tmp_path):
    found = compare(Bigram(), {"other": Bigram(seed=1)}, some_windows())["other"]
    found.save(tmp_path / "quality.json")
    assert Quality.load(tmp_path / "quality.json") == found
    stored = json.loads((tmp_path / "quality.json").read_text())
    assert stored["kl"] == {"value": found.mean_kl.value, "se": found.mean_kl.se}


def test_a_broken_model_is_written_as_null_and_read_as_nan(tmp_path):
    broken = Bigram()
    with torch.no_grad():
        broken.table.fill_(math.nan)
    compare(Bigram(), {"broken": broken}, some_windows())["broken"].save(tmp_path / "q.json")
    assert json.loads((tmp_path / "q.json").read_text())["perplexity"] is None
    assert math.isnan(Quality.load(tmp_path / "q.json").perplexity)
