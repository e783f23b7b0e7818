"""A rotation folded into v and o: the same float function, and one transform less to run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mixllm_compiler
from mixllm_compiler import errors
from mixllm_compiler.ir import ops
from mixllm_compiler.options import Options
from mixllm_compiler.passes.captured_model import capture_model
from mixllm_compiler.passes.fold_rotation import fold_rotation
from tests.helpers import activations, causal_lm, compiled, mlp, token_ids

IDS = token_ids(2, 8)


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits.double()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_the_float_function_stays_equal(kind):
    """Run in float64; what is left is the rounding of the new weights to float32."""
    model = causal_lm(kind, layers=1)
    twin = fold_rotation(model, IDS)
    before, after = logits(model.double()), logits(twin.double())
    assert not torch.equal(before, after)
    assert (after - before).abs().max() < 1e-5 * before.abs().max()


def test_the_folded_transform_does_not_run():
    twin = fold_rotation(causal_lm("llama", layers=1), IDS)
    graph = capture_model(twin, [IDS], Options(rotate=128, quiet=True)).graph
    found = {name.rpartition(".")[2]: m.transform for name, m in graph.matrices.items()}
    assert found["o_proj"] == ""
    assert found["v_proj"] == found["down_proj"] == "hadamard:128"
    on_weights = sum(graph.weight_binding(n) is not None for n in graph.calls(ops.HADAMARD))
    assert on_weights == 6
    assert len(graph.calls(ops.HADAMARD)) - on_weights == 3


def test_o_is_stored_without_a_transform_and_compiles_to_the_same_numbers():
    twin = fold_rotation(causal_lm("llama", layers=1), IDS)
    plan = mixllm_compiler.plan(
        mixllm_compiler.score(twin, IDS, kind="weight-error", rotate=128), bits=5
    )
    expected = logits(compiled(twin, plan=plan))
    packed = mixllm_compiler.quantize(twin, plan)
    assert packed.model.layers[0].self_attn.o_proj.rotation == 0
    assert (logits(packed) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_model_without_attention_is_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, x):
            return self.inner(x)

    with pytest.raises(errors.UnsupportedModel, match="no linear reads the heads"):
        fold_rotation(Model().eval(), activations(2, 5))
