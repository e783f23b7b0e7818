"""Whole models in CUDA graphs: captured at all, right after a thousand replays, beside each other.

Python sees a kernel's launch when a graph is recorded and never in a replay: that, and Inductor's
own counts, tell whether there are graphs.
"""

from __future__ import annotations

import functools
import random

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from mixllm_compiler.backend import mixllm
from mixllm_compiler.formats.layout import pack
from mixllm_compiler.frames import own_frame
from mixllm_compiler.lowering import fused
from mixllm_compiler.lowering.lowered import LOWERED_LINEAR, LOWERED_QUANTIZE
from mixllm_compiler.runtime.weights import CACHE
from tests.helpers import causal_lm, token_ids
from tests.lowering.cases import mix
from tests.lowering.two_level import random_weight

pytestmark = pytest.mark.gpu

KERNEL = "cuda.v1"
LENGTHS = (1, 7, 16, 40, 300)
OPTIONS = {
    "widths": (2, 4, 8),
    "family": "two-level",
    "rotate": 128,
    "bits": 5.0,
    "kernels": "cuda",
    "quiet": True,
}


class Launches:
    """Counts calls of our linears from Python, and knows which blobs they read."""

    def __init__(self, monkeypatch):
        from mixllm_compiler.lowering.cuda.quantizers import CudaKernels

        self.count, self.blobs, original = 0, set(), CudaKernels.linear

        def linear(kernels, codes, scales, sums, packed, *rest):
            self.count += 1
            self.blobs.add(packed.data_ptr())
            return original(kernels, codes, scales, sums, packed, *rest)

        monkeypatch.setattr(CudaKernels, "linear", linear)


@pytest.fixture
def launches(monkeypatch):
    return Launches(monkeypatch)


def llama(seed=0):
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
    return causal_lm("llama", seed=seed, **sizes).bfloat16().cuda()


def compiled(model, mode=None, **options):
    """The model's logits; every call is a step of its own for CUDA graphs."""
    backend = functools.partial(mixllm, options={**OPTIONS, **options})
    settings = {"mode": mode} if mode else {}
    run = torch.compile(own_frame(model.forward), backend=backend, dynamic=False, **settings)

    def call(ids):
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            return run(ids, use_cache=False).logits.clone()

    return call


def ids_of(length, seed):
    return token_ids(1, length, seed).cuda()


def resident():
    """Address of every packed blob of this process."""
    packed = [p for entry in CACHE._entries.values() for p in entry.values.values()]
    return {p.blob.data_ptr() for p in packed}


def test_a_whole_model_is_captured_and_right_after_a_thousand_replays(launches):
    model = llama()
    captured, plain = compiled(model, "reduce-overhead"), compiled(model)
    counters.clear()
    expected = {}
    for length in LENGTHS:
        for seed in range(4):  # warms up, records, replays
            ids = ids_of(length, seed)
            expected[length, seed] = plain(ids)
            assert torch.equal(captured(ids), expected[length, seed])
    assert counters["inductor"]["cudagraph_skips"] == 0
    # A graph for each length, into which token ids are copied; weights are read where they lie.
    copied = counters["inductor"]["cudagraph_recorded_non_static_inputs"]
    assert len(LENGTHS) <= copied <= 2 * len(LENGTHS)
    recorded = launches.count
    assert launches.blobs <= resident() and len(launches.blobs) == 14  # 7 linears in 2 layers
    for step in range(1000):
        length, seed = random.choice(LENGTHS), random.randrange(4)
        found = captured(ids_of(length, seed))
        if step % 20 == 0:
            assert torch.equal(found, expected[length, seed]), f"replay {step}, M = {length}"
    assert launches.count == recorded, "a replay went through Python: there was no graph"
    assert launches.blobs <= resident(), "a packed weight moved"


def test_captured_and_interpreted_models_agree():
    """Inductor rounds what is between our kernels in other places than the interpreter."""
    model = llama()
    captured, eager = compiled(model, "reduce-overhead"), compiled(model, lower="eager")
    for length in LENGTHS:
        for seed in range(3):
            ids = ids_of(length, seed)
            found, expected = (F.log_softmax(run(ids).float(), -1) for run in (captured, eager))
            kl = F.kl_div(found, expected, reduction="batchmean", log_target=True) / length
            assert float(kl) < 0.01


def test_two_models_take_turns_in_graphs(launches):
    models = [llama(seed) for seed in (0, 1)]
    captured = [compiled(model, "reduce-overhead") for model in models]
    expected = {}
    for which, model in enumerate(models):
        plain = compiled(model)
        for length in LENGTHS[:3]:
            expected[which, length] = plain(ids_of(length, 0))
            for _ in range(3):
                captured[which](ids_of(length, 0))
    assert not torch.equal(expected[0, 16], expected[1, 16])
    recorded = launches.count
    for _ in range(200):
        which, length = random.randrange(2), random.choice(LENGTHS[:3])
        assert torch.equal(captured[which](ids_of(length, 0)), expected[which, length])
    assert launches.count == recorded


@pytest.mark.parametrize("lengths", [(1, 1), (7, 300), (300, 40)])
def test_two_models_on_two_streams_at_once(lengths):
    """Each in a graph of its own, both running: nothing of one is the other's."""
    runs = []
    for seed, length in enumerate(lengths):
        run, ids, stream = compiled(llama(seed)), ids_of(length, 0), torch.cuda.Stream()
        for _ in range(2):
            run(ids)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = run(ids)
        expected = []
        for other in range(4):
            new = ids_of(length, other)
            expected.append((new, run(new)))
        runs.append((run, ids, graph, y, stream, expected))  # a graph reads its model's memory
    torch.cuda.synchronize()
    for step in range(100):
        results = []
        for _, ids, graph, y, stream, expected in runs:
            new, want = expected[(step + len(results)) % 4]
            with torch.cuda.stream(stream):
                ids.copy_(new)
                for _ in range(5):
                    y.fill_(float("nan"))
                    graph.replay()
                results.append((y.clone(), want))
        torch.cuda.synchronize()
        for found, want in results:
            assert torch.equal(found, want), f"step {step}"


def test_one_model_on_two_streams_without_graphs():
    """Launches of one model from two streams share packed weights and nothing else."""
    run = compiled(llama(), lower="eager")
    ids = [ids_of(length, length) for length in (1, 40)]
    expected = [run(x) for x in ids]
    streams = [torch.cuda.Stream() for _ in ids]
    torch.cuda.synchronize()
    for _ in range(30):
        found = []
        for x, stream in zip(ids, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(run(x))
        torch.cuda.synchronize()
        assert all(map(torch.equal, found, expected))


def foreign_chain(linear, layout, norm, x, steps):
    """Our kernels with memsets, copies and other programs' kernels in front and behind."""
    quantizer = ("token", 128, 128, KERNEL)
    k = x.shape[-1]
    kept, scratch, residual = [], torch.empty_like(x), x
    for step in range(steps):
        scratch.copy_(x)
        activation = LOWERED_QUANTIZE(scratch, *quantizer)
        scratch.zero_()  # nothing may still read it
        y = LOWERED_LINEAR(*activation, linear, None, layout, torch.bfloat16, KERNEL)
        for part in activation:
            part.zero_()
        *activation, residual = fused.ADD_NORM_QUANTIZE(
            y, residual, norm, None, 1e-5, "rms", *quantizer
        )
        y.fill_(float("nan"))
        if step % 2:
            torch.cuda._sleep(2000)
        y = LOWERED_LINEAR(*activation, linear, None, layout, torch.bfloat16, KERNEL)
        del activation
        x = F.layer_norm(y.float(), (k,)).bfloat16()
        kept.append(x.clone())
    return torch.stack(kept)


@pytest.mark.parametrize("m", [1, 9, 16, 40, 200, 600])
def test_foreign_kernels_before_and_behind_ours_see_and_leave_whole_results(m):
    from mixllm_compiler.lowering.cuda import launch

    packed = pack(random_weight(1024, 1024, mix(1024, (2, 3, 4, 5, 6, 8))), "cuda64.v1")
    x = torch.randn(m, 1024, device="cuda").bfloat16()
    args = (packed.blob.cuda(), str(packed.layout), torch.ones_like(x[0]), x, 6)
    with launch.trying(programmatic=False):
        expected = foreign_chain(*args)
    assert expected.isfinite().all()
    for _ in range(20):
        assert torch.equal(foreign_chain(*args), expected)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = foreign_chain(*args)
    for _ in range(200):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)
