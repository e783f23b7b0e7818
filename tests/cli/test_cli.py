"""The command's own manners: help, exit codes, messages, JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mixllm_compiler.cli.verb import mendable_error, message
from mixllm_compiler.errors import OptionError

VERBS = ["demo", "compile", "generate", "tune", "score", "plan", "inspect", "explain"]
VERBS += ["passes", "doctor"]


def test_help_lists_every_verb(mixllm):
    result = mixllm("--help")
    assert result.exit_code == 0
    assert all(verb in result.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verbs_help_has_examples_and_the_common_options(mixllm, verb):
    shown = mixllm(verb, "--help").stdout
    assert f"$ mixllm {verb}" in shown
    assert "--json" in shown and "--debug" in shown


def test_help_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from mixllm_compiler.cli import main\n"
        "sys.argv = ['mixllm', '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit:\n"
        "    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & sys.modules.keys()\n"
        "sys.exit(f'imported: {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_version(mixllm):
    assert mixllm("--version").stdout.startswith("mixllm-compiler ")


def test_a_wrong_option_is_a_usage_error(mixllm):
    assert mixllm("inspect", "demo", "--bitss", "4").exit_code == 2


def test_a_missing_argument_is_a_usage_error(mixllm):
    assert mixllm("compile").exit_code == 2


def test_an_error_is_one_message_without_a_traceback(mixllm):
    result = mixllm("inspect", "./nowhere")
    assert result.exit_code == 1
    assert result.stderr.strip() == "mixllm: there is no model folder './nowhere'"
    assert result.stdout == ""


def test_debug_shows_the_traceback(mixllm):
    result = mixllm("inspect", "./nowhere", "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr and "UnsupportedModel" in result.stderr


def test_a_missing_file_is_named(mixllm):
    result = mixllm("plan", "scores.safetensors")
    assert result.exit_code == 1
    assert "scores.safetensors" in result.stderr and "Traceback" not in result.stderr


def test_an_error_behind_another_is_the_one_that_is_told():
    wrapped = RuntimeError("backend='mixllm' raised: …")
    wrapped.__cause__ = OptionError("unknown option 'bit'. Did you mean 'bits'?")
    assert message(wrapped) == "unknown option 'bit'. Did you mean 'bits'?"


def test_an_error_of_our_own_asks_for_a_report():
    assert mendable_error(ZeroDivisionError("x")) is None
    assert "internal error: ZeroDivisionError" in message(ZeroDivisionError("x"))


def test_passes_are_listed_with_their_facts(answer):
    passes = {p["name"]: p for p in answer("passes")["passes"]}
    allocate = passes["allocate-bits"]
    assert (allocate["stage"], allocate["requires"], allocate["ensures"]) == (
        *("plan", ["scored"], ["planned"]),
    )
    assert all(p["summary"] and p["summary"] != "(not documented)" for p in passes.values())


def test_the_spec_reads_back(mixllm):
    from mixllm_compiler.passes.pipeline import default_pipeline, parse

    text = mixllm("passes", "--spec").stdout.strip()
    assert parse(text).names() == default_pipeline().names()


def test_a_registered_pass_is_listed_where_it_runs(answer):
    from mixllm_compiler.passes.registry import register_pass, unregister_pass

    @register_pass(after="annotate-linears", name="look-around")
    def look_around(gm):
        """Look at the graph."""

    try:
        found = answer("passes")["passes"]
    finally:
        unregister_pass("look-around")
    names = [p["name"] for p in found]
    at = names.index("look-around")
    assert names[at - 1] == "annotate-linears"
    assert found[at]["summary"] == "Look at the graph."


def test_doctor_finds_what_the_tests_need(answer):
    checks = {c["name"]: c["state"] for c in answer("doctor")["checks"]}
    assert checks["torch"] == checks["torch's private interfaces"] == checks["CPU"] == "ok"


def test_doctor_fails_where_something_is_missing(mixllm, monkeypatch):
    from mixllm_compiler import compat
    from mixllm_compiler.compat import IncompatibleTorch

    def gone():
        raise IncompatibleTorch("this torch lacks install_guard")

    monkeypatch.setattr(compat, "self_test", gone)
    result = mixllm("doctor", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False
