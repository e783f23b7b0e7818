"""One capture, the inputs of all batches, and no run of the model."""

from __future__ import annotations

import pytest
import torch

from mixllm_compiler.calibration.segments import SegmentInterpreter, cut
from mixllm_compiler.errors import GraphBreakError
from mixllm_compiler.options import Options
from mixllm_compiler.passes.captured_model import capture_model, even_batch
from tests.helpers import token_ids
from tests.models.support import LAYERS, LINEARS_PER_LAYER, build

IDS = token_ids(6, 9)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "qwen2"])
@pytest.mark.parametrize("rotate", [0, 128])
def test_a_captured_model_gives_the_logits_of_every_batch(kind, rotate):
    model = build(kind)
    captured = capture_model(model, IDS.split(2), Options(rotate=rotate))
    assert len(captured.graph.active()) == LAYERS * LINEARS_PER_LAYER[kind]
    assert len(captured.batches) == 3
    (segment,) = cut(captured.graph.graph, [])
    run = SegmentInterpreter(captured.graph.module)
    for i, ids in enumerate(IDS.split(2)):
        with torch.no_grad():
            (logits,) = run.run_segment(segment, captured.inputs(i)).values()
            torch.testing.assert_close(logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_weights_are_the_models_own():
    model = build("llama")
    captured = capture_model(model, IDS.split(3), Options())
    linear = {id(p) for name, p in model.named_parameters() if name.endswith("proj.weight")}
    assert linear <= {id(w) for w in captured.weights.values()}


def test_batches_of_two_shapes_are_refused():
    with pytest.raises(GraphBreakError, match="captured 2 times for 2 batches"):
        capture_model(build("llama"), [IDS[:4], IDS[4:]], Options())


@pytest.mark.parametrize("sequences, wanted, batch", [(8, 3, 2), (7, 4, 1), (6, 6, 6), (4, 9, 4)])
def test_batches_are_even(sequences, wanted, batch):
    assert even_batch(sequences, wanted) == batch
