"""A text → windows of tokens for a tokenizer, and how many bytes of the text they predict.

Documents are tokenized apart and joined by the token that begins one (BOS, or EOT where a
tokenizer has no BOS). Bytes make models with other tokenizers comparable: nats per token are
not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..calibration.tokens import split_documents
from ..errors import OptionError

DEFAULT_LENGTH = 1024


@dataclass(frozen=True)
class Windows:
    """Windows of equal length; a model predicts all tokens of a window but its first.

    Attributes:
        ids: int64 [S, T], on the CPU.
        bytes: per window, the UTF-8 bytes of the text that its predicted tokens stand for.
    """

    ids: Tensor
    bytes: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.ids.dim() != 2 or self.ids.shape[1] < 2 or not len(self.ids):
            raise ValueError(f"windows are ids [S, T] with T >= 2, not {list(self.ids.shape)}")
        if len(self.bytes) != len(self.ids):
            raise ValueError(f"{len(self.bytes)} sizes for {len(self.ids)} windows")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Predicted tokens of all windows."""
        return self.ids.shape[0] * (self.ids.shape[1] - 1)

    def first(self, count: int) -> Windows:
        """The first windows."""
        return Windows(self.ids[:count], self.bytes[:count])


def read_windows(
    path: str | Path,
    tokenizer: Any,
    *,
    count: int | None = None,
    length: int = DEFAULT_LENGTH,
    begin: bool = True,
) -> Windows:
    """Windows of a UTF-8 text file whose documents are separated by blank lines.

    Raises:
        OptionError: no such file, no UTF-8, or too little text.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise OptionError(f"there is no text file {str(path)!r}") from None
    except UnicodeDecodeError as error:
        raise OptionError(f"{str(path)!r} is not UTF-8 text: {error}") from error
    return cut_windows(
        split_documents(text), tokenizer, count=count, length=length, begin=begin, name=str(path)
    )


def cut_windows(
    documents: Sequence[str],
    tokenizer: Any,
    *,
    count: int | None = None,
    length: int = DEFAULT_LENGTH,
    begin: bool = True,
    name: str = "the text",
) -> Windows:
    """Windows of documents; a rest shorter than a window is left out.

    Args:
        documents: texts; only as many as are needed are tokenized.
        tokenizer: a fast tokenizer of transformers (bytes are counted from its offsets).
        count: how many windows, None for all that the text gives.
        length: T, tokens in a window.
        begin: begin every window with BOS (or EOT), in addition to the text: most models are
            always used so. Without it windows are cut wherever they fall, and the first token
            of each is not predicted.
        name: what errors call the text.

    Raises:
        OptionError: too little text, or a tokenizer that gives no offsets.
    """
    if length < 2 or (count is not None and count < 1):
        raise OptionError(f"cannot cut {count} windows of {length} tokens; a window has at least 2")
    first = begin_token(tokenizer)
    ids: list[list[int]] = []
    sizes: list[int] = []
    window: list[int] = []
    covered = 0
    for token, size in _stream(documents, tokenizer, first):
        if begin and first is not None and not window:
            window = [first]
            if token == first:  # a document begins where the window does: once is enough
                continue
        if begin or window:
            covered += size
        window.append(token)
        if len(window) == length:
            ids.append(window)
            sizes.append(covered)
            window, covered = [], 0
            if len(ids) == count:
                break
    if not ids or (count is not None and len(ids) < count):
        asked = "one window" if count is None else f"{count} windows"
        raise OptionError(
            f"asked for {asked} of {length} tokens, {name} gives {len(ids)} and {len(window)} "
            "tokens more; give more text or ask for less"
        )
    return Windows(torch.tensor(ids), tuple(sizes))


def begin_token(tokenizer: Any) -> int | None:
    """The token that begins a document: BOS, else EOT, None if the tokenizer has neither."""
    found = tokenizer.bos_token_id
    return tokenizer.eos_token_id if found is None else found


def _stream(
    documents: Sequence[str], tokenizer: Any, first: int | None
) -> Iterator[tuple[int, int]]:
    """(token, bytes of text that it adds) over all documents."""
    if not getattr(tokenizer, "is_fast", False):
        raise OptionError(
            f"{type(tokenizer).__name__} does not say which characters a token stands for, so "
            "bytes cannot be counted; load the fast tokenizer of this model"
        )
    for document in documents:
        if first is not None:
            yield first, 0
        encoded = tokenizer(
            document, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        at = 0
        ends = _byte_positions(document)
        for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            # Tokens may share a character (bytes of one letter): the first of them counts it.
            now = max(at, int(ends[end]))
            yield token, now - at
            at = now


def _byte_positions(text: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """int64 [characters + 1]: where each character begins in UTF-8, and the size of it all."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    sizes = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    return np.concatenate(([0], np.cumsum(sizes)))
