"""The few calls of the CUDA driver that launches need, through ctypes: any installation has them.

Kernels of a library belong to no context, so one load serves all devices of a process.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_int, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import LoweringError

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CLUSTER, _PROGRAMMATIC = 4, 6  # CU_LAUNCH_ATTRIBUTE_…
_DEVICE_SHARED_OPTIN = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN


class _Attribute(ctypes.Structure):
    _fields_ = [("id", c_int), ("pad", c_int), ("value", c_uint * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared", c_uint),
        ("stream", c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", c_uint),
    ]


class TensorMap(ctypes.Structure):
    """CUtensorMap: 128 bytes."""

    _fields_ = [("words", c_uint64 * 16)]


@functools.cache
def _library() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise LoweringError(f"the CUDA driver cannot be loaded: {error}") from error


def _check(result: int, what: str) -> None:
    if result:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(result, ctypes.byref(text))
        words = (text.value or b"unknown error").decode()
        raise LoweringError(f"CUDA could not {what}: {words} (error {result})")


@dataclass(frozen=True)
class Kernel:
    """A function of a loaded library."""

    handle: c_void_p
    name: str

    def allow_shared(self, device: int, size: int) -> None:
        """Permit so many bytes of dynamic shared memory.

        Raises:
            LoweringError: the device has less.
        """
        if not size:
            return
        limit = shared_limit(device)
        if size > limit:
            raise LoweringError(
                f"{self.name} needs {size} bytes of shared memory; device {device} has {limit}"
            )
        _check(
            _library().cuKernelSetAttribute(
                c_int(_MAX_DYNAMIC_SHARED), c_int(size), self.handle, c_int(device)
            ),
            f"give {self.name} {size} bytes of shared memory",
        )

    def launch(
        self,
        grid: int,
        block: int,
        shared: int,
        stream: int,
        arguments: Sequence[Any],
        cluster: int = 1,
        programmatic: bool = False,
    ) -> None:
        """Launch on a stream.

        Args:
            grid, block: CTAs and threads of one.
            shared: bytes of dynamic shared memory.
            stream: its handle.
            arguments: ctypes values, in the kernel's order.
            cluster: CTAs of a cluster.
            programmatic: may begin before the stream's previous kernel has ended; the kernel waits
                itself.

        Raises:
            LoweringError: the driver refused.
        """
        attributes = (_Attribute * 2)()
        count = 0
        if cluster > 1:
            attributes[count].id = _CLUSTER
            attributes[count].value[0] = cluster
            attributes[count].value[1] = attributes[count].value[2] = 1
            count += 1
        if programmatic:
            attributes[count].id = _PROGRAMMATIC
            attributes[count].value[0] = 1
            count += 1
        config = _Config(
            (c_uint * 3)(grid, 1, 1), (c_uint * 3)(block, 1, 1), shared, stream, attributes, count
        )
        pointers = (c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        _check(
            _library().cuLaunchKernelEx(ctypes.byref(config), self.handle, pointers, None),
            f"launch {self.name} with {grid} CTAs of {block} threads and {shared} bytes",
        )


def load(path: Path, name: str) -> Kernel:
    """The function `name` of a file of machine code; it stays loaded.

    Raises:
        LoweringError: the driver refused the code.
    """
    library, kernel = c_void_p(), c_void_p()
    code = path.read_bytes()
    _check(
        _library().cuLibraryLoadData(ctypes.byref(library), code, None, None, 0, None, None, 0),
        f"load {path}",
    )
    _check(
        _library().cuLibraryGetKernel(ctypes.byref(kernel), library, name.encode()),
        f"find {name} in {path}",
    )
    return Kernel(kernel, f"{path.name}:{name}")


@functools.cache
def shared_limit(device: int) -> int:
    """Bytes of shared memory that one CTA may have on a device."""
    found = c_int()
    _check(
        _library().cuDeviceGetAttribute(
            ctypes.byref(found), c_int(_DEVICE_SHARED_OPTIN), c_int(device)
        ),
        "ask for the shared memory of a device",
    )
    return found.value


def token_map(address: int, rows: int, columns: int, box_rows: int) -> TensorMap:
    """Tensor map of int8 [rows, columns]: boxes of `box_rows` × 128 bytes, 128-byte swizzle.

    Raises:
        LoweringError: the driver refused; the address must be a multiple of 16.
    """
    memory = (ctypes.c_char * (ctypes.sizeof(TensorMap) + 64))()
    made = TensorMap.from_buffer(memory, -ctypes.addressof(memory) % 64)
    _check(
        _library().cuTensorMapEncodeTiled(
            ctypes.byref(made),
            c_int(0),  # u8
            c_uint(2),
            c_void_p(address),
            (c_uint64 * 2)(columns, rows),
            (c_uint64 * 1)(columns),
            (c_uint * 2)(128, box_rows),
            (c_uint * 2)(1, 1),
            c_int(0),  # no interleave
            c_int(3),  # swizzle of 128 bytes
            c_int(2),  # L2 promotion to 128 bytes
            c_int(0),  # zeros outside
        ),
        f"make a tensor map of int8 [{rows}, {columns}]",
    )
    return made
