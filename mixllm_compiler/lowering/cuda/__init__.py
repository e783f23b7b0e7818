"""Generated CUDA kernels for NVIDIA GPUs: every width of a matrix in one launch, at any M.

Importing this package needs neither CUDA nor a compiler; `compiling` and `driver` look for them.
"""

from . import layout as layout  # registers the packing
