"""What all tests share: golden files, GPU-only tests, and a clean torch for each test."""

from __future__ import annotations

import difflib
import os
import random
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden_ir"
IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ

# torch reads these when it is imported, so they come first.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "inductor"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if IN_WORKER:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# The first example often compiles something, so time says nothing about the code under test.
hypothesis.settings.register_profile("mixllm", deadline=None)
hypothesis.settings.load_profile("mixllm")

if IN_WORKER:
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite tests/golden_ir with what the tests print now; review the difference",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def clean_torch() -> Iterator[None]:
    """Every test starts from the same seeds and leaves no compiled graph to the next one."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Golden:
    """Texts that a person has reviewed: `tests/golden_ir/<name>.txt`."""

    def __init__(self, update: bool) -> None:
        self.update = update

    def check(self, name: str, text: str) -> None:
        """Fail with a diff unless `text` is what the golden file holds."""
        path = GOLDEN / f"{name}.txt"
        shown = f"tests/golden_ir/{name}.txt"
        text = text.rstrip("\n") + "\n"
        if self.update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        cure = "If it is right, run `pytest --update-golden` for this test, review, commit."
        if not path.exists():
            pytest.fail(f"{shown} does not exist. The text is:\n\n{text}\n{cure}", pytrace=False)
        expected = path.read_text(encoding="utf-8")
        if text != expected:
            diff = difflib.unified_diff(
                expected.splitlines(), text.splitlines(), shown, "now", lineterm=""
            )
            pytest.fail("\n".join([f"{shown} differs.", "", *diff, "", cure]), pytrace=False)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(update=request.config.getoption("--update-golden"))


@pytest.fixture
def unguarded() -> None:
    """Outputs of kernels are allocated as always, not watched."""
