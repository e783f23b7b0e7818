"""Generated C++ kernels for CPUs, built once with the system's compiler.

Importing this package builds nothing; the first selection or call does.
"""

from . import layout as layout  # registers the packing
