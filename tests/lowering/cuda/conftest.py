from __future__ import annotations

import pytest

import mixllm_compiler.runtime  # noqa: F401  it says where tables are, once
from mixllm_compiler.lowering.cuda import dispatch, timed


@pytest.fixture(autouse=True)
def own_tables(tmp_path):
    """Tables that were made on this machine have no say, and those of a test stay its own."""
    before = timed._folder
    timed.use_folder(lambda: tmp_path)
    dispatch.forget()
    yield tmp_path
    timed._folder = before
    dispatch.forget()
