"""The demonstration, in its quick form: everything happens, only not at length."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mixllm_compiler.cli.app import app
from mixllm_compiler.demo.run import FLOAT, MIXED, UNIFORM, Line
from mixllm_compiler.demo.table import comparison, slower
from mixllm_compiler.evaluation.speed import Speed

FAST = Speed(1000.0, 100.0, 1.0, (), ())
SLOW = Speed(500.0, 20.0, 1.0, (), ())
LINE = Line("float", 16, 32, 2e6, 10.0, speed=FAST)


@pytest.mark.slow
def test_the_quick_demonstration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["demo", "--quick", "--json", "--bits", "4.5"])
    assert result.exit_code == 0, result.output
    assert "✓ scoring every output feature" in result.stderr
    found = json.loads(result.stdout)
    lines = {line["name"]: line for line in found["models"]}
    assert list(lines) == [FLOAT, UNIFORM, MIXED]
    assert 4.45 < lines[MIXED]["bits"] <= 4.5 < lines[MIXED]["resident"]
    assert lines[MIXED]["kl"] < lines[UNIFORM]["kl"]
    assert lines[MIXED]["stored"] < lines[FLOAT]["stored"] / 2
    assert all(lines[name]["speed"]["decode"] > 0 for name in (FLOAT, MIXED))
    assert found["texts"][FLOAT] and found["texts"][MIXED]
    folder = tmp_path / "mixllm-demo"
    assert (folder / "plan.safetensors").is_file()
    assert len(list((folder / "ir").glob("graph*/00-captured.py"))) >= 3


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "taken").touch()
    result = CliRunner().invoke(app, ["demo", "--quick", "--out", str(tmp_path / "taken")])
    assert result.exit_code == 1
    assert "is a file" in result.stderr


def test_slower_than_float_is_said_in_words():
    (said,) = slower(LINE, replace(LINE, speed=SLOW), {"reference"})
    assert "2.0x slower in prefill and 5.0x slower in decode" in said
    assert "reference implementation" in said


def test_faster_than_float_needs_no_excuse():
    assert slower(replace(LINE, speed=SLOW), replace(LINE, speed=FAST), {"reference"}) == []


def test_the_table_is_whole_in_80_columns():
    line = replace(LINE, name="uniform 4 bits", kl=0.1498, kl_error=0.0021, top1=0.791)
    fast = replace(FAST, prefill=129_846.0, decode=1532.0)
    console = Console(width=80)
    with console.capture() as shown:
        console.print(comparison([replace(line, resident=32.0, speed=fast)]))
    assert "…" not in shown.get() and "129,846" in shown.get()


def test_what_was_not_measured_is_a_dash():
    console = Console(width=120)
    with console.capture() as shown:
        console.print(comparison([replace(LINE, speed=None, resident=None)]))
    assert shown.get().count("–") == 5
