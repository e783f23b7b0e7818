from __future__ import annotations

import time

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from mixllm_compiler.errors import OptionError
from mixllm_compiler.evaluation.speed import measure_speed


class Scripted:
    """A model whose `generate` takes as long as it is told."""

    def __init__(self, prefill: float, token: float) -> None:
        self.prefill, self.token, self.prompts = prefill, token, []
        self.config = type("Config", (), {"vocab_size": 10})

    def parameters(self):
        return iter([torch.zeros(1)])

    def generate(self, ids, *, max_new_tokens, streamer, **_):
        self.prompts.append(ids)
        streamer.put(ids)
        for index in range(max_new_tokens):
            time.sleep(self.token if index else self.prefill)
            streamer.put(torch.zeros(len(ids)))
        streamer.end()


def test_prefill_ends_with_the_first_new_token():
    model = Scripted(prefill=0.05, token=0.01)
    found = measure_speed({"m": model}, prompt=100, new_tokens=5, repeats=1)["m"]
    assert 0.7 * 100 / 0.05 < found.prefill <= 100 / 0.05
    assert 0.7 / 0.01 < found.decode <= 1 / 0.01


def test_a_batch_counts_all_its_tokens():
    model = Scripted(prefill=0.02, token=0.01)
    ids = torch.zeros(4, 10, dtype=torch.long)
    found = measure_speed({"m": model}, prompt=ids, new_tokens=3, repeats=1)["m"]
    assert 0.7 * 4 / 0.01 < found.decode <= 4 / 0.01


def test_two_calls_warm_up_and_models_take_turns():
    order = []
    models = {name: Scripted(0, 0) for name in "ab"}
    for name, model in models.items():
        model.parameters = lambda name=name: order.append(name) or iter([torch.zeros(1)])
    found = measure_speed(models, prompt=2, new_tokens=2, repeats=3)
    assert order == ["a", "b"] * 5
    assert len(found["a"].decodes) == len(found["b"].prefills) == 3


def test_every_model_gets_the_same_prompt():
    models = {name: Scripted(0, 0) for name in "ab"}
    measure_speed(models, prompt=7, new_tokens=2, repeats=1)
    first, *others = models["a"].prompts + models["b"].prompts
    assert first.shape == (1, 7)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
def test_a_real_model_generates(cache):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    found = measure_speed({"m": model}, prompt=5, new_tokens=3, repeats=2, **cache)["m"]
    assert found.prefill > 0
    assert found.decode > 0
    assert found.warm_up > 0


@pytest.mark.parametrize(
    "wrong", [{"models": {}}, {"repeats": 0}, {"new_tokens": 1}], ids=["models", "repeats", "new"]
)
def test_nothing_to_measure_is_refused(wrong):
    with pytest.raises(OptionError, match="at least 2 new tokens"):
        measure_speed(**{"models": {"m": Scripted(0, 0)}, **wrong})
