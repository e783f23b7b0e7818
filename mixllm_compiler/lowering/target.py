"""The device that kernels are chosen and generated for."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ..errors import OptionError


@dataclass(frozen=True)
class Target:
    """A device as kernels see it, with a text form: `"cuda sm_90 NVIDIA H200"`, `"cpu"`.

    Attributes:
        type: `"cpu"` or `"cuda"`.
        capability: CUDA compute capability (major, minor), None elsewhere.
        name: the product's name, empty where it does not matter. Only time depends on it.
    """

    type: str
    capability: tuple[int, int] | None = None
    name: str = ""

    @classmethod
    def of(cls, device: torch.device | str | int) -> Target:
        """The target of a torch device; `"cuda"` is the current CUDA device."""
        device = torch.device(device)
        if device.type != "cuda":
            return cls(device.type)
        return cls(
            "cuda", torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
        )

    def at_least(self, major: int, minor: int = 0) -> bool:
        """Whether this is a CUDA device of that compute capability or a newer one."""
        return self.capability is not None and self.capability >= (major, minor)

    @property
    def architecture(self) -> str:
        """`"sm_90"`, or the device's type where there is no capability."""
        if self.capability is None:
            return self.type
        return f"sm_{self.capability[0]}{self.capability[1]}"

    def __str__(self) -> str:
        if self.capability is None:
            return self.type
        return f"{self.type} {self.architecture} {self.name}".rstrip()

    @classmethod
    def parse(cls, text: str) -> Target:
        """Inverse of `str`.

        Raises:
            OptionError: the text is no target.
        """
        match = re.fullmatch(r"(\w+)(?: sm_(\d+)(\d)(?: (\S.*))?)?", text)
        if match is None:
            raise OptionError(f"{text!r} is no target; write for example 'cuda sm_90' or 'cpu'")
        if match[2] is None:
            return cls(match[1])
        return cls(match[1], (int(match[2]), int(match[3])), match[4] or "")
