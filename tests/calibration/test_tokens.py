"""Calibration data of every kind becomes token ids of the asked size, or a clear error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mixllm_compiler.calibration.tokens import calibration_tokens, pack_documents, sequence_length
from mixllm_compiler.errors import OptionError, UnsupportedModel
from tests.calibration.support import END, WORDS, tokenizer
from tests.helpers import tiny_llama, token_ids


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def numbers(*words: str) -> list[int]:
    return [WORDS.index(word) for word in words]


def test_documents_are_joined_with_the_end_of_text_token(model):
    ids = calibration_tokens(
        ["the cat sat", "on a mat"], model, tokenizer=tokenizer(), sequences=2, length=4
    )
    expected = [*numbers("the", "cat", "sat", END), *numbers("on", "a", "mat", END)]
    assert ids.dtype == torch.int64
    assert ids.flatten().tolist() == expected


def test_a_file_holds_documents_separated_by_blank_lines(model, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat\nsat\n\non a mat\n", encoding="utf-8")
    for given in (path, str(path)):
        ids = calibration_tokens(given, model, tokenizer=tokenizer(), sequences=1, length=8)
        expected = numbers("the", "cat", "sat", END, "on", "a", "mat", END)
        assert ids.tolist() == [expected]


def test_a_tokenizer_without_an_end_joins_documents_directly():
    ids = pack_documents(["the cat", "sat"], tokenizer(end=None), sequences=1, length=3)
    assert ids.tolist() == [numbers("the", "cat", "sat")]


def test_too_little_text_says_how_much_there_is(model):
    with pytest.raises(OptionError, match=r"asked for 8 × 16 tokens.*gives 2 × 16 \(40 tokens\)"):
        calibration_tokens(
            ["the cat sat"] * 10, model, tokenizer=tokenizer(), sequences=8, length=16
        )


def test_a_missing_file_is_named(model, tmp_path):
    with pytest.raises(OptionError, match=r"no calibration file '.*wiki\.txt'"):
        calibration_tokens(str(tmp_path / "wiki.txt"), model, tokenizer=tokenizer())


def test_text_needs_a_tokenizer(model):
    with pytest.raises(OptionError, match="its tokenizer is unknown; pass tokenizer"):
        calibration_tokens(["the cat"], model)


def test_the_tokenizer_saved_beside_the_model_is_found(tmp_path):
    from transformers import AutoModelForCausalLM

    tiny_llama().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = calibration_tokens(["the cat sat"], model, sequences=1, length=4)
    assert ids.tolist() == [numbers("the", "cat", "sat", END)]


def test_token_ids_are_taken_as_they_are(model):
    ids = token_ids(3, 7)
    assert torch.equal(calibration_tokens(ids, model), ids)
    assert torch.equal(calibration_tokens(ids.int(), model), ids)


@pytest.mark.parametrize("ids", [torch.zeros(2, 3), torch.zeros(5, dtype=torch.int64)])
def test_tensors_that_are_no_token_ids_are_refused(model, ids):
    with pytest.raises(OptionError, match=r"must be integers \[S, T\]"):
        calibration_tokens(ids, model)


@pytest.mark.parametrize("wrong", [-1, 96, 50256])
def test_ids_of_another_tokenizer_are_refused(model, wrong):
    ids = token_ids(2, 5)
    ids[1, 3] = wrong
    with pytest.raises(OptionError, match="the model knows 0 to 95"):
        calibration_tokens(ids, model)


def test_a_model_writes_its_own_text(model):
    first, again = (calibration_tokens("self", model, sequences=3, length=20) for _ in range(2))
    other = calibration_tokens("self", model, sequences=3, length=20, seed=1)
    assert first.shape == (3, 20)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (first[:, 0] == 1).all()  # it begins with the token that texts begin with
    assert len({tuple(row) for row in first.tolist()}) == 3


def test_writing_leaves_the_random_state_alone(model):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    calibration_tokens("self", model, sequences=1, length=5)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("end", [7, [5, 6, 7]])
def test_an_end_of_text_token_does_not_cut_what_a_model_writes(end):
    model = tiny_llama(bos_token_id=None, eos_token_id=end)
    ids = calibration_tokens("self", model, sequences=4, length=64)
    assert ids.shape == (4, 64)
    assert ids[0, 0] == (end if isinstance(end, int) else end[0])


def test_the_text_is_sampled_from_the_plain_distribution(model):
    """Settings that a checkpoint brings for chatting must not narrow it."""
    expected = calibration_tokens("self", model, sequences=2, length=30)
    chatty = tiny_llama()
    chatty.generation_config.update(
        temperature=0.2, top_k=3, top_p=0.5, repetition_penalty=1.5, do_sample=False
    )
    assert torch.equal(calibration_tokens("self", chatty, sequences=2, length=30), expected)


def test_a_model_that_cannot_write_asks_for_data():
    with pytest.raises(UnsupportedModel, match="Linear cannot generate text; pass token ids"):
        calibration_tokens("self", nn.Linear(8, 8))


def test_sequences_are_as_long_as_the_model_allows():
    short = tiny_llama(max_position_embeddings=50)
    assert sequence_length(short, None) == 50
    assert sequence_length(nn.Linear(8, 8), None) == 1024
    with pytest.raises(OptionError, match="sequences of 51 tokens exceed the model's 50 positions"):
        sequence_length(short, 51)
