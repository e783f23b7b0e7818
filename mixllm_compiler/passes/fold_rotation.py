"""The Hadamard transform of attention's output, folded into the linears on both sides of it.

Attention mixes tokens and leaves the channels of a head alone, so that a transform of each head
can be made in v's rows: (A x Wᵥᵀ) T = A x (Tᵀ Wᵥ)ᵀ, and W_o becomes W_o T (QuaRot, arXiv
2404.00456). Nothing is transformed at run time where o reads it. Before anything is scored: v's
rows are other rows afterwards.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel
from ..options import Options
from ..transforms.hadamard import ROTATED_INPUT, block_hadamard
from .captured_model import capture_model
from .input_statistics import readers
from .producers import Producer, producer_of
from .scale_model import check_equal


def fold_rotation(model: nn.Module, ids: Tensor, **extra: Any) -> nn.Module:
    """A copy of a float model whose output projections read heads that are rotated already.

    Each of those linears gets a buffer `input_rotation`, the block's size; `rotate-inputs` then
    leaves it alone.

    Args:
        ids: token ids [B, T] to capture with; nothing is calibrated.
        extra: further arguments of the model's forward.

    Raises:
        GraphBreakError: the model does not capture in one graph.
        UnsupportedModel: no attention has heads whose size is a power of two and whose value and
            output projections have no other use, or the copy computes something else.
    """
    twin = copy.deepcopy(model)
    ids = ids.to(next(twin.parameters()).device)
    graph = capture_model(twin, [ids], Options(rotate=0, quiet=True), **extra).graph
    folded = 0
    with torch.no_grad():
        for x, sites in readers(graph).items():
            producer = producer_of(graph, x, [node for node, _ in sites], sites[0][1].k)
            if producer is None or not producer.heads or producer.heads & (producer.heads - 1):
                continue
            _rotate_rows(producer)
            for _, site in sites:
                weight = graph.matrices[site.matrix].stored()
                weight.copy_(block_hadamard(weight.double(), producer.heads))
                block = torch.tensor(producer.heads, device=weight.device)
                twin.get_submodule(site.module).register_buffer(ROTATED_INPUT, block)
                folded += 1
        if not folded:
            raise UnsupportedModel(
                f"no rotation can be folded in {type(model).__name__}: no linear reads the heads "
                "of a scaled_dot_product_attention, their size is no power of two, or a weight "
                "has another use"
            )
        check_equal(model(ids[:1], **extra), twin(ids[:1], **extra), "fold_rotation")
    return twin


def _rotate_rows(producer: Producer) -> None:
    """T Wᵥ and T bᵥ, head by head."""
    rows = producer.rows.unique()
    for tensor in producer.tensors:
        columns = tensor[rows].double().movedim(0, -1)
        tensor[rows] = block_hadamard(columns, producer.heads).movedim(-1, 0).to(tensor.dtype)
