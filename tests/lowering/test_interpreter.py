"""Runs the tests of `interpreted.py` where Triton interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

NOTHING_RAN = 5


@pytest.mark.parametrize("part", ["linear", "not linear"])
def test_interpreted_kernels(part):
    file = Path(__file__).with_name("interpreted.py")
    plain = ["-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plain, "-k", part, str(file)],
        # The interpreter is numpy on small arrays: more threads only wait for each other.
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    if done.returncode == NOTHING_RAN:
        pytest.skip(done.stdout[-1000:])
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
