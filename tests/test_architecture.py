"""The rules that keep the package readable: imports point one way, files stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mixllm_compiler"

BASE = {"errors", "compat"}
LIBRARY = {
    *("errors", "compat", "frames", "options", "formats", "ir", "transforms", "calibration"),
    *("quantizers", "salience", "allocation", "lowering", "runtime", "modules", "capture"),
    *("passes", "backend"),
}

# Who may import whom, lowest first. "__init__" stands for the package's own lazy names.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "compat": {"errors"},
    "frames": BASE,
    "formats": {"errors"},
    "transforms": {"errors", "formats"},
    "ir": BASE | {"formats", "transforms"},
    "calibration": BASE | {"formats", "ir"},
    "quantizers": BASE | {"formats", "transforms", "calibration"},
    "salience": BASE | {"formats", "ir", "transforms", "calibration", "quantizers"},
    "allocation": BASE | {"formats", "salience"},
    "options": {"errors", "formats", "allocation"},
    "lowering": BASE | {"formats", "ir"},
    "runtime": BASE | {"formats", "ir", "lowering", "allocation"},  # it caches plans by weight
    "modules": BASE | {"formats", "ir", "lowering", "runtime"},
    "capture": BASE | {"options", "formats", "ir", "runtime", "modules"},
    "passes": LIBRARY - {"passes", "backend"},
    "backend": LIBRARY - {"backend"},
    "api": LIBRARY,
    "evaluation": LIBRARY | {"__init__", "api"},
    "integrations": LIBRARY | {"__init__", "api"},
    "report": LIBRARY | {"__init__", "api", "evaluation"},
    "demo": LIBRARY | {"__init__", "api", "evaluation", "report"},
    "cli": LIBRARY | {"__init__", "api", "evaluation", "integrations", "report", "demo"},
}
LAZY = LIBRARY | {"api"}  # what the package's own __init__ may name


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def unit_of(path: Path) -> str:
    """The top-level module or subpackage that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_units(path: Path) -> Iterator[tuple[int, str]]:
    """(line, unit) for each import from this package, also inside functions and type checks."""
    here = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            targets = [(*module, alias.name) for alias in node.names]
        else:
            continue
        for root, *rest in targets:
            if root == PACKAGE.name and rest != ["__version__"]:
                yield node.lineno, rest[0] if rest and rest[0] in MAY_IMPORT else "__init__"


def test_every_module_has_its_place_in_the_table():
    units = {unit_of(path) for path in python_files()} - {"__init__", "__main__"}
    assert units <= MAY_IMPORT.keys(), "say in MAY_IMPORT what the new module may import"


def test_the_table_itself_has_no_cycle():
    graph = networkx.DiGraph([(a, b) for a, allowed in MAY_IMPORT.items() for b in allowed])
    graph.remove_nodes_from(["__init__"])
    assert networkx.is_directed_acyclic_graph(graph)


def test_imports_point_one_way():
    wrong = []
    for path in python_files():
        unit = unit_of(path)
        allowed = LAZY if unit == "__init__" else MAY_IMPORT.get(unit, set()) | {unit}
        wrong += [
            f"{path.relative_to(ROOT)}:{line}: {unit} must not import {target}"
            for line, target in imported_units(path)
            if unit != "__main__" and target not in allowed
        ]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "source, units",
    [
        ("from ..ir import ops", ["ir"]),
        ("from .. import errors, __version__", ["errors"]),
        ("from . import base", ["passes"]),
        ("from .base import Pass", ["passes"]),
        ("import mixllm_compiler.api as api", ["api"]),
        ("from mixllm_compiler.cli import main", ["cli"]),
        ("from mixllm_compiler import Plan", ["__init__"]),
        ("def f():\n    from ..backend import mixllm", ["backend"]),
        ("import torch.ir\nfrom collections import abc", []),
    ],
)
def test_the_import_reader_reads(source, units, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "mixllm_compiler" / "passes" / "some_pass.py"
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert [unit for _, unit in imported_units(path)] == units


@pytest.mark.parametrize("name", ["passes", "lowering", "runtime"])
def test_top_level_links_lead_into_the_package(name):
    link = ROOT / name
    assert link.is_symlink()
    assert link.readlink() == Path("mixllm_compiler") / name
    assert link.is_dir()


def test_importing_the_package_costs_no_torch():
    code = (
        "import sys, mixllm_compiler\n"
        "heavy = {'torch', 'transformers', 'triton', 'numpy', 'networkx'} & sys.modules.keys()\n"
        "sys.exit(f'imported: {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_file_is_longer_than_600_lines():
    files = [p for p in PACKAGE.rglob("*") if p.suffix in {".py", ".jinja", ".cpp", ".cu", ".h"}]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text("utf-8").splitlines()) for p in files}
    assert {name: n for name, n in lengths.items() if n > 600} == {}
