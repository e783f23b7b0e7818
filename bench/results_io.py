"""How every bench writes what it measured: one JSON file per script and device.

    from results_io import Bar, write_results

    write_results(
        __file__,
        rows=[{"plan": "uniform W4", "true bits": 4.156, "KL": 0.0078}, …],
        bars=[Bar.at_most("KL of the default plan at 4.156 bits", measured=0.0033, limit=0.0034)],
    )

`make bars` prints the bars of all these files as one table.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixllm_compiler import __version__ as mixllm_version

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"

PACKAGES = ["torch", "transformers", "triton"]

# What decides the speed of int8 arithmetic, best first: (flag of /proc/cpuinfo, how we write it).
CPU_FEATURES = [
    ("amx_int8", "AMX-INT8"),
    ("avx512_vnni", "AVX512-VNNI"),
    ("avx_vnni", "AVX-VNNI"),
    ("avx512f", "AVX512"),
    ("avx2", "AVX2"),
    ("i8mm", "I8MM"),
    ("asimddp", "DOTPROD"),
]


@dataclass(frozen=True)
class Bar:
    """One thing that had to be reached, and whether it was.

    `measured` is None where the bench could not measure it here; such a bar is not met.
    """

    name: str
    target: str
    measured: float | None
    met: bool
    se: float | None = None

    @classmethod
    def at_most(
        cls, name: str, measured: float | None, limit: float, se: float | None = None
    ) -> Bar:
        """Met where the measured value is at most `limit`."""
        met = measured is not None and bool(measured <= limit)
        return cls(name, f"<= {limit:.6g}", measured, met, se)

    @classmethod
    def at_least(
        cls, name: str, measured: float | None, limit: float, se: float | None = None
    ) -> Bar:
        """Met where the measured value is at least `limit`."""
        met = measured is not None and bool(measured >= limit)
        return cls(name, f">= {limit:.6g}", measured, met, se)

    @classmethod
    def exactly(cls, name: str, measured: float | None, expected: float) -> Bar:
        """Met where the measured value is `expected`: counts, mostly."""
        return cls(name, f"== {expected:.6g}", measured, bool(measured == expected))


@dataclass(frozen=True)
class Device:
    """Where a bench ran: in words for a reader, as a slug for the file's name."""

    words: str

    @property
    def slug(self) -> str:
        """`NVIDIA H200` is `h200`; `2 cores, AVX512-VNNI` is `cpu-2-cores-avx512-vnni`."""
        words = re.sub(r"^NVIDIA ", "", self.words)
        if re.match(r"\d+ cores?\b", words):
            words = f"cpu {words}"
        return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")

    @classmethod
    def cpu(cls) -> Device:
        """The cores this process may use and the best int8 instructions they have."""
        try:
            cores = len(os.sched_getaffinity(0))
        except AttributeError:  # not on this system
            cores = os.cpu_count() or 1
        try:
            flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
        except OSError:
            flags = set()
        feature = next((words for flag, words in CPU_FEATURES if flag in flags), None)
        plural = "core" if cores == 1 else "cores"
        return cls(f"{cores} {plural}, {feature or platform.machine() or 'unknown'}")

    @classmethod
    def gpu(cls) -> Device:
        """The current CUDA device."""
        import torch

        return cls(torch.cuda.get_device_name())

    @classmethod
    def of(cls, device: object) -> Device:
        """From `"cpu"`, `"cuda"`, a torch.device, or words of the caller's own.

        None is the GPU where there is one, else the CPU.
        """
        if isinstance(device, Device):
            return device
        if device is None:
            import torch

            device = "cuda" if torch.cuda.is_available() else "cpu"
        kind = str(device)
        if kind == "cpu":
            return cls.cpu()
        return cls.gpu() if re.fullmatch(r"cuda(:\d+)?", kind) else cls(kind)


def write_results(
    script: str | Path,
    rows: Iterable[Mapping[str, Any]],
    bars: Iterable[Bar],
    device: object = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write `bench/results/<script>-<device>.json` in one step, and return its path.

    `script` is the bench's `__file__` or its bare name. `device` is "cpu", "cuda", a torch.device
    or words of your own; by default the GPU where there is one, else the CPU. Numbers that are not
    finite are written as null. The command is written without the paths of this machine.
    """
    where = Device.of(device)
    content = {
        "command": command(sys.argv),
        "commit": commit(),
        "device": where.words,
        "versions": versions(),
        **({"extra": _plain(extra)} if extra else {}),
        "rows": _plain(list(rows)),
        "bars": [_bar_entry(bar) for bar in bars],
    }
    path = RESULTS / f"{Path(script).stem}-{where.slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(_render(content), encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def command(argv: Sequence[str]) -> str:
    """The command as one would type it in the repository: `python bench/quality.py --bits 4.4`."""
    script, *args = argv
    return shlex.join(["python", _portable_path(script), *(_portable(arg) for arg in args)])


def commit() -> str:
    """The commit that was measured, with `-dirty` when tracked files differ from it.

    Results do not count: a bench that ran a minute ago changes nothing that is measured. Where
    files were copied without their history, the environment variable MIXLLM_COMMIT says it.
    """
    if told := os.environ.get("MIXLLM_COMMIT"):
        return told
    head = _git("rev-parse", "HEAD")
    if head is None:
        return "unknown"
    changed = _git("status", "--porcelain", "-uno", "--", ".", ":(exclude)bench/results")
    return f"{head[:12]}-dirty" if changed else head[:12]


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that decide the result; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found | {"mixllm": mixllm_version}


def _git(*args: str) -> str | None:
    """Git's answer about this repository, or None where there is no git or no commit."""
    if not (ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _portable(arg: str) -> str:
    """`arg` with the paths in it made portable; words and names of models on a hub stay."""
    parts = re.split(r"([=,:])", arg)
    return "".join(_portable_path(part) if _is_local_path(part) else part for part in parts)


def _is_local_path(text: str) -> bool:
    return "/" in text and (text.startswith(("/", ".", "~")) or Path(text).exists())


def _portable_path(path: str | Path) -> str:
    """Relative to the repository, or, outside of it, only the last part."""
    path = Path(path).expanduser().resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def _bar_entry(bar: Bar) -> dict[str, Any]:
    entry: dict[str, Any] = _plain(dataclasses.asdict(bar))
    if entry["se"] is None:
        del entry["se"]
    return entry


def _plain(value: Any) -> Any:
    """`value` as JSON knows it: dataclasses, paths, scalars of numpy and torch, NaN.

    Anything else becomes its text: a long bench must not fail when it writes.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return _portable_path(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str | int | float | None):
        return value
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def _render(content: Mapping[str, Any]) -> str:
    """JSON with one line for each key, row and bar, so that a changed number is a short diff."""
    entries = []
    for key, value in content.items():
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        if isinstance(value, list) and value:
            lines = [json.dumps(item, ensure_ascii=False, allow_nan=False) for item in value]
            text = "[\n    " + ",\n    ".join(lines) + "\n  ]"
        entries.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"
