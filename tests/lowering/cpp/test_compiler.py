"""Libraries: built at most once, from flags that name no machine, with torch's own threads."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from mixllm_compiler.errors import LoweringError
from mixllm_compiler.lowering import sources
from mixllm_compiler.lowering.cpp import compiler, isa, launch
from mixllm_compiler.runtime import build

PLAIN = isa.ISAS["plain"]
SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLLM_CACHE_DIR", str(tmp_path))


def test_a_library_is_built_once(monkeypatch):
    assert compiler.library(SOURCE, "answer", PLAIN).answer() == 42
    monkeypatch.setattr(compiler.subprocess, "run", None)  # it would be called
    assert compiler.library(SOURCE, "answer", PLAIN).answer() == 42
    assert {entry.path.suffix for entry in build.status()} == {".cpp", ".so"}


def test_other_flags_are_another_library():
    compiler.library(SOURCE, "answer", PLAIN)
    compiler.library(SOURCE, "answer", PLAIN, extra=("-O1",))
    assert len([entry for entry in build.status() if entry.path.suffix == ".so"]) == 2


def test_without_the_runtime_it_is_built_in_a_folder_of_the_process(monkeypatch):
    monkeypatch.setattr(sources, "_build", sources._build_temporary)
    assert compiler.library(SOURCE + "// alone\n", "answer", PLAIN).answer() == 42
    assert build.status() == []


def test_a_source_that_does_not_compile_is_quoted():
    with pytest.raises(LoweringError, match=r"cannot compile .*answer.*\.cpp:\n.*error"):
        compiler.library("this is no C++\n", "answer", PLAIN)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_kernels_share_torchs_threads():
    launch.quantizer_library(isa.current())
    maps = Path("/proc/self/maps").read_text()
    assert len(set(re.findall(r"\S*/lib[gi]?omp\S*", maps))) == 1
