"""From semantic ops to generated kernels: specs, selection, cost, and one package a lowering.

Importing it registers the lowered ops and every packing, so that any blob can be unpacked.
"""

from . import cpp as cpp
from . import cuda as cuda
from . import lowered as lowered
from . import triton as triton
