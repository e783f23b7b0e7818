"""The GGUF file of a Llama: order of rows, what it holds, what is counted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import rotate_half

from gguf_llama import importances, interleaved, stored, tensors, write


def llama(**changes):
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, **changes,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@given(st.integers(1, 3), st.integers(1, 4))
def test_adjacent_pairs_turn_as_halves_do(heads, pairs):
    d, k = 2 * pairs, 3
    weight, x = torch.randn(heads * d, k), torch.randn(k)
    angle = torch.rand(pairs)
    cos, sin = angle.cos(), angle.sin()
    halves = (weight @ x).view(heads, d)
    halves = halves * cos.repeat(2) + rotate_half(halves) * sin.repeat(2)
    a, b = (interleaved(weight, heads) @ x).view(heads, pairs, 2).unbind(-1)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    both = interleaved(halves.reshape(-1, 1), heads).view(heads, d)
    torch.testing.assert_close(turned, both)


def test_every_parameter_has_its_place():
    model = llama(tie_word_embeddings=True)
    found = tensors(model)
    assert len(found) == len(list(model.parameters())) and "output.weight" not in found
    assert torch.equal(found["token_embd.weight"], model.model.embed_tokens.weight)
    layer = model.model.layers[1]
    assert torch.equal(found["blk.1.ffn_down.weight"], layer.mlp.down_proj.weight)
    assert torch.equal(found["blk.1.attn_k.weight"], interleaved(layer.self_attn.k_proj.weight, 2))
    assert "output.weight" in tensors(llama(tie_word_embeddings=False))


def test_a_parameter_without_a_place_is_refused():
    with pytest.raises(SystemExit, match=r"q_proj\.bias has no place"):
        tensors(llama(attention_bias=True))


def test_importances_are_mean_squares_of_inputs():
    model, ids = llama(), torch.randint(96, (5, 7))
    seen = []
    norm = model.model.layers[1].input_layernorm
    norm.register_forward_hook(lambda module, args, out: seen.append(out))
    found = importances(model, ids)
    expected = torch.cat(seen).square().mean((0, 1))
    assert len(found) == 14
    torch.testing.assert_close(found["blk.1.attn_q.weight"], expected)


def test_a_float_file_stores_32_bits_of_every_weight(tmp_path):
    gguf = pytest.importorskip("gguf")
    model = llama(tie_word_embeddings=False)
    write(model, tmp_path / "model.gguf")
    found = stored(tmp_path / "model.gguf")
    assert (found.decoder, found.head, found.linears) == (32, 32, 32)
    assert found.types == {"F32": 14} and found.head_type == "F32"
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    written = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    expected = tensors(model)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert reader.fields["llama.attention.head_count_kv"].contents() == 2


def test_llama_cpp_computes_the_same_logits(tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    from llama_cpp_model import LlamaCpp

    model = llama(tie_word_embeddings=True)
    torch.nn.init.normal_(model.model.norm.weight, 1, 0.3)
    write(model, tmp_path / "model.gguf")
    ids = torch.randint(96, (1, 24))
    other = LlamaCpp(tmp_path / "model.gguf", ids[:, :8], 32, threads=1)
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(other(ids), expected, rtol=0, atol=2e-3)  # float16 keys and values
    other.prefill()
    again = torch.cat((ids[:, :8], ids[:, :1]), 1)
    torch.testing.assert_close(other.decode(), other(again)[0, -1], rtol=0, atol=2e-3)
