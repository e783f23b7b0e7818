from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from mixllm_compiler.calibration.tokens import split_documents
from mixllm_compiler.errors import OptionError
from mixllm_compiler.evaluation.text import Windows, cut_windows, read_windows

BOS = 0
TEXT = "the cat sat on the mat; the dog sat on the cat. "


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE: letters outside of ASCII take several tokens."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<s>")


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_every_window_begins_with_bos_and_no_text_is_lost(tokenizer):
    text = 10 * TEXT
    found = cut_windows([text], tokenizer, length=8)
    assert (found.ids[:, 0] == BOS).all()
    together = found.ids[:, 1:].flatten().tolist()
    assert together == encode(tokenizer, text)[: len(together)]
    assert found.tokens == 7 * len(found)


def test_without_bos_windows_are_cut_wherever_they_fall(tokenizer):
    found = cut_windows([10 * TEXT], tokenizer, length=8, begin=False)
    whole = [BOS, *encode(tokenizer, 10 * TEXT)]
    assert found.ids.flatten().tolist() == whole[: found.ids.numel()]


def test_documents_are_joined_by_bos(tokenizer):
    found = cut_windows(["the cat", "sat on the mat"], tokenizer, length=6, begin=False)
    stream = [BOS, *encode(tokenizer, "the cat"), BOS, *encode(tokenizer, "sat on the mat")]
    assert found.ids.flatten().tolist() == stream[: found.ids.numel()]


def test_a_document_that_begins_with_its_window_gets_one_bos(tokenizer):
    first = encode(tokenizer, "the cat sat")
    found = cut_windows(["the cat sat", TEXT], tokenizer, length=1 + len(first))
    assert found.ids[0].tolist() == [BOS, *first]
    assert found.ids[1].tolist() == [BOS, *encode(tokenizer, TEXT)[: len(first)]]


@pytest.mark.parametrize("text", ["plain letters only", "naïve café – Ελληνικά – 猫が座った 🐈"])
def test_bytes_are_those_of_the_text(tokenizer, text):
    ids = encode(tokenizer, text)
    found = cut_windows([text], tokenizer, length=1 + len(ids))
    assert found.bytes == (len(text.encode()),)


def test_bytes_of_windows_add_up_where_a_letter_is_cut(tokenizer):
    text = "猫" * 20
    ids = encode(tokenizer, text)
    assert len(ids) > 20  # several tokens a letter
    found = cut_windows([text], tokenizer, length=2)
    assert len(found) == len(ids)
    assert sum(found.bytes) == len(text.encode())


def test_a_token_that_is_not_predicted_adds_no_bytes(tokenizer):
    ids = encode(tokenizer, TEXT)
    found = cut_windows([TEXT], tokenizer, length=len(ids) // 2, begin=False)
    skipped = tokenizer.decode(found.ids[1:, 0])
    predicted = "".join(tokenizer.decode(row[1:]) for row in found.ids)
    assert skipped
    assert sum(found.bytes) == len(predicted.encode())


def test_bos_between_documents_adds_no_bytes(tokenizer):
    texts = ["the cat", "the dog"]
    count = sum(1 + len(encode(tokenizer, t)) for t in texts)
    found = cut_windows(texts, tokenizer, length=count)
    assert sum(found.bytes) == len("".join(texts))


def test_only_as_many_windows_as_asked(tokenizer):
    assert len(cut_windows([100 * TEXT], tokenizer, count=3, length=16)) == 3


def test_too_little_text_says_how_much_there_is(tokenizer):
    with pytest.raises(OptionError, match="asked for 4 windows of 16 tokens, the text gives 0 and"):
        cut_windows(["the cat"], tokenizer, count=4, length=16)


def test_a_missing_file_is_named(tokenizer, tmp_path):
    with pytest.raises(OptionError, match=r"no text file '.*gone\.txt'"):
        read_windows(tmp_path / "gone.txt", tokenizer)


def test_a_file_that_is_not_utf8_is_refused(tokenizer, tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(OptionError, match="not UTF-8"):
        read_windows(path, tokenizer)


def test_a_file_is_split_at_blank_lines(tokenizer, tmp_path):
    path = tmp_path / "two.txt"
    path.write_text("the cat\n\nsat on the mat\n", encoding="utf-8")
    whole = cut_windows(["the cat", "sat on the mat"], tokenizer, length=6)
    assert torch.equal(read_windows(path, tokenizer, length=6).ids, whole.ids)


def test_two_blank_lines_separate_documents_where_there_are_any():
    assert split_documents("title\n\nbody\n\n\ntitle\r\n\r\nbody\n") == [
        "title\n\nbody",
        "title\n\nbody",
    ]
    assert split_documents("one\n\ntwo\n\n  \n\nthree") == ["one", "two", "three"]


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast, bos_token_id, eos_token_id = False, 0, 0

    with pytest.raises(OptionError, match="Slow does not say"):
        cut_windows([TEXT], Slow())


def test_windows_check_their_shape():
    with pytest.raises(ValueError, match="T >= 2"):
        Windows(torch.zeros(3, 1, dtype=torch.long), (1, 1, 1))
    with pytest.raises(ValueError, match="1 sizes for 3"):
        Windows(torch.zeros(3, 4, dtype=torch.long), (1,))
