from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mixllm_compiler.cli.app import app
from tests.helpers import causal_lm


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Lines are not wrapped, and what a verb writes does not land in the repository."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def mixllm() -> Callable[..., Any]:
    """Runs the command; its result has exit_code, stdout and stderr."""
    runner = CliRunner()

    def run(*arguments: object) -> Any:
        return runner.invoke(app, [str(a) for a in arguments])

    return run


@pytest.fixture
def answer(mixllm: Callable[..., Any]) -> Callable[..., Any]:
    """Runs the command with --json and reads its standard output."""

    def run(*arguments: object) -> Any:
        result = mixllm(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return run


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama and no tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    causal_lm("llama").save_pretrained(folder)
    return folder
