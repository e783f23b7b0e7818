"""Files that are there whole or not at all: safetensors with a JSON document beside the tensors."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ..errors import OptionError

_CONTENT = "mixllm.content"
_VERSION = "mixllm.version"
_DOCUMENT = "mixllm.document"


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file beside `path` and rename it: a reader sees the old bytes or all the new ones."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(beside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)  # gone already unless something went wrong


def save_tensors(
    path: str | os.PathLike[str],
    content: str,
    version: int,
    tensors: Mapping[str, Tensor],
    document: Mapping[str, Any],
) -> None:
    """Write named tensors (any device) and a JSON document as one safetensors file.

    Args:
        path: file to write; its folder must exist.
        content: what the file holds, e.g. `"plan"`; `load_tensors` asks for the same.
        version: version of the document, raised when its meaning changes.
        tensors: name → tensor; tensors that share storage are stored once each.
        document: anything JSON can hold; NaN and infinities are refused.
    """
    header = {
        _CONTENT: content,
        _VERSION: str(version),
        _DOCUMENT: json.dumps(document, allow_nan=False, ensure_ascii=False),
    }
    own = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    write_whole(path, safetensors.torch.save(own, header))


def load_tensors(
    path: str | os.PathLike[str], content: str, version: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors on the CPU and the document of a file that `save_tensors` wrote.

    Raises:
        FileNotFoundError: no such file.
        OptionError: the file is damaged, holds something else, or is of a newer version.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {os.fspath(path)!r}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            found = header.get(_CONTENT)
            if found != content:
                what = (
                    f"a mixllm {found} file" if found else "a safetensors file of another program"
                )
                raise OptionError(f"{os.fspath(path)!r} is not a {content} file but {what}")
            if int(header[_VERSION]) > version:
                raise OptionError(
                    f"{os.fspath(path)!r} is a {content} file of version {header[_VERSION]}, this "
                    f"mixllm-compiler reads up to version {version}; install a newer one"
                )
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except safetensors.SafetensorError as error:
        raise OptionError(
            f"{os.fspath(path)!r} is not a {content} file, or it is damaged ({error})"
        ) from error
    return tensors, json.loads(header[_DOCUMENT])
