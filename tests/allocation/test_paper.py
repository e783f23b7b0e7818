from __future__ import annotations

import pytest
import torch

from mixllm_compiler.allocation.paper import top_by_bytes, top_by_count
from mixllm_compiler.errors import BudgetError

SCORE = torch.tensor([0.1, 5.0, 0.2, 5.0, 3.0])


def test_a_tenth_by_count():
    widths = top_by_count(torch.arange(30.0), 0.1, 4, 8)
    assert widths.tolist() == [4] * 27 + [8] * 3


def test_of_equal_scores_the_earlier_row_goes_first():
    assert top_by_count(SCORE, 0.2, 4, 8).tolist() == [4, 8, 4, 4, 4]


@pytest.mark.parametrize("fraction, high", [(0.0, 0), (1.0, 5), (0.5, 2), (0.3, 2)])
def test_fractions_are_rounded_to_rows(fraction, high):
    assert (top_by_count(SCORE, fraction, 4, 8) == 8).sum() == high


def test_an_impossible_fraction():
    with pytest.raises(ValueError, match="between 0 and 1"):
        top_by_count(SCORE, 1.1, 4, 8)


def test_as_many_as_the_bytes_hold():
    extra = torch.tensor([10, 20, 10, 20, 30])
    assert top_by_bytes(SCORE, extra, 45, 4, 8).tolist() == [4, 8, 4, 8, 4]
    assert top_by_bytes(SCORE, extra, 70, 4, 8).tolist() == [4, 8, 4, 8, 8]
    assert top_by_bytes(SCORE, extra, 0, 4, 8).tolist() == [4] * 5


def test_less_than_the_low_width_takes():
    with pytest.raises(BudgetError, match="5 bytes more than the budget"):
        top_by_bytes(SCORE, torch.ones(5, dtype=torch.int64), -5, 4, 8)
