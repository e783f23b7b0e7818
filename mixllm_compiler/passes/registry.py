"""Passes by name: the package's own, those registered by decorator, those of entry points."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, TypeVar

from ..errors import OptionError, nearest
from .base import FunctionPass, Pass

P = TypeVar("P")
ENTRY_POINT_GROUP = "mixllm.passes"


@dataclass(frozen=True)
class Registration:
    """A user's pass and its place in the default pipeline."""

    name: str
    make: Callable[..., Pass]
    after: str | None


_REGISTERED: dict[str, Registration] = {}


def register_pass(*, after: str | None = None, name: str | None = None) -> Callable[[P], P]:
    """Decorator: make a `Pass` class, or a function over a `GraphModule`, part of the pipeline.

    Args:
        after: the pass behind which it runs by default; None only makes it known by name, for
            spec text.
        name: its name; a class has its own, a function's is its `__name__` with dashes.

    Raises:
        OptionError: the name is taken by a pass of this package.
    """

    def register(target: P) -> P:
        make: Callable[..., Pass]
        if isinstance(target, type) and issubclass(target, Pass):
            registered, make = name or target.name, target
        else:
            registered = name or getattr(target, "__name__", "").replace("_", "-")
            function: Any = target
            make = functools.partial(FunctionPass, function, registered, "user")
        if not registered:
            raise OptionError(f"{target!r} has no name; give one: register_pass(name='…')")
        if registered in _own():
            raise OptionError(f"{registered!r} is a pass of mixllm-compiler; choose another name")
        _REGISTERED[registered] = Registration(registered, make, after)
        return target

    return register


def unregister_pass(name: str) -> None:
    """Forget a registered pass."""
    _REGISTERED.pop(name, None)


def registered() -> list[Registration]:
    """Users' passes in the order of registration, entry points first."""
    _load_entry_points()
    return list(_REGISTERED.values())


def make_pass(name: str, **arguments: Any) -> Pass:
    """A pass by name.

    Raises:
        OptionError: no such pass (names the nearest), or it does not take these arguments.
    """
    _load_entry_points()
    own = _own()
    make: Callable[..., Pass] | None = own.get(name)
    if make is None and name in _REGISTERED:
        make = _REGISTERED[name].make
    if make is None:
        raise OptionError(f"unknown pass {name!r}.{nearest(name, {**own, **_REGISTERED})}")
    try:
        return make(**arguments)
    except TypeError as error:
        raise OptionError(f"pass {name!r}: {error}") from error


def known_passes() -> dict[str, Callable[..., Pass]]:
    """Every pass by name."""
    _load_entry_points()
    return {**_own(), **{r.name: r.make for r in _REGISTERED.values()}}


@functools.cache
def _own() -> dict[str, type[Pass]]:
    from .pipeline import OWN_PASSES

    return {p.name: p for p in OWN_PASSES}


@functools.cache
def _load_entry_points() -> None:
    """Import `mixllm.passes` entry points once; each registers itself with the decorator."""
    for point in entry_points(group=ENTRY_POINT_GROUP):
        loaded = point.load()
        if isinstance(loaded, type) and issubclass(loaded, Pass) and loaded.name not in _REGISTERED:
            register_pass(after=getattr(loaded, "after", None))(loaded)
