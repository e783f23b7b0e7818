"""Verbs that load a model, on a tiny one without a tokenizer and on the shipped one."""

from __future__ import annotations

import pytest

from tests.helpers import causal_lm

FEW = ("--sequences", 2, "--length", 32)
LINEARS = 2 * 7  # two layers of q, k, v, o, gate, up, down


def test_inspect_counts_what_would_be_quantized(answer, tiny_model):
    found = answer("inspect", tiny_model)
    assert found["quantized"] == LINEARS
    reasons = {line["name"]: line["float"] for line in found["linears"] if line["float"]}
    assert reasons == {"lm_head": "the output head (quantize it with lm_head=True)"}
    assert found["unseen"] == [] and found["graph_breaks"] == []


def test_inspect_knows_the_size_at_a_budget(answer, tiny_model):
    found = answer("inspect", tiny_model, "--bits", 8)
    saved = found["weights"] * (32 - 8) / 8
    assert found["bytes"] - found["bytes_at_bits"] == saved


def test_inspect_takes_exclusions(answer, tiny_model):
    found = answer("inspect", tiny_model, "--exclude", "*.layers.0.*", "--lm-head")
    assert found["quantized"] == LINEARS // 2 + 1


def test_inspect_lists_alike_matrices_in_one_line(mixllm, tiny_model):
    shown = mixllm("inspect", tiny_model).stdout
    assert shown.count("q_proj") == 1
    assert mixllm("inspect", tiny_model, "--all").stdout.count("q_proj") == 2


def test_inspect_fails_where_nothing_would_be_quantized(mixllm, tiny_model):
    result = mixllm("inspect", tiny_model, "--group", 512)
    assert result.exit_code == 1
    assert "0 of 15 linears" in result.stdout
    assert "smaller than a group of 512" in result.stdout


def test_a_mistyped_pattern_is_refused(mixllm, tiny_model):
    result = mixllm("inspect", tiny_model, "--exclude", "*.layer.0.*")
    assert result.exit_code == 1
    assert "matches none" in result.stderr


def test_score_then_plan_then_explain(answer, mixllm, tiny_model):
    scored = answer("score", tiny_model, *FEW)
    assert scored["sequences"] == 2 and len(scored["matrices"]) == LINEARS
    planned = answer("plan", "scores.safetensors", "--bits", 4.6, "--tile", 1)
    assert 4.55 < planned["true_bits"] <= 4.6
    (graph,) = answer("explain", tiny_model, "--plan", "plan.safetensors")["graphs"]
    quantized = [line for line in graph["linears"] if not line["float"]]
    assert graph["plan"] == planned["digest"]
    assert {line["name"]: line["true_bits"] for line in quantized} == pytest.approx(
        {name: site["true_bits"] for name, site in planned["matrices"].items()}
    )


def test_a_plan_by_bytes_and_one_by_what_it_may_lose(answer, mixllm, tiny_model):
    answer("score", tiny_model, *FEW, "--widths", "3,4,5,8")
    tiles = "--tile", 32, "--window", 64, "--no-siblings", "--tp", 2, "--formats-per-layer", 2
    planned = answer("plan", "scores.safetensors", "--bits", 4.6, *tiles)
    assert all(len(site["rows"]) <= 2 for site in planned["matrices"].values())
    assert all(n % 32 == 0 for site in planned["matrices"].values() for n in site["rows"].values())
    same = answer("plan", "scores.safetensors", "--bytes", planned["true_bytes"], *tiles)
    assert same["digest"] == planned["digest"]
    rule = "--constant", 2, "--floor", 0.001
    kl = 2 * planned["predicted_loss"] + 0.001
    by_kl = answer("plan", "scores.safetensors", "--kl", kl, *rule, *tiles)
    assert by_kl["predicted_kl"] <= kl
    assert by_kl["true_bytes"] <= 1.02 * planned["true_bytes"]
    result = mixllm("plan", "scores.safetensors", "--kl", 1, "--bits", 4.4)
    assert result.exit_code == 1 and "give the budget as bits or as kl, not both" in result.stderr


def test_a_plan_of_rotated_scores_is_rotated(answer, tiny_model):
    answer("score", tiny_model, *FEW, "--rotate", 64)
    planned = answer("plan", "scores.safetensors")
    assert (planned["rotation"], planned["activation_mode"]) == (64, "token")


def test_a_budget_that_no_plan_meets_is_refused(mixllm, answer, tiny_model):
    answer("score", tiny_model, *FEW)
    result = mixllm("plan", "scores.safetensors", "--bits", 2)
    assert result.exit_code == 1
    assert "cannot be met" in result.stderr


def test_compile_dumps_every_pass(answer, mixllm, tiny_model, tmp_path):
    found = answer("compile", tiny_model, *FEW, "--bits", 4.6, "--lower", "eager", "--dump", "ir")
    assert len([line for line in found["graphs"][0]["linears"] if not line["float"]]) == LINEARS
    (graph,) = (tmp_path / "ir").iterdir()
    steps = sorted(path.stem for path in graph.glob("*.py"))
    assert steps[0] == "00-captured" and steps[-1].endswith("pack-weights")
    # Before kernels are chosen: on a GPU, its own ops stand in the last file.
    (rewritten,) = graph.glob("*-rewrite-linears.py")
    assert "mixllm.mixed_gemm" in rewritten.read_text()
    assert (graph / "summary.txt").is_file() and (graph / "plan.safetensors").is_file()


def test_compile_says_what_became_of_the_linears(mixllm, tiny_model):
    shown = mixllm("compile", tiny_model, *FEW, "--lower", "eager").stdout
    assert "14 linears, 4." in shown and "true bits (asked 4.40 bits)" in shown
    assert "the output head" in shown


def test_compile_quantizes_layer_by_layer(answer, tiny_model):
    best = ("--family", "two-level", "--rotate", 32, "--quantizer", "gptq")
    found = answer("compile", tiny_model, *FEW, *best, "--bits", 5, "--lower", "eager")
    linears = [line for line in found["graphs"][0]["linears"] if not line["float"]]
    assert len(linears) == LINEARS


def test_a_prompt_needs_a_tokenizer(mixllm, tiny_model):
    result = mixllm("compile", tiny_model, "--prompt", "The river")
    assert result.exit_code == 1
    assert "no tokenizer" in result.stderr


def test_a_plan_for_another_model_is_refused(mixllm, answer, tiny_model):
    answer("score", "demo", *FEW)
    answer("plan", "scores.safetensors")
    result = mixllm("compile", tiny_model, "--plan", "plan.safetensors", "--lower", "eager")
    assert result.exit_code == 1
    assert "another model" in result.stderr and "Traceback" not in result.stderr


def test_generate_writes_text(answer):
    found = answer("generate", "demo", *FEW, "--lower", "eager", "--prompt", "The river", "-n", 6)
    assert found["text"].startswith("The river")
    assert found["tokens"] == 6 and found["true_bits"] <= 4.4


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--widths", "four"), "no list of bits"),
        (("--pin", "*.down_proj"), "PATTERN=BITS"),
        (("--lower", "inducter"), "Did you mean 'inductor'?"),
        (("--device", "tpux"), "unknown device"),
        (("--dtype", "float8"), "unknown dtype"),
        (("--data", "missing.txt"), "no calibration file"),
    ],
)
def test_a_wrong_value_is_explained(mixllm, tiny_model, arguments, said):
    result = mixllm("compile", tiny_model, *arguments)
    assert result.exit_code == 1
    assert said in result.stderr and "Traceback" not in result.stderr


def test_a_folder_without_a_model_is_named(mixllm, tmp_path):
    result = mixllm("inspect", tmp_path)
    assert result.exit_code == 1
    assert "config.json" in result.stderr


def test_inspect_counts_the_bytes_of_all_experts(mixllm, tmp_path):
    causal_lm("mixtral").save_pretrained(tmp_path / "moe")
    shown = mixllm("inspect", tmp_path / "moe").stdout
    (line,) = [line for line in shown.splitlines() if "gate_up_proj" in line]
    experts, layers = 8, 2
    assert f"{layers * experts * 512 * 128 * 4 / 1e6:.2f}" in line
    assert f" {layers * experts} " in line and "quantized" in line
