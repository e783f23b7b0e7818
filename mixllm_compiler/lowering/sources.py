"""Where generated source goes before it is imported or compiled, and what compilers make of it.

Lowerings hand their text to `store` or `build` and get a path back. The runtime installs its build
cache here; on its own, this package uses a folder that goes with the process.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from ..errors import LoweringError

Store = Callable[[str, str, str], Path]
"""(source, suffix, tag) → a file that holds the source."""

Builder = Callable[[Path, Path], None]
"""(source file, file to write): compiles one into the other, or raises."""

Build = Callable[[str, str, str, str, Builder, str], Path]
"""(source, suffix, tag, suffix of the product, builder, what else the product depends on) → the
product's file."""


@functools.cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="mixllm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _temporary(source: str, suffix: str, tag: str) -> Path:
    key = hashlib.sha256(source.encode()).hexdigest()[:16]
    path = _folder() / f"{tag}-{key}{suffix}"
    path.write_text(source, encoding="utf-8")
    return path


def _build_here(
    source: str, suffix: str, tag: str, product: str, builder: Builder, depends: str
) -> Path:
    path = _temporary(f"{source}\n// {depends}\n", suffix, tag)
    result = path.with_suffix(product)
    builder(path, result)
    return result


_store: Store = _temporary
_build: Build = _build_here


def use_store(store: Store, build: Build) -> None:
    """From now on keep generated sources with `store`, and compile them with `build`."""
    global _store, _build
    _store, _build = store, build


def store(source: str, suffix: str, tag: str) -> Path:
    """Keep `source`; the file is ready to be imported or compiled."""
    return _store(source, suffix, tag)


def build(source: str, suffix: str, tag: str, product: str, builder: Builder, depends: str) -> Path:
    """What `builder` makes of a source, see `Build`. Raises what the builder raises."""
    return _build(source, suffix, tag, product, builder, depends)


def load(path: Path) -> ModuleType:
    """Import a generated Python file, as a module of its own outside of sys.modules."""
    spec = importlib.util.spec_from_file_location(path.stem.replace("-", "_"), path)
    if spec is None or spec.loader is None:
        raise LoweringError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
