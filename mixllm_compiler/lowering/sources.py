"""Where generated source goes before it is imported or compiled.

Lowerings hand their text to `store` and get a path back. The runtime installs its build cache
here; on its own, this package uses a folder that goes with the process.
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


_store: Store = _temporary


def use_store(store: Store) -> None:
    """From now on keep generated sources with `store`."""
    global _store
    _store = store


def store(source: str, suffix: str, tag: str) -> Path:
    """Keep `source`; the file is ready to be imported or compiled."""
    return _store(source, suffix, tag)


def load(path: Path) -> ModuleType:
    """Import a generated Python file, as a module of its own outside of sys.modules."""
    spec = importlib.util.spec_from_file_location(path.stem.replace("-", "_"), path)
    if spec is None or spec.loader is None:
        raise LoweringError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
