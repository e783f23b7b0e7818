"""A tokenizer of twelve words."""

from __future__ import annotations

from typing import Any

END = "</s>"
WORDS = ["<unk>", END, "the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "left"]


def tokenizer(end: str | None = END) -> Any:
    """Whole words, split at blanks; made without a download."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token=end)
