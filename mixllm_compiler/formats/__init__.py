"""The stored, device-neutral form of a quantized weight, and the plain blob that holds it."""

from . import plain as plain  # registers the packing that the reference kernels read
