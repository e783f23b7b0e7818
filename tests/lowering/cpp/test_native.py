"""Ops in C++ give what the lowered ops give, and stand in graphs that leave the compiler."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mixllm_compiler.formats.layout import Layout, pack
from mixllm_compiler.ir import reference
from mixllm_compiler.lowering.cpp import layout as panels
from mixllm_compiler.lowering.cpp import native
from mixllm_compiler.lowering.cpp.kernels import Scheme
from mixllm_compiler.lowering.lowered import LOWERED_LINEAR, LOWERED_QUANTIZE
from tests.helpers import compiled, mlp
from tests.lowering.cases import ALL_WIDTHS, mix, random_weight
from tests.models.support import handed_over

DTYPES = list(native.OUTPUTS)


def arguments(layout: Layout, dtype: torch.dtype) -> tuple[int, ...]:
    widths = sum(1 << b for b, _ in layout.widths)
    two_level = int(layout.family == "two-level")
    sizes = (layout.n, layout.groups, layout.group, panels.panel_count(layout), widths)
    return (*sizes, two_level, native.OUTPUTS.index(dtype))


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["asym", "two-level"])
@pytest.mark.parametrize("mode", ["token", "group"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [None, *DTYPES])
def test_linear(family, mode, dtype, bias):
    assert native.load(Scheme(family, mode))
    weight = random_weight(130, 200, mix(130, ALL_WIDTHS), 64, family)
    packed = pack(weight, "panels64.v1")
    b = None if bias is None else torch.randn(130).to(bias)
    for lead in ((), (1,), (2, 3), (0,)):
        codes = reference.quantize_activation(torch.randn(*lead, 200), mode, 64)
        y = native.NATIVE_LINEAR(*codes, packed.blob, b, *arguments(packed.layout, dtype))
        expected = LOWERED_LINEAR(*codes, packed.blob, b, str(packed.layout), dtype, "cpp.v1")
        same([y], [expected])


@pytest.mark.parametrize("mode", ["token", "group"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [0, 32])
def test_quantizer_of_any_strides(mode, dtype, block):
    assert native.load(Scheme("asym", mode))
    x = torch.randn(4, 6, 96).to(dtype)
    wide = torch.randn(3, 200).to(dtype)
    shown = [
        x,
        x.transpose(0, 1),
        x[:, ::2],
        x[0],
        x[0, 0],
        x[:0],
        wide[:, 4:100],
        wide[:, ::2][:, :96],
    ]
    shown += [x.permute(2, 0, 1).contiguous().permute(1, 2, 0), x[:1].expand(5, 6, 96)]
    for one in shown:
        found = native.NATIVE_QUANTIZE(one, 32, int(mode == "group"), block)
        same(found, LOWERED_QUANTIZE(one, mode, 32, block, "cpp.v1"))


def test_arguments_that_do_not_fit_are_refused():
    assert native.load(Scheme("asym", "token"))
    packed = pack(random_weight(64, 128, mix(64, (4,)), 64), "panels64.v1")
    codes, scales, sums = reference.quantize_activation(torch.randn(2, 192), "token", 64)
    rest = (packed.blob, None, *arguments(packed.layout, torch.float32))
    with pytest.raises(RuntimeError, match="codes or sums do not fit the layout"):
        native.NATIVE_LINEAR(codes, scales, sums, *rest)
    with pytest.raises(RuntimeError, match="not contiguous"):
        native.NATIVE_LINEAR(codes[:, ::2], scales, sums, *rest)
    with pytest.raises(RuntimeError, match="is not fp32, bf16 or fp16"):
        native.NATIVE_QUANTIZE(torch.randn(2, 64).double(), 64, 0, 0)


def test_the_ops_are_well_behaved():
    assert native.load(Scheme("two-level", "token"))
    packed = pack(random_weight(70, 130, mix(70, (4, 8)), 64, "two-level"), "panels64.v1")
    codes = reference.quantize_activation(torch.randn(2, 3, 130), "token", 64)
    linear = (*codes, packed.blob, torch.randn(70), *arguments(packed.layout, torch.float32))
    checks = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    torch.library.opcheck(native.NATIVE_LINEAR, linear, test_utils=checks)
    torch.library.opcheck(
        native.NATIVE_QUANTIZE, (torch.randn(2, 3, 130), 64, 0, 0), test_utils=checks
    )


@pytest.mark.parametrize("options", [{}, {"family": "two-level", "rotate": 128}])
@torch.no_grad()
def test_graphs_that_leave_the_compiler_have_them(options, monkeypatch):
    model, x = mlp(), torch.randn(3, 128)
    linears = sum(isinstance(module, nn.Linear) for module in model.modules())
    with handed_over() as graphs:
        found = compiled(model, **options)(x)
    targets = [node.target for node in graphs[0].module.graph.nodes]
    assert targets.count(native.NATIVE_LINEAR) == linears
    assert native.NATIVE_QUANTIZE in targets
    assert not {LOWERED_LINEAR, LOWERED_QUANTIZE} & set(targets)
    monkeypatch.setattr(native, "_registered", lambda: None)
    torch._dynamo.reset()
    with handed_over() as graphs:
        assert torch.equal(compiled(model, **options)(x), found)
    assert native.NATIVE_LINEAR not in [node.target for node in graphs[0].module.graph.nodes]
