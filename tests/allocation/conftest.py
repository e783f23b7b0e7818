"""A small model of random matrices and scores as a profiler would leave them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mixllm_compiler.formats.fingerprint import fingerprint
from mixllm_compiler.formats.row_format import RowFormat
from mixllm_compiler.quantizers.rtn import quantize_rows
from mixllm_compiler.salience.scores import Scores

SHAPES = {"self_attn.q_proj": (128, 96), "mlp.up_proj": (256, 96), "mlp.down_proj": (96, 256)}


@pytest.fixture
def model() -> dict[str, Tensor]:
    """Two layers of three matrices and an output head."""
    draw = torch.Generator().manual_seed(0)
    weights = {
        f"model.layers.{i}.{name}.weight": torch.randn(*shape, generator=draw)
        for i in range(2)
        for name, shape in SHAPES.items()
    }
    return {**weights, "lm_head.weight": torch.randn(200, 96, generator=draw)}


@pytest.fixture
def score() -> Callable[..., Scores]:
    """Scores from weight errors with a random importance per row."""

    def score(
        weights, widths=(2, 3, 4, 5, 6, 8), group=32, only=None, formats=None, **fields
    ) -> Scores:
        draw = torch.Generator().manual_seed(1)
        formats = formats or tuple(RowFormat(b, group) for b in widths)
        loss = {}
        for name in weights if only is None else only:
            w = weights[name]
            importance = torch.exp(2 * torch.randn(len(w), generator=draw)) * 1e-6
            errors = [(quantize_rows(w, f).dequantize() - w).square().sum(1) for f in formats]
            loss[name] = (torch.stack(errors, 1) * importance.unsqueeze(1)).float()
        shapes = {name: tuple(weights[name].shape) for name in loss}
        given = {"kind": "fisher-sequence", "tokens": 8192, "sequences": 8, **fields}
        prints = fingerprint(weights)
        return Scores(
            formats=formats, loss=loss, shapes=shapes, fingerprint=prints, group=group, **given
        )

    return score


@pytest.fixture
def scores(model, score) -> Scores:
    return score(model)
