"""What a run leaves behind for people: dumps, logs, traces, records."""

from __future__ import annotations

import logging

import pytest
import torch

from mixllm_compiler import Pass, compat, register_pass
from mixllm_compiler.allocation.plan import Plan
from mixllm_compiler.errors import VerifyError
from mixllm_compiler.lowering.cpp import isa
from mixllm_compiler.passes.pipeline import OWN_PASSES
from mixllm_compiler.passes.registry import unregister_pass
from mixllm_compiler.runtime import records
from tests.helpers import LlamaBlock, activations, compiled, mlp, refusal

X = activations(2, 5)
NAMES = [p.name for p in OWN_PASSES]


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def dumped(tmp_path, model=None, **options):
    compiled(model or LlamaBlock(), dump=tmp_path / "dump", **options)(X)
    (folder,) = (tmp_path / "dump").iterdir()
    return folder


# -- dumps ---------------------------------------------------------------------------------------


def test_a_dump_has_the_graph_before_and_after_every_pass(tmp_path):
    folder = dumped(tmp_path)
    stems = [f"{i:02d}-{name}" for i, name in enumerate(["captured", *NAMES])]
    assert {p.name for p in folder.glob("*.py")} == {f"{stem}.py" for stem in stems}
    assert {p.name for p in folder.glob("*.diff")} == {f"{stem}.diff" for stem in stems[1:]}


def test_dumped_graphs_are_python_a_person_reads(tmp_path):
    folder = dumped(tmp_path)
    for path in folder.glob("*.py"):
        compile(path.read_text(), str(path), "exec")
    text = (folder / "08-share-quantizers.py").read_text()
    assert "# rms_norm: 3 readers share one group/128 quantizer" in text
    assert "    # self_attn.q_proj\n" in text
    assert "'k128 w4:128 g128 asym plain.v1'" in text
    assert "# after share-quantizers · 7 of 7 linears quantized" in text


def test_a_diff_shows_what_one_pass_did(tmp_path):
    folder = dumped(tmp_path)
    diff = (folder / "08-share-quantizers.diff").read_text()
    gone = [line for line in diff.splitlines() if line.startswith("-    quantize_activation")]
    assert len(gone) == 3
    assert not [line for line in diff.splitlines() if line.startswith("+    quantize_activation")]


def test_a_dump_has_the_plan_and_a_summary(tmp_path):
    folder = dumped(tmp_path, widths=(4, 8), bits=5, tile=1)
    plan = Plan.load(folder / "plan.safetensors")
    assert 4.97 < plan.true_bits <= 5
    assert plan.summary() + "\n" == (folder / "plan.txt").read_text()
    summary = (folder / "summary.txt").read_text()
    assert summary.startswith("mixllm: 7 linears, ")
    for name in ("self_attn.q_proj", "mlp.down_proj", *NAMES):
        assert name in summary
    sources = {path.name: path.read_text() for path in (folder / "kernels").iterdir()}
    assert len(sources) == 2
    assert all(name.startswith("cpp.v1-") and "mixllm_" in text for name, text in sources.items())


def test_every_graph_has_a_folder_of_its_own(tmp_path):
    run = compiled(mlp(), dump=tmp_path)
    run(X), run(activations(3, 7))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_users_pass_is_dumped_in_its_place(tmp_path):
    register_pass(after="rotate-inputs", name="look")(lambda gm: None)
    try:
        folder = dumped(tmp_path, mlp())
    finally:
        unregister_pass("look")
    assert (folder / "04-look.py").exists()


def test_what_was_dumped_before_a_pass_failed_stays(tmp_path):
    @register_pass(after="rotate-inputs")
    def fail(gm):
        raise ValueError("something is wrong")

    try:
        refusal(compiled(mlp(), dump=tmp_path), X)
    finally:
        unregister_pass("fail")
    (folder,) = tmp_path.iterdir()
    assert (folder / "03-rotate-inputs.py").exists()


# -- logs and traces -----------------------------------------------------------------------------


def test_every_pass_logs_its_changes_and_time(caplog):
    with caplog.at_level(logging.INFO, "mixllm_compiler"):
        compiled(LlamaBlock())(X)
    messages = [r.message for r in caplog.records if r.name == "mixllm_compiler.passes"]
    assert [m.partition(":")[0] for m in messages] == NAMES
    assert messages[NAMES.index("share-quantizers")].startswith("share-quantizers: 2 changes in ")


def test_debug_logs_show_reasons_and_graphs(caplog):
    with caplog.at_level(logging.DEBUG, "mixllm_compiler.passes"):
        compiled(LlamaBlock(), exclude="*.o_proj")(X)
    assert "annotate-linears: self_attn.o_proj: excluded by '*.o_proj'" in caplog.text
    assert "after rewrite-linears\n# after rewrite-linears" in caplog.text


def test_every_pass_leaves_a_trace_artifact(monkeypatch):
    seen = {}
    monkeypatch.setattr(compat, "trace_artifact", lambda name, text: seen.update({name: text()}))
    compiled(mlp())(X)
    assert list(seen) == [f"mixllm_{name}" for name in NAMES]
    assert "mixllm.mixed_gemm(" in seen["mixllm_rewrite-linears"]


def test_a_trace_artifact_is_what_torch_writes(monkeypatch):
    """The real thing, into torch's own structured trace."""
    lines = []
    logger = logging.getLogger("torch.__trace")

    class Collect(logging.Handler):
        def emit(self, record):
            if getattr(record, "metadata", {}).get("artifact", {}).get("name") == "mixllm_test":
                lines.append(record.payload)

    handler = Collect()
    logger.addHandler(handler)
    try:
        compat.trace_artifact("mixllm_test", lambda: "the graph")
    finally:
        logger.removeHandler(handler)
    assert lines == ["the graph"]


def test_the_summary_line_is_printed_once_per_model(capsys):
    run = compiled(mlp(), quiet=False)
    run(X), run(activations(3, 7))
    lines = [line for line in capsys.readouterr().err.splitlines() if "linears" in line]
    assert len(lines) == 1
    assert lines[0].startswith("mixllm: 2 linears, 4.22 true bits (asked 4.40 bits), ")


def test_a_quiet_run_prints_nothing(capsys):
    compiled(mlp())(X)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


# -- records -------------------------------------------------------------------------------------


def test_a_record_says_what_became_of_every_linear():
    with records.collect() as graphs:
        compiled(LlamaBlock(), exclude="*.o_proj", widths=(8,), bits=9)(X)
    (graph,) = graphs
    by_name = {line.name: line for line in graph.linears}
    assert by_name["self_attn.o_proj"].kept_float == "excluded by '*.o_proj'"
    line = by_name["mlp.up_proj"]
    assert (line.n, line.k, line.rows, line.kernel) == (
        256,
        128,
        {8: 256},
        f"cpp.v1 {isa.current().name}",
    )
    assert line.true_bits == 8 + 16 / 128 + 4 / 128  # codes, one fp16 scale a group, the width
    assert graph.headline().endswith("1 kept float")
    assert [name for name, *_ in graph.passes] == NAMES
    assert all(seconds >= 0 for *_, seconds in graph.passes)


def test_records_name_the_model():
    model = LlamaBlock()
    with records.collect() as graphs:
        compiled(model)(X)
    assert graphs[0].root() is model


# -- verification --------------------------------------------------------------------------------


def test_a_pass_that_breaks_the_graph_is_named():
    @register_pass(after="quantize-weights")
    class ForgetTheRewrite(Pass):
        name = "forget-the-rewrite"
        ensures = {"rewritten"}

        def run(self, graph, ctx):
            return None

    try:
        error = refusal(compiled(mlp()), X)
    finally:
        unregister_pass("forget-the-rewrite")
    assert isinstance(error, VerifyError)
    assert str(error).startswith(
        "after forget-the-rewrite (0): a linear of the plan is still float"
    )
