from __future__ import annotations

import json

import pytest
import torch

from mixllm_compiler.errors import PlanMismatch, WeightError
from mixllm_compiler.formats.fingerprint import Fingerprint, fingerprint, match


def model(dtype=torch.float32, layers=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = {"attn.q_proj": (64, 64), "mlp.up_proj": (160, 64), "mlp.down_proj": (64, 160)}
    return {
        f"model.layers.{i}.{name}.weight": torch.randn(*shape, generator=draw).to(dtype)
        for i in range(layers)
        for name, shape in shapes.items()
    }


def renamed(weights, change):
    return {change(name): w for name, w in weights.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_it_is_a_function_of_the_values(dtype):
    a, b = fingerprint(model(dtype)), fingerprint(model(dtype))
    assert a == b and a.digest == b.digest and hash(a) == hash(b)
    assert len(a.digest) == 12


def test_it_is_the_same_in_every_process():
    weights = {"a.weight": torch.arange(128 * 96.0).view(96, 128)}
    found = fingerprint(weights).matrices["a.weight"]
    assert (found.n, found.k, found.dtype) == (96, 128, "float32")
    assert found.content == "2a7df410cea8140b"
    assert fingerprint(weights).digest == "f77b9a6eec8d"


def test_the_order_of_names_and_the_strides_do_not_matter():
    weights = model()
    backwards = dict(reversed(list(weights.items())))
    strided = {name: w.t().contiguous().t() for name, w in weights.items()}
    assert fingerprint(weights) == fingerprint(backwards) == fingerprint(strided)


@pytest.mark.parametrize("at", [(0, 0), (500, 3), (999, 767)])
def test_a_change_of_all_values_is_seen_and_samples_cover_all_columns(at):
    w = torch.randn(1000, 768)
    before = fingerprint({"w": w})
    other = w.clone()
    other[:, at[1]] += 1
    assert fingerprint({"w": other}) != before


def test_dtype_shape_name_and_tie_count():
    w = torch.zeros(4, 6)
    prints = [
        fingerprint({"a": w}),
        fingerprint({"b": w}),
        fingerprint({"a": w.half()}),
        fingerprint({"a": w.view(6, 4)}),
        fingerprint({"a": w, "b": w}),
        fingerprint({"a": w, "b": w.clone()}),
    ]
    assert len({p.digest for p in prints}) == len(prints)


def test_names_of_one_tensor_are_tied():
    w = torch.randn(8, 4)
    found = fingerprint({"embed": w, "other": torch.randn(8, 4), "head": torch.nn.Parameter(w)})
    assert found.ties == (("embed", "head"),)
    assert found.twins("head") == ("embed", "head")
    assert found.twins("other") == ("other",)


def test_halves_of_one_storage_are_not_tied():
    w = torch.randn(8, 4)
    assert fingerprint({"a": w[:4], "b": w[4:]}).ties == ()


def test_json_round_trip():
    w = torch.randn(8, 4)
    found = fingerprint({**model(), "tied": w, "to": w})
    again = Fingerprint.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    assert again.ties == found.ties
    assert list(again.matrices.items()) == list(found.matrices.items())


def test_bad_weights_are_named():
    with pytest.raises(WeightError, match=r"a\.weight is on the meta device"):
        fingerprint({"a.weight": torch.empty(2, 2, device="meta")})
    with pytest.raises(ValueError, match=r"conv\.weight has the shape \[2, 2, 2\]"):
        fingerprint({"conv.weight": torch.empty(2, 2, 2)})


def test_match_by_name():
    own = fingerprint(model())
    assert match(own, fingerprint(model())) == {name: name for name in own.matrices}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.", "language_model.model."])
def test_match_by_one_prefix_on_either_side(prefix):
    plain = fingerprint(model())
    wrapped = fingerprint(renamed(model(), lambda name: prefix + name))
    assert match(wrapped, plain) == {prefix + name: name for name in plain.matrices}
    assert match(plain, wrapped) == {name: prefix + name for name in plain.matrices}


def test_two_prefixes_are_no_match():
    weights = model()
    mixed = renamed(weights, lambda n: ("a." if ".0." in n else "b.") + n)
    with pytest.raises(PlanMismatch, match="is not in the plan"):
        match(fingerprint(mixed), fingerprint(weights))


def test_a_prefix_ends_at_a_dot():
    with pytest.raises(PlanMismatch):
        match(fingerprint({"xa": torch.ones(2, 2)}), fingerprint({"a": torch.ones(2, 2)}))


def test_another_architecture():
    own, plan = model(layers=3), model()
    own["model.layers.1.mlp.up_proj.weight"] = torch.zeros(192, 64)
    a, b = fingerprint(own), fingerprint(plan)
    with pytest.raises(PlanMismatch) as caught:
        match(a, b)
    assert str(caught.value) == (
        "this plan was made for another model.\n"
        f"  plan:  6 matrices (float32), fingerprint {b.digest}\n"
        f"  model: 9 matrices (float32), fingerprint {a.digest}\n"
        "  first difference: model.layers.1.mlp.up_proj.weight is [192, 64], the plan says "
        "[160, 64]\n"
        "Make one with mixllm_compiler.plan(mixllm_compiler.score(model, data), bits=4.4)."
    )


def test_a_missing_layer_is_named():
    two, three = fingerprint(model()), fingerprint(model(layers=3))
    with pytest.raises(PlanMismatch, match=r"layers\.2\.attn\.q_proj\.weight is not in the plan"):
        match(three, two)
    with pytest.raises(PlanMismatch, match=r"the plan has model\.layers\.2\.attn\.q_proj\.weight"):
        match(two, three)


def test_other_weights_of_the_same_architecture():
    with pytest.raises(PlanMismatch) as caught:
        match(fingerprint(model(seed=1)), fingerprint(model()))
    text = str(caught.value)
    assert text.startswith("this plan was made for other weights of the same architecture.\n")
    assert "names and shapes are equal, but 6 of 6 matrices hold other values" in text


def test_another_dtype_is_told_apart_from_other_values():
    with pytest.raises(PlanMismatch, match=r"q_proj\.weight is bfloat16, the plan says float32"):
        match(fingerprint(model(torch.bfloat16)), fingerprint(model()))


def test_a_tie_that_only_one_side_has():
    w = torch.randn(4, 4)
    tied, untied = fingerprint({"a": w, "b": w}), fingerprint({"a": w, "b": w.clone()})
    with pytest.raises(PlanMismatch, match="a and b are one tensor in the plan, not in the model"):
        match(untied, tied)
    with pytest.raises(PlanMismatch, match="a and b are one tensor in the model, not in the plan"):
        match(tied, untied)


def test_scores_are_called_scores():
    with pytest.raises(PlanMismatch) as caught:
        match(fingerprint(model(seed=1)), fingerprint(model()), what="scores")
    assert str(caught.value).startswith("these scores were made for other weights")
    assert str(caught.value).endswith("Make them with mixllm_compiler.score(model, data).")
    assert "  scores: 6 matrices" in str(caught.value)
    assert "  model:  6 matrices" in str(caught.value)


def test_a_piece_of_a_model_matches_where_that_is_allowed():
    weights = model()
    tied = torch.randn(4, 4)
    whole = fingerprint({**weights, "embed.weight": tied, "head.weight": tied})
    names = [n for n in weights if ".1." in n]
    piece = fingerprint({"_orig_mod." + n: weights[n] for n in names})
    assert match(piece, whole, subset=True) == {"_orig_mod." + n: n for n in names}
    assert match(fingerprint({"head.weight": tied}), whole, subset=True)
    with pytest.raises(PlanMismatch):
        match(piece, whole)
    with pytest.raises(PlanMismatch):
        match(whole, piece, subset=True)


def test_a_piece_that_fits_in_two_places_is_not_guessed():
    w = torch.zeros(4, 4)
    whole = fingerprint({"a.w": w, "b.w": w.clone()})
    with pytest.raises(PlanMismatch, match="2 prefixes of names fit equally well"):
        match(fingerprint({"w": w}), whole, subset=True)
