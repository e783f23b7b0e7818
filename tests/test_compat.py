"""Every private name of torch that capture needs is there, and says so if it is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mixllm_compiler import compat
from tests.helpers import activations, compiled, mlp, refusal


@pytest.fixture(autouse=True)
def _forget_the_self_test():
    compat.self_test.cache_clear()
    yield
    compat.self_test.cache_clear()


def test_this_torch_has_all_of_them():
    compat.self_test()


def test_a_name_that_moved_is_named(monkeypatch):
    monkeypatch.delattr("torch._dynamo.guards.install_guard")
    with pytest.raises(compat.IncompatibleTorch) as error:
        compat.self_test()
    assert "relies on torch._dynamo.guards.install_guard" in str(error.value)
    assert torch.__version__ in str(error.value)


def test_the_backend_asks_first(monkeypatch):
    monkeypatch.delattr("torch.fx.proxy._COPY_META_FIELDS")
    error = refusal(compiled(mlp()), activations(3))
    assert isinstance(error, compat.IncompatibleTorch)


def test_fast_products_are_exact_and_leave_the_setting_as_it_was():
    before = torch.backends.mkldnn.matmul.fp32_precision
    a, b = activations(300, k=256), activations(200, k=256, seed=2)
    with compat.fast_products():
        found = a @ b.t()
    exact = a.double() @ b.double().t()
    assert (found - exact).norm() < 1e-5 * exact.norm()
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_a_stamp_changes_with_every_write_that_can_be_seen():
    weight = nn.Parameter(torch.zeros(4))
    with torch.no_grad():
        stamps = [compat.stamp(weight)]
        weight.add_(1)
        stamps.append(compat.stamp(weight))
        weight.data = torch.ones(4)
        stamps.append(compat.stamp(weight))
        weight.data.copy_(torch.zeros(4))
    assert len(set(stamps)) == 3
    assert compat.stamp(weight) == stamps[-1]  # the one that cannot


def test_memory_that_is_used_again_does_not_look_like_the_old_weight():
    """The allocator likes to give a replaced weight's memory to the new one."""
    seen = 0
    for size in (16, 192, 4096, 24_576):
        weight = nn.Parameter(torch.ones(size))
        was, pointer, same = compat.stamp(weight), weight.data_ptr(), compat.unchanged([weight])
        assert same()
        weight.data = weight.data.half()
        # Held, so that each allocation is another one, until the freed memory is handed out again.
        held = [torch.ones(size)]
        while held[-1].data_ptr() != pointer and len(held) < 500:
            held.append(torch.ones(size))
        weight.data = held[-1]
        assert not same()
        assert compat.stamp(weight) != was
        seen += weight.data_ptr() == pointer
    if not seen:
        pytest.skip("this allocator never hands the freed memory out again")


@pytest.mark.parametrize("change", ["add_", "data", "released"])
def test_both_ways_to_compare_stamps_agree(change):
    weight = nn.Parameter(torch.ones(64))
    was, same = compat.stamp(weight), compat.unchanged([weight])
    assert compat.stamp(weight) == was and same()
    if change == "add_":
        with torch.no_grad():
            weight.add_(1)
    elif change == "data":
        weight.data = torch.ones(64)
    else:
        weight.untyped_storage().resize_(0)
    assert compat.stamp(weight) != was and not same()


def test_a_weight_that_is_gone_is_not_unchanged():
    weight = nn.Parameter(torch.ones(64))
    same = compat.unchanged([weight])
    del weight
    assert not same()


def test_an_inference_tensor_has_a_stamp():
    with torch.inference_mode():
        assert compat.stamp(torch.zeros(4))[0] is None


def test_a_released_weight_is_told_from_an_empty_one():
    weight = torch.zeros(4)
    assert not compat.is_released(weight)
    weight.untyped_storage().resize_(0)
    assert compat.is_released(weight)
    assert not compat.is_released(torch.zeros(0))
    assert not compat.is_released(torch.zeros(4, device="meta"))
