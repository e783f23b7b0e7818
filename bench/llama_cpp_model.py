"""llama.cpp's quantizer and models, in this process, by its C interface.

    quantize(Path("model.gguf"), Path("model-Q4_K_M.gguf"), "Q4_K_M", threads=2)
    model = LlamaCpp(Path("model-Q4_K_M.gguf"), prompt, capacity=1024, threads=2)
    logits = model(ids)                       [1, T] → [1, T, V], without what came before
    model.prefill(), model.decode()           the prompt; then a token after it

Needs llama-cpp-python, built for the CPU it runs on. Import torch first: both then share one
OpenMP, and no idle thread of one takes the core of the other.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import llama_cpp
except ModuleNotFoundError as error:
    raise SystemExit(
        "llama-cpp-python is not installed, so there is nothing to compare with; "
        "CMAKE_ARGS='-DGGML_NATIVE=ON -DGGML_OPENMP=ON' pip install llama-cpp-python gguf"
    ) from error


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Say nothing."""


llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()


def system() -> str:
    """The instructions and features that llama.cpp was built with."""
    return llama_cpp.llama_print_system_info().decode().strip(" |\n")


def quantize(
    source: Path,
    target: Path,
    kind: str,
    threads: int,
    importances: Mapping[str, Tensor] | None = None,
) -> None:
    """llama.cpp's own quantizer with its own choice of a type for each tensor.

    Args:
        kind: "Q4_0", "Q8_0", "Q4_K_M", …
        importances: tensor → float32 [K], see `gguf_llama.importances`.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if importances is not None:
        kept = [tensor.contiguous() for tensor in importances.values()]
        entries = [
            llama_cpp.llama_model_imatrix_data(
                name.encode(), ctypes.cast(data.data_ptr(), _floats), data.numel()
            )
            for name, data in zip(importances, kept, strict=True)
        ]
        # The last entry has no name: that is how the list ends.
        array = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))(*entries)
        params.imatrix = array
    failed = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    if failed:
        raise SystemExit(f"llama.cpp could not quantize {source.name} to {kind}")


_floats = ctypes.POINTER(ctypes.c_float)


class LlamaCpp:
    """A GGUF file as a function of token ids, and with a prompt of its own to be timed on.

    Settings are llama.cpp's defaults: weights laid out for this CPU where it can, keys and values
    in float16, flash attention where it supports it.

    Args:
        prompt: int64 [1, T].
        capacity: tokens of the cache; decoding starts over behind the prompt when it is full.
    """

    def __init__(self, path: Path, prompt: Tensor, capacity: int, threads: int) -> None:
        model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = capacity
        params.n_threads = params.n_threads_batch = threads
        self._context = model and llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp could not load {path.name}")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.capacity, self.length = capacity, prompt.shape[1]
        self.at = 0  # tokens in the cache
        self._prompt = _batch(prompt[0], every=False)
        self._next = _batch(prompt[0, :1], every=False)

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits [1, T, V] of ids [1, T] with T up to the capacity."""
        count = ids.shape[1]
        batch = _batch(ids[0], every=True)
        self._empty()
        self._run(batch)
        found = _tensor(llama_cpp.llama_get_logits(self._context), count * self.vocabulary)
        llama_cpp.llama_batch_free(batch)
        self._empty()
        return found.view(1, count, -1)

    def prefill(self) -> Tensor:
        """Logits [V] behind the prompt."""
        self._empty()
        self._run(self._prompt)
        self.at = self.length
        return self._last()

    def decode(self) -> Tensor:
        """Logits [V] behind one more token, always the same; call `prefill` first."""
        if self.at == self.capacity:
            llama_cpp.llama_memory_seq_rm(self._memory, 0, self.length, -1)
            self.at = self.length
        self._next.pos[0] = self.at
        self._run(self._next)
        self.at += 1
        return self._last()

    def _empty(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, False)
        self.at = 0

    def _run(self, batch: Any) -> None:
        if code := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {code}")

    def _last(self) -> Tensor:
        return _tensor(llama_cpp.llama_get_logits_ith(self._context, -1), self.vocabulary)


def _batch(ids: Tensor, every: bool) -> Any:
    """Tokens from position 0 on, with logits for every one of them or for the last."""
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for at, token in enumerate(ids.tolist()):
        batch.token[at], batch.pos[at] = token, at
        batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
        batch.logits[at] = every or at == len(ids) - 1
    return batch


def _tensor(pointer: Any, count: int) -> Tensor:
    """float32 [count], copied: llama.cpp reuses its memory."""
    address = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * count))
    return torch.frombuffer(address.contents, dtype=torch.float32).clone()
