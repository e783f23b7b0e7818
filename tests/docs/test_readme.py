"""The README does what it says: its examples run as they stand, its links and commands exist."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mixllm_compiler.cli.app import app
from mixllm_compiler.report.results_table import filled

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")
DOCS = sorted(ROOT.glob("docs/*.md"))
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)

# What each example must show that it did, in the order of the README.
SHOWN = [
    [r"mixllm: 14 linears, 4\.\d+ true bits \(asked 4\.40 bits\)"],
    [r"mixllm: 35 linears, 4\.\d+ true bits", r"^The river \w+"],
    [r"^4\.2\d+ bits, loss \+.*\n4\.[45]\d+ bits, .*\n(4\.9|5\.0)\d+ bits, "],
    [r"PackedLinear\(384 → 384, k384 .*two-level"],
    [r"q_proj .*w4:\d+", r"00-captured\.py", r"share-quantizers\.py"],
    [r"model\.layers\.0\.self_attn\.q_proj +384×384 +8\.\d+ .* w8:384"],
]


def installed() -> bool:
    try:
        importlib.metadata.distribution("mixllm-compiler")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SHOWN)))
def test_an_example_runs_as_it_stands(number, tmp_path):
    if not installed():
        pytest.skip("torch finds the backend only if the package is installed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", EXAMPLES[number]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    shown = done.stdout + done.stderr
    assert done.returncode == 0, shown
    for pattern in SHOWN[number]:
        assert re.search(pattern, shown, re.MULTILINE), shown


def test_every_example_is_run():
    assert len(EXAMPLES) == len(SHOWN)


def test_the_first_example_needs_no_import_of_this_package():
    assert 'torch.compile(model, backend="mixllm")' in EXAMPLES[0]
    assert "mixllm_compiler" not in EXAMPLES[0]


def test_the_custom_pass_is_ten_lines():
    example = EXAMPLES[-1]
    custom = example[example.index("@mixllm") : example.index("model, tokenizer")]
    assert len([line for line in custom.splitlines() if line.strip()]) <= 10


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        file, _, anchor = target.partition("#")
        if file.startswith(("http://", "https://")):
            continue
        place = page.parent / file if file else page
        assert place.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", place.read_text("utf-8"), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, target


def slug(heading: str) -> str:
    """The anchor that Git hosts give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda p: p.name)
def test_commands_exist(page):
    verbs = {command.name for command in app.registered_commands}
    named = re.findall(r"`mixllm ([a-z]+)\b", page.read_text("utf-8"))
    assert set(named) <= verbs


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda p: p.name)
def test_the_tables_are_those_of_the_result_files(page):
    text = page.read_text("utf-8")
    command = f"python -m mixllm_compiler.report.results_table {page.relative_to(ROOT)}"
    assert filled(text, ROOT) == text, f"run `{command}`"
