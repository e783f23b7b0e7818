from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bars as bars_script
import results_io
from results_io import Bar, Device, command, write_results

REPOSITORY = results_io.ROOT


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(results_io, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with one commit, in the place of ours."""
    monkeypatch.setattr(results_io, "ROOT", tmp_path)
    monkeypatch.delenv("MIXLLM_COMMIT", raising=False)
    (tmp_path / "code.py").write_text("x = 1\n")
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "a.json").write_text("{}\n")
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for args in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *args], cwd=tmp_path, check=True)
    return tmp_path


# Bars


@pytest.mark.parametrize(
    "bar, target, met",
    [
        (Bar.at_most("KL", 0.413, 0.42, se=0.006), "<= 0.42", True),
        (Bar.at_most("KL", 0.42, 0.42), "<= 0.42", True),
        (Bar.at_most("KL", 0.43, 0.42), "<= 0.42", False),
        (Bar.at_least("speed", 1.31, 1.3), ">= 1.3", True),
        (Bar.at_least("speed", 1.29, 1.3), ">= 1.3", False),
        (Bar.exactly("packs per weight", 1, 1), "== 1", True),
        (Bar.exactly("packs per weight", 2, 1), "== 1", False),
    ],
)
def test_a_bar_is_met_or_not(bar, target, met):
    assert (bar.target, bar.met) == (target, met)


@pytest.mark.parametrize("measured", [None, math.nan])
def test_what_was_not_measured_is_not_met(measured):
    assert not Bar.at_most("a", measured, 1.0).met
    assert not Bar.at_least("a", measured, 1.0).met
    assert not Bar.exactly("a", measured, 1.0).met


def test_a_bar_of_numpy_or_torch_scalars_is_a_plain_one(results):
    made = [Bar.at_most("a", np.float32(0.5), 1), Bar.at_least("b", torch.tensor(2.0), 1)]
    written = json.loads(write_results("x", [], made, device="here").read_text())
    assert [(b["measured"], b["met"]) for b in written["bars"]] == [(0.5, True), (2.0, True)]


# The file


def test_the_file_holds_what_the_table_needs(results, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(REPOSITORY / "bench" / "quality.py"), "--bits", "4.4"])
    path = write_results(
        "bench/quality.py",
        rows=[{"plan": "uniform W4", "KL": 0.0078}, {"plan": "mixed", "KL": 0.0033}],
        bars=[Bar.at_most("ratio", 0.423, 0.425, se=0.006), Bar.at_least("top-1", 0.9, 0.8)],
        device="cpu",
        extra={"tokens": 4096},
    )
    content = json.loads(path.read_text())
    assert path == results / f"quality-{Device.cpu().slug}.json"
    keys = ["command", "commit", "device", "versions", "extra", "rows", "bars"]
    assert list(content) == keys
    assert content["command"] == "python bench/quality.py --bits 4.4"
    assert content["device"] == Device.cpu().words
    assert content["versions"].keys() == {"python", "torch", "transformers", "triton", "mixllm"}
    assert content["rows"][1] == {"plan": "mixed", "KL": 0.0033}
    assert content["extra"] == {"tokens": 4096}
    assert content["bars"] == [
        {"name": "ratio", "target": "<= 0.425", "measured": 0.423, "met": True, "se": 0.006},
        {"name": "top-1", "target": ">= 0.8", "measured": 0.9, "met": True},
    ]


def test_each_row_is_one_line(results):
    path = write_results("x", [{"a": i, "b": [1, 2]} for i in range(3)], [], device="here")
    assert '    {"a": 1, "b": [1, 2]},\n' in path.read_text()


def test_numbers_of_all_kinds_become_json(results):
    row = {
        "numpy": np.float64(1.5),
        "array": np.arange(2),
        "torch": torch.tensor(3),
        "nan": math.nan,
        "inf": math.inf,
        "path": REPOSITORY / "bench",
        "bool": np.bool_(True),
        "dtype": torch.bfloat16,
        4: None,
    }
    written = json.loads(write_results("x", [row], [], device="here").read_text())["rows"][0]
    assert written == {
        "numpy": 1.5,
        "array": [0, 1],
        "torch": 3,
        "nan": None,
        "inf": None,
        "path": "bench",
        "bool": True,
        "dtype": "torch.bfloat16",
        "4": None,
    }


def test_a_failed_write_leaves_the_old_file(results, monkeypatch):
    def full_disk(*_):
        raise OSError("no space left")

    path = write_results("x", [{"a": 1}], [], device="here")
    before = path.read_text()
    monkeypatch.setattr(results_io.os, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_results("x", [{"a": 2}], [], device="here")
    assert path.read_text() == before
    assert list(results.iterdir()) == [path]


# The command


@pytest.mark.parametrize(
    "arg, written",
    [
        ("4.4", "4.4"),
        ("{repo}/bench/results", "bench/results"),
        ("{repo}/bench/../tests/bench", "tests/bench"),
        ("{outside}/models/wiki", "wiki"),
        ("--model={outside}/wiki/", "--model=wiki"),
        ("{outside}/a,{outside}/b", "a,b"),
        ("../somewhere/wiki", "wiki"),
        ("~/models/wiki", "wiki"),
        ("some-org/some-model", "some-org/some-model"),
        ("two words", "'two words'"),
    ],
)
def test_the_command_names_no_path_of_this_machine(arg, written, tmp_path):
    arg = arg.format(repo=REPOSITORY, outside=tmp_path)
    assert command([str(REPOSITORY / "bench" / "x.py"), arg]) == f"python bench/x.py {written}"


def test_relative_paths_are_read_from_the_current_folder(monkeypatch):
    monkeypatch.chdir(REPOSITORY / "bench")
    assert (
        command(["x.py", "./bars.py", "../Makefile"]) == "python bench/x.py bench/bars.py Makefile"
    )


# The commit


def test_the_commit_is_clean_until_a_tracked_file_differs(repository):
    clean = results_io.commit()
    (repository / "new.py").write_text("not tracked\n")
    (repository / "bench" / "results" / "a.json").write_text('{"measured": "again"}\n')
    assert len(clean) == 12
    assert results_io.commit() == clean
    (repository / "code.py").write_text("x = 2\n")
    assert results_io.commit() == f"{clean}-dirty"


def test_without_git_the_environment_says_the_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(results_io, "ROOT", tmp_path)
    monkeypatch.delenv("MIXLLM_COMMIT", raising=False)
    assert results_io.commit() == "unknown"
    monkeypatch.setenv("MIXLLM_COMMIT", "0123456789ab")
    assert results_io.commit() == "0123456789ab"


# The device


@pytest.mark.parametrize(
    "words, slug",
    [
        ("2 cores, AVX512-VNNI", "cpu-2-cores-avx512-vnni"),
        ("1 core, arm64", "cpu-1-core-arm64"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
        ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"),
    ],
)
def test_the_slug_of_a_device(words, slug):
    assert Device(words).slug == slug


def test_devices_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Device.of(None) == Device.of("cuda") == Device.of(torch.device("cuda", 0))
    assert Device.of("cuda").slug == "h200"
    assert Device.of(torch.device("cpu")) == Device.of("cpu") == Device.cpu()
    assert Device.of("two H200").words == "two H200"


# The table of all bars


def show(capsys, *args: str) -> str:
    assert bars_script.main(list(args)) == 0
    return capsys.readouterr().out


def test_the_table_shows_met_missed_and_unmeasured_bars(results, capsys):
    made = [
        Bar.at_most("KL [nats]", 0.41312, 0.42, se=0.0061),
        Bar.at_least("speed", 0.5, 1.3),
        Bar.at_least("speed on a GPU", None, 2),
    ]
    write_results("quality", [], made, device="here")
    text = show(capsys, "--results", str(results))
    assert "quality-here" in text
    assert "KL [nats]" in text
    assert "0.41312 ± 0.0061" in text
    assert "NO" in text
    assert "not measured" in text
    assert "1 of 3 bars met" in text


def test_the_table_as_json(results, capsys):
    write_results("quality", [], [Bar.exactly("packs", 1, 1)], device="here")
    [line] = json.loads(show(capsys, "--results", str(results), "--json"))
    assert (line["result"], line["name"], line["met"]) == ("quality-here", "packs", True)


@pytest.mark.parametrize("text", ["not json", "{}", '{"bars": 3, "device": "", "commit": ""}'])
def test_a_broken_file_stays_visible(tmp_path, capsys, text):
    (tmp_path / "broken.json").write_text(text)
    shown = show(capsys, "--results", str(tmp_path))
    assert "unreadable" in shown
    assert "0 of 1 bars met" in shown


def test_no_results_yet(tmp_path, capsys):
    assert "No bars yet" in show(capsys, "--results", str(tmp_path))


def test_the_script_starts_without_torch():
    code = "import sys, bars; sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(bars_script.__file__).parent,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0
