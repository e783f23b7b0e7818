from __future__ import annotations

import os

import pytest
import torch

from mixllm_compiler.errors import OptionError, WeightError
from mixllm_compiler.formats.files import save_tensors
from mixllm_compiler.formats.fingerprint import fingerprint
from mixllm_compiler.formats.row_format import RowFormat
from mixllm_compiler.salience.scores import VERSION, Scores

Q, UP = "model.layers.0.q_proj.weight", "model.layers.1.q_proj.weight"
FORMATS = (RowFormat(3), RowFormat(4), RowFormat(8))


def make(change=None, **fields) -> Scores:
    """Scores of two 4×128 matrices; `change(loss)` runs before they are checked."""
    draw = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(4, 128, generator=draw) for name in (Q, UP)}
    loss = {name: torch.rand(4, 3, generator=draw) for name in weights}
    if change is not None:
        change(loss)
    given = {
        "kind": "fisher-sequence",
        "formats": FORMATS,
        "loss": loss,
        "shapes": dict.fromkeys(loss, (4, 128)),
        "fingerprint": fingerprint(weights),
        "tokens": 2048,
        "sequences": 2,
        "settings": {"data": "self", "seed": "0"},
        **fields,
    }
    return Scores(**given)


def setting(name, at, value):
    def change(loss):
        loss[name][at] = value

    return change


def test_save_and_load(tmp_path):
    scores = make(setting(UP, (2, 0), float("inf")), siblings={Q: "qk", UP: "qk"})
    scores.save(tmp_path / "scores")
    again = Scores.load(tmp_path / "scores")
    for field in (
        "kind",
        "formats",
        "shapes",
        "tokens",
        "sequences",
        "settings",
        "group",
        "siblings",
    ):
        assert getattr(again, field) == getattr(scores, field), field
    assert again.fingerprint == scores.fingerprint
    assert list(again.loss) == [Q, UP]
    assert all(torch.equal(again.loss[name], scores.loss[name]) for name in scores.loss)
    assert again.diff(scores) == ""


def test_a_file_from_before_siblings_has_none(tmp_path):
    scores = make()
    save_tensors(
        tmp_path / "old",
        "scores",
        VERSION,
        scores.loss,
        {
            "kind": scores.kind,
            "formats": [str(f) for f in scores.formats],
            "shapes": {name: list(shape) for name, shape in scores.shapes.items()},
            "fingerprint": scores.fingerprint.to_json(),
            "tokens": scores.tokens,
            "sequences": scores.sequences,
            "settings": dict(scores.settings),
        },
    )
    assert Scores.load(tmp_path / "old").siblings == {}


def test_an_interrupted_save_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        make().save(tmp_path / "scores")
    assert list(tmp_path.iterdir()) == []


def test_loading_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("not scores")
    with pytest.raises(OptionError, match="is not a scores file, or it is damaged"):
        Scores.load(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError):
        Scores.load(tmp_path / "nothing")


@pytest.mark.parametrize("value", [float("nan"), -1e-9, float("-inf")])
def test_a_score_that_is_none_names_matrix_row_and_format(value):
    with pytest.raises(WeightError, match=rf"the score of {UP}, row 2, w4 g128 asym is .*fp16"):
        make(setting(UP, (2, 1), value))


def test_infinity_forbids_a_format_but_never_all():
    assert make(setting(Q, (1, 0), float("inf"))).loss[Q][1, 0] == float("inf")
    with pytest.raises(WeightError, match=f"row 1 of {Q} has an infinite score in every format"):
        make(setting(Q, 1, float("inf")))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"formats": ()}, "at least one format"),
        ({"formats": (FORMATS[0],) * 3}, "each one once"),
        ({"formats": (RowFormat(3, 64), *FORMATS[1:])}, "share one family and groups of 128"),
        ({"group": 64}, "share one family and groups of 64"),
        ({"formats": FORMATS[:2]}, r"are torch.float32 \[4, 3\], not float32 \[4, 2\]"),
        ({"shapes": {Q: (4, 128)}}, f"name other matrices: {UP}"),
        ({"siblings": {"q": "qkv"}}, "q has siblings but no scores"),
        ({"shapes": {Q: (4, 64), UP: (4, 128)}}, r"is \[4, 64\], its fingerprint says \(4, 128\)"),
    ],
)
def test_what_does_not_fit_together(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


def test_siblings_share_their_input():
    weights = {Q: torch.zeros(4, 128), UP: torch.zeros(4, 64)}
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    with pytest.raises(
        ValueError, match=rf"{Q} \[4, 128\] and {UP} \[4, 64\] cannot read the same"
    ):
        make(fingerprint=fingerprint(weights), shapes=shapes, siblings=dict.fromkeys(weights, "x"))


def test_widths_and_family():
    assert (make().widths, make().family) == ((3, 4, 8), "asym")


def test_summary_shows_alike_matrices_together():
    lines = make().summary().splitlines()
    assert lines[0].startswith("scores fisher-sequence: 2,048 tokens in 2 sequences, 2 matrices")
    assert lines[1] == "data self, seed 0"
    assert lines[2].startswith("nats per token, all rows in ")
    assert lines[2].split()[-4:] == ["matrices", "w3", "w4", "w8"]
    assert lines[3].split()[:2] == ["model.layers.*.q_proj.weight", "2"]
    assert lines[-1].split()[:2] == ["all", "2"]


def test_diff_names_what_changed():
    other = make(setting(UP, (0, 1), 7.0), tokens=4096, settings={"data": "wiki", "seed": "0"})
    text = make().diff(other)
    assert "tokens: 2048 → 4096" in text
    assert "data: self → wiki" in text
    assert "seed" not in text
    assert UP in text and Q not in text


def test_diff_of_other_matrices_and_formats():
    mine = make()
    loss = {Q: mine.loss[Q][:, 1:].clone()}
    other = make(loss=loss, shapes={Q: (4, 128)}, formats=FORMATS[1:])
    text = mine.diff(other)
    assert "widths: (3, 4, 8) → (4, 8)" in text
    assert f"{UP}: only in the first" in text
    assert f"{Q}:" not in text  # equal where both have a format
