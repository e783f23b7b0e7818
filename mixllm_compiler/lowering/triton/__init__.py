"""Generated Triton kernels: portable over NVIDIA GPUs from sm_80 on, and run by its interpreter.

Importing this package does not import Triton; `launch` and `aot` do.
"""

from . import layout as layout  # registers the packing
