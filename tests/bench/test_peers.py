from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import peers
from mixllm_compiler.demo import HELDOUT, MODEL_DIR
from peers import Outcome, Peer, decoder_linears, group_bits, load_peer


def test_the_head_is_no_decoder_linear():
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    names = decoder_linears(AutoModelForCausalLM.from_config(config))
    assert len(names) == 7 and "lm_head" not in names


def test_bits_count_a_scale_and_a_zero_point_per_begun_group():
    assert group_bits(torch.zeros(3, 130), 4, 128, 4) == 3 * (130 * 4 + 2 * 20)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """What a peer leaves that halves all linears and doubles the first norm."""

    def halve(job):
        with torch.no_grad():
            job.model.model.layers[0].input_layernorm.weight.mul_(2)
        linears = job.linears()
        weights = {name: m.weight.detach() / 2 for name, m in linears.items()}
        stored = {name: 3.5 * m.weight.numel() for name, m in linears.items()}
        return Outcome(weights, stored, {"by": 2}, job.ids.numel())

    monkeypatch.setitem(peers.PEERS, "torchao", Peer("torch", halve))
    command = f"torchao --model {MODEL_DIR} --calibration {HELDOUT} --out {tmp_path}"
    assert peers.main([*command.split(), "--sequences", "2", "--length", "16"]) == 0
    return tmp_path / "torchao-w4-g128-asym.safetensors"


def test_a_written_peer_loads_into_the_float_model(written):
    tensors, record = load_peer(written)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    linears = decoder_linears(model)
    before = {name: module.weight.clone() for name, module in linears.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and not any("proj" in name for name in missing)
    assert all(torch.equal(m.weight, before[name] / 2) for name, m in linears.items())
    assert record["true bits"] == 3.5 and record["calibration tokens"] == 32


def test_what_a_peer_changes_besides_linears_is_kept(written):
    tensors, record = load_peer(written)
    others = [name for name in tensors if "proj" not in name]
    assert others == ["model.layers.0.input_layernorm.weight"]
    assert record["other tensors changed"] == 1
