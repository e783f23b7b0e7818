"""Calibration data of any kind → token ids [sequences, length]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import compat
from ..errors import OptionError, UnsupportedModel, WeightError

DEFAULT_SEQUENCES = 8
DEFAULT_LENGTH = 1024


def sequence_length(model: nn.Module, wanted: int | None) -> int:
    """The wanted length, or 1,024 cut to what the model's positions allow."""
    config = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None) or DEFAULT_LENGTH
    if wanted is None:
        return int(min(DEFAULT_LENGTH, limit))
    if wanted > limit:
        raise OptionError(f"sequences of {wanted} tokens exceed the model's {limit} positions")
    return wanted


def calibration_tokens(
    data: Tensor | Sequence[str] | str | Path,
    model: nn.Module,
    *,
    tokenizer: Any = None,
    sequences: int = DEFAULT_SEQUENCES,
    length: int | None = None,
    seed: int = 0,
    at_least: int | None = None,
) -> Tensor:
    """Token ids int64 [S, T].

    Args:
        data: ids [S, T]; texts; the path of a text file (see `split_documents`); a
            `datasets` id `name[:config[:split]]` (needs the extra `eval`); or "self": the model
            writes the text.
        tokenizer: for text; by default the one saved beside the model.
        sequences, length: how much to take.
        at_least: sequences that will do if the text is shorter; by default it must not be.

    Raises:
        OptionError: no such file, too little text, no tokenizer.
        UnsupportedModel: "self" for a model that cannot generate.
    """
    if isinstance(data, Tensor):
        if data.dim() != 2 or data.dtype not in (torch.int64, torch.int32):
            shape = list(data.shape)
            raise OptionError(f"token ids must be integers [S, T], not {data.dtype} {shape}")
        return _known(data.long(), model)
    length = sequence_length(model, length)
    if isinstance(data, str) and data == "self":
        return written_by(model, sequences, length, seed)
    if isinstance(data, str | Path):
        documents = _documents(data)
    else:
        documents = list(data)
    ids = pack_documents(documents, tokenizer or tokenizer_of(model), sequences, length, at_least)
    return _known(ids, model)


def _known(ids: Tensor, model: nn.Module) -> Tensor:
    """The same ids, all of which the model has an embedding for; a GPU would stop at a wrong one.

    Raises:
        OptionError: an id is none of the model's, so they come from another tokenizer.
    """
    table = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(table, "num_embeddings", None)
    if size is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise OptionError(
            f"token ids go from {int(ids.min())} to {int(ids.max())}, the model knows 0 to "
            f"{size - 1}: they were made with another model's tokenizer"
        )
    return ids


def _documents(data: str | Path) -> list[str]:
    path = Path(data)
    if path.is_file():
        return split_documents(path.read_text(encoding="utf-8"))
    if path.suffix or "\n" in str(data) or " " in str(data):
        raise OptionError(f"there is no calibration file {str(data)!r}")
    try:
        import datasets
    except ImportError as error:
        raise OptionError(
            f"{str(data)!r} is no file, and data set ids need the package 'datasets' "
            "(pip install 'mixllm-compiler[eval]')"
        ) from error
    name, config, split = (*str(data).split(":"), "", "")[:3]
    loaded = datasets.load_dataset(name, config or None, split=split or "train")
    return [row["text"] for row in loaded if row["text"].strip()]


def split_documents(text: str) -> list[str]:
    """Documents of a text: separated by two blank lines or, where there are none, by one."""
    text = text.replace("\r\n", "\n").strip()
    separator = "\n\n\n" if "\n\n\n" in text else "\n\n"
    return [stripped for part in text.split(separator) if (stripped := part.strip())]


def tokenizer_of(model: nn.Module) -> Any:
    """The tokenizer saved beside the model.

    Raises:
        OptionError: the model does not know where it came from.
    """
    from transformers import AutoTokenizer

    where = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not where:
        raise OptionError(
            "this model was not loaded from a checkpoint, so its tokenizer is unknown; pass "
            "tokenizer=…, or token ids as data"
        )
    return AutoTokenizer.from_pretrained(where)


def pack_documents(
    documents: Sequence[str],
    tokenizer: Any,
    sequences: int,
    length: int,
    at_least: int | None = None,
) -> Tensor:
    """Join documents with the end-of-text token and cut into [sequences, length].

    Raises:
        OptionError: the text gives fewer sequences than asked.
    """
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for document in documents:
        ids += tokenizer.encode(document, add_special_tokens=False, verbose=False)
        if end is not None:
            ids.append(end)
        if len(ids) >= sequences * length:
            break
    have = len(ids) // length
    if have < (sequences if at_least is None else min(at_least, sequences)):
        raise OptionError(
            f"asked for {sequences} × {length} tokens, the text gives {have} × {length} "
            f"({len(ids)} tokens); give more text or ask for less"
        )
    count = min(have, sequences)
    return torch.tensor(ids[: count * length]).view(count, length)


def _refuse_what_cannot_run(model: nn.Module) -> None:
    """What would end as an error of some op, deep inside of `generate`.

    Raises:
        UnsupportedModel: weights on the meta device.
        WeightError: released weights, or values that are not finite.
    """
    for name, weight in model.named_parameters():
        if weight.device.type == "meta":
            raise UnsupportedModel(
                f"{name} has no values (it is on the meta device); load the checkpoint first"
            )
        compat.refuse_released(weight, name)
        wide = weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        if wide and not bool(torch.isfinite(weight).all()):
            raise WeightError(
                f"{name} holds values that are NaN or infinite, so the model can write no text; "
                "repair the checkpoint"
            )


@torch.no_grad()
def written_by(model: nn.Module, sequences: int, length: int, seed: int = 0) -> Tensor:
    """Text that the model samples from itself at temperature 1; as good for scores as real text."""
    generate = getattr(model, "generate", None)
    if generate is None:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot generate text; pass token ids or a text file as data"
        )
    _refuse_what_cannot_run(model)
    config: Any = model.config
    device = next(model.parameters()).device
    start = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
    start = next(iter(start), 0) if isinstance(start, list | tuple) else start or 0
    prompt = torch.full((sequences, 1), int(start), dtype=torch.long, device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        ids: Tensor = generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            min_new_tokens=length - 1,
            max_new_tokens=length - 1,
            pad_token_id=int(start),
        )
    return ids
