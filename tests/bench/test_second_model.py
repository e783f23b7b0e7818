from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer

from mixllm_compiler.demo import MODEL_DIR
from mixllm_compiler.demo.train import BOS_ID, Settings, encode, train_model
from second_model import _begins_with_bos, build_model

SETTINGS = Settings(
    seconds=0.01, seed=0, vocabulary=300, hidden=64, layers=2, heads=2, kv_heads=1,
    intermediate=96, context=16, batch=2, learning_rate=1e-3, weight_decay=0.1, compile=False,
)  # fmt: skip


def test_it_differs_from_a_llama_where_it_should():
    model = build_model(SETTINGS)
    attention = model.model.layers[0].self_attn
    assert all(getattr(attention, f"{x}_proj").bias is not None for x in "qkv")
    assert attention.o_proj.bias is None
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_attention_is_causal():
    model = build_model(SETTINGS).eval()
    ids = torch.randint(300, (1, 16))
    other = ids.clone()
    other[0, 10:] = (other[0, 10:] + 1) % 300
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[:, :10], model(other).logits[:, :10])


def test_the_biases_are_trained():
    model = build_model(SETTINGS)
    train_model(model, torch.randint(300, (500,)), SETTINGS, torch.device("cpu"))
    biases = [p for name, p in model.named_parameters() if name.endswith("proj.bias")]
    assert len(biases) == 6 and all(bool(bias.any()) for bias in biases)


def test_a_document_begins_with_bos_once():
    ids = encode(_begins_with_bos(MODEL_DIR / "tokenizer.json"), ["a", "b"]).tolist()
    assert ids.count(BOS_ID) == 2 and ids[0] == BOS_ID


def test_a_tokenizer_with_another_first_token_is_refused(tmp_path):
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    changed = tokenizer.to_str().replace("<|endoftext|>", "<s>")
    (tmp_path / "tokenizer.json").write_text(changed)
    with pytest.raises(SystemExit, match="begins a document"):
        _begins_with_bos(tmp_path / "tokenizer.json")
