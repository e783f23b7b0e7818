from __future__ import annotations

import os

import pytest
import safetensors.torch
import torch

from mixllm_compiler.errors import OptionError
from mixllm_compiler.formats.files import load_tensors, save_tensors, write_whole

TENSORS = {"a": torch.arange(6, dtype=torch.uint8), "b.weight": torch.ones(2, 3).bfloat16()}


def test_round_trip(tmp_path):
    document = {"name": "Größe", "numbers": [1, 2.5, None]}
    save_tensors(tmp_path / "x", "thing", 1, TENSORS, document)
    tensors, again = load_tensors(tmp_path / "x", "thing", 1)
    assert again == document
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_shared_and_strided_tensors_are_stored_as_they_read(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    save_tensors(tmp_path / "x", "thing", 1, {"t": base.t(), "a": base, "b": base}, {})
    tensors, _ = load_tensors(tmp_path / "x", "thing", 1)
    assert torch.equal(tensors["t"], base.t())
    assert torch.equal(tensors["a"], tensors["b"])


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_tensors(tmp_path / "x", "thing", 1, TENSORS, {})
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_keeps_what_was_there(tmp_path, monkeypatch):
    write_whole(tmp_path / "x", b"old")

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "x", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_a_document_without_infinities_only(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_tensors(tmp_path / "x", "thing", 1, {}, {"loss": float("inf")})
    assert list(tmp_path.iterdir()) == []


def test_wrong_files_are_named_for_what_they_are(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_tensors(path, "plan", 1)
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(OptionError, match="is not a plan file, or it is damaged"):
        load_tensors(path, "plan", 1)
    path.write_bytes(b"")
    with pytest.raises(OptionError, match="is not a plan file, or it is damaged"):
        load_tensors(path, "plan", 1)
    safetensors.torch.save_file(TENSORS, path)
    with pytest.raises(OptionError, match="not a plan file but a safetensors file of another"):
        load_tensors(path, "plan", 1)
    save_tensors(path, "scores", 1, TENSORS, {})
    with pytest.raises(OptionError, match="not a plan file but a mixllm scores file"):
        load_tensors(path, "plan", 1)


def test_a_truncated_file_is_damaged(tmp_path):
    path = tmp_path / "x"
    save_tensors(path, "plan", 1, TENSORS, {})
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(OptionError, match="damaged"):
        load_tensors(path, "plan", 1)


def test_a_newer_version_says_so(tmp_path):
    save_tensors(tmp_path / "x", "plan", 3, {}, {})
    with pytest.raises(OptionError, match="version 3, this mixllm-compiler reads up to version 2"):
        load_tensors(tmp_path / "x", "plan", 2)
