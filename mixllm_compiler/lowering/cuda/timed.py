"""Tables of what was timed: which variant is fastest, by number of tokens and size of the matrix.

    tables/<gpu>.json in this package         ships
    <cache>/tables/<gpu>.json                 of `mixllm tune` on this machine; goes first

    {"device": …, "mixllm": …, "entries": [[tokens, tiles, groups, "variant"], …], "times": […]}

`times` has the µs of every variant that was tried and is only read to go on with it. The cache
folder is the runtime's; without it only shipped tables are known.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from ...errors import LoweringError, OptionError
from ...formats.files import write_whole
from ..target import Target
from .cost import Problem
from .variants import Variant

log = logging.getLogger("mixllm_compiler.lowering")

Key = tuple[int, int, int]
"""(tokens, tiles of 64 rows, groups of 128 along K)"""

_PROPORTIONAL = 1024  # tokens from which twice as many take twice as long

_folder: Callable[[], Path] | None = None


@dataclass(frozen=True)
class Entry:
    """The best variant for up to so many tokens, at so many tiles of rows and groups along K."""

    tokens: int
    tiles: int
    groups: int
    variant: Variant

    def distance(self, problem: Problem) -> float:
        """How unlike a problem is: factors between the sizes, as logarithms."""
        return abs(math.log(self.tiles / problem.tiles)) + abs(
            math.log(self.groups / problem.groups)
        )


@dataclass
class Table:
    """A table that is being made, or was read.

    Attributes:
        device: the GPU's name.
        made_by: version of mixllm-compiler.
        best: the fastest variant of every problem.
        times: µs of its candidates.
    """

    device: str
    made_by: str = ""
    best: dict[Key, Variant] = field(default_factory=dict)
    times: dict[Key, dict[str, float]] = field(default_factory=dict)

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(Entry(*key, variant) for key, variant in sorted(self.best.items(), key=_key))

    def save(self, path: Path) -> None:
        """Write it whole: who reads it meanwhile sees the old table or the new one.

        Raises:
            LoweringError: the folder is not writable.
        """
        entries = [[*key, str(variant)] for key, variant in sorted(self.best.items(), key=_key)]
        times = [
            {"tokens": m, "tiles": tiles, "groups": groups, "us": us}
            for (m, tiles, groups), us in sorted(self.times.items())
        ]
        parts = [
            f'  "device": {json.dumps(self.device)}',
            f'  "mixllm": {json.dumps(self.made_by)}',
        ]
        for name, rows in (("entries", entries), ("times", times)):
            if rows:
                lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
                parts.append(f'  "{name}": [\n{lines}\n  ]')
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, ("{\n" + ",\n".join(parts) + "\n}\n").encode())
        except OSError as error:
            raise LoweringError(
                f"cannot write the table {path}: {error}. Set MIXLLM_CACHE_DIR to a folder that "
                "you may write to."
            ) from error


def _key(item: tuple[Key, Variant]) -> Key:
    return item[0]


def use_folder(folder: Callable[[], Path]) -> None:
    """From now on look there for this machine's tables, in front of those that ship."""
    global _folder
    _folder = folder
    forget()


def forget() -> None:
    """Read the tables again when they are needed next."""
    tables.cache_clear()


def file_name(device: str) -> str:
    """The name of a GPU's table: `nvidia-h200.json`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def path_of(target: Target) -> Path | None:
    """Where this machine's own table of a GPU is or would be; None without a cache folder."""
    return None if _folder is None or not target.name else _folder() / file_name(target.name)


def shipped(target: Target) -> tuple[Entry, ...]:
    """The entries that come with the package, empty for other GPUs."""
    file = resources.files(__package__) / "tables" / file_name(target.name)
    if not target.name or not file.is_file():
        return ()
    return parse(file.read_text(encoding="utf-8"), file.name, target).entries


@functools.lru_cache(maxsize=64)
def tables(target: Target) -> tuple[tuple[Entry, ...], ...]:
    """Entries of a GPU: this machine's, then those that ship. A damaged file is told and left."""
    found = []
    path = path_of(target)
    try:
        mine = None if path is None else read(path, target)
    except OptionError as error:
        log.warning("mixllm: %s; until then other tables or the cost model choose", error)
        mine = None
    if mine is not None and mine.best:
        found.append(mine.entries)
    if entries := shipped(target):
        found.append(entries)
    return tuple(found)


def read(path: Path, target: Target) -> Table | None:
    """The table of a file; None if there is no such file.

    Raises:
        OptionError: it is damaged, of another GPU, or names what that GPU cannot run.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(str(path), str(error)) from error
    return parse(text, str(path), target)


def parse(text: str, name: str, target: Target) -> Table:
    """A table from its text; `name` of the file is for messages.

    Raises:
        OptionError: see `read`.
    """
    try:
        content = json.loads(text)
        table = Table(content.get("device", target.name), content.get("mixllm", ""))
        for tokens, tiles, groups, variant in content.get("entries", ()):
            key = _positive(tokens), _positive(tiles), _positive(groups)
            table.best[key] = _runnable(Variant.parse(variant), tokens, target)
        for row in content.get("times", ()):
            key = _positive(row["tokens"]), _positive(row["tiles"]), _positive(row["groups"])
            table.times[key] = _microseconds(row["us"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(name, str(error)) from error
    if table.device != target.name:
        raise _damaged(name, f"it is of {table.device!r}, this is {target.name!r}")
    return table


def _damaged(name: str, why: str) -> OptionError:
    return OptionError(
        f"{name} is no table of variants: {why}. Delete it, or make it anew with `mixllm tune "
        "--again`"
    )


def _positive(number: Any) -> int:
    if type(number) is not int or number < 1:
        raise ValueError(f"{number!r} is no size")
    return number


def _microseconds(times: Mapping[str, Any]) -> dict[str, float]:
    found = {str(variant): float(us) for variant, us in times.items()}
    if not all(us > 0 for us in found.values()):
        raise ValueError("a time is not above zero")
    return found


def _runnable(variant: Variant, tokens: int, target: Target) -> Variant:
    if not runs(variant, target):
        raise ValueError(f"{target.architecture} cannot run {variant}")
    if variant.regime in ("decode", "staged") and tokens > variant.tokens:
        raise ValueError(f"{variant} computes {variant.tokens} tokens, not {tokens}")
    return variant


def runs(variant: Variant, target: Target) -> bool:
    """Whether a GPU has the instructions of a variant."""
    if variant.reads_tiles:
        return target.capability == (9, 0)
    return target.at_least(*variant.architecture)


def nearest(entries: Iterable[Entry], m: int, problem: Problem, alike: float) -> Entry | None:
    """The entry for M tokens of a problem, None if nothing like it was timed.

    Sizes may differ by a factor whose logarithm is `alike`. Of more tokens than M the next number
    counts, up to twice as many; above the largest one that, if it is large enough for time to
    be proportional to the tokens.
    """
    close = [entry for entry in entries if entry.distance(problem) < alike]
    if not close:
        return None
    last = max(entry.tokens for entry in close)
    wanted = last if m > last >= _PROPORTIONAL else m
    fit = [entry for entry in close if wanted <= entry.tokens <= 2 * wanted]
    return min(fit, key=lambda entry: (entry.tokens, entry.distance(problem)), default=None)
