"""Which instruction set kernels use, and how one asks for another."""

from __future__ import annotations

import pytest

from mixllm_compiler.errors import LoweringError, OptionError
from mixllm_compiler.lowering.cpp import isa
from mixllm_compiler.lowering.cpp.generate import linear_source, quantizer_source
from mixllm_compiler.lowering.cpp.kernels import Scheme

EVERYTHING = frozenset().union(*(one.needs for one in isa.ISAS.values()))


@pytest.fixture(autouse=True)
def forget():
    isa._chosen.cache_clear()
    yield
    isa._chosen.cache_clear()


@pytest.mark.parametrize(
    "flags, best",
    [
        (EVERYTHING, "avx512-vnni"),
        (EVERYTHING - {"avx512_vnni"}, "avx-vnni"),
        (EVERYTHING - {"avx512_vnni", "avx_vnni"}, "avx2"),
        (frozenset({"sse2"}), "plain"),
        (frozenset(), "plain"),
    ],
)
def test_the_best_that_the_cpu_has_is_taken(flags, best, monkeypatch):
    monkeypatch.delenv(isa.OVERRIDE, raising=False)
    monkeypatch.setattr(isa, "cpu_flags", lambda: flags)
    assert isa.current().name == best


def test_the_environment_names_another(monkeypatch):
    monkeypatch.setenv(isa.OVERRIDE, "plain")
    assert isa.current().name == "plain"


def test_what_the_cpu_lacks_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(isa, "cpu_flags", lambda: isa.ISAS["avx2"].needs)
    monkeypatch.setenv(isa.OVERRIDE, "avx-vnni")
    with pytest.raises(LoweringError, match="MIXLLM_ISA=avx-vnni: this CPU lacks avx_vnni"):
        isa.current()


def test_an_unknown_one_names_the_nearest(monkeypatch):
    monkeypatch.setenv(isa.OVERRIDE, "avx512")
    with pytest.raises(OptionError, match="MIXLLM_ISA=avx512 is no instruction set"):
        isa.current()


def test_no_flag_makes_code_for_the_machine_that_compiles():
    for one in isa.ISAS.values():
        assert not [flag for flag in one.flags if "native" in flag or "march" in flag]


@pytest.mark.parametrize("name", isa.ISAS)
def test_the_same_scheme_gives_the_same_source(name):
    one, scheme = isa.ISAS[name], Scheme("two-level", "token")
    assert linear_source(scheme, one) == linear_source(scheme, one)
    assert linear_source(scheme, one) != linear_source(Scheme("asym", "token"), one)
    assert name in quantizer_source(one)
