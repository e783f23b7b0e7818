"""A weight is packed once, whatever is compiled around it, and forgotten with its model."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from mixllm_compiler.options import Options
from mixllm_compiler.runtime import records
from mixllm_compiler.runtime.weights import CACHE, PLANS
from tests.helpers import (
    W4,
    activations,
    assert_quantized,
    compiled,
    mlp,
    oracle,
    tiny_llama,
    token_ids,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def packs():
    """How many weights were packed since the test began."""
    start = CACHE.packs
    return lambda: CACHE.packs - start


def assert_right(run, model, x):
    assert_quantized(run(x), model(x), oracle(model)(x))


def test_new_batch_sizes_pack_nothing_again(packs):
    model = mlp()
    run = compiled(model)
    with records.collect() as graphs:
        for batch in (3, 5, 9, 12):
            assert_right(run, model, activations(batch))
    assert packs() == 2
    assert len(graphs) == 2  # the second one is dynamic
    assert [g.planned_before for g in graphs] == [False, True]


@pytest.mark.parametrize("lead", [(), (2,)])
def test_a_dynamic_graph_serves_five_shapes(packs, lead):
    model = mlp()
    run = compiled(model, dynamic=True)
    with records.collect() as graphs:
        for batch in (3, 5, 9, 12, 40):
            assert_right(run, model, activations(*lead, batch))
    assert len(graphs) == 1
    assert packs() == 2


def test_a_dynamic_dimension_marked_by_hand_gives_one_graph(packs):
    model = mlp()
    run = compiled(model)
    x = activations(3)
    torch._dynamo.mark_dynamic(x, 0)
    with records.collect() as graphs:
        run(x)
        assert_right(run, model, activations(17))
    assert len(graphs) == 1
    assert packs() == 2


def test_a_dynamic_llama_is_one_graph(packs):
    model = tiny_llama(1)
    run = compiled(model, dynamic=True)
    with records.collect() as graphs:
        for batch, length in ((2, 9), (3, 9), (2, 7), (5, 12), (4, 30)):
            ids = token_ids(batch, length)
            logits = run(ids, use_cache=False).logits
        assert_quantized(logits, model(ids).logits, oracle(model)(ids).logits)
    assert len(graphs) == 1
    assert packs() == 7


def test_a_reset_of_dynamo_packs_nothing_again(packs):
    model, x = mlp(), activations(3)
    first = compiled(model)(x)
    torch._dynamo.reset()
    assert torch.equal(compiled(model)(x), first)
    assert packs() == 2


def test_other_options_pack_again_and_keep_both(packs):
    model, x = mlp(), activations(3)
    low, high = compiled(model), compiled(model, widths=(8,), bits=9)
    assert_right(low, model, x)
    assert_quantized(high(x), model(x), oracle(model, 8)(x))
    torch._dynamo.reset()
    low(x), high(x)
    assert packs() == 4


def test_entries_vanish_with_the_model():
    gc.collect()
    before = len(CACHE)
    model = mlp()
    compiled(model)(activations(3))
    assert len(CACHE) == before + 2
    weights = [id(p) for p in model.parameters()]
    del model
    torch._dynamo.reset()
    gc.collect()
    assert len(CACHE) == before
    assert not CACHE._entries.keys() & set(weights)


def test_plans_vanish_with_the_model():
    model = mlp()
    compiled(model, bits=4.5)(activations(3))
    digest = Options.parse({**W4, "bits": 4.5}).planning_digest()
    assert any(key.startswith(digest) for key in PLANS._plans)
    del model
    torch._dynamo.reset()
    gc.collect()
    compiled(mlp())(activations(3))  # any later compilation drops what is dead
    assert not any(key.startswith(digest) for key in PLANS._plans)


def test_a_compiled_model_keeps_no_model_alive():
    """Guards, caches and records refer to weights weakly."""
    model = mlp()
    compiled(model)(activations(3))
    ref = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert ref() is None


def test_several_compiled_models_live_side_by_side(packs):
    models = [mlp(0), mlp(1), nn.Sequential(nn.Linear(256, 64)).eval()]
    inputs = [activations(3), activations(3), activations(3, k=256)]
    runs = [compiled(m) for m in models]
    for _ in range(2):
        for run, model, x in zip(runs, models, inputs, strict=True):
            assert_right(run, model, x)
    assert packs() == 5


# -- Inductor's cache in a second process --------------------------------------------------------

CHILD = """
import json, sys, torch
from torch._dynamo.utils import counters
from tests.helpers import PLAIN, activations, assert_quantized, mlp, oracle

torch.set_num_threads(1)
model, x = mlp(seed=int(sys.argv[1])), activations(3)
with torch.no_grad():
    options = {"widths": (4,), **PLAIN, "quiet": True, "kernels": "reference"}
    run = torch.compile(model, backend="mixllm", options=options)
    assert_quantized(run(x), model(x), oracle(model)(x))
print(json.dumps({
    "aot": [counters["aot_autograd"]["autograd_cache_hit"],
            counters["aot_autograd"]["autograd_cache_miss"]],
    "fx": [counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]],
}))
"""


def in_another_process(seed: int, folder: Path) -> dict[str, list[int]]:
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    env["PYTHONHASHSEED"] = "random"  # a key that depends on hash order must not survive
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(seed)], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_second_process_with_other_weights_compiles_nothing(tmp_path):
    """The packed blobs enter the compiled code as inputs, so other values fit it."""
    assert in_another_process(0, tmp_path)["aot"] == [0, 1]
    warm = in_another_process(1, tmp_path)
    assert warm["aot"] == [1, 0]
    assert warm["fx"][1] == 0
