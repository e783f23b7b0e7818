"""Scores taken from the captured graph equal those from per-sequence gradients of the weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import mixllm_compiler
from mixllm_compiler.errors import UnsupportedModel
from mixllm_compiler.formats.row_format import WIDTHS
from mixllm_compiler.ir.graph import MixGraph
from mixllm_compiler.options import Options
from mixllm_compiler.passes.pipeline import default_pipeline
from mixllm_compiler.runtime import records
from mixllm_compiler.salience.supervision import draw, generator_of
from mixllm_compiler.transforms.hadamard import block_for, block_hadamard, hadamard_matrix
from tests.helpers import EAGER, token_ids
from tests.models.support import build, handed_over, linear_modules
from tests.salience.brute_force import (
    OPTIONS,
    assert_scores,
    first_order_changes,
    next_token,
    scores,
)

IDS = token_ids(4, 140)  # 556 supervised tokens, enough for a gradient score
TOKENS = IDS.shape[1] - 1
PRESETS = {"fisher-sequence": "best", "paper": "paper"}


class Case(NamedTuple):
    kind: str
    model: Any
    changes: dict[str, Tensor]

    def expected(self, kind: str) -> dict[str, Tensor]:
        return scores(self.changes, kind, TOKENS)


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: module.weight for name, (module, _, _) in linear_modules(model).items()}


@pytest.fixture(scope="module", params=["llama", "gpt2", "opt", "qwen2"])
def case(request):
    kind = request.param
    model = build(kind)
    changes = first_order_changes(
        model, weights_of(model), next_token(IDS), len(IDS), transposed=kind == "gpt2"
    )
    return Case(kind, model, changes)


def losses(graph: MixGraph) -> dict[str, Tensor]:
    """What `annotate-salience` left on the matrices of a compiled graph."""
    return {m.name: m.losses for m in graph.matrices.values() if m.losses is not None}


def profiled(model: Any, *args: Any, preset: str = "best", **kwargs: Any) -> dict[str, Tensor]:
    """Scores of the first graph that `torch.compile` makes of this call."""
    # Plans are remembered by weight and options: another budget is scored anew.
    profiled.budget += 0.001
    options = {"bits": profiled.budget, "preset": preset, **OPTIONS, **EAGER}
    with handed_over() as graphs:
        torch.compile(model, backend="mixllm", options=options)(*args, **kwargs)
    return losses(graphs[0])


profiled.budget = 4.5


@pytest.mark.parametrize(
    "kind, mode",
    [
        ("fisher-sequence", torch.no_grad),
        ("fisher-sequence", torch.inference_mode),
        ("paper", torch.no_grad),
    ],
)
def test_a_compiled_graph_is_scored_like_brute_force(case, kind, mode):
    with mode():
        found = profiled(case.model, IDS, preset=PRESETS[kind], use_cache=False)
    assert_scores(found, case.expected(kind))


def test_a_model_is_scored_like_brute_force(case):
    found = mixllm_compiler.score(case.model, IDS, kind="fisher-sequence", labels="text", **OPTIONS)
    assert_scores(found.loss, case.expected("fisher-sequence"))
    assert (found.kind, found.settings["loss"]) == ("fisher-sequence", "next-token")
    assert (found.sequences, found.tokens) == (len(IDS), len(IDS) * TOKENS)


def test_batches_change_no_score():
    model = build("llama")
    for kind in ("paper", "kfac"):  # the text's labels, and drawn ones
        expected = mixllm_compiler.score(model, IDS, kind=kind)
        found = mixllm_compiler.score(model, IDS, kind=kind, batch=3)
        assert_scores(found.loss, expected.loss, 1e-5)
        assert (found.sequences, found.tokens) == (expected.sequences, expected.tokens)


def test_a_model_is_scored_inside_inference_mode():
    model = build("llama")
    expected = mixllm_compiler.score(model, IDS)
    with torch.inference_mode():
        found = mixllm_compiler.score(model, IDS.clone())
    assert all(torch.equal(found.loss[name], expected.loss[name]) for name in expected.loss)


def test_with_gradients_on_scores_are_the_same():
    model = build("llama")
    with torch.no_grad():
        expected = profiled(model, IDS, use_cache=False)
    assert_scores(profiled(model, IDS, use_cache=False), expected, 1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_padding_is_not_supervised_and_the_mask_reaches_the_model():
    model = build("llama")
    mask = torch.ones_like(IDS)
    mask[:, -10:] = 0  # 516 tokens are left, enough for a gradient score
    changes = first_order_changes(model, weights_of(model), next_token(IDS, mask), len(IDS))
    expected = scores(changes, "fisher-sequence", TOKENS - 10)
    with torch.no_grad():
        assert_scores(profiled(model, IDS, attention_mask=mask, use_cache=False), expected)


@pytest.mark.parametrize("given", [{}, {"rotate": 128, "family": "asym"}], ids=str)
def test_rotated_scores_are_gradients_through_the_rotation(given):
    """Scores of W·T with inputs x·T, from the gradients of the rotated weights themselves."""
    options = Options.parse(given)
    model = build("llama")
    found = mixllm_compiler.score(
        model, IDS, kind="fisher-sequence", labels="text", clip=False, **given
    )
    twin = build("llama")
    for module, _, k in linear_modules(twin).values():
        rotate(module, block_for(k, options.rotate))
    changes = first_order_changes(
        twin, weights_of(twin), next_token(IDS), len(IDS), options.formats
    )
    assert found.widths == WIDTHS
    assert_scores(found.loss, scores(changes, "fisher-sequence", TOKENS))


def rotate(module: Any, block: int) -> None:
    """W ← W·T, and x ← x·T by a matrix product: the module's function stays equal."""
    turn = torch.block_diag(*[hadamard_matrix(block)] * (module.in_features // block))
    with torch.no_grad():  # the transform's own arithmetic: one other code would be 4 % of a score
        module.weight.copy_(block_hadamard(module.weight, block))
    module.register_forward_pre_hook(lambda _, args: (args[0] @ turn.to(args[0].dtype),))


class Twice(nn.Module):
    """One matrix at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(96, 128)
        self.shared = nn.Linear(128, 128)
        self.head = nn.Linear(128, 96)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.shared(self.table(ids)))
        return self.head(torch.tanh(self.shared(x) + x))


def test_changes_of_a_weight_used_twice_add_up_before_they_are_squared():
    model = Twice().eval()

    def loss(twin: Any, d: int) -> Tensor:
        logits = twin(IDS[d : d + 1])[0, :-1]
        return -logits.log_softmax(-1).gather(-1, IDS[d, 1:, None]).sum()

    changes = first_order_changes(model, {"shared": model.shared.weight}, loss, len(IDS))
    with torch.no_grad():
        found = profiled(model, IDS)
    assert_scores(found, scores(changes, "fisher-sequence", TOKENS))


def sampled(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Scores of a call whose logits cover the last position only, as `generate` asks for them."""
    text = default_pipeline().spec()
    spec = text.replace("annotate-salience", "annotate-salience{kind=fisher-sequence}")
    with handed_over() as graphs, torch.no_grad(), records.collect() as found:
        options = {"pipeline": spec, "bits": 4.6, **OPTIONS, **EAGER}
        compiled = torch.compile(model, backend="mixllm", options=options)
        compiled(ids, use_cache=False, logits_to_keep=1)
    assert found[0].score == "fisher-sequence"
    return losses(graphs[0])


def test_where_logits_do_not_cover_the_ids_labels_are_drawn_from_the_model():
    model = build("llama")
    with torch.no_grad():
        likely = model(IDS, logits_to_keep=1).logits[:, -1].softmax(-1)
    labels = torch.cat(
        [draw(p[None], generator_of(p.device, 0, d))[:, None] for d, p in enumerate(likely)]
    )

    def loss(twin: Any, d: int) -> Tensor:
        logits = twin(IDS[d : d + 1], use_cache=False, logits_to_keep=1).logits
        return -logits[0, -1].log_softmax(-1)[labels[d, 0]]

    changes = first_order_changes(model, weights_of(model), loss, len(IDS))
    assert_scores(sampled(model, IDS), scores(changes, "fisher-sequence", 1))


def test_drawn_labels_are_the_same_every_time():
    first, again = (sampled(build("llama"), IDS) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_loss_over_few_tokens_gives_no_gradient_score_and_says_so():
    """A long prompt of `generate` has one logit a sequence."""
    options = {"bits": 4.6, **EAGER}
    with torch.no_grad(), records.collect() as graphs:
        compiled = torch.compile(build("llama"), backend="mixllm", options=options)
        compiled(IDS, use_cache=False, logits_to_keep=1)
    assert graphs[0].score == "weight-error"
    assert "4 tokens, fewer than the 512" in graphs[0].note


def test_without_logits_a_random_projection_of_the_output_is_scored():
    model = build("llama").model
    with torch.no_grad():
        first = profiled(model, IDS, use_cache=False)
        again = profiled(model, IDS, use_cache=False)
    assert first.keys() == linear_modules(model).keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all((loss > 0).any() for loss in first.values())


def test_the_seed_decides_the_random_projection():
    model = build("llama").model
    first, same, other = (
        mixllm_compiler.score(model, IDS[:2], seed=seed, widths=(4, 8)) for seed in (0, 0, 1)
    )
    assert first.settings["loss"] == "random projection"
    assert first.diff(same) == "" and first.diff(other) != ""
    name = next(iter(first.loss))
    assert not torch.equal(first.loss[name], other.loss[name])


def test_a_partly_quantized_model_is_refused_or_ranked_by_weight_error():
    """Quantized modules have no gradient: what lies before them would get a wrong score."""
    model = build("llama")
    scored = mixllm_compiler.score(model, IDS, kind="weight-error")
    mixllm_compiler.quantize(
        model, mixllm_compiler.plan(scored, bits=4.6, exclude=("*.0.self_attn.*",))
    )
    with pytest.raises(UnsupportedModel, match="10 linears are quantized already"):
        mixllm_compiler.score(model, IDS)
    with torch.no_grad(), records.collect() as graphs:
        torch.compile(model, backend="mixllm", options={"bits": 4.6, **EAGER})(IDS)
    assert graphs[0].score == "weight-error"
    assert "quantized already" in graphs[0].note


def test_scores_of_a_bfloat16_model_are_those_of_its_values_in_float32():
    model = build("llama", dtype=torch.bfloat16)
    wide = build("llama", dtype=torch.bfloat16).float()
    found, expected = (mixllm_compiler.score(m, IDS, **OPTIONS).loss for m in (model, wide))
    for name in expected:
        low, wanted = found[name][:, 0].log(), expected[name][:, 0].log()
        assert torch.corrcoef(torch.stack((low, wanted)))[0, 1] > 0.9, name
        assert abs(found[name].sum() / expected[name].sum() - 1) < 0.2, name


def test_profiling_writes_no_static_cache():
    from transformers import StaticCache

    model = build("llama")
    cache = StaticCache(config=model.config, max_cache_len=160)
    with torch.no_grad():
        model(IDS[:, :1], past_key_values=cache)  # the cache takes its memory on first use
    cache.reset()
    state = []

    def freeze() -> None:
        for layer in cache.layers:
            state.append(tuple(t.clone() for t in (layer.keys, layer.values)))
            state.append(int(cache.get_seq_length()))

    from mixllm_compiler import backend

    original, backend._hand_over = backend._hand_over, lambda *args: (freeze(), original(*args))[1]
    try:
        with torch.no_grad(), records.collect() as graphs:
            compiled = torch.compile(model, backend="mixllm", options={"bits": 4.6, **EAGER})
            compiled(IDS, past_key_values=cache)
    finally:
        backend._hand_over = original
    assert graphs[0].score == "fisher-sequence"  # it was profiled
    assert len(state) == 4
    for before in state:
        assert before == 0 if isinstance(before, int) else not any(t.any() for t in before)
    assert int(cache.get_seq_length()) == IDS.shape[1]  # and the compiled call wrote it once
