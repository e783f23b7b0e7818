"""The build cache: generated source and what compilers make of it, found by content.

    <cache>/kernels/<tag>-<key><suffix>          the source
    <cache>/kernels/<tag>-<key><product>         what `build` made of it, if it is to be built

The key is the SHA-256 of the source and of everything else that decides the result: versions,
compiler, flags. So a file once there never changes, and any number of processes share it.
`MIXLLM_CACHE_DIR` moves the cache; `MIXLLM_NO_BUILD=1` forbids adding to it, for servers that must
not compile while they serve.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock

from ..errors import LoweringError

Builder = Callable[[Path, Path], None]
"""(source file, file to write): compiles one into the other, or raises."""

_KEY_LENGTH = 16


def cache_dir() -> Path:
    """The folder of the build cache; not created by asking."""
    chosen = os.environ.get("MIXLLM_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("mixllm")


def building_forbidden() -> bool:
    """Whether `MIXLLM_NO_BUILD` says that nothing may be generated or compiled now."""
    return os.environ.get("MIXLLM_NO_BUILD", "0") not in ("", "0")


def key(source: str, depends: str = "") -> str:
    """Name of a source in the cache. `depends`: versions and flags that its product depends on."""
    digest = hashlib.sha256()
    for part in (source, depends):
        raw = part.encode()
        # With the lengths, no text can move from one part to the other.
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()[:_KEY_LENGTH]


def materialize(source: str, suffix: str, tag: str, depends: str = "") -> Path:
    """Put a source into the cache, unless it is there, and return its file.

    Args:
        source: the text.
        suffix: of the file, `".py"`.
        tag: a few words for the file's name, `"triton-linear"`.
        depends: versions and flags that belong to the key.

    Raises:
        LoweringError: the file is missing and building is forbidden, or the cache is not writable.
    """
    path = _folder() / f"{tag}-{key(source, depends)}{suffix}"
    # A reader never sees half a file, but a full disk or a person may have left another one.
    if _holds(path, source):
        return path
    with _adding(path):
        if not _holds(path, source):
            _write(path, source)
    return path


def build(
    source: str, suffix: str, tag: str, product: str, builder: Builder, depends: str = ""
) -> Path:
    """Put a source and what a compiler makes of it into the cache; return the product's file.

    `builder` runs at most once, under a lock, whatever the number of processes; `depends` must name
    the compiler, its version and its flags. `product` is the suffix of the result, `".so"`.

    Raises:
        LoweringError: the product is missing and building is forbidden, or the cache is not
            writable. What the builder raises passes through; nothing is left behind.
    """
    path = materialize(source, suffix, tag, depends)
    result = path.with_suffix(product)
    if result.exists():
        return result
    with _adding(result):
        if not result.exists():
            beside = _beside(result)
            try:
                builder(path, beside)
                os.replace(beside, result)
            finally:
                beside.unlink(missing_ok=True)
    return result


@dataclass(frozen=True)
class Entry:
    """One file of the cache: its path, size in bytes and time of writing (seconds since 1970)."""

    path: Path
    size: int
    written: float


def status() -> list[Entry]:
    """Everything in the cache, by name."""
    entries = []
    for path in sorted(_folder().glob("*")):
        if path.is_file() and path.suffix not in (".lock", ".tmp"):
            found = path.stat()
            entries.append(Entry(path, found.st_size, found.st_mtime))
    return entries


def _folder() -> Path:
    return cache_dir() / "kernels"


def _holds(path: Path, source: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == source
    except OSError:
        return False


@contextmanager
def _adding(path: Path) -> Iterator[None]:
    """Hold the lock of a file that is about to be written."""
    if building_forbidden():
        raise LoweringError(
            f"{path.name} is not in the build cache {path.parent}, and MIXLLM_NO_BUILD forbids "
            "building it now. Run the model once without that variable, or point "
            "MIXLLM_CACHE_DIR to a cache that has it."
        )
    lock = FileLock(path.with_name(path.name + ".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise _not_writable(path.parent, error) from error
    try:
        yield
    finally:
        lock.release()


def _not_writable(folder: Path, error: OSError) -> LoweringError:
    return LoweringError(
        f"cannot write to the build cache {folder}: {error}. Set MIXLLM_CACHE_DIR to a folder that "
        "you may write to."
    )


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.{time.monotonic_ns()}.tmp")


def _write(path: Path, text: str) -> None:
    """Write in one step: readers see the old file, no file, or the whole new one."""
    beside = _beside(path)
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise _not_writable(path.parent, error) from error
    finally:
        beside.unlink(missing_ok=True)
