"""The build cache: content-addressed, written once by however many processes."""

from __future__ import annotations

import multiprocessing
import os

import pytest

from mixllm_compiler.errors import LoweringError
from mixllm_compiler.lowering import sources
from mixllm_compiler.runtime import build


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("MIXLLM_NO_BUILD", raising=False)
    return tmp_path / "cache"


def test_the_cache_is_where_the_variable_says(cache):
    assert build.cache_dir() == cache


def test_without_the_variable_it_is_the_users_cache(monkeypatch):
    monkeypatch.delenv("MIXLLM_CACHE_DIR")
    assert build.cache_dir().name == "mixllm"


def test_a_source_is_kept_under_its_content(cache):
    path = build.materialize("x = 1\n", ".py", "triton-linear")
    assert path.read_text() == "x = 1\n"
    assert path.is_relative_to(cache)
    assert path.name.startswith("triton-linear-") and path.suffix == ".py"
    assert build.materialize("x = 1\n", ".py", "triton-linear") == path
    assert build.materialize("x = 2\n", ".py", "triton-linear") != path
    assert build.materialize("x = 1\n", ".py", "triton-linear", depends="nvcc 13") != path


def test_a_source_that_somebody_changed_is_written_again():
    path = build.materialize("x = 1\n", ".py", "t")
    path.write_text("x =")
    assert build.materialize("x = 1\n", ".py", "t").read_text() == "x = 1\n"


def test_a_kept_module_can_be_imported():
    path = build.materialize("def f():\n    return 42\n", ".py", "t")
    assert sources.load(path).f() == 42


def test_no_build_forbids_new_sources_and_allows_known_ones(monkeypatch):
    known = build.materialize("x = 1\n", ".py", "t")
    monkeypatch.setenv("MIXLLM_NO_BUILD", "1")
    assert build.materialize("x = 1\n", ".py", "t") == known
    with pytest.raises(LoweringError, match="MIXLLM_NO_BUILD forbids"):
        build.materialize("x = 2\n", ".py", "t")


def test_a_product_is_built_once():
    built = []

    def compiler(source, product):
        built.append(source)
        product.write_bytes(source.read_bytes().upper())

    first = build.build("abc", ".c", "t", ".so", compiler)
    again = build.build("abc", ".c", "t", ".so", compiler)
    assert first == again and first.suffix == ".so"
    assert first.read_bytes() == b"ABC"
    assert len(built) == 1


def test_a_builder_that_fails_leaves_no_product(cache):
    def compiler(source, product):
        product.write_bytes(b"half")
        raise OSError("no such compiler")

    with pytest.raises(OSError, match="no such compiler"):
        build.build("abc", ".c", "t", ".so", compiler)
    assert [entry.path.suffix for entry in build.status()] == [".c"]
    assert not list(cache.rglob("*.tmp"))


def test_status_lists_what_is_there():
    assert build.status() == []
    path = build.materialize("x = 1\n", ".py", "t")
    [entry] = build.status()
    assert (entry.path, entry.size) == (path, 6)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_writable_says_so(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(LoweringError, match="Set MIXLLM_CACHE_DIR"):
        build.materialize("x = 1\n", ".py", "t")


def test_a_cache_that_is_a_file_says_so(cache):
    cache.write_text("")
    with pytest.raises(LoweringError, match="Set MIXLLM_CACHE_DIR"):
        build.materialize("x = 1\n", ".py", "t")


def _build_slowly(log):
    def compiler(source, product):
        with open(log, "a") as file:
            file.write("built\n")
        product.write_bytes(b"done")

    build.build("shared", ".c", "t", ".so", compiler)


def test_processes_that_want_the_same_product_build_it_once(tmp_path):
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_build_slowly, args=(log,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert log.read_text() == "built\n"
