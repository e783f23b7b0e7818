"""An interrupted scoring run goes on where it was, and only that run."""

from __future__ import annotations

import pytest
import torch

import mixllm_compiler
from mixllm_compiler.errors import OptionError
from mixllm_compiler.salience.scores import Scores
from tests.helpers import token_ids
from tests.models.support import build

IDS = token_ids(2, 40)


class Interrupted(Exception):
    pass


def interrupted_after(steps: int):
    def progress(done: int, of: int) -> None:
        if done == steps:
            raise Interrupted

    return progress


@pytest.mark.parametrize("kind", ["kfac", "paper"])
def test_a_resumed_run_gives_the_same_scores_with_fewer_steps(kind, tmp_path):
    path = tmp_path / "partial"
    model = build("llama", num_hidden_layers=3)
    given = {"kind": kind, "widths": (3, 8)}
    expected = mixllm_compiler.score(model, IDS, **given)
    with pytest.raises(Interrupted):  # 4 steps forward, 6 back: one block is done after the sixth
        mixllm_compiler.score(model, IDS, **given, resume=path, progress=interrupted_after(7))
    seen = []
    found = mixllm_compiler.score(
        model, IDS, **given, resume=path, progress=lambda *at: seen.append(at)
    )
    assert len(seen) == 6  # one block forward, two back
    assert (found.tokens, found.sequences) == (expected.tokens, expected.sequences)
    assert found.settings == expected.settings
    for name in expected.loss:
        torch.testing.assert_close(found.loss[name], expected.loss[name], rtol=1e-4, atol=0)
        torch.testing.assert_close(
            found.curvature[name], expected.curvature[name], rtol=1e-4, atol=0
        )
    found.save(path)
    assert Scores.load(path).diff(found) == ""


def test_a_finished_run_needs_no_second_one(tmp_path):
    model, path = build("llama"), tmp_path / "partial"
    first = mixllm_compiler.score(model, IDS, resume=path)
    seen = []
    again = mixllm_compiler.score(model, IDS, resume=path, progress=lambda *at: seen.append(at))
    assert seen == [] and first.diff(again) == ""


def test_a_file_of_another_run_is_refused(tmp_path):
    model, path = build("llama"), tmp_path / "partial"
    mixllm_compiler.score(model, IDS, resume=path)
    before = path.read_bytes()
    for changed, difference in (
        (lambda: mixllm_compiler.score(model, IDS + 1, resume=path), "data differ"),
        (lambda: mixllm_compiler.score(model, IDS, resume=path, seed=1), "kind differ"),
        (lambda: mixllm_compiler.score(model, IDS, resume=path, widths=(3,)), "formats differ"),
        (lambda: mixllm_compiler.score(build("llama", 1), IDS, resume=path), "model differ"),
    ):
        with pytest.raises(OptionError, match=f"another scoring run: {difference}"):
            changed()
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["hessian", "weight-error"])
def test_only_kinds_with_gradients_can_be_resumed(kind, tmp_path):
    with pytest.raises(OptionError, match=f"kind '{kind}' cannot be resumed"):
        mixllm_compiler.score(build("llama"), IDS, kind=kind, resume=tmp_path / "partial")
