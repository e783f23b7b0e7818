"""The shipped model through the generated kernels, beside the same plan through the reference."""

from __future__ import annotations

import pytest
import torch

import mixllm_compiler
from mixllm_compiler.backend import mixllm
from mixllm_compiler.demo import HELDOUT, load
from mixllm_compiler.frames import own_frame
from mixllm_compiler.runtime import records

pytestmark = pytest.mark.gpu


def divergence(p, q):
    """KL(p ‖ q) per token of two sets of logits, in nats."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    "lowering, formats",
    [("cuda", {}), ("triton", {"family": "asym", "widths": (4, 8), "rotate": 0})],
    ids=["cuda", "triton"],
)
def test_kernels_differ_from_the_reference_by_less_than_a_hundredth_of_what_quantizing_costs(
    lowering, formats
):
    model, tokenizer = load()
    model = model.cuda().eval()
    text = HELDOUT.read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :8192].view(8, 1024)
    ids = ids.cuda()
    plan = mixllm_compiler.plan(mixllm_compiler.score(model, ids[:4], **formats), bits=4.4)
    logits = {}
    with torch.no_grad():
        float_logits = model(ids).logits
        for kernels in (lowering, "reference"):
            options = {"plan": plan, "lower": "eager", "quiet": True, "kernels": kernels}
            compiled = torch.compile(own_frame(model.forward), backend=mixllm, options=options)
            with records.collect() as graphs:
                logits[kernels] = compiled(ids).logits
            used = {line.kernel for line in graphs[0].quantized}
            assert used == {"reference" if kernels == "reference" else f"{kernels}.v1"}
    cost = divergence(logits["reference"], float_logits)
    assert cost > 0.01
    assert divergence(logits[lowering], logits["reference"]) <= 0.01 * cost
