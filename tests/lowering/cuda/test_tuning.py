"""Tables of the fastest variants: made by a timer that only pretends, read, damaged, preferred."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from mixllm_compiler.errors import LoweringError, OptionError
from mixllm_compiler.formats.layout import Layout
from mixllm_compiler.lowering.cuda import dispatch, timed, timing, tuning
from mixllm_compiler.lowering.cuda.cost import Problem
from mixllm_compiler.lowering.cuda.variants import Variant
from mixllm_compiler.lowering.target import Target
from mixllm_compiler.report.health import kernel_table

H200 = Target.parse("cuda sm_90 NVIDIA H200")
H100 = Target.parse("cuda sm_90 NVIDIA H100")
A100 = Target.parse("cuda sm_80 NVIDIA A100")
O_PROJ = Layout(4096, ((4, 4096),), 128, "two-level", "cuda64.v1")


class Timer:
    """Says that the variant named `fast` takes 1 µs and all others 2; may break down."""

    def __init__(self, fast="", breaks_at=None):
        self.fast, self.breaks_at, self.asked = fast, breaks_at, []

    def __call__(self, matrix, m, variants):
        self.asked.append((m, *matrix.size))
        if len(self.asked) == self.breaks_at:
            raise KeyboardInterrupt
        return {v: 1.0 if str(v) == self.fast else 2.0 for v in variants}


def run(timer, target=H100, shapes=((64, 32), (16, 32)), tokens=(1, 8, 64), **more):
    path = timed.path_of(target)
    matrices = [tuning.mixed(*shape) for shape in shapes]
    return list(tuning.tune(matrices, tokens, target, 132, timer, path, **more))


def chosen(m, target=H100, layout=O_PROJ):
    return str(dispatch.choose(m, layout, target, 132))


def test_the_fastest_is_chosen_from_then_on():
    assert chosen(1) != "decode:1,4,8,1"
    done = []
    made = run(Timer("decode:1,4,8,1"), progress=lambda *numbers: done.append(numbers))
    assert made == [(m, *shape) for shape in ((64, 32), (16, 32)) for m in (1, 8, 64)]
    assert done == [(i, 6) for i in range(7)]
    assert chosen(1) == chosen(8) == "decode:1,4,8,1"


def test_as_good_as_the_fastest_the_cost_models_choice_stays():
    run(Timer())
    for m in (1, 8, 64):
        problem = Problem.of(tuning.mixed(64, 32).layout)
        assert chosen(m) == str(dispatch.by_cost(m, problem, H100, 132))


def test_what_was_timed_before_it_broke_off_is_kept_and_not_timed_again():
    with pytest.raises(KeyboardInterrupt):
        run(Timer(breaks_at=4))
    first = timed.read(timed.path_of(H100), H100)
    assert [key[1:] for key in sorted(first.best)] == [(64, 32)] * 3
    rest = Timer()
    run(rest)
    assert rest.asked == [(m, 16, 32) for m in (1, 8, 64)]
    assert timed.read(timed.path_of(H100), H100).times.keys() >= first.times.keys()
    done = []
    assert run(Timer(), progress=lambda *numbers: done.append(numbers)) == []
    assert done == [(6, 6)]


def test_again_times_everything_again():
    run(Timer("decode:1,4,8,1"))
    again = Timer("decode:1,2,8,2")
    assert len(run(again, again=True)) == len(again.asked) == 6
    assert chosen(1) == "decode:1,2,8,2"


def test_this_machines_table_goes_before_the_shipped_one_where_it_has_something():
    before = {m: chosen(m, H200) for m in (1, 8, 64, 4096)}
    other = "decode:1,4,4,1" if before[1] == "decode:1,1,4,4" else "decode:1,1,4,4"
    path = timed.path_of(H200)
    timed.Table("NVIDIA H200", best={(1, 64, 32): Variant.parse(other)}).save(path)
    dispatch.forget()
    assert chosen(1, H200) == other
    assert {m: chosen(m, H200) for m in (8, 64, 4096)} == {m: before[m] for m in (8, 64, 4096)}
    assert Variant.parse(other) in dispatch.shipped(H200)


def test_a_table_of_few_tokens_says_nothing_about_many():
    run(Timer("decode:1,4,8,1"), tokens=(1,))
    for m in (2, 3, 9, 64, 4096):
        assert chosen(m) == str(dispatch.by_cost(m, Problem.of(O_PROJ), H100, 132))


def test_above_many_tokens_the_last_entry_decides():
    run(Timer("prefill:256,3,8"), tokens=(2048,))
    assert chosen(100_000) == chosen(2048) == chosen(1024) == "prefill:256,3,8"


@pytest.mark.parametrize(
    "content, why",
    [
        ("", "Expecting value"),
        ("[]", "no attribute"),
        ('{"entries": [[1, 64, 32]]}', "unpack"),
        ('{"entries": [[0, 64, 32, "decode:1,2,8,2"]]}', "0 is no size"),
        ('{"entries": [[1, 64, 32, "fastest"]]}', "is no variant"),
        ('{"entries": [[9, 64, 32, "decode:1,2,8,2"]]}', "computes 8 tokens, not 9"),
        ('{"device": "NVIDIA H200", "entries": []}', "it is of 'NVIDIA H200'"),
        ('{"times": [{"tokens": 1, "tiles": 1, "groups": 1, "us": {"x": 0}}]}', "above zero"),
    ],
)
def test_a_damaged_table_is_named_and_does_not_stop_a_run(content, why, own_tables, caplog):
    path = own_tables / "nvidia-h100.json"
    path.write_text(content)
    with pytest.raises(OptionError, match="mixllm tune") as error:
        run(Timer())
    assert str(path) in str(error.value) and why in str(error.value)
    dispatch.forget()
    with caplog.at_level(logging.WARNING, logger="mixllm_compiler.lowering"):
        assert chosen(1) == str(dispatch.by_cost(1, Problem.of(O_PROJ), H100, 132))
    assert str(path) in caplog.text
    assert run(Timer(), again=True)


def test_variants_of_another_generation_are_refused():
    best = {(64, 64, 32): Variant.parse("middle:64,6,2,0,2,1,2")}
    timed.Table("NVIDIA A100", best=best).save(timed.path_of(A100))
    with pytest.raises(OptionError, match="sm_80 cannot run middle"):
        timed.read(timed.path_of(A100), A100)


def test_who_reads_while_it_is_written_sees_a_whole_table(own_tables, monkeypatch):
    run(Timer(), tokens=(1,))
    whole = (own_tables / "nvidia-h100.json").read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mixllm_compiler.formats.files.os.fsync", full_disk)
    with pytest.raises(LoweringError, match=r"cannot write the table .* MIXLLM_CACHE_DIR"):
        run(Timer(), tokens=(1, 8))
    assert [p.name for p in own_tables.iterdir()] == ["nvidia-h100.json"]
    assert (own_tables / "nvidia-h100.json").read_bytes() == whole


def test_a_problem_that_nothing_runs_is_an_error():
    with pytest.raises(LoweringError, match="no variant runs 1 tokens of layout 'k4096"):
        run(lambda *_: {})


def test_a_table_is_read_as_it_was_written():
    run(Timer("decode:1,4,8,1"), made_by="1.2.3")
    table = timed.read(timed.path_of(H100), H100)
    assert (table.device, table.made_by) == ("NVIDIA H100", "1.2.3")
    assert table.times[1, 64, 32]["decode:1,4,8,1"] == 1.0
    content = json.loads(timed.path_of(H100).read_text())
    assert [1, 64, 32, "decode:1,4,8,1"] in content["entries"]


def test_shapes_that_a_table_takes_for_the_same_are_tuned_once():
    sizes = [(64, 32), (65, 32), (448, 32), (64, 112), (64, 32)]
    kept = tuning.unlike(tuning.mixed(*size) for size in sizes)
    assert [matrix.size for matrix in kept] == [(448, 32), (64, 112), (64, 32)]


@pytest.mark.parametrize("tiles", [1, 5, 16, 448])
def test_a_mixed_matrix_has_its_size_and_scatters_widths_over_windows_only(tiles):
    matrix = tuning.mixed(tiles, 8)
    assert matrix.size == (tiles, 8) and len(matrix.widths) == 64 * tiles
    assert dict(matrix.layout.widths) == {b: 64 * n for b, n in tuning.row_counts(tiles).items()}
    for window in matrix.widths.split(tuning.WINDOW):
        _, counts = window.unique(return_counts=True)
        assert (counts % 64 == 0).all()


def test_random_rows_are_legal_codes():
    widths = tuning.mixed(6, 2).widths
    weight = timing.random_weight(widths, 200, "cpu")
    weight.check()
    assert torch.equal(weight.widths, widths)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_without_a_gpu_tuning_says_so():
    with pytest.raises(LoweringError, match="there is no CUDA device"):
        timing.available()


def test_doctor_names_the_table_in_use():
    assert kernel_table(H100).state == "none" and "mixllm tune" in kernel_table(H100).detail
    assert "shipped" in kernel_table(H200).detail
    run(Timer())
    found = kernel_table(H100)
    assert found.state == "ok" and f"6 problems timed here, {timed.path_of(H100)}" in found.detail
    timed.path_of(H100).write_text("{")
    assert kernel_table(H100).state == "none" and "Delete it" in kernel_table(H100).detail
