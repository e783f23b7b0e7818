"""Which linears read one activation, and its statistics per channel over calibration text."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from ..calibration.segments import SegmentInterpreter, cut
from ..calibration.statistics import ChannelStatistics
from ..ir.annotations import LinearSite
from ..ir.graph import MixGraph
from .captured_model import CapturedModel

Sites = list[tuple[fx.Node, LinearSite]]


def readers(graph: MixGraph) -> dict[fx.Node, Sites]:
    """Linears by the value that they read. One whose weight has another use stays as it is."""
    found: dict[fx.Node, Sites] = {}
    for node, site in graph.sites():
        x, binding = node.args[0], graph.matrices[site.matrix].binding
        if isinstance(x, fx.Node) and site.module and len(binding.node.users) == 1:
            found.setdefault(x, []).append((node, site))
    return found


def statistics(
    captured: CapturedModel, groups: dict[fx.Node, Sites], sample: int
) -> dict[fx.Node, ChannelStatistics]:
    """One forward over all batches, with a look at what the first linear of each group reads.

    Args:
        sample: tokens of each batch to keep.
    """
    (whole,) = cut(captured.graph.graph, [])
    found, override = {}, {}
    for x, sites in groups.items():
        node, site = sites[0]
        device = captured.graph.matrices[site.matrix].binding.tensor.device
        found[x] = ChannelStatistics(site.k, device, sample)

        def look(x: Tensor, *args: Any, seen: ChannelStatistics = found[x]) -> Tensor:
            seen.add(x)
            return F.linear(x, *args)

        override[node] = look
    interpreter = SegmentInterpreter(captured.graph.module, override)
    for batch in range(len(captured.batches)):
        interpreter.run_segment(whole, captured.inputs(batch))
    return found
