"""`PackedLinear` runs eagerly and is captured into the very ops that it calls."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import mixllm_compiler
from mixllm_compiler import PackedLinear, modules
from mixllm_compiler.errors import OptionError
from mixllm_compiler.ir import ops
from mixllm_compiler.lowering.cpp import support as cpp_support
from mixllm_compiler.quantizers.rtn import quantize_rtn
from mixllm_compiler.runtime import records
from mixllm_compiler.runtime.weights import CACHE
from tests.helpers import EAGER, activations, oracle_linear, token_ids
from tests.models.support import build, handed_over, linear_modules, mixed_ops, plan_of

IDS = token_ids(2, 40)
WIDTHS = torch.tensor([4, 8, 3, 4] * 24, dtype=torch.uint8)
REFERENCE = EAGER | {"kernels": "reference"}
MODES = pytest.mark.parametrize("mode", ["group", "token"])


def linear(k: int = 200) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(k, len(WIDTHS))


def packed(mode: str = "group", k: int = 200, transform: str = "") -> PackedLinear:
    weight = linear(k).weight.detach()
    return PackedLinear(quantize_rtn(weight, WIDTHS, transform=transform), linear(k).bias, mode)


def defined(module: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    """By the semantic ops alone."""
    layout, turned = module.layout, x
    if module.rotation:
        turned = ops.HADAMARD(x, module.rotation)
    activation = ops.QUANTIZE_ACTIVATION(turned, module.mode, module.group)
    acc = ops.MIXED_GEMM(*activation, module.packed, layout)
    return ops.DEQUANTIZE(acc, *activation[1:], module.packed, layout, module.bias, x.dtype)


def two_level(k: int = 384, seed: int = 3) -> PackedLinear:
    torch.manual_seed(seed)
    rows = torch.tensor([2, 3, 4, 5, 6, 8], dtype=torch.uint8).repeat(17)[:101]
    weight = quantize_rtn(torch.randn(101, k), rows, 128, "hadamard:128", "two-level")
    return PackedLinear(weight, torch.randn(101), "token").eval()


def kernels_of(module: PackedLinear) -> set[str]:
    return {choice.lowering for choice in modules._CHOICES[module].values()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eagerly_it_runs_the_kernels_to_the_last_bit_of_the_definition(dtype):
    module = two_level()
    for lead in ((), (1,), (2, 5), (70,), (0,)):
        x = activations(*lead, k=384).to(dtype)
        y = module(x)
        assert y.dtype == dtype and y.shape == (*lead, 101)
        assert torch.equal(y, defined(module, x))
    assert kernels_of(module) == {"cpp"}


def test_where_there_are_no_kernels_it_runs_the_definition(monkeypatch):
    module, x = two_level(), activations(3, k=384)
    monkeypatch.setattr(cpp_support, "_build_problem", lambda scheme: "there is no compiler")
    assert torch.equal(module(x), defined(module, x))
    assert kernels_of(module) == {"reference"}


def test_a_blob_is_laid_out_once_and_again_when_it_changes():
    module, x = two_level(), activations(3, k=384)
    before = CACHE.packs
    for _ in range(3):
        module(x)
    assert CACHE.packs == before + 1
    other = two_level(seed=4)
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(x), defined(other, x))
    assert CACHE.packs == before + 2


def copied(module: PackedLinear) -> PackedLinear:
    return copy.deepcopy(module)


def pickled(module: PackedLinear) -> PackedLinear:
    return pickle.loads(pickle.dumps(module))


def saved(module: PackedLinear) -> PackedLinear:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def moved(module: PackedLinear) -> PackedLinear:
    """To a device without values and back to one with them."""
    state = module.state_dict()
    twin = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize("way", [copied, pickled, saved, moved])
def test_a_module_that_ran_goes_through(way):
    module, x = two_level(), activations(3, k=384)
    expected = module(x)
    twin = way(module)
    assert twin.state_dict().keys() == module.state_dict().keys() == {"packed", "bias"}
    assert torch.equal(twin(x), expected)
    assert kernels_of(twin) == {"cpp"}


def test_tracers_see_the_semantic_ops():
    module = two_level()
    module(activations(3, k=384))
    found = torch.export.export(module, (activations(3, k=384),))
    assert "mixllm.mixed_gemm" in str(found.graph)
    assert module.to("meta")(activations(3, k=384).to("meta")).is_meta


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_computes_the_formula(mode, dtype):
    x = activations(2, 5, k=200).to(dtype)
    float_linear = linear()
    expected = oracle_linear(x, float_linear.weight, float_linear.bias, WIDTHS, mode)
    found = packed(mode)(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)


@MODES
@pytest.mark.parametrize("transform", ["", "hadamard:64"])
def test_captured_it_gives_the_same_bits_as_eagerly(mode, transform):
    module = packed(mode, k=256, transform=transform).eval()
    x = activations(3, 7, k=256)
    with torch.no_grad(), records.collect() as graphs:
        found = torch.compile(module, backend="mixllm", options=REFERENCE)(x)
    assert torch.equal(found, defined(module, x))
    assert [line.kernel for line in graphs[0].linears] == ["reference"]


@MODES
@pytest.mark.parametrize("transform", ["", "hadamard:64"])
def test_captured_for_native_kernels_it_gives_the_same_numbers(mode, transform):
    module = packed(mode, k=256, transform=transform).eval()
    x = activations(3, 7, k=256)
    with torch.no_grad(), records.collect() as graphs:
        found = torch.compile(module, backend="mixllm", options=EAGER | {"kernels": "cpp"})(x)
    assert torch.equal(found, module(x))
    torch.testing.assert_close(found, defined(module, x), rtol=1e-6, atol=1e-5)
    assert [line.kernel.split()[0] for line in graphs[0].linears] == ["cpp.v1"]


def test_under_autocast_it_returns_what_a_linear_would():
    x = activations(5, k=200)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed()(x).dtype == linear()(x).dtype == torch.bfloat16


def test_its_matrix_comes_back_in_the_neutral_form():
    expected = quantize_rtn(linear().weight.detach(), WIDTHS)
    found = packed().quantized_weight()
    assert torch.equal(found.widths, expected.widths)
    assert torch.equal(found.dequantize(), expected.dequantize())
    assert found.true_bytes() == expected.true_bytes()


def test_an_unknown_mode_is_refused():
    with pytest.raises(OptionError, match="unknown activation mode 'row'"):
        packed("row")


def test_moving_to_another_dtype_leaves_codes_and_scales_alone():
    module = packed()
    blob = module.packed.clone()
    assert torch.equal(module.to(torch.bfloat16).packed, blob)
    assert module.bias.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def quantized():
    model = build("qwen2")
    return mixllm_compiler.quantize(model, plan_of(model, IDS))


@torch.no_grad()
def test_a_quantized_model_is_captured_into_the_same_ops(quantized):
    expected = quantized(IDS).logits
    modules = {n for n, m in quantized.named_modules() if isinstance(m, PackedLinear)}
    for options in (EAGER, REFERENCE):
        torch._dynamo.reset()
        with handed_over() as graphs:
            found = torch.compile(quantized, backend="mixllm", options=options)(IDS).logits
        assert modules == mixed_ops(graphs[0]).keys() and len(modules) == 14
        torch.testing.assert_close(found, expected)
    assert torch.equal(found, expected)


def test_no_float_weight_of_a_quantized_linear_is_left(quantized):
    assert not linear_modules(quantized)
    sizes = [p.numel() for p in quantized.parameters() if p.dim() == 2]
    assert sizes == [96 * 128]  # the embedding, which the head shares


@torch.no_grad()
def test_a_state_dict_round_trips(quantized):
    expected = quantized(IDS).logits
    file = io.BytesIO()
    torch.save(quantized.state_dict(), file)
    other = copy.deepcopy(quantized)
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.zero_()
    assert not torch.equal(other.state_dict()["model.layers.0.mlp.up_proj.packed"], blob(quantized))
    file.seek(0)
    assert other.load_state_dict(torch.load(file)).missing_keys == []
    restore_unsaved_buffers(other, quantized)
    assert torch.equal(other(IDS).logits, expected)


def blob(model: nn.Module) -> torch.Tensor:
    return model.get_submodule("model.layers.0.mlp.up_proj").packed


def restore_unsaved_buffers(model: nn.Module, source: nn.Module) -> None:
    """Rotary frequencies are in no state dict."""
    saved, buffers = model.state_dict(), dict(source.named_buffers())
    for name, buffer in model.named_buffers():
        if name not in saved:
            buffer.copy_(buffers[name])


@torch.no_grad()
def test_a_quantized_model_generates(quantized):
    ask = {"attention_mask": torch.ones_like(IDS), "do_sample": False, "max_new_tokens": 6}
    expected = quantized.generate(IDS, **ask)
    compiled = copy.deepcopy(quantized)
    compiled.forward = torch.compile(compiled.forward, backend="mixllm", options=EAGER)
    with records.collect() as graphs:
        assert torch.equal(compiled.generate(IDS, **ask), expected)
    assert len(graphs) >= 2
